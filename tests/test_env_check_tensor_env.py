"""`check_trial_env` on a `TensorEnv` that is broken."""

import pytest
import torch
from env_check_cases import ROWS, trial_env
from torchrl.data import Categorical, Unbounded

from rl2_torchrl.envs import TensorEnv
from rl2_torchrl.testing import TrialContractError, check_trial_env


class Drifts(TensorEnv):
    """As `Sound`: the place and the drift are the state."""

    dtype, limit = torch.float32, 5

    def __init__(self):
        specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1, dtype=self.dtype)}
        super().__init__(**specs, action_spec=Categorical(3), max_episode_steps=self.limit, batch_size=(ROWS,), seed=0)

    def begin(self, task, rows):
        place = self.noise()
        return self.hear(place, task, rows), self.seen(place, task)

    def advance(self, state, action):
        place, drift = state
        place = place + action.unsqueeze(-1) - 1 + drift + self.noise()
        return (place, drift), self.seen(place, drift), self.paid(place), None, None

    def hear(self, place, task, rows):
        return place, task

    def seen(self, place, drift):
        return place.to(self.dtype)

    def paid(self, place):
        return -place.abs()

    def noise(self):
        return torch.rand(ROWS, 1, generator=self.generator)


class OneDraw(Drifts):
    def noise(self):
        return super().noise()[:1].expand(ROWS, 1)


class WideDrifts(Drifts):
    dtype = torch.float64


class EndlessDrifts(Drifts):
    limit = None


class SeenDrifts(Drifts):
    def seen(self, place, drift):
        return drift.clone()


class BufferedDrifts(Drifts):
    def seen(self, place, drift):
        self.buffer = self.__dict__.get("buffer", place.clone())
        return self.buffer.copy_(place)


class DeafDrifts(Drifts):
    def hear(self, place, task, rows):
        return place, torch.zeros_like(task)


class ForgetfulDrifts(Drifts):
    def hear(self, place, task, rows):
        return place, task if rows.all() else torch.zeros_like(task)


class PlacesOnSelf(Drifts):
    """Keeps the place beside the state, so that those who begin take all along."""

    def begin(self, task, rows):
        self.place = self.noise()
        return task, self.seen(self.place, task)

    def advance(self, state, action):
        (self.place, _), *rest = super().advance((self.place, state), action)
        return state, *rest


class DriftsOnSelf(Drifts):
    """Keeps the task beside the state, that of rows that go on among it."""

    def hear(self, place, task, rows):
        self.drift = task
        return place, task

    def advance(self, state, action):
        return super().advance((state[0], self.drift), action)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (OneDraw, "rows_draw_apart"),
        (WideDrifts, "float32"),
        (EndlessDrifts, "trials_end"),
        (SeenDrifts, "task_hidden"),
        (BufferedDrifts, "kept_tensors"),
        (DeafDrifts, "task_heard"),
        (ForgetfulDrifts, "task_heard"),
        (PlacesOnSelf, "rows_go_on"),
        (DriftsOnSelf, "task_kept"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_faults_of_a_tensor_env_are_told(make, rule):
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trial_env(make()), max_steps=100)
    assert raised.value.rule == rule


def test_the_tensor_env_that_the_broken_ones_are_made_of_is_sound():
    check_trial_env(trial_env(Drifts()))
