"""Exported agents: `torch.export` and ONNX graphs are the training's policy, memory in and memory out, over steps of trials."""

from functools import partial

import numpy as np
import pytest
import torch
from gymnasium import spaces
from tensordict import TensorDict
from test_agent import NETWORKS, Toy, bandits, make, play, targets, toys, trial_env
from torchrl.modules import set_recurrent_mode

import rl2_torchrl as rl2
from rl2_torchrl import AdaptiveAgent
from rl2_torchrl.envs import GymVectorEnv
from rl2_torchrl.modules.distributions import distribution_of

FORMS = ["pt2", "onnx"]
STEPS, ROWS = 100, 2  # five trials of the longest
CASES = {
    **{f"categorical {name}": (bandits, slots) for name, slots in NETWORKS.items()},
    **{f"gaussian {name}": (targets, NETWORKS[name]) for name in ("norm", "double")},
    **{f"toy {name}": (partial(toys, name), {"hidden_size": 8}) for name in ("image", "several", "flags", "dict")},
    "tanh": (partial(toys, "box"), {"distribution": rl2.TanhGaussianActions.from_spec}),
}
#: An export to ONNX takes seconds.
IN_ONNX = [
    *(f"categorical {name}" for name in ("gru", "lstm", "mlp")),
    *("gaussian norm", "gaussian double", "toy image", "toy several", "toy flags", "toy dict", "tanh"),
]


def exported(agent, form, folder):
    """The agent of an exported file."""
    if form == "onnx":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    path = agent.export(folder / f"agent.{form}")
    return (
        AdaptiveAgent.load(path) if form == "onnx" else AdaptiveAgent(torch.export.load(path).module(), agent.signature)
    )


def inputs(signature, steps, rows, seed=0):
    """What a step reads beside its memory, at each of some steps: trials of 20 steps at most, each row's at its own time."""
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        for each in signature.observations.values():
            number = each.number_of_choices
            shape = (rows, *each.spec.shape)
            if number is not None:
                value = (torch.rand(shape, generator=generator) * number).long() + (
                    0 if each.start is None else each.start
                )
            elif each.spec.dtype == torch.uint8:
                value = torch.randint(256, shape, generator=generator)
            else:
                value = torch.randn(shape, generator=generator)
            yield value.to(each.spec.dtype)
        yield torch.randn(rows, generator=generator)
        yield torch.rand(rows, generator=generator) < 0.3
        yield torch.tensor([step % (20 - 3 * row) == 0 for row in range(rows)])
        yield torch.randn(rows, signature.noise_size, generator=generator).to(signature.dtype)


@pytest.mark.parametrize(("name", "form"), [*((name, "pt2") for name in CASES), *((name, "onnx") for name in IN_ONNX)])
def test_steps_of_trials(name, form, tmp_path):
    make_env, slots = CASES[name]
    env = make_env(rows=ROWS)
    actor = make(env, **slots)
    agent = AdaptiveAgent.from_policy(actor, env)
    step, signature, layout = exported(agent, form, tmp_path).step, agent.signature, agent.signature.layout
    memory = [torch.zeros(ROWS, *shape, dtype=signature.dtype) for shape in signature.memory.values()]
    fed, read, written, noises = inputs(signature, STEPS, ROWS), [], [], []
    with torch.no_grad():
        for _ in range(STEPS):
            *observed, reward, done, start, noise = (next(fed) for _ in range(len(signature.observations) + 4))
            # The transition input, put together here; the last action is what the graph has handed on.
            entries = zip(signature.observations.items(), observed, strict=True)
            values = {key: each.read(value) for (key, each), value in entries}
            told = torch.cat([memory[0], reward[:, None], done[:, None].float()], -1)
            seen = layout.encode([values[key] for key in layout.observations], (ROWS,))
            at_start = torch.zeros_like(told)
            at_start[:, -1] = signature.done_at_start
            trans = torch.cat([*seen, torch.where(start[:, None], at_start, told)], -1)
            read.append(TensorDict({**values, "trans": trans.float(), "is_init": start[:, None]}, [ROWS]))
            written.append(step(*observed, reward, done, start, noise, *memory))
            memory = list(written[-1][-len(memory) :])
            noises.append(noise)
        # The training's policy, over all steps at once, as an update runs it.
        with set_recurrent_mode(True):
            td = actor.module[0](torch.stack(read, 1))
    action, *outputs = (torch.stack(each, 1) for each in zip(*written, strict=True))
    parameters = [td[key] for key in actor.module[-1].in_keys]
    assert parameters[0].std() > 0.1  # else anything would be near it
    for given, expected in zip(outputs, parameters, strict=False):
        torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5)
    # From the graph's own parameters: a tie within rounding is no difference.
    drawn = distribution_of(actor.module[-1]).with_noise(torch.stack(noises, 1), *outputs[: len(parameters)])
    drawn = signature.action.scaled(drawn)
    expected = signature.action.to_env(drawn.flatten(0, 1)).unflatten(0, (ROWS, STEPS))
    torch.testing.assert_close(action, expected, rtol=0, atol=1e-6)
    handed_on = layout.action.encode(drawn, (ROWS, STEPS))
    torch.testing.assert_close(outputs[len(parameters)], handed_on, rtol=0, atol=1e-6, check_dtype=False)


@pytest.mark.parametrize(("make_env", "form"), [(bandits, "onnx"), (targets, "pt2")], ids=["categorical", "gaussian"])
def test_same_noise_same_actions(make_env, form, tmp_path):
    agent = AdaptiveAgent.from_policy(make(make_env(), **NETWORKS["norm"]), make_env())
    expected = play(agent, make_env(), 30, seed=1)
    actions, rewards = play(exported(agent, form, tmp_path), make_env(), 30, seed=1)
    torch.testing.assert_close(actions, expected[0], rtol=0, atol=1e-5)
    torch.testing.assert_close(rewards, expected[1], rtol=0, atol=1e-4)


def test_noise_and_memory_of_an_onnx_model_may_be_of_numpys_float64(tmp_path):
    agent = AdaptiveAgent.from_policy(make(bandits(), hidden_size=8), bandits())
    again, noise = exported(agent, "onnx", tmp_path), np.random.default_rng(0).gumbel(size=(3, 4))
    for each in (agent, again):
        each.new_trial(3)
        each.act(noise=noise)
        each.observe([1.0, 0.0, 1.0])
        each.memory = [np.asarray(memory, np.float64) for memory in each.memory]
    assert np.array_equal(again.act(noise=noise), agent.act(noise=noise))


class Flags(rl2.RecurrentCore):
    """A core that remembers whether it has been paid yet, and counts its steps."""

    def __init__(self, input_size, **keys):
        super().__init__(2, {"is_poor": (1,), "count": (1,)}, input_size=input_size, **keys)
        self.gain = torch.nn.Parameter(torch.tensor(1.0))

    def initial_memory(self, num_rows):
        return torch.ones(num_rows, 1, dtype=torch.bool), torch.full((num_rows, 1), 3)

    def step(self, x, is_poor, count):
        is_poor, count = is_poor & (x[:, -2:-1] <= 0), count + 1
        return self.gain * torch.cat([is_poor, count], -1), is_poor, count


class Chooses(Flags):
    def step(self, x, is_poor, count):
        return super().step(x, torch.where(x[:, :1] > 0, is_poor, ~is_poor), count)


def test_memory_of_flags_and_counters_in_onnx(tmp_path):
    agent = AdaptiveAgent.from_policy(make(bandits(), core=Flags), bandits())
    again = exported(agent, "onnx", tmp_path)
    for each in (agent, again):
        each.new_trial(2)
        for reward in ([0.0, 1.0], [0.0, 0.0]):
            each.act(deterministic=True)
            each.observe(reward)
        each.new_trial(rows=[False, True])
        each.act(deterministic=True)
    assert again.memory[1].tolist() == [[1.0], [1.0]]
    assert again.memory[2].tolist() == [[6.0], [4.0]]
    torch.testing.assert_close(again.memory, agent.memory, rtol=0, atol=0)


def test_a_graph_that_onnxruntime_cannot_play_is_told_of_and_one_that_is_none_leaves_the_file(
    tmp_path, monkeypatch, caplog
):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    path, agent = tmp_path / "agent.onnx", AdaptiveAgent.from_policy(make(bandits(), core=Chooses), bandits())
    agent.export(path)
    assert "agent.onnx is a valid graph that onnxruntime here cannot play" in caplog.text
    assert "Where" in caplog.text
    onnx.checker.check_model(path)

    def refuse(_):
        raise onnx.checker.ValidationError("no graph")

    path.write_bytes(b"a good one")
    monkeypatch.setattr(onnx.checker, "check_model", refuse)
    with pytest.raises(ValueError, match=r"cannot be read as an ONNX model.*Where.* Export to .pt2"):
        agent.export(path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("agent.onnx", b"a good one")]


@pytest.mark.parametrize("form", ["itself", *FORMS])
def test_under_a_default_of_float64(form, tmp_path):
    torch.set_default_dtype(torch.float64)
    try:
        env = toys("several", 1)
        actor = make(env, hidden_size=8, encoder=lambda shape: torch.nn.Linear(shape[0], 4))
        agent = AdaptiveAgent.from_policy(actor, env)
        again = agent if form == "itself" else exported(agent, form, tmp_path)
    finally:
        torch.set_default_dtype(torch.float32)
    for each in (agent, again):
        each.new_trial(2)
        for _ in range(2):
            each.act([[1, 4], [3, 5]], deterministic=True)
            each.observe([1.0, 0.0])
    torch.testing.assert_close(again.memory, agent.memory)


def test_inputs_and_outputs_of_an_onnx_model_have_names(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    agent = AdaptiveAgent.from_policy(make(toys("dict", 2), **NETWORKS["lstm"]), toys("dict", 2))
    # What another program does, which has neither this package nor PyTorch.
    session = runtime.InferenceSession(agent.export(tmp_path / "agent.onnx"))
    names = [each.name for each in session.get_inputs()]
    assert names == [
        "at",
        "seen",
        "sub.x",
        "reward",
        "done",
        "start",
        "noise",
        "last_action",
        "actor_hidden",
        "actor_hidden_cell",
    ]
    memory = {"last_action": (1, 3), "actor_hidden": (1, 1, 8), "actor_hidden_cell": (1, 1, 8)}
    memory = {name: np.zeros(shape, np.float32) for name, shape in memory.items()}
    seen = {"at": np.array([2]), "seen": np.float32([[0.5, -0.5]]), "sub.x": np.float32([[0.1]])}
    told = {"reward": np.float32([0.0]), "done": np.array([False]), "start": np.array([True])}
    out = session.run(None, {**seen, **told, "noise": np.zeros((1, 3), np.float32), **memory})
    results = dict(zip([each.name for each in session.get_outputs()], out, strict=True))
    assert list(results) == ["action", "logits", *(f"next_{name}" for name in memory)]
    agent.new_trial()
    assert results["action"] == agent.act({"at": 2, "seen": [0.5, -0.5], "sub": {"x": [0.1]}}, deterministic=True)
    assert results["next_last_action"][0, results["action"][0]] == 1


def test_observations_with_the_names_of_other_tensors(tmp_path):
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    shown = spaces.Dict({name: spaces.Box(-1, 1, (2,)) for name in ("start", "last_action", "next_last_action", "loc")})
    env = trial_env(GymVectorEnv(partial(Toy, shown, spaces.Box(-1, 1, (2,))), 2))
    agent = AdaptiveAgent.from_policy(make(env, hidden_size=8), env)
    session = runtime.InferenceSession(agent.export(tmp_path / "agent.onnx"))
    inputs = [each.name for each in session.get_inputs()]
    assert inputs == agent.signature.inputs
    assert set(inputs) > {"start", "loc", *(f"observation.{name}" for name in shown if name != "loc")}
    assert [each.name for each in session.get_outputs()][:2] == ["action", "parameter.loc"]


def test_what_cannot_be_exported(tmp_path):
    env = bandits()
    agent = AdaptiveAgent.from_policy(make(env), env)
    with pytest.raises(ValueError, match=r"agent.pth'\: agents are exported to .pt2"):
        agent.export(tmp_path / "agent.pth")
    with pytest.raises(ValueError, match="onnxruntime plays no bfloat16"):
        AdaptiveAgent.from_policy(make(env, dtype=torch.bfloat16), env).export(tmp_path / "agent.onnx")
    with pytest.raises(TypeError, match="exported graph, which has no policy"):
        exported(agent, "pt2", tmp_path).save(tmp_path / "agent.safetensors")
    with pytest.raises(
        ValueError, match=rf"PyTorch reads .pt2 files by pickle.*torch.export.load\('{tmp_path}/agent.pt2'\)"
    ):
        AdaptiveAgent.load(tmp_path / "agent.pt2")


def test_onnx_models_of_others(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    (tmp_path / "agent.onnx").write_bytes(b"something else")
    with pytest.raises(ValueError, match="agent.onnx cannot be read as an ONNX model"):
        AdaptiveAgent.load(tmp_path / "agent.onnx")
    with pytest.raises(FileNotFoundError, match="no agent in .*other.onnx"):
        AdaptiveAgent.load(tmp_path / "other.onnx")
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    out = onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [1])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Relu", ["x"], ["y"])], "g", [value], [out])
    onnx.save(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9),
        tmp_path / "other.onnx",
    )
    with pytest.raises(ValueError, match="is an ONNX model, but no agent's"):
        AdaptiveAgent.load(tmp_path / "other.onnx")
