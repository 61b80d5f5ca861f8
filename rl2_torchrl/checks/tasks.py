"""Rules on tasks: given to the env, constant in a trial, different elsewhere, held out, and hidden from the agent."""

from __future__ import annotations

from functools import partial

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import EnvBase

from rl2_torchrl.checks.evidence import Evidence, NotChecked, Rule
from rl2_torchrl.env_check.outcomes import flat
from rl2_torchrl.env_check.shown import BITS, bits_of, drawn, shown
from rl2_torchrl.tasks import TaskSampler, _InOrder
from rl2_torchrl.trial import base_of, rows_of, transforms_of

__all__ = ["RULES"]


def task_given(seen: Evidence) -> str | None:
    """An env that takes a task is given one."""
    waits = seen.ask(partial(_waits_for, key=seen.task_key))
    if waits is None:
        raise NotChecked("the env is in other processes")
    if waits:
        return f"the env takes a {seen.task_key!r} at each reset, and nobody draws one"


def _waits_for(env: EnvBase, key: NestedKey) -> bool:
    # Whoever draws tasks shows them, as TaskSampler does; a batch may lack them, or hold the zeros that nobody has drawn.
    return key in env.full_state_spec.keys(True) and key not in env.full_observation_spec.keys(True)


def task_constant(seen: Evidence) -> str | None:
    """A trial has one task."""
    moved = (seen.task[:, 1:] != seen.task[:, :-1]).any(-1) & seen.inner
    if moved.any():
        return f"the task changes inside a trial, behind {seen.place(moved)}"


def tasks_drawn(seen: Evidence) -> str | None:
    """Draws differ, within one and from one to the next."""
    if seen.sampler is None:
        raise NotChecked("the env shows no TaskSampler")
    if isinstance(seen.sampler.distribution, _InOrder):
        raise NotChecked("TaskSampler.fixed hands out a list on purpose")
    tasks = _draws(seen.sampler)
    times, size = tasks.shape[:2]
    if (tasks == tasks[:1]).all():
        return f"{times} draws of {size} tasks gave each time the same"
    if size > 1 and (tasks == tasks[:, :1]).all():
        return f"{times} draws of {size} tasks gave {size} times the same each"


def tasks_differ(seen: Evidence) -> str | None:
    """Rows have tasks of their own, and workers too."""
    if seen.ask(_hands_out_a_list):
        raise NotChecked("TaskSampler.fixed hands out a list on purpose")
    # Two trials tell more than one, where every row has them.
    task = seen.task[:, [0, -1]] if seen.starts[:, 1:].any(1).all() else seen.task[:, :1]
    if len(task) == 1:
        raise NotChecked("there is a single row")
    parts = {"rows have the same task": len(task), "workers draw the same tasks": _num_workers(seen)}
    for what, number in parts.items():
        if number == 1 or len(task) % number:
            continue
        blocks = task.reshape(number, -1, task.shape[-1])
        if (blocks == blocks[:1]).all():
            known = seen.ask(_some_tasks)
            if (number - 1) * bits_of(blocks[0], blocks[0] if known is None else known.to(blocks)) < BITS:
                raise NotChecked(f"{len(task)} rows are too few to tell equal tasks from chance")
            return f"all {number} {what}"


def tasks_held_out(seen: Evidence) -> str | None:
    """Held-out tasks are no training tasks."""
    if seen.held_out is None:
        raise NotChecked("no held_out tasks were given")
    sizes = min(len(seen.batch), 1024)
    train, held_out = ([tuple(t) for t in _tasks_of(s, sizes).tolist()] for s in (seen.sampler, seen.held_out))
    if len(set(train)) < 0.98 * len(train):
        raise NotChecked("there are so few tasks that training plays all of them")
    known = set(train)
    again = sum(task in known for task in held_out)
    if again > len(held_out) / 10:
        return f"{again} of {len(held_out)} held-out tasks are training tasks"


def task_hidden(seen: Evidence) -> str | None:
    """The task does not stand in what the actor reads, at whatever scale."""
    if seen.task_key in seen.probe.actor.in_keys:
        return f"the actor reads {seen.task_key!r}"
    task = seen.task[:64]
    differs, firsts = (task[:, 0] != task[:1, 0]).any(0), torch.zeros(task.shape[:2], dtype=torch.bool)
    firsts[:, 0] = True
    told = {
        number: f"number {number} of the task is {key!r}{where}"
        for key in seen.probe.observed
        for number, where in shown(flat(seen.need(key)[:64], 2), task, firsts).items()
    }
    if len(told) == differs.sum() > 0:
        return f"the actor reads all of the task: {', '.join(told.values())}"
    seen.report.notes += told.values()


def _hands_out_a_list(env: EnvBase) -> bool:
    samplers = [each for each in transforms_of(env) if isinstance(each, TaskSampler)]
    return bool(samplers) and isinstance(samplers[0].distribution, _InOrder)


def _some_tasks(env: EnvBase) -> torch.Tensor | None:
    """Tasks ``[K, n]`` of who draws them around the env, or in its first row; None if nobody shows."""
    around = [transforms_of(each) for each in (env, *rows_of(env)[:1])]
    samplers = [each for transforms in around for each in transforms if isinstance(each, TaskSampler)]
    return _draws(samplers[0]).flatten(0, 1) if samplers else None


def _num_workers(seen: Evidence) -> int:
    return getattr(base_of(seen.env), "num_workers", getattr(seen.collector, "num_workers", 1))


def _draws(sampler: TaskSampler, size: torch.Size | None = None, number: int = 256) -> torch.Tensor:
    """At least ``number`` tasks of ``sampler``, from its seed, ``[S, N, n]``: as many at once as its env asks for, or ``size``.

    A distribution may have no more at once.
    """
    size = sampler.container.base_env.batch_size if size is None else size
    try:
        return drawn(sampler.distribution, size, sampler.generator.initial_seed(), number // size.numel() + 2)
    except (TypeError, ValueError, RuntimeError) as error:
        raise NotChecked(f"a copy of the task distribution gives no {size.numel()} tasks at once ({error})") from error


def _tasks_of(source: EnvBase | TaskSampler | torch.Tensor | TensorDictBase | None, size: int) -> torch.Tensor:
    """About a thousand tasks ``[N, n]``, drawn ``size`` at a time."""
    if isinstance(source, EnvBase):
        source = next((t for t in transforms_of(source) if isinstance(t, TaskSampler)), None)
    if source is None:
        raise NotChecked("the env shows no TaskSampler")
    if isinstance(source, TaskSampler):
        if not isinstance(source.distribution, _InOrder):
            return _draws(source, torch.Size([size]), 1024).flatten(0, 1)
        source = source.distribution.tasks
    return flat(source[:4096], 1)


RULES: dict[Rule, str] = {
    task_given: "All trials then play one task, and there is nothing to adapt to: add a TaskSampler, "
    "TransformedEnv(env, Compose(Trial(...), TaskSampler(...), ...)). A transform of your own that draws tasks writes them to the "
    "observation_spec; an env that draws them itself leaves them out of its state_spec.",
    task_constant: "A trial is one task, or there is nothing to adapt to: draw tasks at trial starts only.",
    tasks_drawn: "A few tasks are learnt by heart: draw with the generator that is passed, batch_size tasks at a time. A "
    "curriculum that begins with one task is no fault: train(check=False), once all else is checked, or begin with two.",
    tasks_differ: "They are one row's data again: give each worker's TaskSampler a seed of its own, or wrap one around all.",
    tasks_held_out: "What is measured is not adaptation to new tasks: draw held-out tasks with another seed.",
    task_hidden: "An agent that sees its task has nothing to find out: leave it out of the observations; a critic may read it "
    "(extra_keys).",
}
