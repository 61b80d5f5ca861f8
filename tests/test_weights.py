"""Weights as files: back as they were, never half a file, and a clear word about a file that is none."""

import pickle

import pytest
import torch
from torch import nn

from rl2_torchrl import load_weights, save_weights


def test_weights_come_back_as_they_were(tmp_path):
    saved, loaded = nn.Linear(2, 3), nn.Linear(2, 3)
    path = save_weights(saved, tmp_path / "new" / "folder" / "actor.pt")
    load_weights(loaded, path)
    torch.testing.assert_close(loaded.state_dict(), saved.state_dict(), rtol=0, atol=0)
    assert [file.name for file in path.parent.iterdir()] == ["actor.pt"]


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="no weights in .*actor.pt: a recipe leaves"):
        load_weights(nn.Linear(2, 3), tmp_path / "actor.pt")


def test_other_sizes(tmp_path):
    path = save_weights(nn.Linear(2, 3), tmp_path / "actor.pt")
    module = nn.Linear(2, 4)
    before = module.weight.clone()
    with pytest.raises(ValueError, match=r"actor.pt holds the weights of another network: .*\(3, 2\).*\(4, 2\)"):
        load_weights(module, path)
    assert torch.equal(module.weight, before)


class Harmful:
    """An object that would run code where a pickle is read."""

    def __reduce__(self):
        return pytest.fail, ("a pickle was executed",)


def cut_short(path):
    whole = save_weights(nn.Linear(2, 3), path).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


@pytest.mark.parametrize(
    "write",
    [
        cut_short,
        lambda path: path.touch(),
        lambda path: path.write_text("something else"),
        lambda path: path.write_bytes(pickle.dumps(Harmful())),
        lambda path: torch.save({"weight": Harmful()}, path),
        lambda path: torch.save(torch.zeros(3), path),
        lambda path: torch.save({"weight": 3}, path),
    ],
    ids=["cut short", "empty", "text", "pickle", "object", "tensor", "number"],
)
def test_files_that_hold_no_weights(write, tmp_path):
    write(tmp_path / "actor.pt")
    with pytest.raises(
        ValueError, match=r"actor.pt cannot be read as weights .*: it is cut short or damaged, or something else"
    ):
        load_weights(nn.Linear(2, 3), tmp_path / "actor.pt")
