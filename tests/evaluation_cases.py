"""What tests of evaluations share: bandits and countdowns as trials, and policies of one line."""

import math

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import (
    Compose,
    EnvBase,
    TransformedEnv,
)

from rl2_torchrl import (
    AdaptationCurve,
    AdaptationReport,
    GRUCategoricalActor,
    PreviousStep,
    TaskSampler,
    TrainResult,
    Trial,
)
from rl2_torchrl.envs import BernoulliBandit, TensorEnv

NAN = math.nan

# Ten bandits of two certain arms: the first arm of task i pays in the tasks 0, 3, 4, 7, 9.
FIRST_PAYS = [1.0, 0.0, 0.0, 1.0, 1.0, 0.0, 0.0, 1.0, 0.0, 1.0]
TASKS = torch.tensor([[pay, 1 - pay] for pay in FIRST_PAYS])


def bandit_env(tasks=TASKS, rows=4, pulls=3, seed=0):
    base = BernoulliBandit(tasks.shape[-1], batch_size=(rows,), seed=seed)
    return TransformedEnv(base, Compose(Trial(episodes=pulls), TaskSampler.fixed(tasks), PreviousStep()))


def act(function, out_key="action"):
    """A policy without memory: ``trans -> action``."""
    return TensorDictModule(function, in_keys=["trans"], out_keys=[out_key])


def first_arm(trans):
    return torch.zeros(trans.shape[:-1], dtype=torch.int64)


def win_stay_lose_shift(trans):
    """The first arm at first, then the last one if it paid, else the other."""
    last, paid = trans[..., :2].argmax(-1), trans[..., -2] > 0
    begun = trans[..., -1] > 0
    return torch.where(begun, torch.where(paid, last, 1 - last), 0)


class Countdown(EnvBase):
    """Episodes of ``task`` steps, each of which pays 1, 2, 3, ... in turn."""

    def __init__(self, rows):
        super().__init__(batch_size=(rows,))
        self.state_spec = Composite(task=Unbounded((rows, 1), dtype=torch.int64), shape=(rows,))
        self.observation_spec = Composite(step=Unbounded((rows, 1), dtype=torch.int64), shape=(rows,))
        self.action_spec = Categorical(2, shape=(rows,))
        self.reward_spec = Unbounded((rows, 1))

    def _reset(self, tensordict=None, **kwargs):
        return TensorDict({"step": torch.zeros(*self.batch_size, 1, dtype=torch.int64)}, self.batch_size)

    def _step(self, tensordict):
        step = tensordict["step"] + 1
        done = step >= tensordict["task"]
        entries = {"step": step, "reward": step.float(), "done": done, "terminated": done.clone()}
        return TensorDict(entries, self.batch_size)

    def _set_seed(self, seed):
        pass


class TensorCountdown(TensorEnv):
    """As `Countdown`; counts the steps that it is asked for."""

    def __init__(self, rows):
        number = Unbounded(1, dtype=torch.int64)
        spaces = {"observation_spec": Composite(step=number), "action_spec": Categorical(2)}
        super().__init__(task_spec=number, **spaces, batch_size=(rows,), seed=0)
        self.asked = 0

    def begin(self, task, rows):
        step = torch.zeros_like(task)
        return {"step": step, "task": task}, {"step": step}

    def advance(self, state, action):
        self.asked += 1
        step = state["step"] + 1
        return {**state, "step": step}, {"step": step}, step.float(), step >= state["task"], None


def countdown_env(lengths, rows, kind=Countdown, **bounds):
    tasks = TaskSampler.fixed(torch.tensor(lengths).unsqueeze(-1))
    return TransformedEnv(kind(rows), Compose(Trial(**bounds), tasks, PreviousStep(["step"])))


def same(one, other):
    return torch.equal(one.nan_to_num(-1.0), other.nan_to_num(-1.0))


def remembering_actor(**kwargs):
    torch.manual_seed(0)
    return GRUCategoricalActor.from_env(bandit_env(), hidden_size=8, init_range=3.0, **kwargs)


def make_report(**kwargs):
    agent = AdaptationCurve(torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 2.0]]))
    greedy = AdaptationCurve(torch.tensor([[1.0, 1.0], [1.0, 1.0], [1.0, 2.0]]))
    other = AdaptationCurve(torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]]))
    history = [
        {"env_steps": 10.0, "train/trial_return": 1.0},
        {"env_steps": 20.0, "train/trial_return": NAN, "eval/trial_return": 1.5},
    ]
    entries = {
        "agent": agent,
        "greedy": greedy,
        "baselines": {"random": other},
        "ablations": {"memory_zeroed": other},
        "optimum": 2.5,
        "train": TrainResult(env_steps=20, seconds=1.5, history=history),
        "seed": 7,
    }
    return AdaptationReport(**{**entries, **kwargs})
