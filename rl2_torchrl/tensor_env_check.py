"""`check_tensor_env`: what a `TensorEnv` promises to those who play it, as a test that its author runs."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import check_env_specs

from rl2_torchrl.arguments import kind_of
from rl2_torchrl.env_check.outcomes import BrokenRule, misfit, same
from rl2_torchrl.env_check.playing import EnvBelow
from rl2_torchrl.env_check.rows import seed_repeats
from rl2_torchrl.env_check.tasks import task_own
from rl2_torchrl.envs.gym_vector import GymVectorEnv
from rl2_torchrl.envs.rows import EnvState, entries_of, merge, tensors_of
from rl2_torchrl.envs.tensor_env import TensorEnv
from rl2_torchrl.quiet import quiet_torchrl
from rl2_torchrl.tasks import TaskDistribution

__all__ = ["TensorEnvError", "check_tensor_env"]

#: The rules in the order of the checks, with why it matters and what to do. `_Checked` has a method for each.
_RULES = {
    "state": "Rows are merged and checkpoints read by it: return tensors [*B, ...], after a step as after a begin.",
    "specs": "Networks and memory are made by the specs: mend them, or what the env returns.",
    "finite": "One NaN spreads over the whole batch through the advantages: mend the env, or bound what leads there.",
    "in_place": "Steps that were collected before would change afterwards: make new tensors, not `state += ...`.",
    "repeatable": "No run could be repeated: draw from `self.generator` alone, and keep all that changes in the state.",
    "round_trip": "A checkpoint would go on as another run: keep all that changes in the state or in `get_outside_state`.",
    "rows_independent": "Rows are separate trials: calculate along no batch dimension, and draw for all rows, always.",
    "partial_reset": "Episodes end at different steps: begin what `rows` marks, and leave all else where it is.",
    "torchrl": "Other TorchRL code could not play it: see `torchrl.envs.check_env_specs`.",
}
_NUM_TASKS = 8
Step = dict[str, Tensor]


class TensorEnvError(BrokenRule):
    """A promise of `TensorEnv` is broken; ``rule`` is its short name."""


def check_tensor_env(env: TensorEnv, tasks: TaskDistribution | None = None, *, num_steps: int = 50) -> None:
    """Plays random actions and checks what a `TensorEnv` promises; the first rule that breaks is raised, by name.

    Checked are types, shapes and specs; that rows do not touch one another, that a reset of some rows leaves the others where
    they are, and that a seed repeats a run and a checkpoint goes on with it. An env may refuse none of its action_spec's actions:
    an illegal one does nothing, or costs something. It is reset and stepped, and seeded as it was made.

    Args:
        env: the env, of two rows or more. Hand over some more, so that random actions see ends of episodes.
        tasks: distribution of the tasks to play, ``(batch_size, generator) -> task`` ``[*B, ...]``. None draws them from the
            env's ``task_spec``.
        num_steps: steps to play, each time; those of several episodes.

    Raises:
        TensorEnvError: a rule is broken. The message says which, what was seen, why it matters and what to do.
        TypeError: it is no `TensorEnv`, or a `GymVectorEnv`, which `rl2_torchrl.testing.check_trial_env` checks.
        ValueError: the env has one row only, or ``num_steps`` is below 2.

    Examples:
        >>> from rl2_torchrl.envs import PointRobot, goals_on_half_circle
        >>> check_tensor_env(PointRobot(batch_size=(8,)), goals_on_half_circle())
    """
    if not isinstance(env, TensorEnv) or isinstance(env, GymVectorEnv):
        raise TypeError(
            f"{kind_of(env)} is no TensorEnv that its author has written by begin and advance, which this check calls by "
            "itself: check_trial_env(TransformedEnv(env, Compose(Trial(...), ...))) checks any env."
        )
    if env.batch_size.numel() < 2 or num_steps < 2:
        raise ValueError(
            f"batch_size={tuple(env.batch_size)}, num_steps={num_steps}: whether rows touch one another shows with two rows or "
            "more, and whether a run goes on with two steps or more."
        )
    checked, given_seed = _Checked(env, tasks, num_steps), env.given_seed
    for rule in _RULES:
        seen = getattr(checked, rule)()
        if seen is not None:
            raise TensorEnvError(rule, seen, _RULES[rule])
    env._set_seed(given_seed)  # or all that are checked would draw the same from here on


class _Checked:
    """An env, and actions and tasks to play. A rule returns what breaks it, or None."""

    def __init__(self, env: TensorEnv, tasks: TaskDistribution | None, num_steps: int):
        self.env, self.num_steps = env, num_steps
        generator = torch.Generator().manual_seed(0)
        spec = env.full_state_spec["task"] if "task" in env.full_state_spec.keys() else None
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)  # specs draw from PyTorch's default generator; a check finds the same each time
            number = 0 if spec is None else _NUM_TASKS  # an env may have no task
            draws = [spec.rand() if tasks is None else tasks(env.batch_size, generator) for _ in range(number)]
            self.actions = [env.full_action_spec[env.action_key].rand() for _ in range(num_steps)]
        self.tasks = [task.to(env.device) for task in draws]
        self.every_row = torch.ones(env.batch_size, dtype=torch.bool, device=env.device)
        self.below = EnvBelow(env, self.tasks, "task", None)

    # ---------------------------------------------------------------- playing
    def task(self, number: int = 0) -> Tensor | TensorDictBase | None:
        return self.tasks[number % len(self.tasks)].clone() if self.tasks else None

    def start(self, number: int = 0, rows: Tensor | None = None) -> Step:
        return self.with_more(self.env.start(self.task(number), rows))

    def with_more(self, entries: Step) -> Step:
        more = self.env.observe_more(self.env.state) if self.env.more_keys else {}
        return {str(key): value.clone() for key, value in {**entries, **more}.items()}

    def play(self, action: Tensor) -> Step:
        """One step, with ends of a fixed length too."""
        entries, reward, *_ = self.env.play(action.clone())
        terminated, truncated = self.env._ends()
        return {**self.with_more(entries), "reward": reward.clone(), "terminated": terminated, "truncated": truncated}

    def run(self, actions: list[Tensor]) -> Iterator[Step]:
        """Steps, and the first observations of the episodes that begin in rows whose last has ended."""
        for number, action in enumerate(actions):
            yield self.play(action)
            yield from self.begin_ended(number)

    def begin_ended(self, number: int = 0) -> Iterator[Step]:
        terminated, truncated = self.env._ends()
        ended = (terminated | truncated).squeeze(-1)
        if ended.any():
            yield self.start(number + 1, ended)

    def go_to(self, number: int) -> Step:
        """Plays ``number`` steps from the start, and returns what was observed last."""
        return [self.start(), *self.run(self.actions[:number])][-1]

    def row(self, number: int) -> Tensor:
        """Which row is that of ``number``, counted round and round: bool ``[*B]``."""
        row = torch.zeros_like(self.every_row)
        row.view(-1)[number % row.numel()] = True
        return row

    def save(self) -> Tensor:
        return self.env.get_extra_state().clone()

    # -------------------------------------------------------------- the rules
    def state(self) -> str | None:
        state, _ = self.env.begin(self.task(), self.every_row)
        before, after = _layout(state), _layout(self.env.advance(state, self.actions[0].clone())[0])
        for leaf in tensors_of(state):
            if leaf.shape[: self.env.batch_dims] != self.env.batch_size or leaf.device.type != self.env.device.type:
                held, size = f"{list(leaf.shape)} on {leaf.device}", list(self.env.batch_size)
                return f"the state holds a tensor {held}, with a batch of {size}"
        if before != after:
            return f"the state is made of {before} after a begin, of {after} after a step"

    def specs(self) -> str | None:
        env = self.env
        begun, observed = env.begin(self.task(), self.every_row)
        _, following, reward, terminated, truncated = env.advance(begun, self.actions[0].clone())
        more = set(map(str, env.more_keys))
        own = {str(key): env.observation_spec[key] for key in env.observation_spec.keys(True, True)}
        parts = [("begin", observed, set(own) - more), ("advance", following, set(own) - more)]
        if more:
            self.start()
            parts.append(("observe_more", env.observe_more(env.state), more))
        for name, values, said in parts:
            values = {str(key): value for key, value in entries_of(values).items()}
            if set(values) != said:
                return f"{name} observes {sorted(values)}, its spec says {sorted(said)}"
            for key, value in values.items():
                if wrong := misfit(value, own[key]):
                    return f"{name}'s observation {key!r} {wrong}"
        if wrong := misfit(reward, env.reward_spec):
            return f"the reward {wrong}"
        for name, end in (("terminated", terminated), ("truncated", truncated)):
            if end is not None and (end.shape != (*env.batch_size, 1) or end.dtype != torch.bool):
                return f"{name} is {end.dtype} {list(end.shape)}, not bool {[*env.batch_size, 1]}"

    def finite(self) -> str | None:
        for number, step in enumerate([self.start(), *self.run(self.actions)]):
            for key, value in step.items():
                if value.is_floating_point() and not value.isfinite().all():
                    return f"{key!r} is NaN or infinite in step {number} of random actions"

    def in_place(self) -> str | None:
        task = self.task()
        self.env.begin(task, self.every_row)
        if task is not None and not bool((task == self.tasks[0]).all()):
            return "a begin wrote over the task"
        self.start()
        for action in self.actions:
            held = {"the action": action.clone()}
            held |= {f"the state's tensor {i}": leaf for i, leaf in enumerate(tensors_of(self.env.state))}
            held |= {f"the last {key!r}": value for key, value in self.env._now.observation.items()}
            copies = {name: value.clone() for name, value in held.items()}
            self.env.play(held["the action"])
            list(self.begin_ended())
            for name, value in held.items():
                if not same(value, copies[name]):
                    return f"a step wrote over {name}"

    def repeatable(self) -> str | None:
        return seed_repeats(self.below)

    def round_trip(self) -> str | None:
        for played in (0, 1, self.num_steps // 2):
            self.go_to(played)
            saved = self.save()
            going_on = list(self.run(self.actions[played:]))
            self.env.set_extra_state(saved)
            resumed = list(self.run(self.actions[played:]))
            what = f"a run, and the one resumed from its state after {played} steps,"
            if seen := _difference(going_on, resumed, self.every_row, what):
                return seen

    def rows_independent(self) -> str | None:
        self.start()
        for number, action in enumerate(self.actions):
            row, before = self.row(number), self.save()
            steps = [self.play(merge(row, self.actions[number - 1], action))]
            self.env.set_extra_state(before)
            steps.append(self.play(action))
            if seen := _difference(steps[:1], steps[1:], ~row, "steps that differ in one row's action alone"):
                return seen
            list(self.begin_ended())
        return task_own(self.below)

    def partial_reset(self) -> str | None:
        env = self.env
        for played in range(self.num_steps // 2):
            row, first = self.row(played), self.go_to(played)
            saved, generator = self.save(), env.generator.get_state()
            going_on = [self.play(self.actions[played])]
            env.set_extra_state(saved)
            begun = self.start(1, row)
            what = f"a reset of one row after {played} steps"
            if seen := _difference([{key: first[key] for key in begun}], [begun], ~row, what):
                return seen
            env.generator.set_state(generator)
            if seen := _difference(going_on, [self.play(self.actions[played])], ~row, what + ", one step on,"):
                return seen

    def torchrl(self) -> str | None:
        try:
            with quiet_torchrl():
                check_env_specs(self.env)
        except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
            return f"{type(error).__name__}: {error}"


def _difference(one: list[Step], other: list[Step], rows: Tensor, what: str) -> str | None:
    """Where ``rows`` of the steps are not the same."""
    for number, (step, again) in enumerate(zip(one, other, strict=False)):
        for key in step:
            if key not in again or not same(step[key][rows], again[key][rows]):
                return f"{what} differ in {key!r} of step {number}"
    return None if len(one) == len(other) else f"{what} differ in when episodes end"


def _layout(state: EnvState) -> str:
    return ", ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in tensors_of(state)) or "nothing"
