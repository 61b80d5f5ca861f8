"""Environments whose task is a tensor: bandits, tabular MDPs, a grid, a point robot, MuJoCo (extra ``mujoco``), the bridge to
Gymnasium; and how an env of your own becomes one, in ten minutes.

From an idea to a training run
==============================
An idea: *a boat shall stay at its buoy, in a current that nobody tells it*. What is hidden and changes from trial to trial is the
**task**, here one number. It is drawn by a function of your own:

>>> import torch
>>> def currents(batch_size, generator):
...     return torch.rand(*batch_size, 1, generator=generator) - 0.5  # [*batch_size, 1], metres a step

The env may be written in any of three ways, of which the next sections show one each:

===================  ==================================================  ==============================  ===========
way                  choose it when                                      the task comes in               env steps/s
===================  ==================================================  ==============================  ===========
`TensorEnv`          you write the env, and its step is tensor algebra   ``begin(task, rows)``           32 k
`GymVectorEnv`       it is a Gymnasium env, or steps one env at a time   ``set_task(env, task)``         11 k
TorchRL's `EnvBase`  it exists already, as DMControl or Brax do          an entry that ``_reset`` reads  3 k
===================  ==================================================  ==============================  ===========

(Steps a second of ``learn(..., rows=64)`` below, updates and evaluations among them, on one core of a shared machine; the last one
is a ``SerialEnv`` of 64.) What follows is the same for all three. Boats side by side, one a row, become trials of two episodes in
one current, and are trained on:

>>> import rl2_torchrl as rl2
>>> from torchrl.envs import Compose, TransformedEnv
>>> def trials(boats, seed=0):
...     tasks = rl2.TaskSampler(currents, seed=seed)
...     return TransformedEnv(boats, Compose(rl2.Trial(episodes=2), tasks, rl2.PreviousStep()))
>>> def learn(make_boats, updates, rows=32):
...     torch.manual_seed(0)
...     env, held_out = trials(make_boats(rows)), trials(make_boats(rows), seed=1)  # other currents
...     actor = rl2.RecurrentActor.from_env(env, normalize=True)
...     critic = rl2.GRUValueHead.from_env(env, normalize=True)
...     policy = rl2.ActorCritic(actor, critic)
...     advantage = rl2.TrialAdvantage(value_target="gae", scale_rewards=True)
...     update = rl2.PPOUpdate(rl2.RL2PPOLoss(actor, critic), advantage, bptt=20, lr=3e-3, epochs=4, minibatches=4)
...     frames = {"frames_per_batch": 40 * rows, "total_frames": updates * 40 * rows}
...     collector = rl2.TrialCollector(env, policy, keep=update.in_keys, **frames)
...
...     def evaluate():
...         first, last = rl2.adaptation_curve(held_out, actor, num_trials=4 * rows).per_episode.tolist()
...         return {"first_episode": first, "last_episode": last}
...
...     return rl2.train(collector, update, evaluate=evaluate, progress=False)

1. A TensorEnv
--------------
All rows at once, on tensors ``[*B, ...]``: how an episode begins, and what a step does. All that an episode remembers, the task
among it, goes through the state; what is drawn comes from ``self.generator``. Specs are those of one row. Each episode begins anew,
here by ``begin``, below by ``set_task`` and ``reset``: what shall outlive it within a trial, such as a current that drifts from
journey to journey, makes the trial one long episode, ``Trial(steps=...)``.

>>> from torchrl.data import Bounded, Unbounded
>>> from rl2_torchrl.envs import TensorEnv
>>> class Boats(TensorEnv):
...     def __init__(self, **kwargs):
...         specs = {"task_spec": Unbounded(1), "observation_spec": Unbounded(1), "action_spec": Bounded(-1.0, 1.0, (1,))}
...         super().__init__(**specs, max_episode_steps=10, **kwargs)
...
...     def begin(self, task, rows):  # task [*B, 1]
...         place = 2 * torch.rand(*self.batch_size, 1, generator=self.generator, device=self.device) - 1
...         return (place, task), place  # state, observation
...
...     def advance(self, state, action):  # action [*B, 1]
...         place, current = state
...         place = place + action.clamp(-1, 1) + current
...         lost = place.abs() > 3
...         return (place, current), place, 1 - place.abs(), lost, None  # state, observation, reward, terminated, truncated

Two checks, each of a second or two, name the rule that breaks: the first knows what a `TensorEnv` promises, the second what a
trial is. Then train: an untrained boat is paid less than 0, the best about 9.5 of 10.

>>> from rl2_torchrl.testing import check_tensor_env, check_trial_env
>>> check_tensor_env(Boats(batch_size=(16,)), currents)
>>> check_trial_env(trials(Boats(batch_size=(16,))))
>>> result = learn(lambda rows: Boats(batch_size=(rows,), seed=0), updates=30)
>>> result.history[0]["eval/last_episode"] < 0, result.history[-1]["eval/last_episode"] > 7
(True, True)

2. A Gymnasium env
------------------
One boat, as Gymnasium has it. ``set_task`` changes it before each reset, so ``reset`` must leave the task alone. It is given a
tensor, of which ``.item()`` or ``.tolist()`` makes numbers.

>>> import gymnasium
>>> import numpy as np
>>> from rl2_torchrl.envs import GymVectorEnv
>>> class Boat(gymnasium.Env):
...     observation_space, action_space = gymnasium.spaces.Box(-np.inf, np.inf, (1,)), gymnasium.spaces.Box(-1, 1, (1,))
...     current = 0.0
...
...     def reset(self, *, seed=None, options=None):
...         super().reset(seed=seed)
...         self.place = self.np_random.uniform(-1, 1)
...         return np.array([self.place]), {}
...
...     def step(self, action):
...         self.place += action.item() + self.current
...         lost = abs(self.place) > 3
...         return np.array([self.place]), 1 - abs(self.place), lost, False, {}
>>> def make_boat():
...     return gymnasium.wrappers.TimeLimit(Boat(), max_episode_steps=10)
>>> def set_current(boat, task):  # the unwrapped env, and one row's task [1]
...     boat.current = task.item()
>>> def gym_boats(rows):
...     return GymVectorEnv(make_boat, rows, set_task=set_current, task_spec=Unbounded(1), seed=0)
>>> check_trial_env(trials(gym_boats(4)))
>>> result = learn(gym_boats, updates=2)

An env with an id needs no function that makes it: ``GymVectorEnv("Pendulum-v1", rows, ...)``. Where a step takes a millisecond and
more, ``vectorization="async"`` gives each row a process.

3. An env of TorchRL's
----------------------
One that exists without a task, such as this one, or one of TorchRL's wrappers:

>>> from tensordict import TensorDict
>>> from torchrl.data import Composite
>>> from torchrl.envs import EnvBase, SerialEnv
>>> class OldBoat(EnvBase):
...     current = 0.25
...
...     def __init__(self):
...         super().__init__()
...         self.observation_spec = Composite(place=Unbounded(1))
...         self.action_spec, self.reward_spec = Bounded(-1.0, 1.0, (1,)), Unbounded(1)
...         self.set_seed(0)
...
...     def _reset(self, tensordict):
...         self.place, self.steps = 2 * torch.rand(1, generator=self.generator) - 1, 0
...         return TensorDict({"place": self.place})
...
...     def _step(self, tensordict):
...         self.place, self.steps = self.place + tensordict["action"] + self.current, self.steps + 1
...         lost = self.place.abs() > 3
...         ends = {"terminated": lost, "done": lost | (self.steps == 10)}
...         return TensorDict({"place": self.place, "reward": 1 - self.place.abs(), **ends})
...
...     def _set_seed(self, seed):
...         self.generator = torch.Generator().manual_seed(seed)

gets one by a subclass that declares it in ``state_spec`` and takes it out of what ``_reset`` is given. Several of them are the
rows of a ``SerialEnv`` (or, for a millisecond a step and more, of a ``ParallelEnv``, which in a script needs the ``__main__`` guard
of multiprocessing), whose ``set_seed`` gives each a seed of its own. An env that is batched itself declares
``Composite(task=Unbounded((rows, 1)), shape=(rows,))``, and its ``_reset`` begins only the rows of ``tensordict["_reset"]``. By
`Resumable` checkpoints hold it, too, in the middle of an episode.

>>> from rl2_torchrl.envs import Resumable
>>> class TaskBoat(Resumable, OldBoat):
...     def __init__(self, **kwargs):  # which TorchRL's own wrappers are given, at a reset too
...         super().__init__(**kwargs)
...         self.state_spec = Composite(task=Unbounded(1))
...
...     def _reset(self, tensordict=None, **kwargs):
...         if tensordict is not None and "task" in tensordict.keys():  # TorchRL resets without one to look at an env
...             self.current = tensordict["task"].clone()
...         return super()._reset(tensordict, **kwargs)
>>> def torchrl_boats(rows):
...     boats = SerialEnv(rows, TaskBoat)
...     boats.set_seed(0)
...     return boats
>>> check_trial_env(trials(TaskBoat()))
>>> check_trial_env(trials(torchrl_boats(4)))
>>> result = learn(torchrl_boats, updates=2, rows=4)

What goes wrong, and how it is told
-----------------------------------
A reset that forgets the task, here since it sets everything up anew; likewise a ``set_task`` that misspells an attribute, or an env
that hears its first task alone:

>>> class Forgetful(Boat):
...     def reset(self, **kwargs):
...         self.current = 0.0
...         return super().reset(**kwargs)
>>> def make_forgetful():
...     return gymnasium.wrappers.TimeLimit(Forgetful(), max_episode_steps=10)
>>> check_trial_env(trials(GymVectorEnv(make_forgetful, 4, set_task=set_current, task_spec=Unbounded(1))))
Traceback (most recent call last):
rl2_torchrl.testing.TrialContractError: rule 'task_heard' is broken: 8 tasks made no difference to anything in 30 steps of random
actions. All tasks are one, and there is nothing to adapt to: set the task in each reset, for the rows that begin. Where tasks are
told apart too rarely for random actions, pass task_of=, which reads them back.

A buffer that is written over, and so changes the steps that were collected before. (`GymVectorEnv` and ``SerialEnv`` copy what they
are given.)

>>> class InPlace(TaskBoat):
...     def _step(self, tensordict):
...         self.place += 0.1 * torch.sign(self.place)  # waves drive it away
...         return super()._step(tensordict)
>>> check_trial_env(trials(InPlace()))
Traceback (most recent call last):
rl2_torchrl.testing.TrialContractError: rule 'kept_tensors' is broken: step 0 wrote over the 'place' of a reset. Steps that were
collected before change afterwards: return new tensors, or copies of the env's own.

Rewards ``[*B]`` where ``[*B, 1]`` is due; a Gymnasium env must pay a number, and an array is refused at its first step.

>>> class FlatReward(Boats):
...     def advance(self, state, action):
...         state, observation, reward, *ends = super().advance(state, action)
...         return state, observation, reward.squeeze(-1), *ends
>>> check_trial_env(trials(FlatReward(batch_size=(4,))))
Traceback (most recent call last):
rl2_torchrl.testing.TrialContractError: rule 'step_specs' is broken: the 'reward' that step 0 returned is torch.float32 [4], its
spec says torch.float32 [4, 1]. Networks and memory are made by the specs, and sums of [B] and [B, 1] are [B, B]: mend them, or what
the env returns.

Further ones, by their rule:

=====================  =============================================================================================================
``trials_end``         no time limit: ``max_episode_steps``, Gymnasium's ``TimeLimit``, or `Trial` with ``steps``
``task_own``           a task that is kept on the class, or as one number for all rows, or is heard an episode late
``task_kept``          a batched env whose ``_reset`` takes the tasks of all rows, and not those of ``_reset`` alone
``rows_go_on``         one whose ``_reset`` begins all rows, so that those that were to go on lose their episode
``begins_anew``        one that sets the rows' step counts back where all rows begin, and not in those of ``_reset``
``rows_draw_apart``    rows that are seeded alike, such as a ``SerialEnv`` of ``OldBoat`` without its ``set_seed``
``seed_repeats``       ``np.random`` or ``torch.rand`` in place of ``self.np_random`` or ``self.generator``; a ``set_task`` that
                       reckons from what the last task left, ``env.mass *= task.item()``
``round_trip``         a `TensorEnv` that keeps what changes on itself, in place of the state (`check_tensor_env`)
``task_hidden``        the whole task in what the agent sees, at whatever scale: nothing is left to find out
=====================  =============================================================================================================

A `GymVectorEnv` refuses what Gymnasium has by default, a vector env that resets at the next step, and says which ``autoreset_mode``
to take. A task that random actions hardly ever meet, such as a far goal, passes for a forgotten one: `check_trial_env` then takes
``task_of=lambda boats: ...``, which reads the rows' tasks back. Rewards of any size are in order with ``scale_rewards=True``, and
observations, of different units too, with ``normalize=True``; images are read as they are, but for bytes, scaled to [0, 1].

Where nothing adapts: an entropy bonus (``RL2PPOLoss(..., entropy_bonus=True)``), a hidden layer (``num_cells=[64]``), a critic that
sees the task (``extra_keys=["task"]``) and more rows help most. First and last episode alike can mean that the agent adapts within
its first: `AdaptationReport` with ``ablations={"memory zeroed": ...}`` (`rl2_torchrl.with_zeroed_memory`) tells.

From here on: ``recipes/pendulum.py`` is a whole experiment on a Gymnasium env, to copy; `train` takes checkpoints and a logger; and
`rl2_torchrl.describe(collector, update)` says what is learnt by what.
"""

from rl2_torchrl.envs.bandits import BernoulliBandit, QuadraticBandit, uniform_means, uniform_targets
from rl2_torchrl.envs.gridnavi import GridNavi, grid_goals
from rl2_torchrl.envs.gym_vector import GymVectorEnv
from rl2_torchrl.envs.gymnasium import GymTaskEnv
from rl2_torchrl.envs.locomotion import (
    AntDirection,
    AntGoal,
    HalfCheetahDirection,
    HalfCheetahVelocity,
    LocomotionEnv,
    directions,
    goals_in_disc,
    signs,
    velocities,
)
from rl2_torchrl.envs.point_robot import PointRobot, goals_on_half_circle
from rl2_torchrl.envs.resumable import Resumable
from rl2_torchrl.envs.tabular import TabularMDP, pack_mdps, random_mdps, unpack_mdps
from rl2_torchrl.envs.tensor_env import TensorEnv

__all__ = [
    "AntDirection",
    "AntGoal",
    "BernoulliBandit",
    "GridNavi",
    "GymTaskEnv",
    "GymVectorEnv",
    "HalfCheetahDirection",
    "HalfCheetahVelocity",
    "LocomotionEnv",
    "PointRobot",
    "QuadraticBandit",
    "Resumable",
    "TabularMDP",
    "TensorEnv",
    "directions",
    "goals_in_disc",
    "goals_on_half_circle",
    "grid_goals",
    "pack_mdps",
    "random_mdps",
    "signs",
    "uniform_means",
    "uniform_targets",
    "unpack_mdps",
    "velocities",
]
