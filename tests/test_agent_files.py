"""An agent's file: all of the agent, never half a file, nothing that runs, and a clear word about a file that is none."""

import json
import pickle
import zipfile

import pytest
import torch
from torch import nn
from torchrl.envs import Compose, TransformedEnv

import rl2_torchrl as rl2
from rl2_torchrl import AdaptiveAgent, GRUCategoricalActor, RecurrentActor, load_weights, register_part
from rl2_torchrl.agent.files import read_agent, write_agent
from rl2_torchrl.envs import BernoulliBandit, uniform_means


def bandits():
    trial = Compose(rl2.Trial(episodes=3), rl2.TaskSampler(uniform_means(3)), rl2.PreviousStep(done_at_start=1.0))
    return TransformedEnv(BernoulliBandit(3, batch_size=(2,)), trial)


def an_agent(**slots):
    return AdaptiveAgent.from_policy(RecurrentActor.from_env(bandits(), hidden_size=4, **slots), bandits())


def test_an_agent_comes_back_as_it_was(tmp_path):
    agent = an_agent()
    path = agent.save(tmp_path / "new" / "folder" / "agent.pt")
    again = AdaptiveAgent.load(path)
    torch.testing.assert_close(again.policy.state_dict(), agent.policy.state_dict(), rtol=0, atol=0)
    assert again.signature.as_json() == agent.signature.as_json()
    assert again.signature.done_at_start == 1.0
    assert [file.name for file in path.parent.iterdir()] == ["agent.pt"]


def test_weights_go_into_an_actor(tmp_path):
    path, actor = an_agent().save(tmp_path / "agent.pt"), RecurrentActor.from_env(bandits(), hidden_size=4)
    load_weights(actor, path)
    torch.testing.assert_close(actor.state_dict(), AdaptiveAgent.load(path).policy.state_dict(), rtol=0, atol=0)


def test_loading_draws_no_random_numbers(tmp_path):
    path = an_agent().save(tmp_path / "agent.pt")
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    AdaptiveAgent.load(path)
    assert torch.rand(1) == expected


@pytest.mark.parametrize(
    "load", [AdaptiveAgent.load, lambda path: load_weights(nn.Linear(2, 3), path)], ids=["agent", "weights"]
)
def test_no_file(load, tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no agent in .*agent.pt: a recipe leaves"):
        load(tmp_path / "agent.pt")


def test_weights_of_other_sizes(tmp_path):
    path, actor = an_agent().save(tmp_path / "agent.pt"), RecurrentActor.from_env(bandits(), hidden_size=5)
    before = {name: value.clone() for name, value in actor.state_dict().items()}
    with pytest.raises(ValueError, match=r"agent.pt holds the weights of another network: .*\(12, 4\).*\(15, 5\)"):
        load_weights(actor, path)
    torch.testing.assert_close(actor.state_dict(), before, rtol=0, atol=0)


class Harmful:
    """An object that would run code where a pickle is read."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def cut_short(path):
    whole = an_agent().save(path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def planted(path):
    held = torch.load(an_agent().save(path), weights_only=True)
    torch.save({**held, "weights": {**held["weights"], "more": Harmful()}}, path)


@pytest.mark.parametrize(
    "write",
    [
        cut_short,
        planted,
        lambda path: path.touch(),
        lambda path: path.write_text("something else"),
        lambda path: path.write_bytes(pickle.dumps(Harmful())),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save(an_agent().policy.state_dict(), path),
        lambda path: torch.save(
            {"format": "rl2_torchrl.agent.1", "about": "{}", "weights": {"a": 3}, "digest": ""}, path
        ),
    ],
    ids=["cut short", "planted", "empty", "text", "pickle", "tensor", "bare weights", "number"],
)
@pytest.mark.parametrize(
    "load", [AdaptiveAgent.load, lambda path: load_weights(nn.Linear(2, 3), path)], ids=["agent", "weights"]
)
def test_files_that_hold_no_agent(load, write, tmp_path):
    write(tmp_path / "agent.pt")
    with pytest.raises(
        ValueError, match=r"agent.pt cannot be read as an agent's file .*: it is cut short, or something else"
    ):
        load(tmp_path / "agent.pt")


def test_every_flipped_byte_of_a_weight_is_noticed(tmp_path):
    path = an_agent().save(tmp_path / "agent.pt")
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        weights = [entry for entry in file.infolist() if "/data/" in entry.filename]
    assert len(weights) == 6
    for entry in weights:
        # Before the data lie a header of 30 bytes, the entry's name, and padding, whose length the header ends with.
        header, padding = entry.header_offset, whole[entry.header_offset + 28 : entry.header_offset + 30]
        data = header + 30 + len(entry.filename) + int.from_bytes(padding, "little")
        place = data + entry.file_size // 2
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(ValueError, match="agent.pt is damaged: what it holds is not what was saved"):
            AdaptiveAgent.load(path)


def test_a_file_of_another_version(tmp_path):
    path = an_agent().save(tmp_path / "agent.pt")
    torch.save({**torch.load(path, weights_only=True), "format": "rl2_torchrl.agent.7"}, path)
    with pytest.raises(ValueError, match="of the format 'rl2_torchrl.agent.7', and this version of the package reads"):
        AdaptiveAgent.load(path)


def test_weights_that_are_not_the_architectures(tmp_path):
    path = an_agent().save(tmp_path / "agent.pt")
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
        own_agent().save(tmp_path / "agent.pt")
    register_part(Scaled, lambda part: {"size": part.linear.in_features, "factor": part.factor})
    register_part(Trace, lambda core: {"input_size": core.input_size})
    agent = own_agent()
    again = AdaptiveAgent.load(agent.save(tmp_path / "agent.pt"))
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
        AdaptiveAgent.load(tmp_path / "agent.pt")


def test_arguments_that_do_not_rebuild_the_part_are_noticed_at_saving(tmp_path, monkeypatch):
    from rl2_torchrl.agent import architecture

    monkeypatch.setattr(architecture, "_PARTS", dict(architecture._PARTS))
    register_part(Scaled, lambda part: {"size": 1 + part.linear.in_features, "factor": part.factor})
    register_part(Trace, lambda core: {"input_size": core.input_size})
    with pytest.raises(ValueError, match="the weights are not those of the networks"):
        own_agent().save(tmp_path / "agent.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_hook_is_no_part_of_a_file(tmp_path):
    actor = GRUCategoricalActor.from_env(bandits())
    head = next(module for module in actor.modules() if isinstance(module, rl2.Head))
    head.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="Head cannot be written to an agent's file"):
        AdaptiveAgent.from_policy(actor, bandits()).save(tmp_path / "agent.pt")


def test_what_a_file_says_is_text(tmp_path):
    about, _ = read_agent(an_agent().save(tmp_path / "agent.pt"))
    assert json.loads(json.dumps(about)) == about
    assert about["policy"]["distribution"] == "Categorical"
