"""What the HalfCheetah recipe reports: velocities and errors of speed beside the returns, in tables and plots."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from tensordict import TensorDictBase

from rl2_torchrl import AdaptationReport
from rl2_torchrl.evaluation import AdaptationCurve

__all__ = ["CheetahReport", "VelocityRecord"]

#: Steps of an episode that the report looks at closely: in the first episode the agent has yet to find out what to do.
START_STEPS = 20


class VelocityRecord:
    """The velocity and the task of every step of played trials; all rows begin and end theirs together."""

    def __init__(self):
        self._velocities: list[torch.Tensor] = []
        self._tasks: list[torch.Tensor] = []

    def __call__(self, tensordict: TensorDictBase) -> None:
        """Writes one step down."""
        self._velocities.append(tensordict["next", "velocity"].squeeze(-1).clone())
        self._tasks.append(tensordict["task"].squeeze(-1).clone())

    @property
    def velocities(self) -> torch.Tensor:
        """Velocities ``[num_tasks, steps]`` in m/s."""
        return torch.stack(self._velocities, -1)

    def errors(self, episodes: int) -> AdaptationCurve:
        """``sum_t |v_t - task|`` of every episode and task: the absolute value comes first, then all means."""
        errors = (self.velocities - torch.stack(self._tasks, -1)).abs().double()
        return AdaptationCurve(errors.reshape(len(errors), episodes, -1).sum(-1))


@dataclass
class CheetahReport(AdaptationReport):
    """An `AdaptationReport` with the velocities themselves, and for a goal velocity how far they were from it.

    Args:
        horizon: steps of an episode.
        tasks: the held-out tasks, [num_tasks].
        velocities: of the agent in every step, [num_tasks, steps], in m/s.
        speed_errors: ``sum_t |v_t - task|`` of every episode, by name.
        is_speed: whether the task is a velocity.
    """

    horizon: int = 200
    tasks: torch.Tensor = None
    velocities: torch.Tensor = None
    speed_errors: dict[str, AdaptationCurve] = None
    is_speed: bool = False

    def entries(self) -> dict[str, Any]:
        """The episodes' returns in each direction, or their errors of speed; and how the agent runs at their starts."""
        entries = self._speed_entries() if self.is_speed else self._direction_entries()
        starts = {f"{name}_at_start": values.mean(0).tolist() for name, values in self.starts().items()}
        return {**entries, **starts}

    def summary(self) -> dict[str, float | str]:
        """First and last episode: the errors of speed, or the return in each direction; and what the ablations make of the last."""
        if self.is_speed:
            errors = {name: _first_and_last(curve.per_episode.tolist()) for name, curve in self.speed_errors.items()}
            return {f"sum of abs(v - goal), {name.replace('_', ' ')}": cell for name, cell in errors.items()}
        return {
            f"{way}, {name.replace('_', ' ')}": _first_and_last(per_episode)
            for way, curves in self._direction_entries().items()
            for name, per_episode in curves.items()
        }

    def _speed_entries(self) -> dict[str, Any]:
        per_episode = {
            name: {"per_episode": curve.per_episode.tolist(), "per_episode_se": curve.per_episode_se.tolist()}
            for name, curve in self.speed_errors.items()
        }
        return {"speed_error": per_episode}

    def _direction_entries(self) -> dict[str, Any]:
        curves = {"agent": self.agent, "greedy": self.greedy, **self.ablations}
        return {
            way: {name: curve.returns[rows].mean(0).tolist() for name, curve in curves.items()}
            for way, rows in self._directions.items()
        }

    @property
    def _directions(self) -> dict[str, torch.Tensor]:
        """Which tasks ``[num_tasks]`` are of each direction; one that has none, as it may of a few, is left out."""
        rows = {"forward": self.tasks > 0, "backward": self.tasks < 0}
        return {way: own for way, own in rows.items() if own.any()}

    def save(self, folder: str | Path) -> Path:
        """Writes ``velocity.png`` beside what every report writes."""
        path = super().save(folder)
        self.plot_velocity().savefig(path.parent / "velocity.png", dpi=130)
        return path

    def plot_velocity(self):
        """How the agent runs, as a `matplotlib.figure.Figure`: a few trials, and the mean over all at their episodes' starts."""
        figure = Figure(figsize=(15, 4.8), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(2, 1))
        self._plot_trials(left)
        self._plot_starts(right)
        figure.suptitle(f"{self.title}: held-out trials, weights fixed")
        return figure

    def _plot_trials(self, axes) -> None:
        order = self.tasks.argsort()
        shown = order[torch.linspace(0, len(order) - 1, min(6, len(order))).long()]
        episodes = self.velocities[shown].reshape(len(shown), -1, self.horizon)  # [shown, episodes, steps]
        smooth = torch.nn.functional.avg_pool1d(episodes, 11, 1, 5, count_include_pad=False).flatten(1)
        colors = colormaps["viridis"](torch.linspace(0, 0.9, len(shown)).tolist())
        for color, task, velocity in zip(colors, self.tasks[shown].tolist(), smooth, strict=True):
            axes.plot(velocity, color=color, lw=1.3, label=f"task {task:+.2f}")
            if self.is_speed:
                axes.axhline(task, color=color, lw=1, ls=":")
        for start in range(self.horizon, self.velocities.shape[1], self.horizon):
            axes.axvline(start, color="grey", lw=1, ls="--")
        goal = "; dotted: the goal" if self.is_speed else ""
        axes.set(xlabel="step of the trial (dashed: a new episode)", ylabel=f"velocity (m/s, over 0.5 s{goal})")
        axes.margins(y=0.15)
        axes.legend(ncols=len(shown), fontsize=8, frameon=False, loc="upper center")
        axes.grid(alpha=0.25)

    def _plot_starts(self, axes) -> None:
        """Mean over tasks ± 2 SE, without smoothing: in its first episode the agent has to find out, in the last it knows."""
        for name, values in self.starts().items():
            for episode, style in ((0, "-"), (values.shape[1] - 1, "--")):
                own = values[:, episode]
                mean, se = own.mean(0), own.std(0, correction=0) / (len(own) - 1) ** 0.5  # of one task no band
                steps = range(1, len(mean) + 1)
                color = "#0072b2" if name == "backward" else "#e69f00"
                label = f"{name.replace('_', ' ')}, episode {episode + 1}"
                axes.plot(steps, mean, color=color, ls=style, label=label)
                axes.fill_between(steps, mean - 2 * se, mean + 2 * se, color=color, alpha=0.2, lw=0)
        what = "|velocity - goal|" if self.is_speed else "velocity"
        axes.set(xlabel="step of the episode", ylabel=f"mean {what} (m/s; bands: 2 SE)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False)
        axes.grid(alpha=0.25)

    def starts(self) -> dict[str, torch.Tensor]:
        """The first steps of every episode, ``[num_tasks, episodes, steps]`` in m/s: velocities by direction, or ``|v - task|``."""
        episodes = self.velocities.reshape(len(self.tasks), -1, self.horizon)[..., :START_STEPS]
        if self.is_speed:
            return {"speed_error": (episodes - self.tasks[:, None, None]).abs()}
        return {way: episodes[rows] for way, rows in self._directions.items()}


def _first_and_last(per_episode: Sequence[float]) -> str:
    return f"{per_episode[0]:.1f} → {per_episode[-1]:.1f}"
