"""Settings that are known to work, by env: a place to look up what to begin with in an env like one of these.

Each is its recipe's default. `recipes/README.md` lists what they reach, with commands and minutes; `recipes/results` has the pages.
Bandits and tabular MDPs of any size follow rules instead (`recipes.rules`).
"""

from dataclasses import dataclass, replace

from recipes.settings import Learning, Network

__all__ = ["PRESETS", "Preset"]


@dataclass(frozen=True)
class Preset:
    """Settings of one env.

    Args:
        recipe: the recipe whose defaults they are.
        reached: what came out, as `recipes/README.md` says it.
        reason: what in these settings is the env's own, and what it is meant for.
        network: actor and critic.
        learning: batches, and PPO on them.
    """

    recipe: str
    reached: str
    reason: str
    network: Network
    learning: Learning


#: What steps of a batch of some thousand steps in few rows begin with.
_SMALL = {"lr": 1e-3, "lmbda": 0.95, "minibatches": 4, "max_grad_norm": 0.5}

#: What MuJoCo's running robots have in common: two episodes of 200 steps; what a step is worth shows within some tens of steps.
_RUNNING = (
    Network(critic_keys=("time_left", "task")),
    Learning(
        trials=64, env_steps=8_000_000, lr=2e-3, gamma=0.97, lmbda=0.9, minibatches=8, max_grad_norm=0.5, entropy=0.01
    ),
)

PRESETS = {
    "GridNavi": Preset(
        "grid_navi",
        "the Bayes optimum, 37.2, in 17 of 20",
        "What is earned is a trial's plain sum: no discount. The order of the first search decides how well the second can go on. "
        "Orders differ by a few hundredths of what goals differ by: a critic that sees the goal takes the latter out of the noise, "
        "and much entropy that falls late leaves time to compare them. Without both 6 of 12 seeds found the best order.",
        Network(num_cells=(128,), critic_keys=("time_left", "task")),
        Learning(
            trials=1024, gamma=1.0, lmbda=0.95, minibatches=32, max_grad_norm=0.5, entropy=0.1, entropy_decay="late"
        ),
    ),
    "PointRobot": Preset(
        "point_robot",
        "5.5 to 5.7 steps in the first episode, 4.3 to 4.4 in the last",
        "A goal that pays nothing before it is reached has to be searched for: an entropy bonus, without which one of three "
        "seeds finds it.",
        Network(),
        Learning(trials=128, env_steps=3_000_000, lr=1e-3, minibatches=4, max_grad_norm=0.5, entropy=0.1),
    ),
    "HalfCheetah direction": Preset(
        "half_cheetah",
        "forward 577 to 726, backward 1,188 to 1,214",
        "Both directions share one spread of actions, which the one learnt first makes narrow: a small entropy bonus. The recipe "
        "scales rewards, or the critic's gradient would be nearly all of the norm that is clipped.",
        *_RUNNING,
    ),
    "HalfCheetah velocity": Preset(
        "half_cheetah",
        "6.0 to 7.8, greedily 5.6 to 6.6",
        "As for directions; the error falls for longer: in 30 M steps to 8.6, in 50 M to 6.8, means of three seeds.",
        _RUNNING[0],
        replace(_RUNNING[1], env_steps=50_000_000),
    ),
    "AntDirection": Preset(
        "ant_direction", "560 an episode", "Those of the cheetah; nothing was tuned here.", *_RUNNING
    ),
    "CartPole-v1": Preset(
        "cartpole",
        "488 of 500 steps",
        "What is seen is normalised, as of any env whose units one has not chosen.",
        Network(normalize=True, critic_keys=()),
        Learning(trials=64, env_steps=2_000_000, entropy=0.01, **_SMALL),
    ),
    "Pendulum-v1": Preset(
        "pendulum",
        "−130 an episode",
        "Normalised as well, since rewards go down to -16 a step; a horizon of twenty steps, one second.",
        Network(normalize=True, critic_keys=()),
        Learning(trials=64, env_steps=1_000_000, gamma=0.95, entropy=0.0, **_SMALL),
    ),
    "Walker2d-v5": Preset(
        "walker",
        "477 in the first episode, 496 in the last",
        "Numbers of all sizes are normalised; a horizon of a hundred steps, since walking takes many to pay.",
        Network(units=128, normalize=True, critic_keys=()),
        Learning(trials=64, env_steps=5_000_000, gamma=0.99, entropy=0.0, **_SMALL),
    ),
    "MiniGrid-MemoryS7-v0": Preset(
        "minigrid_memory",
        "success 1.00",
        "Nothing is paid until a corridor's right end is reached: much entropy, and small steps for a million frames.",
        Network(units=128, critic_keys=()),
        Learning(trials=32, env_steps=3_500_000, epochs=4, entropy=0.05, **{**_SMALL, "lr": 5e-4}),
    ),
    "MiniGrid doors": Preset(
        "minigrid_goals",
        "17.9 steps, from the second episode on 7.6",
        "The goal's door is told to the memory by a loss of its own (--belief), without which the way back takes 15.7 steps.",
        Network(units=128, critic_keys=()),
        Learning(trials=64, env_steps=800_000, gamma=0.97, epochs=6, entropy=0.02, **_SMALL),
    ),
    "Meta-World ML1": Preset(
        "meta_world",
        "success 0.74, in the last episode 0.98",
        "39 numbers of all sizes are normalised; goals are paired with other tasks' objects, or tasks are learnt by heart.",
        Network(units=128, normalize=True, critic_keys=()),
        Learning(trials=32, env_steps=2_000_000, epochs=5, entropy=0.0, **_SMALL),
    ),
    "POPGym, Easy": Preset(
        "pop_gym",
        "1.00 in the best epoch",
        "A hidden layer reads what is asked for from the memory; actor and critic share one core.",
        Network(units=128, num_cells=(128,), critic_keys=()),
        Learning(trials=64, env_steps=2_000_000, epochs=4, entropy=0.01, **_SMALL),
    ),
    "DMControl point mass": Preset(
        "point_mass",
        "24.6 of 40 in the first episode, 29.6 in the last",
        "The critic sees the target, and the memory learns to tell it (--belief), since most of a search is paid nothing.",
        Network(normalize=True, critic_keys=("task", "time_left")),
        Learning(trials=32, env_steps=600_000, entropy=0.0, **_SMALL),
    ),
    "Brax inverted pendulum": Preset(
        "brax_pendulum",
        "97.5 of 100 steps upright",
        "A step costs much whatever the number of rows: many rows, few steps, a higher learning rate.",
        Network(units=32, normalize=True, critic_keys=("time_left",)),
        Learning(trials=128, env_steps=200_000, entropy=0.0, **{**_SMALL, "lr": 2e-3}),
    ),
}
