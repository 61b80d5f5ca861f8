"""Videos of trials: `record_trial` plays one and writes it, a picture a step, with what happens written on it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from tensordict.nn import TensorDictModuleBase
from torchrl.envs import EnvBase

from rl2_torchrl.arguments import needs, require_env, whole
from rl2_torchrl.evaluation import adaptation_curve
from rl2_torchrl.modules.acting import State
from rl2_torchrl.trial import EPISODE_INDEX, TRIAL_STEP, base_of, is_within

__all__ = ["VideoWriter", "record_trial", "video_suffix"]


def record_trial(
    env: EnvBase,
    policy: TensorDictModuleBase,
    path: str | Path,
    *,
    fps: int = 20,
    deterministic: bool = False,
    width: int = 480,
    height: int = 320,
) -> Path:
    """Plays one trial in the env's first row and writes it as a video: one picture after every step.

    On each picture stand the episode, the step of the trial and, where the env has such entries, task and velocity.

    Args:
        env: trial env over an env with ``render(row, width=, height=)``, such as those in MuJoCo, or a `GymVectorEnv` whose envs
            have ``render_mode="rgb_array"``; one row is enough.
        policy: recurrent policy, e.g. an actor.
        path: file to write, ``.mp4`` or ``.gif``.
        fps: pictures, hence env steps, a second; of a ``.gif`` a divisor of 100. Default 20, at which `LocomotionEnv` plays at its
            true speed.
        deterministic: act with the distribution's mode or mean. Default False, as RL² plays.
        width: of a picture, in pixels; Gymnasium's envs draw theirs in a size of their own.
        height: of a picture, in pixels, likewise.

    Returns:
        The path.

    Raises:
        TypeError: the env has no ``render``.
        ImportError: a package for the file's format is missing (extra ``video``).
        ValueError: another format, ``fps`` that it cannot have, or a size that is no whole number of pixels.
        RuntimeError: there is no OpenGL to render with; the message says what to install and to set.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import GRUGaussianActor, PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import HalfCheetahVelocity, velocities
        >>> trial = Compose(Trial(episodes=2), TaskSampler(velocities()), PreviousStep(["observation"]))
        >>> env = TransformedEnv(HalfCheetahVelocity(batch_size=(1,)), trial)
        >>> actor = GRUGaussianActor.from_env(env)
        >>> def film():  # needs OpenGL
        ...     return record_trial(env, actor, "trial.mp4")
    """
    width, height = whole("width", width), whole("height", height)
    require_env(env, "record_trial(env, policy, path)")
    base = base_of(env)
    if not callable(getattr(type(base), "render", None)):
        raise TypeError(
            f"{type(base).__name__} has no render(row, width=, height=), so there is nothing to film: write one that draws "
            '[height, width, 3] uint8; for a Gymnasium env, GymVectorEnv(..., render_mode="rgb_array") has it.'
        )
    with VideoWriter(path, fps) as video:

        def film(state: State) -> None:
            video.append(base.render(0, width=width, height=height), _caption(state))

        adaptation_curve(env, policy, num_trials=1, deterministic=deterministic, on_step=film)
    return video.path


def video_suffix() -> str:
    """The better format that can be written here: ``".mp4"``, or ``".gif"`` without ffmpeg.

    Examples:
        >>> video_suffix() in (".mp4", ".gif")
        True
    """
    return ".mp4" if find_spec("imageio_ffmpeg") else ".gif"


class VideoWriter:
    """A video file that pictures are appended to; it is whole at the end of its ``with`` block.

    Args:
        path: file to write. ``.mp4`` needs imageio-ffmpeg, which brings ffmpeg; ``.gif`` and captions need Pillow.
        fps: pictures a second, 1 or more; of a ``.gif`` a divisor of 100.

    Raises:
        ImportError: a package is missing (extra ``video``).
        ValueError: another format, ``fps`` that it cannot have, or pictures of another kind or of several sizes.

    Examples:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "grey.gif"
        >>> with VideoWriter(file, fps=20) as video:
        ...     for level in (0, 128, 255):
        ...         video.append(torch.full((32, 48, 3), level, dtype=torch.uint8), "a caption")
        >>> file.read_bytes()[:3]
        b'GIF'
    """

    def __init__(self, path: str | Path, fps: int = 20):
        self.path = Path(path)
        if self.path.suffix not in _FORMATS:
            raise ValueError(f"{self.path.name}: a video is written as {' or '.join(_FORMATS)}.")
        if fps < 1:
            raise ValueError(f"fps={fps}: a video has a picture a second or more; pass 20, say.")
        with needs('videos need Pillow, which is an extra: pip install "rl2_torchrl[video]".'):
            import PIL.Image
            import PIL.ImageDraw
        self._pillow = PIL
        self._file, self._shape = _FORMATS[self.path.suffix](self.path, fps), None

    def append(self, picture: torch.Tensor | np.ndarray, caption: str = "") -> None:
        """Adds a ``picture``, ``[height, width, 3]`` uint8, all of one size, with ``caption`` in its upper left corner."""
        picture = torch.as_tensor(picture)
        self._shape = self._shape or picture.shape
        if picture.dtype != torch.uint8 or picture.shape != self._shape or picture.shape[2:] not in ((), (3,), (4,)):
            raise ValueError(
                f"a picture of {self.path.name} is {picture.dtype} {list(picture.shape)}; all must be uint8 [height, width, 3], "
                f"from 0 to 255 (4 with transparency, none of greys), of the size of the first, which is {list(self._shape)}."
            )
        image = self._pillow.Image.fromarray(picture.cpu().numpy()).convert("RGB")
        if caption:
            self._pillow.ImageDraw.Draw(image).text(
                (8, 6), caption, fill="white", font_size=16, stroke_width=1, stroke_fill="black"
            )
        self._file.append(image)

    def __enter__(self) -> VideoWriter:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


class _Mp4:
    def __init__(self, path: Path, fps: int):
        said = 'an .mp4 is written by imageio-ffmpeg, an extra: pip install "rl2_torchrl[video]"; or write a .gif.'
        with needs(said):
            import imageio_ffmpeg
        self._path, self._fps, self._write = str(path), fps, imageio_ffmpeg.write_frames
        self._frames = None

    def append(self, image) -> None:
        if self._frames is None:
            self._frames = self._write(self._path, image.size, fps=self._fps, macro_block_size=2)
            self._frames.send(None)
        self._frames.send(image.tobytes())

    def close(self) -> None:
        if self._frames is not None:
            self._frames.close()


class _Gif:
    def __init__(self, path: Path, fps: int):
        if 100 % fps:
            raise ValueError(
                f"fps={fps}: a .gif shows each picture for whole hundredths of a second, and would play at another speed. Pass a "
                "divisor of 100, such as 20, or write an .mp4."
            )
        self._path, self._fps, self._images = path, fps, []

    def append(self, image) -> None:
        self._images.append(image.quantize(128))

    def close(self) -> None:
        if self._images:
            first, *others = self._images
            first.save(self._path, save_all=True, append_images=others, duration=1000 / self._fps, loop=0)


_FORMATS = {".mp4": _Mp4, ".gif": _Gif}


def _caption(state: State) -> str:
    """Where the first row stands after a step. Past an episode's end it shows the next one, past the trial's the last."""
    is_last = bool(state["next", "done"][0])
    episode = state[EPISODE_INDEX if is_last else ("next", EPISODE_INDEX)]
    words = [f"episode {int(episode[0]) + 1}", f"step {int(state['next', TRIAL_STEP][0])}"]
    for key in [*filter(lambda key: is_within(key, "task"), state), ("next", "velocity")]:
        if key in state:
            numbers = state[key][0].reshape(-1).tolist()
            words.append(f"{key if isinstance(key, str) else key[-1]} " + " ".join(f"{n:+.2f}" for n in numbers))
    return "  ".join(words)
