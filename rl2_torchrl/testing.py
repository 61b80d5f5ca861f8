"""Contracts as tests that users run, and that name the rule that breaks: `check_trial_env`, and `check_tensor_env`."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cached_property
from math import prod

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase, check_env_specs

from rl2_torchrl.arguments import require_env, whole
from rl2_torchrl.env_check import RULES as RULES_BELOW
from rl2_torchrl.env_check import EnvBelow
from rl2_torchrl.env_check.outcomes import ENOUGH, BrokenRule, flat
from rl2_torchrl.env_check.shown import BITS, bits_of, drawn, rows_of_task, shown
from rl2_torchrl.quiet import quiet_torchrl
from rl2_torchrl.tasks import TaskSampler, _InOrder
from rl2_torchrl.tensor_env_check import TensorEnvError, check_tensor_env
from rl2_torchrl.transition import PreviousStep
from rl2_torchrl.trial import EPISODE_DONE, EPISODE_INDEX, TIME_LEFT, TRIAL_STEP, Trial, base_of, transforms_of

__all__ = ["TensorEnvError", "TrialContractError", "check_tensor_env", "check_trial_env"]

log = logging.getLogger(__name__)

#: The rules in the order of the checks, with why it matters and what to do. `_Played` has a method for each; those of
#: names that start with "task" and "trans" are left out where the env has no such entry, those of `env_check` where workers hide
#: what `Trial` plays.
_RULES = {
    "trial_counters": "Without them nobody knows where a trial stands: Compose(Trial(...), ...).",
    "task_present": "What is learnt cannot be told apart by task: add TaskSampler, or pass task_key=None.",
    "task_in_state_spec": "The drawn task never reaches the env: declare it there and read it in _reset.",
    "trans_present": "A policy that does not see its last reward cannot adapt: add PreviousStep, or pass in_key=None.",
    "rows_draw_apart": "They are one row's data again: seed each row, or each worker, by a number of its own.",
    "step_specs": "Networks and memory are made by the specs, and sums of [B] and [B, 1] are [B, B]: mend them, or what the env "
    "returns.",
    "specs": "Collectors and workers allocate memory by the specs: mend them, or what the env returns.",
    "float32": "Networks are float32, and memory is doubled: make it so in the env, or append DoubleToFloat.",
    "kept_tensors": "Steps that were collected before change afterwards: return new tensors, or copies of the env's own.",
    "trials_end": "A trial without end has no return: give episodes a time limit, or trials Trial(steps=...), or raise max_steps.",
    "rewards_finite": "One NaN spreads over the whole batch through the advantages: mend the env's reward, or bound its actions.",
    "observations_finite": "One NaN spreads over all that the networks make: mend the env, or bound what leads there.",
    "done_at_trial_end": "Memory is reset at done, here too early or too late: let Trial write it.",
    "terminated_at_done": "Another task's value leaks into this trial's advantages: let Trial write it.",
    "trial_step": "Trials end at the wrong step: leave Trial's entries as they are.",
    "episode_index": "Returns are summed under the wrong episode: leave Trial's entries as they are.",
    "begins_anew": "Later episodes are cut short: in _reset set all that counts back in the rows of '_reset', torch.where(rows, 0, "
    "self.steps).",
    "task_constant": "A trial is one task, or there is nothing to adapt to: draw tasks at trial starts only.",
    "task_changes": "One task is learnt by heart: draw at each trial; give TaskSampler.fixed more tasks than rows.",
    "task_differs_by_row": "They are one row's data again: seed each worker's TaskSampler, or wrap it around all.",
    "task_follows_seed": "Held-out tasks would be training tasks: draw with the generator that is passed.",
    "task_hidden": "An agent that sees its task has nothing to find out: leave it out of the observations.",
    "trans_previous_step": "An episode's last reward must reach the policy: put PreviousStep behind reward changes.",
    "trans_at_trial_start": "The last trial leaks into this one: let PreviousStep write the entry at resets.",
    "seed_repeats": "No run can be repeated: let _set_seed, or Gymnasium's reset(seed=...), seed all that the env draws from; "
    "let set_task reckon from a value that stays, not from what the last task left (`*=`), or tasks drift from reset to reset; and "
    "let reset clear what the last episode left, in wrappers too (a delay's queue, a filter).",
    "rows_go_on": "Rows end episodes at different steps, and each end would cut the others' short: in _reset begin the rows of "
    "'_reset' alone, torch.where(rows, first, self.state).",
    "task_heard": "All tasks are one, and there is nothing to adapt to: set the task in each reset, for the rows that begin. Where "
    "tasks are told apart too rarely for random actions, pass task_of=, which reads them back.",
    "task_own": "A row adapts to its own task: keep tasks row by row, not on the class, not one for all, not the one before; draw "
    "random numbers by row, or as many whatever the task.",
    "task_kept": "A trial is one task: change that of the rows that begin alone, torch.where(rows, task, self.task), or keep it in "
    "the state.",
    "action_heard": "A step is lost between episodes, as where a vector env resets at the next step: use "
    "AutoresetMode.DISABLED, or reset at once when asked to.",
    "partial_reset": "Rows end trials at different steps: reset what _reset says, keep counters in the TensorDict.",
}
_NUM_TASKS = 8  # of whole batches, given to the env below `Trial` one after another
_NUM_DRAWS = 16  # resets whose tasks are compared


class TrialContractError(BrokenRule):
    """A rule of the trial contract is broken; ``rule`` is its short name."""


def check_trial_env(
    env: EnvBase,
    *,
    num_trials: int = 2,
    max_steps: int = 10_000,
    task_key: NestedKey | None = "task",
    in_key: NestedKey | None = "trans",
    task_of: Callable[[EnvBase], torch.Tensor | TensorDictBase] | None = None,
) -> None:
    """Plays random trials and checks that ``env`` is a trial env; the first rule that breaks is raised, by name.

    Made for ``TransformedEnv(your_env, Compose(Trial(...), TaskSampler(...), PreviousStep()))``. Random actions of the
    action_spec are played, of which an env may refuse none, whatever a mask says. What the workers of a ``SerialEnv`` or
    ``ParallelEnv`` do inside is hidden: ``task_follows_seed``, and what is asked of the env below `Trial` itself, are left out
    there. The env is reset and stepped, uses up tasks, and is seeded as it was made; one of TorchRL's, which does not keep its
    seed, by a number of PyTorch's default generator: seed it after the check.

    Whether a task reaches the env (``task_heard``) is seen from outside: after one seed and the same actions, another task must
    show in something, from the start and in episodes that begin in some rows. An env in which random actions hardly ever meet
    the task, such as a far goal that alone is paid, cannot be told so from one that forgets it: give ``task_of``.

    Args:
        env: the trial env.
        num_trials: trials to play in every row.
        max_steps: steps within which every row must have ended ``num_trials`` trials.
        task_key: the task's entry; None for an env that has no tasks on purpose.
        in_key: the transition input's entry, as `PreviousStep` writes it; None for an env without it.
        task_of: reads the tasks ``[*B, ...]`` that the rows have back from the env below `Trial`.

    Raises:
        TrialContractError: a rule is broken. The message says which, what was seen, why it matters and what to do. What the env
            itself has raised is its cause, with the line where.
        ValueError: ``num_trials`` or ``max_steps`` is below 1.

    Examples:
        >>> from torchrl.envs import Compose, TransformedEnv
        >>> from rl2_torchrl import PreviousStep, TaskSampler, Trial
        >>> from rl2_torchrl.envs import BernoulliBandit, uniform_means
        >>> bandit = BernoulliBandit(num_arms=3, batch_size=(4,))
        >>> transforms = Compose(Trial(episodes=5), TaskSampler(uniform_means(3)), PreviousStep())
        >>> check_trial_env(TransformedEnv(bandit, transforms))
    """
    num_trials, max_steps = whole("num_trials", num_trials), whole("max_steps", max_steps)
    require_env(env, "check_trial_env(env)")
    played = _Played(env, num_trials, max_steps, task_key, in_key, task_of)
    left_out = tuple(prefix for prefix, key in (("task", task_key), ("trans", in_key)) if key is None)
    for rule in _RULES:
        seen = None if rule.startswith(left_out) else played.look(rule)
        if isinstance(seen, torch.Tensor):  # a mask of broken places, [num_rows, T, n]
            places = seen.flatten(2).any(-1).nonzero().tolist()
            seen = "at row {}, step {} of the trials played".format(*places[0]) if places else None
        if seen is not None:
            is_own = played.raised is not None and rule != "specs"
            raise TrialContractError(rule, seen, _RAISED if is_own else _RULES[rule]) from played.raised
    if played.below is not None:
        played.below.leave()


_RAISED = "The env raised this when it was played. The traceback above shows where."
#: What an env raises that breaks a contract, and what TorchRL raises of what it returns.
_OF_ENVS = (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class _Played:
    """Trials of ``env``, played when the first rule asks for them. A rule returns what breaks it, or where, or None."""

    raised: Exception | None = None  #: by the env, where a rule tells of that: its traceback shows the line

    def __init__(self, env: EnvBase, num_trials: int, max_steps: int, task_key, in_key, task_of=None):
        self.env, self.num_trials, self.max_steps = env, num_trials, max_steps
        self.task_key, self.in_key, self.num_rows = task_key, in_key, prod(env.batch_size)
        self.task_of = task_of
        self.base, self.transforms = base_of(env), transforms_of(env)
        trial = next((each for each in self.transforms if isinstance(each, Trial)), None)
        self.below_trial = None if trial is None else trial.container.base_env  # what it resets; None: workers hide it

    def look(self, rule: str) -> str | torch.Tensor | None:
        """What breaks ``rule``."""
        if hasattr(type(self), rule):
            return getattr(self, rule)()
        try:
            return None if self.below is None else RULES_BELOW[rule](self.below)
        except _OF_ENVS as error:
            # What TorchRL cannot play is told by the rule "specs".
            return None if rule in ("rows_draw_apart", "step_specs") else self._told(error)

    def _told(self, error: Exception) -> str:
        self.raised = error
        return f"{type(error).__name__}: {error}"

    @cached_property
    def below(self) -> EnvBelow | None:
        """The env that `Trial` plays, and the tasks that it is given; None where workers hide it."""
        if self.below_trial is None:
            return None
        has_task = self.task_key is not None and self.task_key in self.below_trial.full_state_spec.keys(True)
        tasks = [self.env.reset().get(self.task_key).clone() for _ in range(_NUM_TASKS)] if has_task else []
        if tasks and all((task == tasks[0]).all() for task in tasks):
            log.warning(
                "all tasks of %s resets were the same: whether the env hears its task is not checked (task_heard, task_own, "
                "task_kept).",
                _NUM_TASKS,
            )
        return EnvBelow(self.below_trial, tasks, self.task_key, self.task_of)

    @cached_property
    def steps(self) -> TensorDictBase:
        """Steps ``[num_rows, T]``, until every row has played its trials."""
        steps, ended, tensordict = [], torch.zeros(1), self.env.reset()
        while len(steps) < self.max_steps and (ended < self.num_trials).any():
            stepped, tensordict = self._step(tensordict)
            steps.append(stepped.reshape(self.num_rows).cpu())
            ended = ended + steps[-1]["next", "done"].int()
        return torch.stack(steps, -1)

    def _step(self, tensordict: TensorDictBase) -> tuple[TensorDictBase, TensorDictBase]:
        stepped = self.env.step(self.env.rand_action(tensordict)).clone()
        return stepped, self.env.maybe_reset(self.env.step_mdp(stepped).clone())

    @cached_property
    def draws(self) -> torch.Tensor:  # tasks of further resets, [_NUM_DRAWS, num_rows, n]
        tasks = [self.env.reset().get(self.task_key) for _ in range(_NUM_DRAWS)]
        return torch.stack([rows_of_task(task, self.env.batch_size) for task in tasks])

    @property
    def starts(self) -> torch.Tensor:  # steps that begin a trial, [num_rows, T, 1]
        done = self.steps["next", "done"]
        return torch.cat([torch.ones_like(done[:, :1]), done[:, :-1]], 1)

    def _missing(self, keys: set[NestedKey], spec) -> str | None:
        missing = [key for key in keys if key not in spec.keys(True)]
        return f"{missing} not among {list(spec.keys(True))}" if missing else None

    def _miscounted(self, key: str, increment: torch.Tensor) -> torch.Tensor:
        before, after, starts = self.steps[key], self.steps["next", key], self.starts
        broken = (after != before + increment) | (starts & (before != 0))
        broken[:, 1:] |= ~starts[:, 1:] & (before[:, 1:] != after[:, :-1])
        return broken

    # ------------------------------------------------------------ the rules
    def trial_counters(self):
        return self._missing({EPISODE_DONE, EPISODE_INDEX, TRIAL_STEP, TIME_LEFT}, self.env.observation_spec)

    def task_present(self):
        return self._missing({self.task_key}, self.env.observation_spec)

    def task_in_state_spec(self):
        return self._missing({self.task_key}, self.base.full_state_spec)

    def trans_present(self):
        return self._missing({self.in_key}, self.env.observation_spec)

    def specs(self):
        try:
            with quiet_torchrl():
                check_env_specs(self.env)
        except _OF_ENVS as error:
            return self._told(error)

    def trials_end(self):
        ended = self.steps["next", "done"].sum(1).min().item()
        return f"a row ended {ended} trials in {self.max_steps} steps" if ended < self.num_trials else None

    def rewards_finite(self):
        return ~self.steps["next", "reward"].isfinite()

    def observations_finite(self):
        broken = torch.zeros_like(self.steps["next", "done"])
        for key in self.env.observation_spec.keys(True, True):
            value = self.steps["next"].get(key, None)
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                broken |= ~value.isfinite().reshape(*broken.shape[:2], -1).all(-1, keepdim=True)
        return broken

    def float32(self):
        specs = {**dict(self.env.observation_spec.items(True, True)), "reward": self.env.reward_spec}
        wide = [key for key, spec in specs.items() if spec.dtype == torch.float64 != torch.get_default_dtype()]
        return f"{wide} are float64" if wide else None

    def done_at_trial_end(self):
        return self.steps["next", "done"] != (self.steps["next", TIME_LEFT] == 0)

    def terminated_at_done(self):
        after = self.steps["next"]
        truncates = "truncated" in after.keys() and torch.equal(after["truncated"], after["done"])
        return after["terminated"] != (torch.zeros_like(after["done"]) if truncates else after["done"])

    def trial_step(self):
        return self._miscounted(TRIAL_STEP, torch.ones_like(self.steps[TRIAL_STEP]))

    def episode_index(self):
        return self._miscounted(EPISODE_INDEX, self.steps["next", EPISODE_DONE].long())

    def begins_anew(self):
        begins = torch.cat([torch.ones_like(self.starts[:, :1]), self.steps["next", EPISODE_DONE][:, :-1]], 1)
        ends = self.steps["next", EPISODE_DONE] & begins
        later = int(begins[:, 1:].sum())
        # Where rows end together all begin, which hides it, then and in training.
        if later >= ENOUGH and self.num_rows > 1 and not ends[:, 0].any() and ends[:, 1:].sum() == later:
            return f"all {later} episodes that began later ended at their first step, and none where all rows began"

    def task_constant(self):
        task = flat(self.steps[self.task_key], 2)
        broken = task != flat(self.steps["next", self.task_key], 2)
        broken[:, 1:] |= (task[:, 1:] != task[:, :-1]) & ~self.starts[:, 1:]
        return broken

    def task_changes(self):
        # All may be one task, of which `below` tells.
        if (self.draws == self.draws[:1]).all() and (self.draws != self.draws[:, :1]).any():
            return f"{_NUM_DRAWS} resets drew the same"

    def task_differs_by_row(self):
        parts = {"rows": self.num_rows, "workers": getattr(self.base, "num_workers", 1)}
        for what, number in parts.items():
            blocks = self.draws.unflatten(1, (number, -1)).transpose(0, 1).flatten(1, 2)  # [number, K, n]
            if (blocks == blocks[:1]).all() and (number - 1) * bits_of(blocks[0], blocks[0]) >= BITS:
                return f"all {number} {what} drew the same tasks {_NUM_DRAWS} times"

    def task_follows_seed(self):
        samplers = [
            t for t in self.transforms if isinstance(t, TaskSampler) and not isinstance(t.distribution, _InOrder)
        ]
        for sampler in samplers:
            try:
                tasks = [drawn(sampler.distribution, self.env.batch_size, seed, _NUM_DRAWS) for seed in (0, 0, 1)]
            except (TypeError, ValueError, RuntimeError):  # it has a state that nobody can put back
                continue
            one, again, other = tasks
            if (one != again).any() or ((one == other).all() and (one != one[:1, :1]).any()):
                return "one seed gave other tasks when used again, or another seed the same"

    def task_hidden(self):
        task = flat(self.steps[self.task_key], 2)
        differs = (task != task[:1, :1]).flatten(0, 1).any(0)  # a single task stands anywhere by chance
        if self.in_key is None or not differs.any():
            return None
        found = shown(self.steps[self.in_key], task, self.starts.squeeze(-1)).items()
        told = ", ".join(f"number {number} is {self.in_key!r}{where}" for number, where in found)
        return f"all of the task is seen: {told}" if len(found) == differs.sum() else None

    def trans_previous_step(self):
        trans, after = self.steps["next", self.in_key], self.steps["next"]
        broken = trans[..., -2:] != torch.cat([after["reward"], after[EPISODE_DONE]], -1).to(trans.dtype)
        broken[:, 1:] |= ~self.starts[:, 1:] & (self.steps[self.in_key][:, 1:, -2:] != trans[:, :-1, -2:])
        return broken

    def trans_at_trial_start(self):
        previous = next((t for t in self.transforms if isinstance(t, PreviousStep)), None)
        size = 1 if previous is None else previous.action_size + 1  # action and reward
        return (self.steps[self.in_key][..., -1 - size : -1] != 0) & self.starts

    def partial_reset(self):
        before = self._step(self.env.reset())[1]
        done = torch.zeros_like(before["done"])
        done.view(-1)[0] = True
        after = self.env.maybe_reset(before.clone().set("done", done))
        steps = self.env.step(self.env.rand_action(after.clone()))["next", TRIAL_STEP].reshape(-1)
        expected = before[TRIAL_STEP].reshape(-1) + 1
        expected[0] = 1
        before, after = before.reshape(self.num_rows)[1:], after.reshape(self.num_rows)[1:]
        touched = [key for key in before.keys(True, True) if not torch.equal(before.get(key), after.get(key))]
        if touched or not torch.equal(steps, expected):
            return f"a reset of row 0 changed {touched} of others, or {TRIAL_STEP} went on as {steps.tolist()}"
