"""`Camera`: pictures of a MuJoCo model, with or without a display."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import torch

from rl2_torchrl.arguments import whole
from rl2_torchrl.envs.physics import import_mujoco

__all__ = ["Camera"]


class Camera:
    """Takes pictures of a model; it keeps its renderer, which takes longer to make than many pictures.

    Args:
        model: a `mujoco.MjModel`.
        width: of a picture, in pixels.
        height: of a picture, in pixels.

    Raises:
        RuntimeError: there is no OpenGL to render with; the message says what to install and to set.
        ValueError: a size is no whole number of pixels.

    Examples:
        >>> from rl2_torchrl.envs.physics import gymnasium_model, load_model
        >>> model = load_model(gymnasium_model("half_cheetah.xml"))
        >>> def picture():  # needs OpenGL
        ...     return Camera(model, 480, 320).picture(model.qpos0, np.zeros(model.nv))  # [320, 480, 3]
    """

    def __init__(self, model: Any, width: int, height: int):
        mujoco = import_mujoco()
        self.size = width, height = whole("width", width), whole("height", height)
        self._model, self._data = model, mujoco.MjData(model)
        buffer = model.vis.global_  # what is off-screen is 640 x 480, unless the model's file says otherwise
        buffer.offwidth, buffer.offheight = max(buffer.offwidth, width), max(buffer.offheight, height)
        try:
            self._renderer = mujoco.Renderer(model, height, width)
        except (AttributeError, ImportError, RuntimeError, mujoco.FatalError) as error:
            raise RuntimeError(
                f"MuJoCo found no OpenGL to render with ({error}); MUJOCO_GL={os.environ.get('MUJOCO_GL', '')!r}. Without a "
                "display set MUJOCO_GL=egl before Python starts (on Debian and Ubuntu: apt-get install libegl1 "
                "libgl1-mesa-dri), or MUJOCO_GL=osmesa (apt-get install libosmesa6)."
            ) from None

    def __reduce__(self) -> tuple:
        return Camera, (self._model, *self.size)  # a copy has a renderer of its own: OpenGL's cannot be copied

    def picture(self, qpos: np.ndarray, qvel: np.ndarray, camera: str | int = "track") -> torch.Tensor:
        """The model at ``qpos`` ``[nq]`` and ``qvel`` ``[nv]`` as ``[height, width, 3]`` uint8, seen by one of its cameras."""
        mujoco = import_mujoco()
        self._data.qpos[:], self._data.qvel[:] = qpos, qvel
        mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera)
        return torch.from_numpy(self._renderer.render().copy())

    def close(self) -> None:
        """Gives the renderer back."""
        self._renderer.close()
