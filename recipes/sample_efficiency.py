"""How fast our agent, RL² by hand in PyTorch and SB3-contrib's RecurrentPPO learn the same trials, by env steps and minutes.

What is there in ``folder`` is not trained again. Needs the extra sb3.
"""

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Literal

import torch
from matplotlib.figure import Figure

from recipes import bandit, grid_navi
from recipes.cli import cli
from recipes.compare import Curve, curve_of, draw_curves, points, with_error
from recipes.other_programs import PROGRAMS, Trials, import_sb3, trial_return
from recipes.presets import PRESETS
from recipes.reports import finished_report, read_report
from recipes.results import table
from recipes.rules import bandit_settings
from recipes.run import Run
from recipes.settings import Learning, whole_batches
from recipes.streams import ENVS, HELD_OUT_TASKS, TRAIN_TASKS, draw_tasks, stream_seed
from rl2_torchrl import TaskDistribution, baselines
from rl2_torchrl.envs import BernoulliBandit, GridNavi, TensorEnv, grid_goals, uniform_means
from rl2_torchrl.report import made_by

NAMES = {"rl2_torchrl": "rl2_torchrl", "plain": "RL² by hand (plain PyTorch)", "sb3": "SB3-contrib RecurrentPPO"}
#: Updates between evaluations, from the first one on: what `train` has by default, and so our agent.
EVAL_INTERVAL = 20
#: What the page says of the errors of several seeds.
OF_SEEDS = (
    "± is the standard error over the seeds, a rough one of so few; bands are two of it. On bandits each seed is evaluated "
    "on 2,048 tasks of its own, which alone make it 0.03 for three seeds: a mean may lie above the optimum, which is that "
    "over all tasks."
)
#: Folders of the trainings of a world by a program.
Runs = dict[tuple[str, str], list[Path]]


@dataclass(frozen=True)
class World:
    """Trials that all learn.

    Args:
        title: what they are.
        episodes: episodes of a trial.
        env_steps: env steps of a training.
        learning: of all programs: what the recipe has, from rewards alone.
        make_env: ``(rows, seed)`` to an env.
        tasks: tasks to train on.
        held_out: tasks of the evaluations.
        best: Bayes-optimal return of a trial.
        recipe: trains our agent with ``learning`` and ``run``.
    """

    title: str
    episodes: int
    env_steps: int
    learning: Learning
    make_env: Callable[[int, int], TensorEnv]
    tasks: TaskDistribution
    held_out: Callable[[int], torch.Tensor]
    best: Callable[[], float]
    recipe: Callable[..., object]

    def shortened(self, env_steps: int | None, trials: int | None) -> Learning:
        """``learning`` of so many env steps, in whole batches of so many trials; None for the world's own."""
        asked = {"env_steps": self.env_steps if env_steps is None else env_steps}
        asked |= {} if trials is None else {"trials": trials}
        learning = replace(self.learning, **asked)
        return replace(learning, env_steps=whole_batches(learning.env_steps, learning.trials * self.trials(1, 0).steps))

    def trials(self, rows: int, seed: int, tasks: TaskDistribution | None = None) -> Trials:
        """``rows`` trials, on tasks of their own or those of ``tasks``."""
        env = self.make_env(rows, stream_seed(seed, ENVS))
        return Trials(env, tasks or self.tasks, self.episodes, stream_seed(seed, TRAIN_TASKS))


@cache
def _earned_by_search() -> float:
    """The trial return of who searches the whole grid."""
    return baselines.grid_search(grid_navi.GOALS, episode_steps=grid_navi.EPISODE_STEPS, episodes=4).trial_return


WORLDS = {
    "bandit": World(
        "Bernoulli bandits, 5 arms, 10 pulls",
        10,
        2_000_000,
        bandit_settings(learns_from="rewards")["learning"],
        lambda rows, seed: BernoulliBandit(5, batch_size=(rows,), seed=seed),
        uniform_means(5),
        lambda seed: draw_tasks(uniform_means(5), seed, HELD_OUT_TASKS, 2048),
        lambda: baselines.bayes_optimal_return(5, 10),
        lambda **how: bandit.main(learns_from="rewards", classical=False, **how),
    ),
    "grid_navi": World(
        "GridNavi, 4 episodes of 15 steps",
        4,
        6_000_000,
        PRESETS["GridNavi"].learning,
        lambda rows, seed: GridNavi(episode_steps=grid_navi.EPISODE_STEPS, batch_size=(rows,)),
        grid_goals(),
        lambda seed: grid_navi.GOALS.repeat(24, 1),
        _earned_by_search,
        # The other programs' critics do not see the goal.
        lambda **how: grid_navi.main(network=replace(PRESETS["GridNavi"].network, critic_keys=("time_left",)), **how),
    ),
}


def main(
    *,
    worlds: tuple[Literal["bandit", "grid_navi"], ...] = ("bandit", "grid_navi"),
    programs: tuple[Literal["rl2_torchrl", "plain", "sb3"], ...] = ("rl2_torchrl", "plain", "sb3"),
    env_steps: int | None = None,
    seeds: tuple[int, ...] = (0, 1, 2),
    threads: int = 1,
    trials: int | None = None,
    folder: Path = Path("runs/sample_efficiency"),
    page: Path = Path("recipes/results/sample_efficiency.md"),
) -> Path:
    """Trains all ``programs`` with the same settings on the same tasks, and writes a page with a plot and a table.

    Args:
        worlds: what is learnt.
        programs: who learns it.
        env_steps: env steps of each training, in place of 2 million (bandit) or 6 million, rounded up to whole batches.
        seeds: seeds of networks, envs and tasks: a training each.
        threads: threads of PyTorch.
        trials: trials in a batch, in place of the recipe's.
        folder: where each training leaves its report.json, in <world>_<env steps>_<trials>_<threads>/<program>/seed<seed>.
        page: the page; its plot is beside it.
    """
    torch.set_num_threads(threads)
    torch.set_flush_denormal(True)
    for what, given in {"worlds": worlds, "programs": programs, "seeds": seeds}.items():
        if not given:
            raise ValueError(f"{what} is empty: nothing would be trained. Name one or more, or leave --{what} out.")
    if "sb3" in programs:
        import_sb3()  # before hours of the others' trainings
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds}: each seed once, or one would be weighed twice.")
    learnings = {name: WORLDS[name].shortened(env_steps, trials) for name in worlds}
    # By all that makes a training another one; its minutes are those of so many threads.
    within = {name: folder / f"{name}_{each.env_steps}_{each.trials}_{threads}" for name, each in learnings.items()}
    runs = {
        (name, program): [within[name] / program / f"seed{seed}" for seed in seeds]
        for name, program in product(worlds, programs)
    }
    for (name, program), folders in runs.items():
        for seed, log_dir in zip(seeds, folders, strict=True):
            run = Run(log_dir, seed=seed, report_tasks=2_100, progress=False)
            learning = learnings[name]
            finished_report(log_dir, partial(train, WORLDS[name], program, learning, run), asdict(learning))
    page.parent.mkdir(parents=True, exist_ok=True)
    draw(runs, worlds, programs).savefig(page.with_suffix(".png"), dpi=110)
    page.write_text("\n\n".join(written(runs, worlds, programs, page)) + "\n")
    return page


def train(world: World, program: str, learning: Learning, run: Run, *, resume: bool) -> None:
    """A training of ours, or of another program, which begins anew."""
    torch.manual_seed(run.seed)
    if program == "rl2_torchrl":
        world.recipe(learning=learning, run=replace(run, resume=resume))
    else:
        learn(world, program, learning, run)


def learn(world: World, program: str, learning: Learning, run: Run) -> None:
    """Trains another program, and leaves what `recipes.compare` reads of a run."""
    held_out = world.held_out(run.seed)
    judged = world.trials(len(held_out), run.seed, lambda batch_size, generator: held_out)
    trials = world.trials(learning.trials, run.seed)
    learner = PROGRAMS[program](trials, learning, learning.env_steps)
    history, updates, start = [], 0, time.perf_counter()

    def after_update(env_steps: int) -> None:
        nonlocal updates
        if updates % EVAL_INTERVAL == 0 or env_steps == learning.env_steps:
            row = {"env_steps": env_steps, "time/seconds": time.perf_counter() - start}
            history.append(row | {"eval/trial_return": trial_return(judged, learner.act)})
        updates += 1

    learner.learn(after_update)
    report = {
        "title": NAMES[program],
        "agent": {"mean": history[-1]["eval/trial_return"]},
        "train": {"history": history},
    }
    run.log_dir.mkdir(parents=True, exist_ok=True)
    (run.log_dir / "report.json").write_text(json.dumps(report | made_by(), indent=1) + "\n")


# ------------------------------------------------------------------------ page
def draw(runs: Runs, worlds: tuple[str, ...], programs: tuple[str, ...]) -> Figure:
    """A row for each world: held-out return over env steps, and over minutes."""
    figure = Figure(figsize=(10, 3.6 * len(worlds)), layout="constrained")
    for row, name in zip(figure.subplots(len(worlds), 2, squeeze=False), worlds, strict=True):
        for axes, by in zip(row, ("steps", "minutes"), strict=True):
            axes.axhline(WORLDS[name].best(), color="0.4", ls=":", lw=1, label="Bayes optimum")
            draw_curves(axes, curves(runs, name, programs, by), by, "held-out return of a trial")
            axes.set_title(WORLDS[name].title)
            axes.get_legend().remove()
        row[1].set_xscale("log")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def curves(runs: Runs, world: str, programs: tuple[str, ...], by: Literal["steps", "minutes"]) -> list[Curve]:
    """The curve of each program."""
    return [curve_of(NAMES[program], runs[world, program], by, "eval/trial_return") for program in programs]


def written(runs: Runs, worlds: tuple[str, ...], programs: tuple[str, ...], page: Path) -> list[str]:
    """The page's paragraphs."""
    about = made_by()
    parts = [
        f"# {page.stem.replace('_', ' ')}",
        "The same trials, tasks, batches, epochs, minibatches, discounts, entropy bonus and learning rate for all, from rewards "
        "alone: those of our recipe; means of the seeds. By hand: `torch.nn.GRU`, shared by policy and value, PPO over whole "
        "trials (`recipes/other_programs.py`). RecurrentPPO: its LSTM, a trial is an episode, and its input the transition "
        f"that RL² sees. Evaluations, every {EVAL_INTERVAL} updates on the same held-out tasks by sampled actions, are part of the "
        "minutes. Minutes to 95 %: to the first evaluation of 95 % of the optimum, of the seeds that came there.",
        "The networks are each program's own, and a part of what is compared: all have a memory of 64 units; our recipe has a "
        "hidden layer of 128 behind it, first weights that remember a whole trial, and a critic of layers of its own that is told "
        "the time left; the others have linear heads of policy and value alone, and first weights as usual.",
        *[OF_SEEDS] * any(len(folders) > 1 for folders in runs.values()),
        f"![held-out return]({page.with_suffix('.png').name})",
    ]
    for name in worlds:
        parts += [f"## {WORLDS[name].title}: Bayes optimum {WORLDS[name].best():.3f}", figures(runs, name, programs)]
    versions = ", ".join(f"{package} {number}" for package, number in about["versions"].items())
    commits = dict.fromkeys(read_report(each)["commit"] or "-" for folders in runs.values() for each in folders)
    return [*parts, f"Made by `{about['command']}`, trainings at commits {', '.join(commits)}, with {versions}."]


def figures(runs: Runs, world: str, programs: tuple[str, ...]) -> str:
    """A row for each program: at equal env steps, at equal minutes, and how long it took to come near the optimum."""
    by_steps, by_minutes = (curves(runs, world, programs, by) for by in ("steps", "minutes"))
    last, end = (min(each.x[-1] for each in those) for those in (by_steps, by_minutes))
    near = 0.95 * WORLDS[world].best()
    rows = []
    for program, steps, minutes in zip(programs, by_steps, by_minutes, strict=True):
        # Of each seed to its own end: the curve by minutes goes as far as the fastest one.
        seeds = [points(run, "minutes", "eval/trial_return") for run in runs[world, program]]
        reached = [x[values >= near][0] for x, values in seeds if max(values) >= near]
        some = f" ({len(reached)} of {len(seeds)} seeds)" * (len(reached) < len(seeds))
        in_all = fmean(x[-1] for x, _ in seeds)
        rows.append(
            [
                steps.name,
                with_error(*steps.at(last)),
                with_error(*minutes.at(end)),
                f"{fmean(reached):.2f}{some}" if reached else "-",
                f"{in_all:.2f}",
                f"{1e3 * steps.x[-1] / in_all / 60:.1f}",
            ]
        )
    return table(
        [
            "",
            f"after {last:.1f} M env steps",
            f"after {end:.2f} minutes",
            "minutes to 95 %",
            "minutes in all",
            "1,000 env steps/s",
        ],
        rows,
    )


if __name__ == "__main__":
    cli(main)
