"""The agents in recipes/pretrained, played on held-out tasks as anyone would play them, and the page of what each scores."""

import re
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from rich.console import Console
from torchrl.envs import Compose, TransformedEnv

from recipes.cli import cli
from recipes.command import arguments
from recipes.paper_cells import TASK_SEED
from recipes.paper_page import markdown
from recipes.streams import ENVS, REPORT_TASKS, draw_tasks, stream_seed
from recipes.tabular_mdp import EPISODE_STEPS
from rl2_torchrl import AdaptationReport, AdaptiveAgent, PreviousStep, RecurrentCore, TaskSampler, Trial
from rl2_torchrl.envs import BernoulliBandit, TabularMDP, random_mdps, uniform_means
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.report import made_by

FOLDER = Path("recipes/pretrained")
#: Names of the paper's agents: pulls and arms, or episodes.
NAMES = re.compile(r"(?:bandits_(\d+)_(\d+)|mdps_(\d+))(?:_.*)?")
#: Agents of other recipes, by the names of their files: the recipe that trained them and reports on them, and its options.
RECIPES = {
    "grid_navi_rewards": ("grid_navi", {}),
    "grid_navi_task": ("grid_navi", {}),
    "point_robot_dense_rewards": ("point_robot", {}),
    "point_robot_sparse_rewards": ("point_robot", {"sparse": True}),
    "half_cheetah_direction_task": ("half_cheetah", {"task": "direction"}),
    "half_cheetah_velocity_task": ("half_cheetah", {"task": "velocity"}),
    "ant_direction_task": ("ant_direction", {}),
    "walker_rewards": ("walker", {}),
}

#: What the page says of agents that a recipe plays.
PLAYED = (
    "A recipe plays one with the network that it has: `GRU 64, 128` is `--units 64 --num-cells 128`, and `GRU 64` is `--units 64 "
    "--num-cells`, with nothing behind it, as in `python -m recipes.bandit --arms 5 --pulls 10 --units 64 --num-cells --weights "
    "recipes/pretrained/bandits_10_5_rewards.safetensors --log-dir runs/played`. Those of neither bandits nor MDPs need none of it."
)


def main(*, folder: Path = FOLDER, trials: int = 10_000, page: Path | None = None) -> dict[str, AdaptationCurve]:
    """Plays every agent of a folder on held-out tasks, and writes the page of their scores.

    Those of the paper's tables are played as anyone would play them, the others by the report of the recipe that trained them.

    Args:
        folder: agents, bandits_<pulls>_<arms>_<learns from>.safetensors, mdps_<episodes>_<learns from>.safetensors, and those that
            are named in `RECIPES`.
        trials: held-out tasks, a trial each; of other recipes at most as many as their reports have.
        page: where the table goes; by default README.md in the folder.
    """
    if trials < 2:
        raise ValueError(f"trials={trials}: a standard error needs two at least. Pass 10000 for figures to report.")
    if not (paths := sorted(folder.glob("*.safetensors"))):
        raise ValueError(
            f"folder={str(folder)!r} holds no agents, <env>_<learns from>.safetensors: name one that does."
        )
    rows = [about(path) for path in paths]  # first: to play them takes long
    curves = {path.name: score(path, trials) for path in paths}
    for row, curve in zip(rows, curves.values(), strict=True):
        row += [f"{curve.mean:.2f}", f"{curve.se:.2f}", str(curve.num_tasks)]
    table = markdown(
        ["file", "env", "trained with", "network", "bytes", "return of a trial", "± standard error", "trials"], rows
    )
    made = made_by()
    text = (
        "Load one by `rl2_torchrl.AdaptiveAgent.load(file)`. Scores on held-out tasks, acting by sampling: "
        f"`{made['command']}`, commit {made['commit']}.\n\n{PLAYED}"
    )
    page = page or folder / "README.md"
    page.write_text(f"# Trained agents\n{text}\n\n{table}\n")
    Console().print(f"page: {page}", markup=False)
    return curves


def score(path: Path, trials: int) -> AdaptationCurve:
    """The returns of an agent's trials on held-out tasks of the env that its file is named after."""
    if path.stem in RECIPES:
        return report_of(path, trials).agent
    torch.manual_seed(TASK_SEED)
    return AdaptationCurve(play(AdaptiveAgent.load(path), held_out(path.stem, trials)).unsqueeze(-1))


def report_of(path: Path, trials: int) -> AdaptationReport:
    """What the recipe that trained an agent reports on it."""
    name, options = RECIPES[path.stem]
    recipe = import_module(f"recipes.{name}")
    with TemporaryDirectory() as folder:
        own = {"weights": path, "report_tasks": min(trials, recipe.RUN.report_tasks), "log_dir": Path(folder)}
        return recipe.main(**arguments(recipe.main, {**options, **own}))


def held_out(name: str, trials: int) -> TransformedEnv:
    """Held-out trials side by side, of the env that an agent is named after: as many as the paper's tables have are on their tasks.

    Fewer bandits are on the first of these, fewer MDPs on others.
    """
    episodes, arms = sizes_of(name)
    seed = stream_seed(TASK_SEED, ENVS)
    if arms is not None:
        env, tasks = BernoulliBandit(arms, batch_size=(trials,), seed=seed), uniform_means(arms)
    else:
        env, tasks = TabularMDP(episode_steps=EPISODE_STEPS, batch_size=(trials,), seed=seed), random_mdps()
    sampler = TaskSampler.fixed(draw_tasks(tasks, TASK_SEED, REPORT_TASKS, trials))
    return TransformedEnv(env, Compose(Trial(episodes=episodes), sampler, PreviousStep()))


def sizes_of(name: str) -> tuple[int, int | None]:
    """Episodes of a trial, and arms, None of an MDP: of the env that an agent is named after."""
    if not (found := NAMES.fullmatch(name)):
        raise ValueError(
            f"{name!r} is named after no bandits and no MDPs, so that nothing says what the agent is to play. If it is one of "
            "them, copy its file to bandits_<pulls>_<arms>_<learns from>.safetensors or mdps_<episodes>_<learns from>.safetensors; "
            "any other is played by its recipe, --weights FILE, and a cheetah's by recipes.agent_benchmark, --env direction or "
            "velocity."
        )
    pulls, arms, episodes = (number and int(number) for number in found.groups())
    return pulls or episodes, arms


def play(agent: AdaptiveAgent, env: TransformedEnv) -> torch.Tensor:
    """The returns ``[N]`` of one trial in each of the rows of ``env``, which all end at the same step."""
    td, (rows,) = env.reset(), env.batch_size
    returns, done = torch.zeros(rows, dtype=torch.float64), False
    agent.new_trial(rows)
    while not done:
        shown = [td[key] for key in agent.signature.observations]
        action = agent.act(*shown)
        td = env.step(td.set("action", torch.as_tensor(action)))["next"]
        agent.observe(td["reward"], td["episode_done"])
        returns += td["reward"].squeeze(-1)
        done = td["done"].all()
    return returns


def about(path: Path) -> list[str]:
    """What the page says of an agent beside its score."""
    told = {"rewards": "rewards only", "task": "the task told"}.get(path.stem.rpartition("_")[-1], "-")
    return [f"`{path.name}`", env_of(path), told, network_of(AdaptiveAgent.load(path)), str(path.stat().st_size)]


def env_of(path: Path) -> str:
    """The env that an agent is named after, in words."""
    if path.stem in RECIPES:
        return path.stem.rpartition("_")[0].replace("_", " ")
    episodes, arms = sizes_of(path.stem)
    return f"{episodes} pulls of {arms} arms" if arms is not None else f"{episodes} episodes of a tabular MDP"


def network_of(agent: AdaptiveAgent) -> str:
    """The sizes of an agent's layers in their order, such as "GRU 64, 128"; with an encoder before the core "32, GRU 64, 128"."""
    sizes = []
    for module in agent.policy.modules():
        if isinstance(module, RecurrentCore):
            sizes.append(f"{type(module).__name__.removesuffix('Core')} {module.features_size}")
        elif isinstance(module, torch.nn.Linear):
            sizes.append(str(module.out_features))
    return ", ".join(sizes[:-1])


if __name__ == "__main__":
    cli(main)
