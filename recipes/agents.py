"""The agents in recipes/pretrained, played on held-out tasks as anyone would play them, and the page of what each scores."""

from pathlib import Path

import torch
import tyro
from rich.console import Console
from torchrl.envs import Compose, TransformedEnv

from recipes.experiment import ENVS, REPORT_TASKS, draw_tasks, stream_seed
from recipes.paper_cells import TASK_SEED
from recipes.paper_page import markdown
from recipes.tabular_mdp import EPISODE_STEPS
from rl2_torchrl import AdaptiveAgent, PreviousStep, TaskSampler, Trial
from rl2_torchrl.envs import BernoulliBandit, TabularMDP, random_mdps, uniform_means
from rl2_torchrl.evaluation import AdaptationCurve
from rl2_torchrl.report import made_by

FOLDER = Path("recipes/pretrained")


def main(
    *, folder: Path = FOLDER, trials: int = 10_000, page: Path = FOLDER / "README.md"
) -> dict[str, AdaptationCurve]:
    """Plays every agent of a folder on the tasks of the paper's tables, and writes the page of their scores.

    Args:
        folder: agents, bandits_<pulls>_<arms>_<learns from>.safetensors and mdps_<episodes>_<learns from>.safetensors.
        trials: held-out tasks, a trial each.
        page: where the table goes.
    """
    if trials < 2:
        raise ValueError(f"trials={trials}: a standard error needs two at least. Pass 10000 for figures to report.")
    curves = {path.name: score(path, trials) for path in sorted(folder.glob("*.safetensors"))}
    rows = [row_of(folder / name, curve) for name, curve in curves.items()]
    table = markdown(
        ["file", "env", "trained with", "network", "bytes", "return of a trial", "± standard error", "trials"], rows
    )
    command = f"`python -m recipes.agents --trials {trials}`, commit {made_by()['commit']}"
    text = (
        f"Load one by `rl2_torchrl.AdaptiveAgent.load(file)`. Scores on held-out tasks, acting by sampling: {command}."
    )
    page.write_text(f"# Trained agents\n{text}\n\n{table}\n")
    Console().print(f"page: {page}")
    return curves


def score(path: Path, trials: int) -> AdaptationCurve:
    """The returns of an agent's trials on held-out tasks of the env that its file is named after."""
    torch.manual_seed(TASK_SEED)
    return AdaptationCurve(play(AdaptiveAgent.load(path), held_out(path.stem, trials)).unsqueeze(-1))


def held_out(name: str, trials: int) -> TransformedEnv:
    """Held-out trials side by side, of the env that an agent is named after: those of the paper's tables, in their order."""
    kind, episodes, *more = name.split("_")
    seed = stream_seed(TASK_SEED, ENVS)
    if kind == "bandits":
        env, tasks = BernoulliBandit(int(more[0]), batch_size=(trials,), seed=seed), uniform_means(int(more[0]))
    elif kind == "mdps":
        env, tasks = TabularMDP(episode_steps=EPISODE_STEPS, batch_size=(trials,), seed=seed), random_mdps()
    else:
        raise ValueError(
            f"{name!r} is named after no env: bandits_<pulls>_<arms>_<learns from> or mdps_<episodes>_<learns from>."
        )
    sampler = TaskSampler.fixed(draw_tasks(tasks, TASK_SEED, REPORT_TASKS, trials))
    return TransformedEnv(env, Compose(Trial(episodes=int(episodes)), sampler, PreviousStep()))


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


def row_of(path: Path, curve: AdaptationCurve) -> list[str]:
    """What the page says of an agent."""
    kind, episodes, *more = path.stem.split("_")
    env = f"{episodes} pulls of {more[0]} arms" if kind == "bandits" else f"{episodes} episodes of a tabular MDP"
    told = {"rewards": "rewards only", "task": "the task told"}.get(more[-1] if more else "", "-")
    sizes = [env, told, network_of(AdaptiveAgent.load(path)), str(path.stat().st_size)]
    return [f"`{path.name}`", *sizes, f"{curve.mean:.2f}", f"{curve.se:.2f}", str(curve.num_tasks)]


def network_of(agent: AdaptiveAgent) -> str:
    """The sizes of an agent's layers, such as "GRU 64, 128"."""
    modules = list(agent.policy.modules())
    [gru] = [module for module in modules if isinstance(module, torch.nn.GRU)]
    *hidden, _ = [module.out_features for module in modules if isinstance(module, torch.nn.Linear)]
    return ", ".join([f"GRU {gru.hidden_size}", *map(str, hidden)])


if __name__ == "__main__":
    tyro.cli(main)
