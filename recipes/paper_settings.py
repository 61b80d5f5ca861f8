"""How RL² is trained for each cell of the paper's tables: keyword arguments of `recipes.bandit` and `recipes.tabular_mdp`."""

from typing import Any

__all__ = ["RL2_SETTINGS"]

BANDITS: dict[str, Any] = {"trials": 1024, "gamma": 1.0, "lmbda": 0.3, "epochs": 4, "minibatches": 8, "entropy": 0.02}
MDPS: dict[str, Any] = {"trials": 1024, "gamma": 0.99, "lmbda": 0.7, "epochs": 4, "minibatches": 8, "entropy": 0.01}

RL2_SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "bandits": {
        # The defaults of recipes.bandit, which come near the Bayes optimum.
        "10,5": {**BANDITS, "units": 64, "lr": 3e-3, "env_steps": 3_000_000},
        "10,10": {**BANDITS, "units": 64, "lr": 3e-3, "env_steps": 3_000_000},
        # Placeholders from here on, to be replaced by what a search finds: more arms and pulls, more units and steps.
        "10,50": {**BANDITS, "units": 128, "lr": 3e-3, "env_steps": 10_000_000},
        "100,5": {**BANDITS, "units": 128, "lr": 1e-3, "env_steps": 40_000_000},
        "100,10": {**BANDITS, "units": 128, "lr": 1e-3, "env_steps": 60_000_000},
        "100,50": {**BANDITS, "units": 128, "lr": 1e-3, "env_steps": 100_000_000},
        "500,5": {**BANDITS, "units": 128, "lr": 1e-3, "env_steps": 100_000_000, "trials": 512},
        "500,10": {**BANDITS, "units": 128, "lr": 1e-3, "env_steps": 150_000_000, "trials": 512},
        "500,50": {**BANDITS, "units": 128, "lr": 1e-3, "env_steps": 200_000_000, "trials": 512},
    },
    "mdps": {
        # The defaults of recipes.tabular_mdp.
        "10": {**MDPS, "units": 128, "lr": 1e-3, "env_steps": 60_000_000},
        # Placeholders: longer trials, more steps; smaller batches of trials, so that there are as many updates.
        "25": {**MDPS, "units": 128, "lr": 1e-3, "env_steps": 80_000_000},
        "50": {**MDPS, "units": 128, "lr": 1e-3, "env_steps": 100_000_000, "trials": 512},
        "75": {**MDPS, "units": 128, "lr": 1e-3, "env_steps": 120_000_000, "trials": 512},
        "100": {**MDPS, "units": 128, "lr": 1e-3, "env_steps": 150_000_000, "trials": 512},
    },
}
"""``RL2_SETTINGS[table][cell]``, with the reason above each that is not a recipe's default."""
