"""The public names: listed once, documented with an example and shapes; and the one direction of the imports."""

import ast
import doctest
import importlib
import inspect
import pkgutil
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from torch import nn
from torchrl.envs import EnvBase

import rl2_torchrl
from rl2_torchrl import envs
from rl2_torchrl.envs import LocomotionEnv

PACKAGE = Path(rl2_torchrl.__file__).parent
PUBLIC = ["rl2_torchrl", "rl2_torchrl.envs", "rl2_torchrl.baselines", "rl2_torchrl.testing", "rl2_torchrl.video"]
NAMES = [(module, name) for module in PUBLIC for name in importlib.import_module(module).__all__]

# Names without an example of their own, and why.
NO_EXAMPLE = {
    "TaskDistribution": "an alias of a type, which cannot have a docstring; a comment and TaskSampler say what it is",
    "TrainResult": "plain data, returned by train",
    "GridSearch": "plain data, returned by grid_search, whose example shows it",
    "train": "the README's recipe by hand is its example, and a test runs it",
    "TrialContractError": "raised by check_trial_env, whose example shows it",
    "TensorEnvError": "raised by check_tensor_env, whose example shows it",
    "TrainingCheckError": "raised by check_training, whose example shows it",
    "TrainingReport": "plain data, returned by check_training",
    "Description": "returned by describe, whose example shows it",
}

# Every part of the package, from the ground up: a part imports from its own layer and from those before it.
LAYERS = [
    {"arguments", "codec", "history", "interrupts", "locks", "logs", "quiet", "requirements", "storage"},
    {"baselines", "callbacks", "envs", "kernels", "progress", "seeding", "tasks", "transition", "trial"},
    {"gradients"},
    {"modules"},
    {"agent", "learners", "minibatches", "objectives", "passes", "rollout"},
    {
        "ablations",
        "collector",
        "episode_tables",
        "evaluation",
        "env_check",
        "kept",
        "tensor_env_check",
        "testing",
        "update",
    },
    {"checkpoints", "checks", "describe", "settings", "video", "workers"},
    {"training", "training_loop"},
    {"report"},
]


def source_files():
    """Dotted name and file of every module of the package."""
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = ("rl2_torchrl", *file.relative_to(PACKAGE).with_suffix("").parts)
        yield ".".join(parts[:-1] if parts[-1] == "__init__" else parts), file


def imports(file, modules):
    """Modules of this package that ``file`` imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] in ("rl2_torchrl", "recipes"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file.name} has a relative import, which this test cannot follow"
            if node.module.split(".")[0] in ("rl2_torchrl", "recipes"):
                within = [f"{node.module}.{alias.name}" for alias in node.names]
                yield from (name if name in modules else node.module for name in within)


def graph():
    modules = dict(source_files())
    return {name: set(imports(file, modules)) for name, file in modules.items()}


def part(module):
    return module.split(".")[1] if "." in module else ""


def public(module, name):
    return getattr(importlib.import_module(module), name)


# ------------------------------------------------------------------ the list


@pytest.mark.parametrize("module", PUBLIC)
def test_the_list_is_sorted_complete_and_without_repeats(module):
    module = importlib.import_module(module)
    assert list(module.__all__) == sorted(set(module.__all__), key=lambda name: (name[0].islower(), name))
    for name in module.__all__:
        assert hasattr(module, name), name
        assert not name.startswith("_")


@pytest.mark.parametrize("module", ["rl2_torchrl", "rl2_torchrl.envs", "rl2_torchrl.baselines"])
def test_the_list_is_what_the_package_imports(module):
    module = importlib.import_module(module)
    imported, sources = set(), set()
    for node in ast.parse(Path(module.__file__).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            imported |= {alias.name for alias in node.names}
            sources.add(node.module)
    assert imported == set(module.__all__)
    # What a module lists is public here too: no name has to be looked for. (Agents share helpers among themselves.)
    for source in {source for source in sources if not source.startswith("rl2_torchrl.baselines.")}:
        assert set(importlib.import_module(source).__all__) <= imported, source


def test_the_package_says_how_its_parts_belong_together():
    for name in ("Trial", "TaskSampler", "PreviousStep", "ActorCritic", "PPOUpdate", "train", "adaptation_curve"):
        assert name in rl2_torchrl.__doc__


# --------------------------------------------------------------- documentation


@pytest.mark.parametrize(("module", "name"), [case for case in NAMES if case[1] != "TaskDistribution"])
def test_every_public_name_is_documented_with_an_example(module, name):
    doc = inspect.getdoc(public(module, name))
    # A dataclass without a docstring has its signature for one.
    assert doc
    assert not doc.startswith(f"{name}(")
    assert len(doc.splitlines()[0]) > 20
    examples = doctest.DocTestParser().get_examples(doc)
    assert bool(examples) is not (name in NO_EXAMPLE)


def test_exceptions_to_the_rule_exist():
    assert set(NO_EXAMPLE) <= {name for _, name in NAMES}


def annotations(function):
    signature = inspect.signature(function)
    return " ".join(str(p.annotation) for p in signature.parameters.values())


@pytest.mark.parametrize(("module", "name"), [case for case in NAMES if case[1] not in NO_EXAMPLE])
def test_shapes_are_said_where_tensors_go_in(module, name):
    entry = public(module, name)
    doc, types = inspect.getdoc(entry), annotations(entry)
    forward = vars(entry).get("forward", vars(entry).get("__call__")) if inspect.isclass(entry) else None
    if forward is not None:
        doc += inspect.getdoc(forward) or ""
        types += annotations(forward)
    is_network = inspect.isclass(entry) and issubclass(entry, nn.Module) and not issubclass(entry, EnvBase)
    if is_network or re.search(r"\bTensor(Dict|DictBase)?\b", types):
        assert re.search(r"``\[[\w*., -]*\]``|\bshape\b", doc)


def test_arguments_of_the_bodies_in_mujoco_are_described_once():
    arguments = inspect.getdoc(LocomotionEnv).partition("Args:")[2].partition("Raises:")[0]
    described = re.findall(r"^    (\w+): ", arguments, re.MULTILINE)
    assert ["self", *described] == list(inspect.signature(LocomotionEnv.__init__).parameters)
    bodies = [cls for _, cls in inspect.getmembers(envs, inspect.isclass) if issubclass(cls, LocomotionEnv)]
    assert len(bodies) == 5
    for cls in set(bodies) - {LocomotionEnv}:
        assert cls.__init__ is LocomotionEnv.__init__
        assert "Arguments: those of `LocomotionEnv`." in re.sub(r"\s+", " ", inspect.getdoc(cls)), cls


def annotated_functions():
    """What is called of the public names, as ``module.name`` and function: constructors, methods, functions of this package."""
    for module, name in NAMES:
        entry = public(module, name)
        members = {name: entry} if inspect.isfunction(entry) else vars(entry) if inspect.isclass(entry) else {}
        for member, value in members.items():
            function = getattr(value, "fget", None) or getattr(value, "__func__", value)
            if inspect.isfunction(function) and (not member.startswith("_") or member in ("__init__", "__call__")):
                yield f"{module}.{name}, {member}", inspect.unwrap(function)


def test_every_argument_and_return_of_public_names_has_a_type():
    # What a user's type checker reads (py.typed). `tests/typed.py` lets mypy read the README's listings.
    missing, seen = {}, 0
    for where, function in annotated_functions():
        if not Path(function.__code__.co_filename).is_relative_to(PACKAGE):
            continue  # wrapped by TorchRL, or made by dataclass
        seen += 1
        signature = inspect.signature(function)
        handed_on = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
        arguments = [p for p in list(signature.parameters.values()) if p.kind not in handed_on]
        names = [p.name for p in arguments if p.annotation is p.empty and p.name not in ("self", "cls")]
        if signature.return_annotation is signature.empty and function.__name__ != "__init__":
            names.append("return")
        if names:
            missing[where] = names
    assert missing == {}
    assert seen > 150


# -------------------------------------------------------------------- imports


def test_every_part_has_its_layer():
    assert {part(module) for module in graph()} - {""} == set().union(*LAYERS)


@pytest.mark.parametrize("layer", range(len(LAYERS)))
def test_imports_point_down(layer):
    below = set().union(*LAYERS[: layer + 1])
    for module, imported in graph().items():
        if part(module) in LAYERS[layer]:
            assert {part(name) for name in imported} <= below, module


@pytest.mark.parametrize(
    ("parts", "unknown"),
    [
        ({"envs", "tasks", "trial", "transition"}, {"modules", "objectives", "update", "training", "evaluation"}),
        ({"modules"}, {"objectives", "update", "training", "evaluation", "collector", "envs", "tasks", "trial"}),
        ({"kernels", "baselines"}, {"envs", "tasks", "trial", "transition", "modules", "training"}),
        ({"training", "training_loop"}, {"envs", "tasks", "trial", "transition", "evaluation", "report"}),
    ],
)
def test_parts_that_know_nothing_of_others(parts, unknown):
    for module, imported in graph().items():
        if part(module) in parts:
            assert not {part(name) for name in imported} & unknown, module


def test_nothing_imports_recipes_or_the_whole_package():
    for module, imported in graph().items():
        assert "rl2_torchrl" not in imported, module
        assert not any(name.split(".")[0] == "recipes" for name in imported), module


def test_no_circles():
    # Raises a CycleError, with the circle, where there is one.
    assert len(list(TopologicalSorter(graph()).static_order())) == len(graph())


@pytest.mark.parametrize(
    "name", sorted(each.name for each in pkgutil.walk_packages(rl2_torchrl.__path__, "rl2_torchrl."))
)
def test_a_module_has_what_it_says(name):
    module = importlib.import_module(name)
    assert [each for each in getattr(module, "__all__", ()) if not hasattr(module, each)] == []
