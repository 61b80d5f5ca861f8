"""What `RL2PPOLoss` is built of, looked at before it is built."""

from collections.abc import Iterable, Mapping
from inspect import signature

from tensordict.nn import TensorDictModuleBase
from torch import nn
from torchrl.objectives import ClipPPOLoss, PPOLoss

from rl2_torchrl.arguments import require_flags, require_numbers
from rl2_torchrl.gradients.networks import leaves_of
from rl2_torchrl.modules.actor_critic import hidden_keys
from rl2_torchrl.objectives.belief import TaskBelief

__all__ = ["checked_terms", "require_options"]


def checked_terms(
    terms: Iterable[nn.Module], actor: TensorDictModuleBase, critic: TensorDictModuleBase | None
) -> list[nn.Module]:
    """``terms`` as a list.

    Raises:
        TypeError: one of them is none.
        ValueError: one reads what both networks write, unless it is one module's that both run, or a `TaskBelief` a memory.
    """
    if isinstance(terms, nn.Module) and not isinstance(terms, nn.ModuleList):
        raise TypeError(f"terms={type(terms).__name__}(...) is one term: give a list, [{type(terms).__name__}(...)].")
    leaves = [[] if network is None else leaves_of(network) for network in (actor, critic)]
    ours, theirs = ({key: leaf for leaf in each for key in leaf.out_keys} for each in leaves)
    memory = {key for network in (actor, critic) if network is not None for key in hidden_keys(network)}
    terms = list(terms)
    for term in terms:
        name = type(term).__name__
        if isinstance(term, type):
            raise TypeError(f"{term.__name__} is a class and no loss term: give one of its objects, {term.__name__}().")
        keys = getattr(term, "in_keys", "")
        if not isinstance(term, nn.Module) or isinstance(keys, str):
            raise TypeError(f"{name} is no loss term, a module with in_keys: help(rl2_torchrl.objectives.terms).")
        if strangers := [key for key in keys if not isinstance(key, str | tuple)]:
            raise TypeError(f"{name}.in_keys holds {strangers}: entries' names are texts or tuples of them.")
        if twice := [key for key in keys if key in ours and ours[key] is not theirs.get(key, ours[key])]:
            raise ValueError(
                f"{name} reads {twice}, which actor and critic both write, the critic last: rename one (features_key=...)."
            )
        if isinstance(term, TaskBelief) and keys[0] in memory:
            raise ValueError(
                f"TaskBelief reads {keys[0]!r}, the memory as it was collected: name what a network writes, such as actor_features."
            )
    return terms


def require_options(clip_epsilon, critic_coeff, entropy_coeff, options: Mapping[str, object]) -> None:
    """Raises unless ``options`` are `ClipPPOLoss`'s, and clip and weights numbers of the range in which they mean something."""
    known = {**signature(PPOLoss.__init__).parameters, **signature(ClipPPOLoss.__init__).parameters}
    if unknown := sorted(options.keys() - known.keys()):
        there = sorted({"terms", *known} - {"self", "kwargs"})
        raise TypeError(f"RL2PPOLoss has no options {unknown}, and would train without them: there are {there}.")
    if isinstance(bonus := options["entropy_bonus"], float):
        raise TypeError(f"entropy_bonus={bonus} is neither True nor False: its weight is entropy_coeff={bonus}.")
    require_flags(**{name: value for name, value in options.items() if isinstance(known[name].default, bool)})
    bounds = clip_epsilon if isinstance(clip_epsilon, (tuple, list)) else (clip_epsilon, clip_epsilon)
    if len(bounds) != 2:
        raise ValueError(f"{clip_epsilon=} has {len(bounds)} numbers: give one, or two, (low, high).")
    low, high = bounds
    require_numbers(clip_epsilon=low, critic_coeff=critic_coeff, entropy_coeff=entropy_coeff)
    if not (0 < low <= 1 and high > 0):
        raise ValueError(f"{clip_epsilon=} must lie in (0, 1]: the lowest ratio is 1 - that. Usual are 0.1 to 0.3.")
    if critic_coeff is not None and not critic_coeff >= 0:
        raise ValueError(f"{critic_coeff=}: a negative weight would drive the values away from the returns.")
    coefficients = entropy_coeff.values() if isinstance(entropy_coeff, Mapping) else [entropy_coeff]
    if any(coefficient is not None and not coefficient >= 0 for coefficient in coefficients):
        raise ValueError(f"{entropy_coeff=}: a negative weight would make the policy stop exploring.")
    if any(coefficients) and not options["entropy_bonus"]:
        raise ValueError(f"{entropy_coeff=} without a bonus weighs nothing: give entropy_bonus=True, or neither.")
