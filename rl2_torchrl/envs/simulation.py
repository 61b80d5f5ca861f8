"""MuJoCo's simulation as plain arrays, and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

__all__ = ["model_of", "put_simulation", "simulation_of"]

#: Arrays of a model that are drawn or compiled, large, and changed by no task.
_OF_PICTURES = ("tex_", "mesh_", "skin_", "bvh_", "oct_")


def simulation_of(model: Any, data: Any) -> dict[str, Any]:
    """All arrays of MuJoCo's ``data``, since envs read some of the last substep's before their next step, and its time; and those
    of ``model`` with its options, which a task may have changed, as the bytes of one.
    """
    arrays = {name: np.array(value) for name, value in _arrays(data)}
    return {"simulation": {**arrays, "time": np.asarray(data.time)}, "model": model_of(model)}


def model_of(model: Any) -> np.ndarray:
    """The arrays of ``model`` and its options as the bytes of one."""
    parts = [_scalars(model.opt), *_of_model(model)]
    return np.concatenate([np.ascontiguousarray(part).reshape(-1).view(np.uint8) for part in parts])


def put_simulation(model: Any, data: Any, saved: dict[str, Any]) -> None:
    """Puts back what `simulation_of` returned."""
    import mujoco

    _put_model(model, saved["model"])
    _write(data, saved["simulation"])
    # Contacts and constraints, whose number changes, are made anew; all else is left as the last substep left it.
    mujoco.mj_forward(model, data)
    _write(data, saved["simulation"])


def _put_model(model: Any, packed: np.ndarray) -> None:
    options, arrays = _scalars(model.opt), list(_of_model(model))
    parts = np.split(packed, np.cumsum([options.nbytes, *(array.nbytes for array in arrays)]))
    for name, value in zip(_scalar_names(model.opt), parts[0].view(np.float64), strict=True):
        setattr(model.opt, name, type(getattr(model.opt, name))(value))
    for array, part in zip(arrays, parts[1:-1], strict=True):
        array[...] = part.view(array.dtype).reshape(array.shape)


def _of_model(model: Any) -> Iterator[np.ndarray]:
    """The arrays of a model and of its options."""
    for name, value in (*_arrays(model), *_arrays(model.opt)):
        if not name.startswith(_OF_PICTURES):
            yield value


def _scalar_names(options: Any) -> list[str]:
    return [name for name in dir(options) if type(getattr(options, name)) in (int, float)]


def _scalars(options: Any) -> np.ndarray:
    return np.array([getattr(options, name) for name in _scalar_names(options)], np.float64)


def _write(data: Any, saved: dict[str, np.ndarray]) -> None:
    data.time = float(saved["time"])
    for name, value in _arrays(data):
        if name in saved and value.shape == saved[name].shape:
            value[...] = saved[name]


def _arrays(struct: Any) -> Iterator[tuple[str, np.ndarray]]:
    for name in dir(struct):
        if not name.startswith("_"):
            value = getattr(struct, name, None)
            if isinstance(value, np.ndarray) and value.flags.writeable and value.dtype.kind in "biuf":
                yield name, value
