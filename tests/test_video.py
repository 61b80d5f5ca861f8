"""Videos of trials: what stands in the file, frame by frame, and pictures wherever there is an OpenGL."""

import os
import subprocess
import sys
from functools import partial

import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torchrl.envs import Compose, StepCounter, TransformedEnv

from rl2_torchrl import GRUCategoricalActor, GRUGaussianActor, PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import BernoulliBandit, GymVectorEnv, HalfCheetahVelocity, uniform_means, velocities
from rl2_torchrl.video import VideoWriter, _caption, record_trial, video_suffix

GREYS = (0, 60, 120, 180, 240)


class DrawnCheetah(HalfCheetahVelocity):
    """Its picture is one shade of grey, the brighter the further the step, so that no OpenGL is needed."""

    def render(self, row, *, width, height):
        return torch.full((height, width, 3), 30 * int(self._row_steps()[row]), dtype=torch.uint8)


def cheetahs(env_class=DrawnCheetah):
    torch.manual_seed(0)
    transforms = Compose(Trial(episodes=2), TaskSampler(velocities(), seed=1), PreviousStep(["observation"]))
    env = TransformedEnv(env_class(batch_size=(2,), horizon=3, seed=0), transforms)
    return env, GRUGaussianActor.from_env(env, hidden_size=4)


def pictures(path):
    """Pictures of a file, ``[frames, height, width, 3]``, and frames a second."""
    if path.suffix == ".gif":
        with Image.open(path) as gif:
            images = [np.array(image.convert("RGB")) for image in ImageSequence.Iterator(gif)]
            return np.stack(images), 1000 / gif.info["duration"]
    frames = imageio_ffmpeg.read_frames(str(path))
    about = next(frames)
    width, height = about["size"]
    return np.stack([np.frombuffer(f, np.uint8).reshape(height, width, 3) for f in frames]), about["fps"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_file_holds_the_pictures_in_their_order(suffix, tmp_path):
    path = tmp_path / "new" / f"greys{suffix}"
    with VideoWriter(path, fps=10) as video:
        for grey in GREYS:
            video.append(torch.full((48, 64, 3), grey, dtype=torch.uint8))
    seen, fps = pictures(path)
    assert seen.shape == (5, 48, 64, 3)
    assert fps == 10
    np.testing.assert_allclose(seen.mean((1, 2, 3)), GREYS, atol=3)


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_a_trial_is_filmed_a_picture_a_step(suffix, tmp_path):
    env, actor = cheetahs()
    path = record_trial(env, actor, tmp_path / f"trial{suffix}", width=320, height=64)
    seen, fps = pictures(path)
    assert seen.shape == (2 * 3, 64, 320, 3)
    assert fps == 20
    # Below the caption: steps 1 and 2 of an episode, then the next episode's start; the last picture is the trial's end.
    np.testing.assert_allclose(seen[:, 40:].mean((1, 2, 3)), [30, 60, 0, 30, 60, 90], atol=3)
    assert (seen[:, :30].max((1, 2, 3)) > 200).all()  # the caption is white


class Fader(gymnasium.Env):
    """Its picture is brighter with every step of an episode, of which there are two."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    action_space, observation_space = gymnasium.spaces.Discrete(2), gymnasium.spaces.Box(0, 1, (1,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, **kwargs):
        self.number = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.number += 1
        return np.zeros(1, np.float32), 0.0, self.number == 2, False, {}

    def render(self):
        return np.full((48, 320, 3), 60 * self.number, np.uint8)


@pytest.mark.parametrize("vectorization", ["sync", "async"])
def test_gymnasiums_envs_are_filmed_as_they_draw_themselves(vectorization, tmp_path):
    make = partial(Fader, render_mode="rgb_array")
    env = TransformedEnv(GymVectorEnv(make, 2, vectorization=vectorization), Compose(Trial(episodes=2), PreviousStep()))
    seen, _ = pictures(record_trial(env, GRUCategoricalActor.from_env(env), tmp_path / "trial.gif"))
    env.close()
    assert seen.shape == (4, 48, 320, 3)
    np.testing.assert_allclose(seen[:, 40:].mean((1, 2, 3)), [60, 0, 60, 120], atol=3)


def test_gymnasiums_envs_without_pictures(tmp_path):
    env = TransformedEnv(GymVectorEnv(Fader, 1), Compose(Trial(episodes=2), PreviousStep()))
    with pytest.raises(ValueError, match='render_mode=None, and draw no pictures.*render_mode="rgb_array"'):
        record_trial(env, GRUCategoricalActor.from_env(env), tmp_path / "trial.gif")


@pytest.mark.parametrize(
    ("picture", "seen"),
    [
        (np.zeros((4, 6, 3)), r"float64 \[4, 6, 3\]"),
        (None, r"object \[\]"),
        (np.zeros((4, 6, 2), np.uint8), r"uint8 \[4, 6, 2\]"),
    ],
)
def test_what_an_env_draws_that_is_no_picture_is_told(picture, seen):
    class Draws(Fader):
        def render(self):
            return picture

    env = GymVectorEnv(partial(Draws, render_mode="rgb_array"), 1)
    env.reset()
    with pytest.raises(TypeError, match=rf"render\(\) draws {seen}; a picture is uint8"):
        env.render()


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 4)])
def test_greys_and_transparent_pictures_are_pictures_too(shape, tmp_path):
    with VideoWriter(tmp_path / "film.gif") as video:
        for shade in (10, 200):
            video.append(np.full(shape, shade, np.uint8), "seen")
    with Image.open(tmp_path / "film.gif") as film:
        assert (film.n_frames, film.size) == (2, (6, 4))


@pytest.mark.parametrize(
    "other", [np.zeros((8, 8, 3), np.uint8), np.zeros((4, 6, 3), np.float32), np.zeros((4, 6), np.uint8)]
)
def test_pictures_of_a_video_are_of_one_kind(other, tmp_path):
    with VideoWriter(tmp_path / "a.gif") as video:
        video.append(np.zeros((4, 6, 3), np.uint8))
        with pytest.raises(ValueError, match=r"a picture of a.gif is .*the size of the first, which is \[4, 6, 3\]"):
            video.append(other)


def test_an_env_with_transforms_around_transforms_is_filmed_too(tmp_path):
    env, actor = cheetahs()
    nested = TransformedEnv(env, StepCounter(), auto_unwrap=False)
    assert len(pictures(record_trial(nested, actor, tmp_path / "trial.gif", width=320, height=64))[0]) == 2 * 3


def test_captions_say_where_the_picture_stands():
    env, actor = cheetahs()
    captions, td = [], env.reset()
    for action in (0.0, 0.5, 0.0, 0.5, 0.0, 0.5):
        td = env.step(td.set("action", torch.full((2, 6), action)))
        state = dict(td.items(True, True))
        captions.append((_caption(state), td["task"][0].item(), td["next", "velocity"][0].item()))
        td = env.step_mdp(td)
    for step, (caption, task, velocity) in enumerate(captions, 1):
        episode = 1 if step < 3 else 2  # the third step's picture is the second episode's start
        assert caption == f"episode {episode}  step {step}  task {task:+.2f}  velocity {velocity:+.2f}"
    assert captions[2][2] == 0
    assert captions[1][2] != 0
    several = {**state, ("task", "mass"): torch.tensor([[2.0]]), ("task", "drag"): torch.tensor([[0.5]])}
    del several["task"]
    assert "mass +2.00  drag +0.50" in _caption(several)


def test_best_format(monkeypatch):
    assert video_suffix() == ".mp4"
    monkeypatch.setattr("rl2_torchrl.video.find_spec", lambda name: None)
    assert video_suffix() == ".gif"


# ------------------------------------------------------------------ OpenGL

SCRIPT = """
import copy
import mujoco, torch
from tensordict import TensorDict
from rl2_torchrl.envs import HalfCheetahVelocity

try:
    mujoco.Renderer(mujoco.MjModel.from_xml_string("<mujoco/>"), 16, 16).render()
    print("OpenGL works")
except Exception:
    print("no OpenGL")
env = HalfCheetahVelocity(batch_size=(2,), seed=0)
env.reset(TensorDict({"task": torch.zeros(2, 1)}, [2]))
first = env.render(1, width=96, height=64)
camera = env._camera
env.play(torch.ones(2, 6))
second = env.render(1, width=96, height=64)
assert first.shape == (64, 96, 3) and first.dtype == torch.uint8
assert first.float().std() > 10, "an empty picture"
assert not torch.equal(first, second), "the cheetah did not move"
assert not torch.equal(env.render(0, width=96, height=64), second), "both rows look alike"
assert env._camera is camera, "a renderer of its own for each picture"
assert env.render(0).shape == (320, 480, 3)
large = env.render(0, width=800, height=600)  # than the model's buffer off screen
assert large.shape == (600, 800, 3) and large.float().std() > 10
assert torch.equal(copy.deepcopy(env).render(1, width=96, height=64), second), "a copy takes other pictures"
print("pictures taken")
"""


@pytest.mark.parametrize("library", ["egl", "disable"])
def test_pictures_where_there_is_an_opengl_and_an_error_where_not(library):
    environment = {**os.environ, "MUJOCO_GL": library}  # MuJoCo reads it once, so in a process of its own
    command = [sys.executable, "-c", SCRIPT]
    result = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=os.getcwd())
    # Bare MuJoCo says whether there is one: then ours must take pictures, and else say what to do.
    if "OpenGL works" in result.stdout:
        assert library != "disable"
        assert "pictures taken" in result.stdout, result.stderr
    else:
        assert "RuntimeError: MuJoCo found no OpenGL" in result.stderr
        assert "set MUJOCO_GL=egl before Python starts" in result.stderr


# ------------------------------------------------------------------- bad input


def test_missing_ffmpeg_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    env, actor = cheetahs()
    with pytest.raises(ImportError, match=r"rl2_torchrl\[video\]\"; or write a .gif"):
        record_trial(env, actor, tmp_path / "trial.mp4")


def test_missing_pillow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.ImageDraw", None)
    with pytest.raises(ImportError, match=r"rl2_torchrl\[video\]"):
        VideoWriter(tmp_path / "trial.gif")


def test_unknown_format(tmp_path):
    with pytest.raises(ValueError, match=r"trial.avi: a video is written as .mp4 or .gif"):
        VideoWriter(tmp_path / "trial.avi")


@pytest.mark.parametrize(
    ("suffix", "fps", "message"),
    [
        (".mp4", 0, "a picture a second or more"),
        (".gif", 0, "a picture a second or more"),
        (".gif", 30, "a divisor of 100"),
    ],
)
def test_a_speed_that_no_file_can_have(suffix, fps, message, tmp_path):
    with pytest.raises(ValueError, match=f"fps={fps}: .*{message}"):
        VideoWriter(tmp_path / f"trial{suffix}", fps)


def test_pictures_of_numpys(tmp_path):
    with VideoWriter(tmp_path / "grey.gif") as video:
        video.append(np.full((8, 8, 3), 128, np.uint8))
    assert pictures(video.path)[0].shape == (1, 8, 8, 3)


def test_a_size_of_no_pixels(tmp_path):
    with pytest.raises(ValueError, match="width=0 must be a whole number, at least 1"):
        record_trial(*cheetahs(), tmp_path / "trial.mp4", width=0)


def test_an_env_without_pictures(tmp_path):
    transforms = Compose(Trial(episodes=2), TaskSampler(uniform_means(3)), PreviousStep())
    env = TransformedEnv(BernoulliBandit(3, batch_size=(1,)), transforms)
    with pytest.raises(TypeError, match="BernoulliBandit has no render.*GymVectorEnv"):
        record_trial(env, GRUCategoricalActor.from_env(env), tmp_path / "trial.gif")
