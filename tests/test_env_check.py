"""`check_trial_env` on TorchRL envs that are broken: each fault is told by its rule, with its cause."""

import numpy as np
import pytest
import torch
from env_check_cases import (
    ROWS,
    BeginsAll,
    Doubles,
    NeverEnds,
    NeverHears,
    OneBefore,
    ShowsTask,
    Sound,
    drifts,
    trial_env,
)
from torchrl.data import Categorical, Unbounded
from torchrl.envs import Compose, DoubleToFloat, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.env_check import EnvBelow
from rl2_torchrl.env_check.steps import action_heard
from rl2_torchrl.env_check.tasks import task_own
from rl2_torchrl.envs import TensorEnv
from rl2_torchrl.testing import TrialContractError, check_trial_env


class NextStep(Sound):
    """As over a vector env that resets at the next step, whatever the action is."""

    def begin(self, rows):
        if rows.all():
            return super().begin(rows)
        return self.shown(done=torch.zeros_like(rows), terminated=torch.zeros_like(rows))

    def ended(self):
        return self.steps >= torch.arange(3, 3 + ROWS).unsqueeze(-1)

    def _step(self, tensordict):
        begins = self.ended()
        before = self.place
        after = super()._step(tensordict)
        self.place = torch.where(begins, 0.0 * before, self.place)
        self.steps = torch.where(begins, 0, self.steps)
        after.update(self.shown(reward=torch.where(begins, 0.0, after["reward"]), done=self.ended()))
        return after.set("terminated", after["done"].clone())


class InPlace(Sound):
    def shown(self, **flags):
        self.buffer = self.__dict__.get("buffer", self.place.clone())
        return super().shown(**flags).set("place", self.buffer.copy_(self.place))


class ForgetsTask(Sound):
    def hear(self, rows, task):
        if rows.all():
            super().hear(rows, task)


class DrawsItsOwnTask(Sound):
    def hear(self, rows, task):
        self.drift = torch.where(rows, self.noise(rows), self.drift)


class FirstRowAlone(Sound):
    """Only row 0 hears."""

    def hear(self, rows, task):
        rows = rows & (torch.arange(len(rows)) == 0).unsqueeze(-1)
        super().hear(rows, task)


class OneForAll(Sound):
    """Keeps a number where each row has its own."""

    def hear(self, rows, task):
        self.drift = task[0].expand(len(task), 1)


class TakesAllTasks(Sound):
    """A reset of some rows brings the others a task that they are not to take."""

    def hear(self, rows, task):
        self.drift = task


class BeginsAllAlike(BeginsAll):
    """The same, without random numbers."""

    def noise(self, rows):
        return torch.zeros(rows.shape)


class CountsOn(Sound):
    """Sets its count of steps back only where all rows begin, and ends episodes at another step in each row."""

    def ended(self):
        return self.steps >= torch.arange(3, 3 + len(self.steps)).unsqueeze(-1)

    def begin(self, rows):
        steps = self.steps
        first = super().begin(rows)
        self.steps = torch.where(rows.all(), 0, steps)
        return first


class SameSeeds(Sound):
    seeds = [7] * ROWS


class FlatReward(Sound):
    def paid(self):
        return super().paid().squeeze(-1)


class DeepReward(Sound):
    def paid(self):
        return super().paid().unsqueeze(-1)


class DoublesUnsaid(Sound):
    def shown(self, **flags):
        shown = super().shown(**flags)
        return shown.set("place", shown["place"].double())


class NoNumbers(Sound):
    def shown(self, **flags):
        shown = super().shown(**flags)
        shown["place"][2] = torch.where(self.steps[2] == 3, float("nan"), shown["place"][2])
        return shown


class Flat(Sound):
    """Shows an entry ``[B]`` too, without a dimension of its own, as the state of a simulator may be."""

    def __init__(self):
        super().__init__()
        self.observation_spec["counted"] = Unbounded((ROWS,))

    def shown(self, **flags):
        return super().shown(**flags).set("counted", self.steps.squeeze(-1).float())


class FlatNoNumbers(Flat):
    def shown(self, **flags):
        shown = super().shown(**flags)
        shown["counted"][1] = torch.where(self.steps[1, 0] == 4, float("inf"), shown["counted"][1])
        return shown


class Unseeded(Sound):
    def _set_seed(self, seed):
        self.generators = [np.random.default_rng() for _ in range(*self.batch_size)]


class ShowsTaskScaled(Sound):
    """As an env that scales what it observes, in half precision."""

    def shown(self, **flags):
        shown = super().shown(**flags)
        return shown.set("place", (1 - 0.3 * self.drift).half().float())


class ShowsTaskOnce(ShowsTask):
    """A hint at an episode's first step alone, which the memory has to keep."""

    def shown(self, **flags):
        return super().shown(**flags).set("hint", self.drift * (self.steps == 0))


class Choices(Sound):
    """Counts its steps from 1, where its spec counts from 0."""

    def __init__(self):
        super().__init__()
        self.observation_spec["steps"] = Categorical(5, shape=(ROWS, 1))

    def shown(self, **flags):
        return super().shown(**flags).set("steps", self.steps + 1)


BROKEN = [
    (NextStep, "action_heard", "AutoresetMode.DISABLED"),
    (InPlace, "kept_tensors", "step 0 wrote over the 'place' of a reset. Steps that were collected"),
    (ForgetsTask, "task_heard", "another task given at a reset of some rows made no difference"),
    (DrawsItsOwnTask, "task_heard", "8 tasks made no difference .* set the task in each reset"),
    (NeverHears, "task_heard", "8 tasks made no difference"),
    (FirstRowAlone, "task_heard", r"another task made no difference in the rows \[1, 2, 3\], though it did in others"),
    (OneForAll, "task_own", "twice given the same task, seed and actions, row . played something else"),
    (OneBefore, "task_own", "keep tasks row by row, not on the class, not one for all, not the one before"),
    (TakesAllTasks, "task_kept", "row 1 went another way in the middle of an episode"),
    (BeginsAll, "rows_go_on", "forgot .* where every other row began anew. .* begin the rows of '_reset' alone"),
    (BeginsAllAlike, "rows_go_on", "rows in mid-episode forgot what had been done in them"),
    (
        CountsOn,
        "begins_anew",
        "all .* episodes that began later ended at their first step, and none where all rows began",
    ),
    (SameSeeds, "rows_draw_apart", "rows 0 and 1 drew the same random numbers.* seed each row"),
    (
        FlatReward,
        "step_specs",
        r"the 'reward' that step 0 returned is torch.float32 \[4\], its spec says torch.float32 \[4, 1\]",
    ),
    (
        DeepReward,
        "step_specs",
        r"the 'reward' that step 0 returned is torch.float32 \[4, 1, 1\], its spec says .* \[4, 1\]",
    ),
    (Doubles, "float32", r"\['place'\] are float64. Networks are float32"),
    (
        DoublesUnsaid,
        "step_specs",
        r"the 'place' that step 0 returned is torch.float64 \[4, 1\], its spec says torch.float32",
    ),
    (NeverEnds, "trials_end", "a row ended 0 trials in 300 steps"),
    (NoNumbers, "observations_finite", "at row 2, step 2 of the trials played"),
    (FlatNoNumbers, "observations_finite", "at row 1, step 3 of the trials played"),
    (Unseeded, "seed_repeats", "two runs of one seed, task and sequence of actions differ after 0 steps"),
    (ShowsTask, "task_hidden", r"all of the task is seen: number 0 is 'trans'\[.\]\. An agent"),
    (ShowsTaskScaled, "task_hidden", r"number 0 is 'trans'\[.\], at another scale"),
    (Choices, "step_specs", "the 'steps' that step 3 returned is outside its spec"),
]


@pytest.mark.parametrize(("make", "rule", "message"), BROKEN, ids=lambda value: getattr(value, "__name__", ""))
def test_a_broken_env_is_told_by_its_rule(make, rule, message):
    with pytest.raises(TrialContractError, match=message) as raised:
        check_trial_env(trial_env(make()), max_steps=300)
    assert raised.value.rule == rule


class Misspelt(Sound):
    """Raises from step ``at_step`` on."""

    at_step = 1

    def paid(self):
        if (self.steps >= self.at_step).any():
            raise ValueError("a line of the env's own.")
        return super().paid()


class MisspeltLater(Misspelt):
    at_step = 4  # when `check_env_specs` is over


@pytest.mark.parametrize(
    ("make", "rule", "said"),
    [(Misspelt, "specs", "Coll"), (MisspeltLater, "kept_tensors", "The env raised this .*where")],
)
def test_what_the_env_raises_is_the_cause_with_its_line(make, rule, said):
    with pytest.raises(TrialContractError, match=rf"ValueError: a line of the env's own\. {said}") as raised:
        check_trial_env(trial_env(make()))
    assert raised.value.rule == rule
    assert raised.value.__cause__.__traceback__ is not None
    assert isinstance(raised.value.__cause__, ValueError)


class ShowsMore(Sound):
    def shown(self, **flags):
        return super().shown(**flags).set("unsaid", self.place.clone())


def test_what_torchrl_says_of_the_specs_is_followed_by_what_to_do():
    with pytest.raises(
        TrialContractError, match=r"(?s)'specs' is broken: AssertionError: .*unsaid.*memory by the specs: mend"
    ):
        check_trial_env(trial_env(ShowsMore()))


class PaysNothing(Sound):
    def shown(self, **flags):
        flags.pop("reward", None)
        return super().shown(**flags)


def test_an_env_that_pays_no_reward_is_told():
    with pytest.raises(TrialContractError, match="'specs' is broken: .*the env's step returned no 'reward'"):
        check_trial_env(trial_env(PaysNothing()))


def test_the_env_that_the_broken_ones_are_made_of_is_sound():
    check_trial_env(trial_env(Sound()))
    check_trial_env(trial_env(Sound(1)))
    check_trial_env(trial_env(ShowsTaskOnce()))
    check_trial_env(
        TransformedEnv(Flat(), Compose(Trial(episodes=3), TaskSampler(drifts, seed=0), PreviousStep(["place"])))
    )
    check_trial_env(trial_env(Sound()), task_of=lambda env: env.drift)


def test_doubles_are_mended_by_torchrls_transform():
    check_trial_env(trial_env(Doubles(), DoubleToFloat(in_keys=["place"])))


@pytest.mark.parametrize(
    "make", [ForgetsTask, DrawsItsOwnTask, NeverHears, FirstRowAlone, OneForAll, OneBefore, TakesAllTasks]
)
def test_a_task_that_is_read_back_tells_at_once(make):
    with pytest.raises(TrialContractError, match="after a reset( of some rows)? row . has the task .*, not ") as raised:
        check_trial_env(trial_env(make()), task_of=lambda env: env.drift)
    assert raised.value.rule == "task_heard"


class FarGoal(Sound):
    """A task that random actions never meet."""

    def paid(self):
        return (self.place > 1000 + self.drift).float()

    def _step(self, tensordict):
        drift, self.drift = self.drift, 0 * self.drift
        after = super()._step(tensordict)
        self.drift = drift
        return after


def test_a_task_that_random_actions_never_meet_must_be_read_back():
    with pytest.raises(TrialContractError, match="pass task_of=, which reads them back"):
        check_trial_env(trial_env(FarGoal()))
    check_trial_env(trial_env(FarGoal()), task_of=lambda env: env.drift)


# ---- Rows that are chosen by what they did are not like all others.


class Thermostat(TensorEnv):
    """Heats or cools by a ``gain``, the task; the larger it is, the sooner an episode ends, seldom at its first step."""

    def __init__(self, rows):
        specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1), "action_spec": Categorical(3)}
        super().__init__(**specs, max_episode_steps=12, batch_size=(rows,))

    def begin(self, task, rows):
        heat = torch.randn(*self.batch_size, 1, generator=self.generator)
        return (heat, task), heat

    def advance(self, state, action):
        heat, gain = state
        heat = 0.75 * heat + (action - 1).unsqueeze(-1) * gain
        return (heat, gain), heat, -heat.abs(), heat.abs() > 5, None


class Frail(Thermostat):
    """Rows of a task below 0 end at once, whatever is done; of others none does, and an action counts."""

    def advance(self, state, action):
        heat, gain = state
        heat = torch.where(gain < 0, heat, heat + action.unsqueeze(-1))
        return (heat, gain), heat, heat, gain < 0, None


def gains(generator):
    return [1.5 * torch.randn(32, 1, generator=generator) for _ in range(8)]


def test_rows_that_a_task_ends_early_are_no_sign_of_a_fault():
    generator = torch.Generator().manual_seed(0)
    assert not any(action_heard(EnvBelow(Frail(32), gains(generator), "task", None)) for _ in range(5))


class LargeForAll(Sound):
    """A task beyond 3 rules all rows."""

    def hear(self, rows, task):
        super().hear(rows, task)
        if self.drift.max() > 3:
            self.drift = torch.full_like(self.drift, self.drift.max())


def test_what_a_late_task_alone_does_is_found():
    """Also once all rows have heard theirs, after which steps are fewer."""
    tasks = [0.1 * torch.randn(ROWS, 1) for _ in range(8)]
    assert task_own(EnvBelow(LargeForAll(), tasks, "task", None)) is None
    tasks[6][0] = 4.0
    assert "row" in task_own(EnvBelow(LargeForAll(), tasks, "task", None))
    assert task_own(EnvBelow(Sound(), tasks, "task", None)) is None
