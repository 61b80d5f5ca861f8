"""A recipe's command line: its ``main`` with settings that follow from what is asked, once or for each of several seeds."""

import inspect
import logging
import signal
import sys
from argparse import SUPPRESS, ArgumentError, ArgumentParser
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from functools import partial, wraps
from typing import Any

import tyro
from rich.console import Console

from recipes.cli import told_in_a_line
from recipes.help import as_typed, overview, program
from recipes.run import Run
from recipes.seeds import run_seeds
from recipes.settings import FirstWeights, Learning, Told, require_choices

__all__ = ["arguments", "command", "settings_by", "typed"]

log = logging.getLogger(__name__)

#: Exit status of a training that Ctrl-C has ended, as a shell has it.
CUT_SHORT = 128 + signal.SIGINT
#: What only a training takes, of a recipe's own arguments and of `Run`.
OF_TRAINING = ("belief", "stop_at_goal", "workers", "backend", "logger")


def settings_by(rule: Callable[..., dict[str, Any]]) -> Callable[[Callable], Callable]:
    """Decorates a recipe's ``main``: the settings that a caller leaves out are those that ``rule`` gives for what was asked.

    ``rule(**asked)`` has some of ``main``'s arguments, all with defaults, and returns settings for others.
    """

    def decorate(main: Callable) -> Callable:
        @wraps(main)
        def with_settings(**given: Any) -> Any:
            require_choices(main, given)
            return main(**{**rule(**_asked(rule, given)), **given})

        with_settings.rule = rule
        return with_settings

    return decorate


def _asked(rule: Callable, given: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the arguments ``given`` that ``rule`` takes."""
    return {name: given[name] for name in inspect.signature(rule).parameters if name in given}


def arguments(main: Callable, options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a recipe's ``main`` from flat ``options``, as its command line takes them: ``units=8`` goes to its network.

    Raises:
        TypeError: ``main`` has no such option.
    """
    filled, unknown = {}, dict(options)
    rule = getattr(main, "rule", None)
    by_rule = rule(**_asked(rule, options)) if rule else {}
    for name, parameter in inspect.signature(main).parameters.items():
        default = by_rule.get(name, parameter.default)
        if is_dataclass(default):
            names = [each.name for each in fields(default) if each.name in unknown]
            filled[name] = replace(default, **{key: unknown.pop(key) for key in names})
        elif name in unknown or name in by_rule:
            filled[name] = unknown.pop(name, default)
    if unknown:
        raise TypeError(f"{main.__module__} has no options {sorted(unknown)}; see its --help.")
    return filled


@told_in_a_line()
def command(main: Callable) -> Any:
    """Runs a recipe's ``main`` as a command, once or for each of its ``--seeds``.

    This package's INFO lines are shown, TorchRL's are not. Where its settings follow from a rule, they are those for the
    arguments on the command line, and ``--help`` shows them: all on one screen, ``--help-all`` each with what it is.

    Raises:
        SystemExit: Ctrl-C has ended the training, with the status `CUT_SHORT`, after what there is was saved and reported; or what
            was asked is wrong, as `told_in_a_line` says it.
    """
    logging.basicConfig(format="%(message)s")
    logging.getLogger("rl2_torchrl").setLevel(logging.INFO)
    logging.getLogger("torchrl").setLevel(logging.WARNING)
    rule, main = getattr(main, "rule", None), inspect.unwrap(main)

    @wraps(main)
    def once_or_for_each_seed(*, run: Run, **others: Any) -> Any:
        if run.seeds:
            return run_seeds(program(), run.seeds, run.log_dir, sys.argv[1:])
        if "--seeds" in words:
            raise ValueError("--seeds names no seed: give some, such as --seeds 0 1 2, or leave it out.")
        played = run.weights is not None
        given = {**others, "run": run}
        if played and (unused := _changed(given, defaults, FirstWeights, Learning, Told, names=OF_TRAINING)):
            log.warning("%s is played, not trained. Of no effect: %s.", run.weights, ", ".join(unused))
        unused = _changed(others, defaults, FirstWeights)
        if run.goes_on and (unused := [*unused, *["--initial-weights"] * (run.initial_weights is not None)]):
            log.warning("%s goes on from its checkpoint. Of no effect any more: %s.", run.log_dir, ", ".join(unused))
        elif run.initial_weights is not None and unused:
            log.warning("The training begins with %s. Of no effect: %s.", run.initial_weights, ", ".join(unused))
        report = main(run=run, **others)
        if getattr(getattr(report, "train", None), "interrupted", False):
            sys.exit(CUT_SHORT)  # or a script would go on with what comes next
        return report

    words = ["--help" if word == "--help-all" else word for word in sys.argv[1:]]
    asked = {} if rule is None else typed(rule, words)
    settings = {} if rule is None else rule(**asked)
    defaults = {name: settings.get(name, each.default) for name, each in inspect.signature(main).parameters.items()}
    _require_own_names(main, defaults)
    if {"-h", "--help"}.intersection(sys.argv[1:]):
        Console(highlight=False).print(overview(main, {**asked, **settings}, as_typed()), markup=False, soft_wrap=True)
        sys.exit()
    with_settings = partial(once_or_for_each_seed, **settings)
    return tyro.cli(with_settings, prog=as_typed(), args=words, config=(tyro.conf.OmitArgPrefixes,))


def _require_own_names(main: Callable, defaults: Mapping[str, Any]) -> None:
    """Raises TypeError where an argument of ``main`` has the name of a setting that recipes share, as one of two would be lost."""
    shared = {each.name for group in defaults.values() if is_dataclass(group) for each in fields(group)}
    if clashing := sorted(shared.intersection(defaults)):
        raise TypeError(
            f"main in {main.__module__} has arguments {clashing}, which are shared settings: name them otherwise."
        )


def _changed(
    given: Mapping[str, Any], defaults: Mapping[str, Any], *kinds: type, names: Sequence[str] = ()
) -> list[str]:
    """Those settings in groups of these ``kinds``, or of these ``names``, that differ from their defaults, as they are typed."""
    changed = []
    for key, value in given.items():
        if is_dataclass(value):
            chosen = [each.name for each in fields(value) if isinstance(value, kinds) or each.name in names]
            changed += [name for name in chosen if getattr(value, name) != getattr(defaults[key], name)]
        elif key in names and value != defaults[key]:
            changed.append(key)
    return [f"--{name.replace('_', '-')}" for name in changed]


def typed(rule: Callable, words: Sequence[str]) -> dict[str, Any]:
    """The arguments of ``rule`` that stand among the ``words`` of a command line; if one is wrong, none: its parser will say so."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False, argument_default=SUPPRESS, exit_on_error=False)
    for name, parameter in inspect.signature(rule).parameters.items():
        parser.add_argument(*dict.fromkeys([f"--{name.replace('_', '-')}", f"--{name}"]), type=type(parameter.default))
    try:
        return vars(parser.parse_known_args(words)[0])
    except ArgumentError:
        return {}
