"""An agent's file: all of the agent, never half a file, nothing that runs, and a clear word about a file that is none."""

import json
import logging
import pickle
import re
from collections import OrderedDict

import gymnasium
import numpy as np
import pytest
import safetensors.torch
import torch
from gymnasium import spaces
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import remove_parametrizations
from torchrl.envs import Compose, TransformedEnv

import rl2_torchrl as rl2
from rl2_torchrl import AdaptiveAgent, GRUCategoricalActor, RecurrentActor, load_weights, register_part
from rl2_torchrl.agent.architecture import plan_of_policy
from rl2_torchrl.agent.files import read_agent, write_agent
from rl2_torchrl.envs import BernoulliBandit, GymVectorEnv, uniform_means
from rl2_torchrl.storage import save_tree


def bandits():
    trial = Compose(rl2.Trial(episodes=3), rl2.TaskSampler(uniform_means(3)), rl2.PreviousStep(done_at_start=1.0))
    return TransformedEnv(BernoulliBandit(3, batch_size=(2,)), trial)


def an_agent(**slots):
    return AdaptiveAgent.from_policy(RecurrentActor.from_env(bandits(), hidden_size=4, **slots), bandits())


def test_an_agent_comes_back_as_it_was(tmp_path):
    agent = an_agent()
    path = agent.save(tmp_path / "new" / "folder" / "agent.safetensors")
    again = AdaptiveAgent.load(path)
    torch.testing.assert_close(again.policy.state_dict(), agent.policy.state_dict(), rtol=0, atol=0)
    assert again.signature.as_json() == agent.signature.as_json()
    assert again.signature.done_at_start == 1.0
    assert [file.name for file in path.parent.iterdir()] == ["agent.safetensors"]


def test_layers_keep_their_names(tmp_path):
    layers = OrderedDict(wide=nn.Linear(5, 3), bent=nn.Tanh())
    again = AdaptiveAgent.load(an_agent(encoder=nn.Sequential(layers)).save(tmp_path / "agent.safetensors"))
    assert ["wide", "bent"] in [list(module._modules) for module in again.policy.modules()]


def test_weights_go_into_an_actor(tmp_path):
    path, actor = an_agent().save(tmp_path / "agent.safetensors"), RecurrentActor.from_env(bandits(), hidden_size=4)
    load_weights(actor, path)
    torch.testing.assert_close(actor.state_dict(), AdaptiveAgent.load(path).policy.state_dict(), rtol=0, atol=0)


def test_an_agents_policy_takes_weights_and_the_agent_none(tmp_path):
    agent, path = an_agent(), an_agent().save(tmp_path / "agent.safetensors")
    with pytest.raises(TypeError, match=r"AdaptiveAgent is no network: .* its .policy"):
        load_weights(agent, path)
    load_weights(agent.policy, path)


def test_of_an_actor_and_critic_the_actor_gets_the_weights(tmp_path):
    agent, actor = an_agent(), RecurrentActor.from_env(bandits(), hidden_size=4)
    load_weights(
        rl2.ActorCritic(actor, rl2.GRUValueHead.from_env(bandits())), agent.save(tmp_path / "agent.safetensors")
    )
    torch.testing.assert_close(actor.state_dict(), agent.policy.state_dict(), rtol=0, atol=0)


def test_loading_draws_no_random_numbers(tmp_path):
    path = an_agent().save(tmp_path / "agent.safetensors")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    AdaptiveAgent.load(path)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    "load", [AdaptiveAgent.load, lambda path: load_weights(nn.Linear(2, 3), path)], ids=["agent", "weights"]
)
def test_no_file(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="agent.safetensors is no file: a recipe leaves"):
        load(tmp_path / "agent.safetensors")
    with pytest.raises(FileNotFoundError, match="is a folder, and no agent's file: a recipe leaves"):
        load(tmp_path)


def test_weights_of_other_sizes(tmp_path):
    path, actor = an_agent().save(tmp_path / "agent.safetensors"), RecurrentActor.from_env(bandits(), hidden_size=5)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    with pytest.raises(
        ValueError,
        match=r"holds the weights of another network: [\w.]+ \(12, \d+\), here \(15, \d+\), .*\(12, 4\), here \(15, 5\), "
        r".*, and \d more. Build this one with the sizes that were saved",
    ):
        load_weights(actor, path)
    torch.testing.assert_close(actor.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("of_a_run", [True, False])
def test_weights_name_the_command_of_their_run_where_it_is_known(of_a_run, tmp_path):
    path, actor = an_agent().save(tmp_path / "agent.safetensors"), RecurrentActor.from_env(bandits(), hidden_size=5)
    if of_a_run:
        (tmp_path / "about.txt").touch()
    end = re.escape(f"; {tmp_path / 'about.txt'} has its command" * of_a_run + ").")
    with pytest.raises(ValueError, match=f"--num-cells, which may be empty, and --core{end}"):
        load_weights(actor, path)


@pytest.mark.parametrize(
    ("slots", "words"),
    [
        ({"activation": nn.Tanh}, r"part 1 .*Tanh.*, here .*ReLU"),
        ({"encoder": nn.Sequential(nn.Identity(), nn.Tanh())}, r"part 0 .*Tanh.*, here .*ReLU"),
    ],
)
def test_weights_of_other_parts_of_the_same_sizes(tmp_path, slots, words):
    path = an_agent(**slots).save(tmp_path / "agent.safetensors")
    here = {"encoder": nn.Sequential(nn.Identity(), nn.ReLU())} if "encoder" in slots else {}
    with pytest.raises(ValueError, match=f"holds the weights of another network: {words}"):
        load_weights(RecurrentActor.from_env(bandits(), hidden_size=4, **here), path)


def test_weights_of_encoders_that_read_the_same_entries_the_other_way_round(tmp_path):
    def actor(*keys, hidden_key="actor_hidden"):
        shapes = {"trans": [5], **dict.fromkeys(keys, [2])}
        encoders = dict.fromkeys(keys, rl2.MLPEncoder)
        return RecurrentActor(shapes, rl2.CategoricalActions(3), hidden_size=4, encoder=encoders, hidden_key=hidden_key)

    about = {"policy": plan_of_policy(actor("left", "right"))}
    path = write_agent(tmp_path / "agent.safetensors", about, actor("left", "right").state_dict())
    load_weights(actor("left", "right", hidden_key="mine"), path)
    load_weights(actor("l", "r"), path)  # by other names, which may be the same
    with pytest.raises(
        ValueError, match=r"another network: entries read \['\"left\"', '\"right\"', .*\], here \['\"right\"'"
    ):
        load_weights(actor("right", "left"), path)


def test_of_parts_that_are_not_known_the_sizes_alone_are_compared(tmp_path, caplog):
    class Unknown(nn.Tanh):
        pass

    path = an_agent(activation=nn.Tanh).save(tmp_path / "agent.safetensors")
    with caplog.at_level(logging.INFO):
        load_weights(RecurrentActor.from_env(bandits(), hidden_size=4, activation=Unknown), path)
    assert "only sizes are compared" in caplog.text


class Harmful:
    """An object that would run code where a pickle is read."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def cut_short(path):
    whole = an_agent().save(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "write",
    [
        cut_short,
        lambda path: path.touch(),
        lambda path: path.write_text("something else"),
        lambda path: path.write_bytes(pickle.dumps(Harmful())),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save(an_agent().policy.state_dict(), path),
        lambda path: torch.save({"format": "rl2_torchrl.agent.1", "about": {}, "weights": {"a": Harmful()}}, path),
        lambda path: safetensors.torch.save_file(an_agent().policy.state_dict(), path),
    ],
    ids=["cut short", "empty", "text", "pickle", "tensor", "bare weights", "planted", "safetensors"],
)
@pytest.mark.parametrize(
    "load", [AdaptiveAgent.load, lambda path: load_weights(nn.Linear(2, 3), path)], ids=["agent", "weights"]
)
def test_files_that_hold_no_agent(load, write, tmp_path):
    write(tmp_path / "agent.safetensors")
    with pytest.raises(
        ValueError,
        match=r"agent.safetensors is cut short, .*An agent was to be read from it: copy it once more, or save it anew",
    ):
        load(tmp_path / "agent.safetensors")


def test_every_flipped_byte_is_noticed(tmp_path):
    path = an_agent().save(tmp_path / "agent.safetensors")
    whole = path.read_bytes()
    for place in range(0, len(whole), len(whole) // 50):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="agent.safetensors is cut short"):
            AdaptiveAgent.load(path)


@pytest.mark.parametrize("held", [{"format": "rl2_torchrl.agent.7"}, {"weights": torch.zeros(1)}, [1]])
def test_a_file_of_another_kind_or_version(held, tmp_path):
    save_tree(held, tmp_path / "agent.safetensors")
    with pytest.raises(ValueError, match=r"is of the format .*; an agent's, for this version of the package, is"):
        AdaptiveAgent.load(tmp_path / "agent.safetensors")


def test_a_checkpoint_is_no_agent(tmp_path):
    save_tree({"format": 4}, tmp_path / "checkpoint-7")
    with pytest.raises(ValueError, match=r"format 4; .*whole run.*resume=True.*from_policy"):
        AdaptiveAgent.load(tmp_path / "checkpoint-7")


def test_weights_that_are_not_the_architectures(tmp_path):
    path = an_agent().save(tmp_path / "agent.safetensors")
    about, weights = read_agent(path)
    weights.popitem()
    with pytest.raises(ValueError, match="the weights are not those of the networks that the file describes"):
        AdaptiveAgent.load(write_agent(path, about, weights))


# --------------------------------------------------------------- parts of one's own
class Scaled(nn.Module):
    """An encoder of a user's own."""

    def __init__(self, size, factor):
        super().__init__()
        self.linear, self.factor = nn.Linear(size, 3), factor

    def forward(self, x):
        return self.factor * self.linear(x)


class Trace(rl2.RecurrentCore):
    """A core of a user's own."""

    def __init__(self, input_size, decay=0.5, **keys):
        super().__init__(input_size, {"trace": (input_size,)}, input_size=input_size, **keys)
        self.decay = nn.Parameter(torch.tensor(decay))

    def step(self, x, trace):
        trace = self.decay * trace + x
        return trace, trace


def own_agent():
    return AdaptiveAgent.from_policy(
        RecurrentActor.from_env(bandits(), encoder=lambda shape: Scaled(shape[0], 2.0), core=Trace), bandits()
    )


def test_parts_that_are_not_known(tmp_path, monkeypatch):
    from rl2_torchrl.agent import architecture

    monkeypatch.setattr(architecture, "_PARTS", dict(architecture._PARTS))
    with pytest.raises(TypeError, match="Scaled cannot be written .*register_part"):
        own_agent().save(tmp_path / "agent.safetensors")
    register_part(Scaled, lambda part: {"size": part.linear.in_features, "factor": part.factor})
    register_part(Trace, lambda core: {"input_size": core.input_size})
    agent = own_agent()
    again = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    actions = []
    for each in (agent, again):
        torch.manual_seed(0)
        each.new_trial(5)
        actions.append([])
        for _ in range(10):
            actions[-1].append(each.act().tolist())
            each.observe(torch.arange(5.0))
    assert actions[0] == actions[1]
    monkeypatch.delitem(architecture._PARTS, "Trace")
    with pytest.raises(ValueError, match="has a part 'Trace', which this program does not know: call register_part"):
        AdaptiveAgent.load(tmp_path / "agent.safetensors")


def of_the_name(name, base):
    return type(name, (base,), {"__module__": __name__, "__qualname__": name})


@pytest.mark.parametrize(
    ("name", "base", "register"),
    [
        ("Head", nn.Module, lambda cls: register_part(cls, dict)),
        ("Categorical", torch.distributions.Categorical, lambda cls: rl2.register_distribution(cls, dict)),
    ],
)
def test_a_class_that_has_the_name_of_one_that_is_known(name, base, register, monkeypatch):
    from rl2_torchrl.agent import architecture
    from rl2_torchrl.modules import distributions

    monkeypatch.setattr(architecture, "_PARTS", dict(architecture._PARTS))
    monkeypatch.setattr(distributions, "_KNOWN", dict(distributions._KNOWN))
    with pytest.raises(ValueError, match=rf"test_agent_files.{name} has the name of .*\.{name}, which is known"):
        register(of_the_name(name, base))
    for _ in range(2):  # a notebook's cell is run twice
        register(of_the_name("Own", base))
    AdaptiveAgent.from_policy(RecurrentActor.from_env(bandits()), bandits())


class Activated(nn.Module):
    """An encoder of a user's own with an argument that the package's have too: here it is a module, or a name."""

    def __init__(self, size, activation):
        super().__init__()
        self.linear, self.activation = nn.Linear(size, 3), activation

    def forward(self, x):
        return self.linear(x).tanh() if self.activation == "tanh" else self.activation(self.linear(x))


@pytest.mark.parametrize("activation", ["tanh", nn.Tanh()])
def test_an_argument_of_ones_own_may_be_called_activation(tmp_path, monkeypatch, activation):
    from rl2_torchrl.agent import architecture

    monkeypatch.setattr(architecture, "_PARTS", dict(architecture._PARTS))
    register_part(Activated, lambda part: {"size": part.linear.in_features, "activation": part.activation})
    agent = an_agent(encoder=lambda shape: Activated(shape[0], activation))
    again = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    for each in (agent, again):
        each.new_trial()
        each.act(deterministic=True)
    torch.testing.assert_close(again.memory, agent.memory, rtol=0, atol=0)


class Counting(Scaled):
    """An encoder that keeps more than tensors, and whose size is one of NumPy's numbers."""

    seen = 0

    def get_extra_state(self):
        return {"seen": self.seen}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_a_part_with_extra_state_and_numbers_of_numpy(tmp_path, monkeypatch):
    from rl2_torchrl.agent import architecture

    monkeypatch.setattr(architecture, "_PARTS", dict(architecture._PARTS))
    register_part(Counting, lambda part: {"size": np.int64(part.linear.in_features), "factor": np.float32(part.factor)})
    actor = RecurrentActor.from_env(bandits(), encoder=lambda shape: Counting(shape[0], 2.0))
    agent = AdaptiveAgent.from_policy(actor, bandits())
    next(part for part in agent.policy.modules() if isinstance(part, Counting)).seen = 3
    path = agent.save(tmp_path / "agent.safetensors")
    load_weights(actor, path)
    for policy in (AdaptiveAgent.load(path).policy, actor):
        assert next(part for part in policy.modules() if isinstance(part, Counting)).seen == 3


def test_arguments_that_do_not_rebuild_the_part_are_noticed_at_saving(tmp_path, monkeypatch):
    from rl2_torchrl.agent import architecture

    monkeypatch.setattr(architecture, "_PARTS", dict(architecture._PARTS))
    register_part(Scaled, lambda part: {"size": 1 + part.linear.in_features, "factor": part.factor})
    register_part(Trace, lambda core: {"input_size": core.input_size})
    with pytest.raises(ValueError, match="the weights are not those of the networks"):
        own_agent().save(tmp_path / "agent.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_hook_is_no_part_of_a_file(tmp_path):
    actor = GRUCategoricalActor.from_env(bandits())
    head = next(module for module in actor.modules() if isinstance(module, rl2.Head))
    head.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="Head cannot be written to an agent's file"):
        AdaptiveAgent.from_policy(actor, bandits()).save(tmp_path / "agent.safetensors")


def test_weights_that_are_made_of_others_are_made_plain_before_they_are_saved(tmp_path):
    actor = GRUCategoricalActor.from_env(bandits())
    linear = next(module for module in actor.modules() if isinstance(module, nn.Linear))
    weight_norm(linear)
    with pytest.raises(ValueError, match="parametrizations.weight"):
        AdaptiveAgent.from_policy(actor, bandits()).save(tmp_path / "agent.safetensors")
    remove_parametrizations(linear, "weight")
    AdaptiveAgent.from_policy(actor, bandits()).save(tmp_path / "agent.safetensors")


def test_what_a_file_says_is_text(tmp_path):
    about, _ = read_agent(an_agent().save(tmp_path / "agent.safetensors"))
    assert json.loads(json.dumps(about)) == about
    assert about["policy"]["distribution"] == "Categorical"


@pytest.mark.parametrize("scale", [True, False])
def test_images_are_given_as_they_were(scale, tmp_path):
    image = spaces.Box(0, 255, (4, 4, 3), np.uint8)
    env = TransformedEnv(GymVectorEnv(lambda: Seen(image), 2), Compose(rl2.Trial(episodes=2), rl2.PreviousStep()))
    register_part(Reals, lambda part: {"size": part.linear.in_features})
    encoder = rl2.modules.ImageEncoder(Reals(48), image.shape, scale=scale)
    agent = AdaptiveAgent.from_policy(
        RecurrentActor.from_env(env, encoder={"observation": encoder}, init_range=1.0), env
    )
    again = AdaptiveAgent.load(agent.save(tmp_path / "agent.safetensors"))
    acted = []
    for each in (agent, again):
        each.new_trial()
        acted.append(each.step.policy.module[0].module[0].module(torch.full((1, 4, 4, 3), 200, dtype=torch.uint8)))
    assert torch.equal(*acted)


class Reals(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.linear = nn.Linear(size, 4)

    def forward(self, images):
        return self.linear(images.flatten(1).float())


class Seen(gymnasium.Env):
    action_space = spaces.Discrete(3)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, True, False, {}
