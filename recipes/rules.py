"""Settings of recipes as a rule: what follows from the numbers of arms and pulls."""

from typing import Any, Literal

from recipes.experiment import Learning, Network, Told

__all__ = ["LearnsFrom", "bandit_settings"]

LearnsFrom = Literal["rewards", "task"]


def bandit_settings(arms: int = 5, pulls: int = 10, learns_from: LearnsFrom = "task") -> dict[str, Any]:
    """Network, learning and what training is told, for bandits of ``arms`` arms and trials of ``pulls`` pulls."""
    is_told = learns_from == "task"
    network = Network(
        num_cells=(128,),
        memory_steps=pulls,
        input_gain=3.0,
        critic_keys=("time_left", "task") if is_told else ("time_left",),
    )
    learning = Learning(trials=2048, minibatches=16, env_steps=6_000_000, gamma=1.0, lmbda=0.9, entropy=0.02)
    return {"network": network, "learning": learning, "told": Told(regret=is_told)}
