"""`check_trial_env` on the env below `Trial`: sound ones pass in all forms, and a broken one is told by the rule that it breaks."""

import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from line_envs import FORMS, Hidden, Line, goals, set_goal, set_goals, theirs, trials
from rollouts import ENVS, make_env
from tensordict import TensorDict
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import Compose, DoubleToFloat, EnvBase, SerialEnv, TransformedEnv

from rl2_torchrl import PreviousStep, TaskSampler, Trial
from rl2_torchrl.env_check import EnvBelow
from rl2_torchrl.env_check.outcomes import CHANCE, none_by_rule
from rl2_torchrl.env_check.rows import rows_go_on
from rl2_torchrl.env_check.steps import action_heard, begins_anew
from rl2_torchrl.envs import GymTaskEnv, GymVectorEnv, TensorEnv
from rl2_torchrl.envs.task_setter import _warn_of_drift
from rl2_torchrl.testing import TrialContractError, check_trial_env

ROWS = 4


class Sound(EnvBase):
    """A walk with a drift, which is the task, and noise of each row's own; episodes last ``5`` steps."""

    dtype, seeds = torch.float32, range(1, ROWS + 1)

    def __init__(self, rows=ROWS):
        super().__init__(batch_size=(rows,))
        self.state_spec = Composite(task=Unbounded((rows, 1)), shape=(rows,))
        self.observation_spec = Composite(place=Unbounded((rows, 1), dtype=self.dtype), shape=(rows,))
        self.action_spec, self.reward_spec = Categorical(3, shape=(rows,)), Unbounded((rows, 1))
        self.place, self.drift = torch.zeros(rows, 1, dtype=self.dtype), torch.zeros(rows, 1)
        self.steps = torch.zeros(rows, 1, dtype=torch.int64)
        self._set_seed(0)

    def _reset(self, tensordict=None, **kwargs):
        rows = tensordict.get("_reset", torch.ones(*self.batch_size, 1, dtype=torch.bool))
        self.hear(rows, tensordict["task"] if "task" in tensordict.keys() else self.drift)
        return self.begin(rows)

    def hear(self, rows, task):
        self.drift = torch.where(rows, task, self.drift)

    def begin(self, rows):
        self.place = torch.where(rows, self.noise(rows), self.place)
        self.steps = torch.where(rows, 0, self.steps)
        return self.shown(done=torch.zeros_like(rows), terminated=torch.zeros_like(rows))

    def _step(self, tensordict):
        every = torch.ones(*self.batch_size, 1, dtype=torch.bool)
        self.place = self.place + tensordict["action"].unsqueeze(-1) - 1 + self.drift + self.noise(every)
        self.steps = self.steps + 1
        done = self.ended()
        return self.shown(reward=self.paid(), done=done, terminated=done.clone())

    def ended(self):
        return self.steps >= 5

    def paid(self):
        return -self.place.abs().float()

    def shown(self, **flags):
        return TensorDict({"place": self.place.clone(), **flags}, self.batch_size)

    def noise(self, rows):
        pairs = zip(self.generators, rows.flatten().tolist(), strict=True)
        return torch.tensor([[generator.random() if draws else 0.0] for generator, draws in pairs], dtype=self.dtype)

    def _set_seed(self, seed):
        self.generators = [np.random.default_rng([seed or 0, own]) for own in list(self.seeds)[: self.batch_size[0]]]


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


class NeverHears(Sound):
    def hear(self, rows, task):
        pass


class FirstRowAlone(Sound):
    """Only row 0 hears."""

    def hear(self, rows, task):
        rows = rows & (torch.arange(len(rows)) == 0).unsqueeze(-1)
        super().hear(rows, task)


class OneForAll(Sound):
    """Keeps a number where each row has its own."""

    def hear(self, rows, task):
        self.drift = task[0].expand(len(task), 1)


class OneBefore(Sound):
    """Hears a task when the next one is given."""

    def hear(self, rows, task):
        self.drift, self.next = self.__dict__.get("next", self.drift), torch.where(rows, task, self.drift)


class TakesAllTasks(Sound):
    """A reset of some rows brings the others a task that they are not to take."""

    def hear(self, rows, task):
        self.drift = task


class BeginsAll(Sound):
    """A reset of some rows is one of all."""

    def begin(self, rows):
        return super().begin(torch.ones_like(rows))


class BeginsAllAlike(BeginsAll):
    """The same, without random numbers."""

    def noise(self, rows):
        return torch.zeros(rows.shape)


class CountsOn(Sound):
    """Sets its count of steps back only where all rows begin."""

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


class Doubles(Sound):
    dtype = torch.float64


class DoublesUnsaid(Sound):
    def shown(self, **flags):
        shown = super().shown(**flags)
        return shown.set("place", shown["place"].double())


class NeverEnds(Sound):
    def ended(self):
        return self.steps < 0


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


class ShowsTask(Sound):
    def __init__(self, rows=ROWS):
        super().__init__(rows)
        self.observation_spec["hint"] = Unbounded((rows, 1))

    def shown(self, **flags):
        return super().shown(**flags).set("hint", self.drift.clone())


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


def drifts(batch_size, generator):
    return torch.randn(*batch_size, 1, generator=generator)


def trial_env(env, *behind):
    return TransformedEnv(env, Compose(Trial(episodes=3), TaskSampler(drifts, seed=0), PreviousStep(), *behind))


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
    (CountsOn, "begins_anew", "episodes that began in some rows ended at their first step, of others none"),
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


@pytest.mark.parametrize(("make", "rule"), [(Misspelt, "specs"), (MisspeltLater, "kept_tensors")])
def test_what_the_env_raises_is_the_cause_with_its_line(make, rule):
    with pytest.raises(
        TrialContractError, match=r"ValueError: a line of the env's own\. The env raised this .*where\.$"
    ) as raised:
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


@pytest.mark.parametrize(("make", "rule", "times"), [(Thermostat, begins_anew, 30), (Frail, action_heard, 5)])
def test_rows_that_a_task_ends_early_are_no_sign_of_a_fault(make, rule, times):
    generator = torch.Generator().manual_seed(0)
    assert not any(rule(EnvBelow(make(32), gains(generator), "task", None)) for _ in range(times))


def test_what_is_none_by_rule_is_chance_in_one_of_400_cases_at_most():
    """Rows of three kinds, each seen in two forms that are alike."""
    generator = torch.Generator().manual_seed(0)
    for size in (3, 10, 30, 100):
        share = torch.tensor([0.0, 0.3, 0.7]).repeat_interleave(size) * min(1, 3 / size)
        one, other = (torch.rand(20_000, 3 * size, generator=generator) < share for _ in range(2))
        counts = [[(each, 3 * size) for each in form.sum(1).tolist()] for form in (one, other)]
        assert sum(none_by_rule(*pair) for pair in zip(*counts, strict=True)) <= 20_000 * CHANCE
    assert none_by_rule((9, 24), (0, 24))
    assert not none_by_rule((9, 24), (1, 24))


# ---- Envs of this package.


@pytest.mark.parametrize("name", [name for name in FORMS if "lines" not in name])
def test_all_forms_of_vector_envs_pass(name):
    env = FORMS[name]()
    check_trial_env(env, task_key=None if "without" in name else "task")
    env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.DISABLED, AutoresetMode.SAME_STEP])
def test_vector_envs_of_ones_own_pass(mode):
    check_trial_env(trials(theirs(mode, make=Hidden)))


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize(
    "way",
    [{"set_task": set_goal, "task_spec": Unbounded(1)}, {"task_option": "goal", "task_spec": Unbounded(1)}],
    ids=["set_task", "task_option"],
)
def test_all_ways_of_tasks_pass(vectorization, way):
    env = trials(GymVectorEnv(Hidden, 4, seed=0, vectorization=vectorization, **way))
    check_trial_env(env)
    env.close()


def test_a_list_of_tasks_passes():
    def numbers(batch_size, generator):
        return torch.randint(4, batch_size, generator=generator)

    def set_task(env, task):
        env.goal = task

    check_trial_env(trials(GymVectorEnv(Hidden, 4, set_task=set_task, tasks=[1.0, 2.0, 3.0, 4.0], seed=0), numbers))


class Speaks(Hidden):
    observation_space = spaces.Dict(place=spaces.Box(-np.inf, np.inf, (3,)), says=spaces.Text(5))

    def observed(self):
        return {"place": super().observed().astype(np.float32), "says": "a" * (1 + self.steps % 3)}


@pytest.mark.parametrize("rows", [None, 3])
def test_text_that_an_env_observes_passes(rows):
    def make():
        return GymTaskEnv(Speaks, set_task=set_goal, task_spec=Unbounded(1))

    check_trial_env(trials(make() if rows is None else SerialEnv(rows, make)))


@pytest.mark.parametrize("name", [name for name in ENVS if name != "workers"])
def test_the_envs_of_other_tests_pass(name):
    check_trial_env(make_env(name, steps=15))


# ---- Vector envs and Gymnasium envs that are broken.


def misspelt(env, task):
    env.gaol = task.item()


def first_only(env, task):
    env.goal = task.item() if env.resets == 0 else env.goal


def on_the_class(env, task):
    env.__dict__.pop("goal", None)
    type(env).goal = task.item()


def one_before(env, task):
    env.goal, env.following = vars(env).get("following", 3.0), task.item()


def drifting(env, task):
    env.goal = (env.goal + task.item()) % 7  # stays within the line


class OwnGoal(Hidden):
    def reset(self, **kwargs):
        seen = super().reset(**kwargs)
        self.goal = self.np_random.integers(1, 6)
        return seen


@pytest.mark.parametrize(
    ("make", "set_task", "rule", "message"),
    [
        (
            Hidden,
            misspelt,
            "task_heard",
            r"no difference .*; set_task gave the env \['gaol'\], .* misspelt\?.* self.unwrapped. A",
        ),
        (Hidden, first_only, "task_heard", "8 tasks made no difference to anything in 30 steps of random actions. All"),
        (OwnGoal, set_goal, "task_heard", "8 tasks made no difference .* set the task in each reset"),
        (type("Fresh", (Hidden,), {}), on_the_class, "task_own", "not on the class"),
        (Hidden, one_before, "task_own", "not the one before"),
        (Hidden, drifting, "seed_repeats", "differ after . steps.* not from what the last task left"),
    ],
)
def test_a_task_that_does_not_reach_its_row_is_told(make, set_task, rule, message):
    env = GymVectorEnv(make, 4, set_task=set_task, task_spec=Unbounded(1), seed=0)
    with pytest.raises(TrialContractError, match=message) as raised:
        check_trial_env(trials(env))
    assert raised.value.rule == rule


def single():
    env = GymTaskEnv(Hidden, set_task=misspelt, task_spec=Unbounded(1))
    return TransformedEnv(env, DoubleToFloat(), auto_unwrap=False)


@pytest.mark.parametrize("make", [single, lambda: SerialEnv(2, single)])
def test_a_misspelt_attribute_is_named_of_envs_that_stand_alone_too(make):
    env = TransformedEnv(make(), Compose(Trial(2), TaskSampler(goals, seed=1), PreviousStep()), auto_unwrap=False)
    with pytest.raises(TrialContractError, match=r"set_task gave the env \['gaol'\], .* misspelt\?"):
        check_trial_env(env)


ALONE = {
    "vector": lambda set_task: GymVectorEnv(Hidden, 4, set_task=set_task, task_spec=Unbounded(1)),
    "processes": lambda set_task: GymVectorEnv(
        Hidden, 2, set_task=set_task, task_spec=Unbounded(1), vectorization="async"
    ),
    "single": lambda set_task: GymTaskEnv(Hidden, set_task=set_task, task_spec=Unbounded(1)),
}


@pytest.mark.parametrize("kind", ALONE)
def test_a_misspelt_attribute_is_told_once_at_the_first_reset(kind, told):
    for set_task, said in ((set_goal, 0), (misspelt, 1)):
        env = TransformedEnv(ALONE[kind](set_task), Compose(Trial(2), TaskSampler(goals, seed=1)))
        env.reset()
        assert len(told) == said
        env.reset()
        assert len(told) == said
        env.close()
    assert told[0].startswith("set_task gave the env ['gaol'], which it did not have before: misspelt? Or a wrapper's?")


def scaled(env, task):
    env.goal = 0.5 * env.goal + task.item()


@pytest.mark.parametrize("kind", ["vector", "single"])
def test_tasks_that_drift_are_told_of_once(kind, told):
    _warn_of_drift.cache_clear()
    for set_task, said in ((set_goal, 0), (scaled, 1)):
        env = TransformedEnv(ALONE[kind](set_task), Compose(Trial(2), TaskSampler(goals, seed=1), PreviousStep()))
        env.rollout(20, break_when_any_done=False)
        assert len(told) == said
        env.close()
    assert "other numbers in the env the second time: ['goal']" in told[0]


def heavier(env, task):
    env.model.body_mass[-1] *= task.item()


def test_masses_that_drift_are_told_of(told):
    pytest.importorskip("mujoco")
    _warn_of_drift.cache_clear()
    env = GymTaskEnv("InvertedPendulum-v5", set_task=heavier, task_spec=Unbounded(1))
    for task in (2.0, 3.0, 3.0):
        env.reset(TensorDict({"task": torch.tensor([task])}))
    assert len(told) == 1
    assert "the second time: ['model']" in told[0]


class OwnSeed(Hidden):
    def reset(self, *, seed=None, options=None):
        super().reset(seed=3 if self.resets == 0 else None)
        return self.observed(), {}


def test_envs_that_seed_themselves_alike_are_told():
    with pytest.raises(TrialContractError, match="drew the same random numbers") as raised:
        check_trial_env(trials(GymVectorEnv(OwnSeed, 4, set_task=set_goal, task_spec=Unbounded(1))))
    assert raised.value.rule == "rows_draw_apart"


class Endless(Hidden):
    def step(self, action):
        observation, reward, *_, info = super().step(action)
        return observation, reward, False, False, info


@pytest.mark.parametrize(("make", "rule"), [(Endless, "trials_end"), (Line, "task_hidden")])
def test_faults_of_a_gymnasium_env_are_told(make, rule):
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trials(GymVectorEnv(make, 4, set_task=set_goal, task_spec=Unbounded(1), seed=0)), max_steps=100)
    assert raised.value.rule == rule


class OneBuffer(Hidden):
    """Observes in float64, in the same memory at every step."""

    def observed(self):
        self.buffer = vars(self).get("buffer", np.zeros(3))
        self.buffer[:] = super().observed()
        return self.buffer


def test_what_gymnasium_envs_may_do_with_their_observations_is_mended_on_the_way():
    check_trial_env(trials(GymVectorEnv(OneBuffer, 4, set_task=set_goal, task_spec=Unbounded(1), seed=0)))


class Column(SyncVectorEnv):
    def step(self, actions):
        observations, reward, *rest = super().step(actions)
        return observations, reward[:, None], *rest


def test_a_vector_env_with_a_column_of_rewards_is_told():
    envs = Column([Hidden] * 4, autoreset_mode=AutoresetMode.DISABLED)
    env = GymVectorEnv(envs, set_task=set_goals, task_spec=Unbounded(1), seed=0)
    with pytest.raises(TrialContractError, match=r"gives rewards of shape \(4, 1\); they must be \(4,\)") as raised:
        check_trial_env(trials(env, goals))
    assert raised.value.rule == "specs"


class SharedDraws(Sound):
    """Rows that draw in turn from one generator, so that where others begin a row goes on with other numbers."""

    def _set_seed(self, seed):
        self.generator = np.random.default_rng(seed)

    def noise(self, rows):
        drawn = torch.zeros(rows.shape)
        drawn[rows] = torch.tensor(self.generator.random(int(rows.sum())), dtype=torch.float32)
        return drawn


def test_rows_that_draw_from_one_generator_do_not_pass_for_begun():
    below = EnvBelow(SharedDraws(), [drifts(torch.Size([ROWS]), None)] * 2, "task", None)
    assert rows_go_on(below) is None


class TwinWorkers(SerialEnv):
    """Seeds its workers all alike."""

    def set_seed(self, seed=None, static_seed=False):
        return super().set_seed(seed, static_seed=True)


def test_workers_with_the_same_seed_are_told():
    workers = TwinWorkers(2, lambda: Sound(1))
    workers.set_seed(0)
    with pytest.raises(TrialContractError, match="rows 0 and 1 drew the same") as raised:
        check_trial_env(trial_env(workers))
    assert raised.value.rule == "rows_draw_apart"


class FirstOnly(Sound):
    """Hears its first task alone, also as the only row of a worker."""

    def hear(self, rows, task):
        self.resets = self.__dict__.get("resets", 0) + 1
        if self.resets <= 3:  # the first two are TorchRL's own, to look at the env
            super().hear(rows, task)


@pytest.mark.parametrize(
    ("make", "rule"),
    [
        (NeverHears, "task_heard"),
        (FirstOnly, "task_heard"),
        (OneBefore, "task_own"),
        (Doubles, "float32"),
        (NeverEnds, "trials_end"),
        (ShowsTask, "task_hidden"),
    ],
)
def test_faults_within_workers_are_told(make, rule):
    workers = SerialEnv(2, lambda: make(1))
    workers.set_seed(0)
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trial_env(workers), max_steps=100)
    assert raised.value.rule == rule


def test_workers_of_several_rows_that_begin_all_are_told():
    workers = SerialEnv(2, lambda: BeginsAll(2))
    workers.set_seed(0)
    with pytest.raises(TrialContractError) as raised:
        check_trial_env(trial_env(workers), max_steps=100)
    assert raised.value.rule == "rows_go_on"


# ---- A `TensorEnv` that is broken.


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
