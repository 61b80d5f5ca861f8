"""An agent's step as a graph for other programs: `torch.export` (``.pt2``) and ONNX, with the memory as inputs and outputs."""

from __future__ import annotations

import importlib
import io
import logging
from collections.abc import Callable
from contextlib import redirect_stdout
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType

import numpy as np
import torch
from tensordict.nn import ProbabilisticTensorDictSequential
from torch import Tensor

from rl2_torchrl.agent.signature import Signature, name_of
from rl2_torchrl.agent.step import PolicyStep
from rl2_torchrl.arguments import needs

__all__ = ["export_policy", "onnx_step"]

log = logging.getLogger(__name__)

#: Where the signature lies in a file.
_SIGNATURE = "rl2_torchrl.signature"


def export_policy(policy: ProbabilisticTensorDictSequential, signature: Signature, path: Path) -> Path:
    """Writes one step of ``policy`` to ``path``, as its suffix says; see `AdaptiveAgent.export`."""
    if path.suffix not in (".pt2", ".onnx"):
        raise ValueError(f"path={str(path)!r}: agents are exported to .pt2 (torch.export) or .onnx.")
    if path.suffix == ".onnx" and signature.dtype == torch.bfloat16:
        raise ValueError(f"{path}: onnxruntime plays no bfloat16. Export a copy in float32, or to .pt2.")
    step = PolicyStep(policy, signature, compiled=False).eval()
    example = _example(signature)
    rows = torch.export.Dim("rows")
    program = torch.export.export(step, example, dynamic_shapes={"tensors": tuple({0: rows} for _ in example)})
    path.parent.mkdir(parents=True, exist_ok=True)
    # An agent that lies there already stays until this one is whole.
    with TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        if path.suffix == ".pt2":
            torch.export.save(program, made, extra_files={_SIGNATURE: signature.as_json()})
        else:
            _write_onnx(program, step, signature, made)
        for file in sorted(made.parent.iterdir(), reverse=True):  # large weights lie in a file of their own
            file.replace(path.with_name(file.name))
    return path


def _write_onnx(program: torch.export.ExportedProgram, step: PolicyStep, signature: Signature, path: Path) -> None:
    """Writes ``program`` to ``path``; ValueError where that is no graph, the log tells of one that onnxruntime cannot play."""
    _require("onnx", "onnxscript")
    parameters = map(name_of, step.parameter_keys)
    parameters = [f"parameter.{name}" if name in signature.inputs else name for name in parameters]
    outputs = ["action", *parameters, *(f"next_{name}" for name in signature.memory)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with redirect_stdout(io.StringIO()):  # it prints its progress
        model = torch.onnx.export(program, input_names=signature.inputs, output_names=outputs, dynamo=True)
    model.model.metadata_props[_SIGNATURE] = signature.as_json()
    model.save(path)
    if find_spec("onnxruntime") is None:
        return
    try:
        onnx_step(path)
    except ValueError as error:
        told = f"{error.__cause__}. Export to .pt2, or write what it names in other operations."
        checker = _require("onnx.checker")
        try:
            checker.check_model(path)
        except checker.ValidationError:
            raise ValueError(f"what was made cannot be read as an ONNX model, and is not written: {told}") from error
        log.warning("%s is a valid graph that onnxruntime here cannot play, as others may: %s", path.name, told)


def onnx_step(path: Path) -> tuple[Callable[..., list[Tensor]], Signature]:
    """The step of an ``.onnx`` file by onnxruntime, on one thread of the CPU, and its signature."""
    if not path.exists():
        raise FileNotFoundError(f"there is no agent in {path}.")
    runtime = _require("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1  # a step is too little to be shared
    try:
        session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # noqa: BLE001  (its errors have no class in common)
        raise ValueError(f"{path} cannot be read as an ONNX model: {error}") from error
    held = session.get_modelmeta().custom_metadata_map
    if _SIGNATURE not in held:
        raise ValueError(f"{path} is an ONNX model, but no agent's: AdaptiveAgent.export writes them.")
    names = [each.name for each in session.get_inputs()]
    signature = Signature.from_json(held[_SIGNATURE])

    def step(*tensors: Tensor) -> list[Tensor]:
        given = dict(zip(signature.inputs, (np.asarray(tensor) for tensor in tensors), strict=True))
        return [torch.from_numpy(out) for out in session.run(None, {name: given[name] for name in names})]

    return step, signature


def _example(signature: Signature) -> tuple[Tensor, ...]:
    """Inputs of a step, of a few rows: one would be taken for a size that never changes."""
    rows = 3
    observed = [torch.zeros(rows, *each.spec.shape, dtype=each.spec.dtype) for each in signature.observations.values()]
    flag = torch.zeros(rows, dtype=torch.bool)
    noise = torch.zeros(rows, signature.noise_size, dtype=signature.dtype)
    memory = [torch.zeros(rows, *shape, dtype=signature.dtype) for shape in signature.memory.values()]
    return (*observed, torch.zeros(rows, dtype=torch.float32), flag, ~flag, noise, *memory)


def _require(*names: str) -> ModuleType:
    """The last of these modules."""
    with needs(f'ONNX needs {" and ".join(names)}: pip install "rl2_torchrl[onnx]".'):
        return [importlib.import_module(name) for name in names][-1]
