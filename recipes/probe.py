"""What an agent's memory knows: posterior means read from its hidden state by a linear layer, R² at every step of the trial.

The posterior mean of every arm's (every state's and action's) reward is what an optimal agent must know of the past. A ridge
regression of it on the hidden state is fitted on half of the trials, for each step by itself, and scored on the other half. Beside
it the same of a network that was never trained, which is shown the same actions and rewards: what any GRU remembers.
"""

import csv
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from torchrl.envs import EnvBase

from recipes.agents import FOLDER, held_out
from recipes.cli import cli
from recipes.posterior import Posterior, beta_moments, normal_moments
from recipes.results import table
from rl2_torchrl import AdaptiveAgent
from rl2_torchrl.agent.step import PolicyStep
from rl2_torchrl.envs import TabularMDP
from rl2_torchrl.report import made_by

AGENTS = (
    "bandits_10_5_rewards",
    "bandits_100_5_task",
    "bandits_100_10_task",
    "bandits_100_50_task",
    "mdps_10_rewards",
    "mdps_25_task",
)


def main(
    *,
    agents: tuple[Path, ...] = tuple(FOLDER / f"{name}.safetensors" for name in AGENTS),
    trials: int = 4000,
    ridge: float = 1e-3,
    page: Path = Path("recipes/results/probe.md"),
) -> dict[str, torch.Tensor]:
    """Probes agents, and writes a page, a plot and a CSV file of R² by step.

    Args:
        agents: files of agents, named after their envs: bandits_<pulls>_<arms>_<learns from>.safetensors and
            mdps_<episodes>_<learns from>.safetensors.
        trials: held-out tasks, a trial each; the readout is fitted on one half of them.
        ridge: weight of the readout's squared weights, per trial; hidden states are brought to unit scale first.
        page: the page; plot and CSV are beside it.

    Returns:
        R² by agent, ``[steps, 2]``: trained and untrained. The first step's, at which nothing is known, is left out.
    """
    if trials < 100:
        raise ValueError(f"trials={trials}: a readout of some hundred weights fits so few by chance. Pass 4000.")
    names = [path.stem for path in agents]
    if not names:
        raise ValueError(
            "agents is empty: nothing would be probed. Name files of agents, or leave it out for the shipped ones."
        )
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"agents has {', '.join(twice)} twice, and one of two would be lost: probe each file by itself."
        )
    scores = {path.stem: probe(path, trials, ridge) for path in agents}
    page.parent.mkdir(parents=True, exist_ok=True)
    with page.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["agent", "step", "r2", "r2_untrained"])
        for name, score in scores.items():
            writer.writerows(
                [name, step + 2, *(f"{each:.4f}" for each in row)] for step, row in enumerate(score.tolist())
            )
    plot(scores).savefig(page.with_suffix(".png"), dpi=110)
    page.write_text(text_of(scores, page))
    return scores


def probe(path: Path, trials: int, ridge: float) -> torch.Tensor:
    """R² of the readout at each step but the first, of the agent in a file and of an untrained one, ``[steps, 2]``."""
    torch.manual_seed(0)
    agent = AdaptiveAgent.load(path)
    played = play(agent, untrained(path), held_out(path.stem, trials))
    trained, control = (r_squared(hidden, played.posterior, ridge) for hidden in played.hidden)
    return torch.stack([trained, control], -1)[1:]


# ------------------------------------------------------------------- trials
@dataclass(frozen=True)
class Played:
    """Trials by step: hidden states ``[steps, trials, units]`` of two agents, posterior means ``[steps, trials, numbers]``."""

    hidden: tuple[torch.Tensor, torch.Tensor]
    posterior: torch.Tensor


def play(agent: AdaptiveAgent, control: AdaptiveAgent, env: EnvBase) -> Played:
    """A trial in each row of ``env``, which all end at the same step; ``control`` is shown what ``agent`` does and earns."""
    td, (rows,) = env.reset(), env.batch_size
    hidden, seen, done = ([], []), [], False
    for each in (agent, control):
        each.new_trial(rows)
    while not done:
        shown = [td[key] for key in agent.signature.observations]
        seen.append(td["trans"])
        action = torch.as_tensor(agent.act(*shown))
        control.act(*shown)
        control.memory[0] = agent.memory[0].clone()  # the last action
        for states, each in zip(hidden, (agent, control), strict=True):
            states.append(hidden_of(each))
        td = env.step(td.set("action", action))["next"]
        for each in (agent, control):
            each.observe(td["reward"], td["episode_done"])
        done = td["done"].all()
    posterior = posterior_of(env)(torch.stack(seen, 1)).transpose(0, 1)
    return Played(tuple(map(torch.stack, hidden)), posterior)


def hidden_of(agent: AdaptiveAgent) -> torch.Tensor:
    """The hidden state ``[rows, units]`` of an agent with one core of one layer; of an LSTM its output."""
    memory = zip(agent.signature.memory, agent.memory, strict=True)
    hidden = next(each for name, each in memory if "hidden" in str(name))
    return hidden.flatten(1).clone()


def untrained(path: Path) -> AdaptiveAgent:
    """The agent of a file with all weights drawn anew."""
    agent = AdaptiveAgent.load(path)
    policy = deepcopy(agent.policy)
    for module in policy.modules():
        if isinstance(module, torch.nn.GRU | torch.nn.LSTM | torch.nn.Linear):
            module.reset_parameters()
    return AdaptiveAgent(PolicyStep(policy, agent.signature), agent.signature)


def posterior_of(env: EnvBase) -> Posterior:
    """What the trials of ``env`` have shown of each arm, or of each state and action."""
    if isinstance(env.base_env, TabularMDP):
        return Posterior(normal_moments, env.base_env.num_actions, env.base_env.num_states)
    return Posterior(beta_moments, env.base_env.num_arms)


# ------------------------------------------------------------------ readout
def r_squared(hidden: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    """R² ``[steps]`` of linear readouts of ``target`` ``[steps, trials, numbers]`` from ``hidden`` ``[steps, trials, units]``.

    All numbers of a step together: 1 less the share of their variance, over the trials on which nothing was fitted, that is left.
    """
    return torch.stack([_r_squared(h.double(), y.double(), ridge) for h, y in zip(hidden, target, strict=True)])


def _r_squared(hidden: torch.Tensor, target: torch.Tensor, ridge: float) -> torch.Tensor:
    half = len(hidden) // 2
    mean, scale = hidden[:half].mean(0), hidden[:half].std(0).clamp(min=1e-6)
    features, centre = (hidden - mean) / scale, target[:half].mean(0)
    fitted = features[:half]
    weights = torch.linalg.solve(
        fitted.T @ fitted + half * ridge * torch.eye(features.shape[1], dtype=features.dtype),
        fitted.T @ (target[:half] - centre),
    )
    left = (target[half:] - centre - features[half:] @ weights).square().sum()
    return 1 - left / (target[half:] - target[half:].mean(0)).square().sum()


# --------------------------------------------------------------------- page
def plot(scores: dict[str, torch.Tensor]) -> Figure:
    """R² over the trial, a panel an agent."""
    figure = Figure(figsize=(4 * len(scores), 3.6), layout="constrained")
    for axes, (name, score) in zip(figure.subplots(1, len(scores), squeeze=False)[0], scores.items(), strict=True):
        steps = range(2, len(score) + 2)
        axes.plot(steps, score[:, 0], color="#c1272d", lw=2, label="trained")
        axes.plot(steps, score[:, 1], color="grey", lw=1.5, ls="--", label="untrained")
        axes.set(title=name, xlabel="step of the trial", ylim=(min(0.0, score.min().item()), 1))
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("R² of posterior means, read from the memory")
    figure.axes[0].legend(frameon=False)
    return figure


def text_of(scores: dict[str, torch.Tensor], page: Path) -> str:
    """The page."""
    shares = (0.1, 0.25, 0.5, 1.0)
    head = ["agent", *(f"R² after {share:.0%} of the trial" for share in shares), "untrained, at its end"]
    rows = [
        [name, *(f"{_at(score, share)[0]:.3f}" for share in shares), f"{score[-1, 1]:.3f}"]
        for name, score in scores.items()
    ]
    made = made_by()
    versions = ", ".join(f"{name} {number}" for name, number in made["versions"].items())
    [*paragraphs] = [
        "# probe",
        "How well a linear layer reads the posterior means of all arms (of all states and actions) from the agent's memory: R² on "
        "trials on which it was not fitted. Untrained: a network of the same sizes with weights drawn anew, shown the same.",
        table(head, rows),
        f"![R² over the trial]({page.with_suffix('.png').name})",
        f"Made by `{made['command']}`, commit {made['commit']}, with {versions}.",
    ]
    return "\n\n".join(paragraphs) + "\n"


def _at(score: torch.Tensor, share: float) -> torch.Tensor:
    return score[max(0, round(share * (len(score) + 1)) - 2)]


if __name__ == "__main__":
    cli(main)
