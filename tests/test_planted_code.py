"""Nothing that lies in a file is run: pickles planted where checkpoints, weights, agents and reports are read."""

import os
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from runs import BATCH, HISTORY, Run, checkpoint

from recipes import compare
from rl2_torchrl import AdaptiveAgent, load_weights
from rl2_torchrl.baselines import gittins
from rl2_torchrl.history import HistoryFile
from rl2_torchrl.storage import load_tree


class Harmful:
    """An object that runs code where a pickle is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.fixture
def evil(tmp_path):
    """An object that leaves a trace where it is read from a pickle, and what looks for the trace."""
    trace = tmp_path / "code was run"
    pickle.loads(pickle.dumps(Harmful(trace)))
    assert trace.exists()
    trace.unlink()
    yield Harmful(trace)
    assert not trace.exists()


def planted_beside(folder, evil):
    for name in ("state.pickle", "other.pickle", "meta.pkl", "checkpoint-84.pickle"):
        (folder / name).write_bytes(pickle.dumps(evil))


def planted_as_checkpoint(folder, evil):
    checkpoint(folder).write_bytes(pickle.dumps(evil))


def planted_by_torch(folder, evil):
    torch.save({"state": evil}, checkpoint(folder))


def planted_as_folder(folder, evil):
    """As TorchRL's checkpoints and TensorDict's memory-mapped folders have it."""
    for sub in ("checkpoint-999", "checkpoint-999/state"):
        (folder / sub).mkdir()
        (folder / sub / "other.pickle").write_bytes(pickle.dumps(evil))
        (folder / sub / "meta.json").write_text('{"_type": "<class \'dict\'>", "shape": [], "device": "cpu"}')


def planted_as_history(folder, evil):
    (folder / HISTORY).write_bytes(pickle.dumps(evil))


PLANTED = [planted_beside, planted_as_checkpoint, planted_by_torch, planted_as_folder, planted_as_history]


@pytest.mark.parametrize("plant", PLANTED)
def test_code_planted_in_a_checkpoint_folder_is_not_run(plant, folder, evil):
    plant(folder, evil)
    assert Run(5).train(checkpoints=folder, resume=True).env_steps == 5 * BATCH


def by_pickle(evil, path):
    path.write_bytes(pickle.dumps(evil))


def by_torch(evil, path):
    torch.save({"w": evil}, path)


def loads_weights(path):
    load_weights(torch.nn.Linear(2, 3), path)


def loads_history(path):
    history, _ = HistoryFile(path).read({"size": path.stat().st_size, "sha256": "", "rows": 1})
    assert len(history) == 0
    raise ValueError("none of it could be read")


def loads_report(path):
    path.rename(path.with_name("report.json"))
    compare.history(path.parent)


def loads_agent(suffix):
    return lambda path: AdaptiveAgent.load(path.rename(path.with_suffix(suffix)))


LOADERS = {
    "checkpoint": load_tree,
    "history": loads_history,
    "weights": loads_weights,
    "agent": loads_agent(".safetensors"),
    "exported agent": loads_agent(".pt2"),
    "ONNX agent": loads_agent(".onnx"),
    "report": loads_report,
}


@pytest.mark.parametrize("plant", [by_pickle, by_torch])
@pytest.mark.parametrize("loader", LOADERS)
def test_code_planted_in_a_file_is_not_run(loader, plant, tmp_path, evil):
    if loader == "ONNX agent":
        pytest.importorskip("onnxruntime")
    plant(evil, tmp_path / "file")
    with pytest.raises(ValueError, match=r"file|none of it|codec"):
        LOADERS[loader](tmp_path / "file")


@pytest.mark.parametrize("plant", [by_pickle, by_torch, lambda evil, path: os.truncate(path, 100)])
def test_a_table_in_the_cache_that_cannot_be_trusted_is_made_anew(plant, tmp_path, evil, monkeypatch):
    (tmp_path / "cache").mkdir()
    monkeypatch.setattr(gittins, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setattr(gittins, "TABLE_PULLS", 5)
    gittins._stored_table.cache_clear()
    table = gittins._stored_table(3, 0.5)
    (path,) = (tmp_path / "cache").iterdir()
    whole = path.read_bytes()
    plant(evil, path)
    gittins._stored_table.cache_clear()
    torch.testing.assert_close(gittins._stored_table(3, 0.5), table, equal_nan=True)
    gittins._stored_table.cache_clear()
    assert len(path.read_bytes()) == len(whole)


def test_no_module_reads_pickles():
    package = Path(sys.modules["rl2_torchrl"].__file__).parent
    for file in package.rglob("*.py"):
        text = file.read_text()
        for reader in (
            "pickle.load",
            "tensordict.load",
            "TensorDict.load",
            "load_memmap",
            "Checkpoint(",
            "np.load",
            "marshal",
        ):
            assert reader not in text, file
        assert len(re.findall(r"(?<!safetensors\.)torch\.load\(", text)) == text.count("weights_only=True)"), file
