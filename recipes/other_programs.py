"""What one might take in place of this package, on the same trials: RL² by hand in PyTorch, and SB3-contrib's RecurrentPPO.

Both see what our agent sees (`Trials`), and have the `recipes.settings.Learning` of the recipe that they stand beside.
"""

from collections.abc import Callable
from types import ModuleType

import gymnasium
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from recipes.settings import Learning
from rl2_torchrl import TaskDistribution, linear_decay
from rl2_torchrl.envs import TensorEnv

__all__ = ["PROGRAMS", "PlainRL2", "Trials", "import_sb3", "recurrent_ppo"]


class Trials:
    """Trials of an env of fixed episode length on plain tensors, all rows in step; what is seen is the transition, as RL² has it.

    Args:
        env: an env without observation, or with one of a number of places.
        tasks: where a trial's task is drawn from.
        episodes: episodes of a trial.
        seed: seed of the tasks.
    """

    def __init__(self, env: TensorEnv, tasks: TaskDistribution, episodes: int, seed: int):
        self.env, self.tasks, self.episodes = env, tasks, episodes
        self.rows, self.steps = env.batch_size.numel(), episodes * env.max_episode_steps
        self.num_actions = env.action_spec.space.n
        places = "observation" in env.observation_spec.keys()
        self.num_places = env.observation_spec["observation"].space.n if places else 0
        self.input_size = self.num_places + self.num_actions + 2
        self._generator = torch.Generator().manual_seed(seed)

    def begin(self) -> Tensor:
        """A new task in each row: the first input ``[rows, input_size]``."""
        self._step, self._task = 0, self.tasks(torch.Size([self.rows]), self._generator)
        return self._input(self.env.start(self._task, None))

    def step(self, action: Tensor) -> tuple[Tensor, Tensor, bool]:
        """The next input, the reward ``[rows]``, and whether the trial has ended."""
        observation, reward, _, _ = self.env.play(action)
        self._step += 1
        episode_ended = self._step % self.env.max_episode_steps == 0
        if episode_ended:
            observation = self.env.start(self._task, None)
        return self._input(observation, action, reward, episode_ended), reward.squeeze(-1), self._step == self.steps

    def _input(
        self, observation: dict, action: Tensor | None = None, reward: Tensor | None = None, done: bool = False
    ) -> Tensor:
        entries = torch.zeros(self.rows, self.input_size)
        if self.num_places:
            entries.scatter_(1, observation["observation"].unsqueeze(-1), 1.0)
        if action is not None:
            entries.scatter_(1, self.num_places + action.unsqueeze(-1), 1.0)
            entries[:, -2:] = torch.cat([reward, torch.full_like(reward, done)], -1)
        return entries


#: Acts on inputs ``[rows, input_size]`` of one step of a trial, the first or a later one: actions ``[rows]``.
Act = Callable[[Tensor, bool], Tensor]


def trial_return(trials: Trials, act: Act) -> float:
    """Mean return of a trial of each row."""
    entries, total, done, first = trials.begin(), 0.0, False, True
    while not done:
        entries, reward, done = trials.step(act(entries, first))
        total, first = total + reward.mean().item(), False
    return total


# --------------------------------------------------------------------- by hand
class PlainRL2:
    """RL² as one writes it in an afternoon: `torch.nn.GRU`, one network for policy and value, PPO over whole trials."""

    def __init__(self, trials: Trials, learning: Learning, env_steps: int):
        self.trials, self.learning, self.units = trials, learning, 64
        self.gru = nn.GRU(trials.input_size, self.units)
        self.head = nn.Linear(self.units, trials.num_actions + 1)
        self._parameters = [*self.gru.parameters(), *self.head.parameters()]
        for gate in self.gru.weight_hh_l0.data.chunk(3):
            nn.init.orthogonal_(gate)
        nn.init.orthogonal_(self.head.weight.data[:-1], 0.01)
        for bias in (self.gru.bias_ih_l0, self.gru.bias_hh_l0, self.head.bias):
            nn.init.zeros_(bias)
        self.optimizer = torch.optim.Adam(self._parameters, lr=learning.lr, fused=True)
        self.updates = env_steps // (trials.rows * trials.steps)

    def learn(self, after_update: Callable[[int], None]) -> None:
        """Trains, and calls ``after_update(env_steps)``."""
        for update in range(self.updates):
            progress = update / self.updates
            self.optimizer.param_groups[0]["lr"] = self.learning.lr * linear_decay(progress)
            self._update(*self._rollout(), self.learning.entropy * self.learning.entropy_schedule(progress))
            after_update((update + 1) * self.trials.rows * self.trials.steps)

    @torch.no_grad()
    def act(self, entries: Tensor, first: bool) -> Tensor:
        """Actions of one step, drawn."""
        if first:
            self._hidden = torch.zeros(len(entries), self.units)
        self._hidden = torch.gru_cell(entries, self._hidden, *self.gru.all_weights[0])
        return torch.distributions.Categorical(logits=self.head(self._hidden)[:, :-1]).sample()

    @torch.no_grad()
    def _rollout(self) -> tuple[Tensor, ...]:
        inputs, actions, rewards = [self.trials.begin()], [], []
        for step in range(self.trials.steps):
            actions.append(self.act(inputs[-1], step == 0))
            entries, reward, _ = self.trials.step(actions[-1])
            inputs.append(entries)
            rewards.append(reward)
        inputs, actions = torch.stack(inputs[:-1]), torch.stack(actions)
        log_prob, _, value = self._evaluate(inputs, actions)
        advantage, ahead, following = (
            torch.empty_like(value),
            torch.zeros(self.trials.rows),
            torch.zeros(self.trials.rows),
        )
        gamma, lmbda = self.learning.gamma, self.learning.lmbda
        for step in reversed(range(self.trials.steps)):  # the next episode is part of the trial, the next trial is not
            ahead = rewards[step] + gamma * following - value[step] + gamma * lmbda * ahead
            advantage[step], following = ahead, value[step]
        return inputs, actions, log_prob, advantage, advantage + value

    def _evaluate(self, inputs: Tensor, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out = self.head(self.gru(inputs)[0])
        log_probs = F.log_softmax(out[..., :-1], -1)
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        return log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1), entropy, out[..., -1]

    def _update(self, inputs, actions, old_log_prob, advantage, target, entropy_coeff: float) -> None:
        for _ in range(self.learning.epochs):
            for rows in torch.randperm(self.trials.rows).chunk(self.learning.minibatches):
                log_prob, entropy, value = self._evaluate(inputs[:, rows], actions[:, rows])
                a = advantage[:, rows]
                a, ratio = (a - a.mean()) / (a.std() + 1e-8), (log_prob - old_log_prob[:, rows]).exp()
                policy = -torch.min(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
                loss = policy + 0.5 * F.mse_loss(value, target[:, rows]) - entropy_coeff * entropy.mean()
                self.optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(self._parameters, self.learning.max_grad_norm or float("inf"))
                self.optimizer.step()


# ------------------------------------------------------------------------- SB3
def import_sb3() -> ModuleType:
    """SB3-contrib; ModuleNotFoundError without the extra sb3."""
    try:
        import sb3_contrib
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "recurrent_ppo is SB3-contrib's: pip install -e '.[sb3]', or name other programs."
        ) from error
    return sb3_contrib


def recurrent_ppo(trials: Trials, learning: Learning, env_steps: int):
    """SB3-contrib's RecurrentPPO (its LSTM, shared by policy and value), which sees a trial as an episode.

    Raises:
        ModuleNotFoundError: without the extra sb3.
    """
    RecurrentPPO = import_sb3().RecurrentPPO
    networks = {"lstm_hidden_size": 64, "shared_lstm": True, "enable_critic_lstm": False, "net_arch": []}
    horizon = {"gamma": learning.gamma, "gae_lambda": learning.lmbda}
    batches = {
        "n_steps": trials.steps,
        "n_epochs": learning.epochs,
        "batch_size": trials.rows * trials.steps // learning.minibatches,
    }
    steps = {"learning_rate": lambda left: learning.lr * left, "max_grad_norm": learning.max_grad_norm or float("inf")}
    model = RecurrentPPO(
        "MlpLstmPolicy", _vec_env(trials), policy_kwargs=networks, device="cpu", **batches, **horizon, **steps
    )
    return _SB3(model, learning, env_steps)


class _SB3:
    def __init__(self, model, learning: Learning, env_steps: int):
        self._model, self._learning, self._env_steps = model, learning, env_steps

    def learn(self, after_update: Callable[[int], None]) -> None:
        from stable_baselines3.common.callbacks import BaseCallback

        entropy, schedule, env_steps = self._learning.entropy, self._learning.entropy_schedule, self._env_steps

        class AfterUpdate(BaseCallback):
            def _on_rollout_start(self) -> None:  # the update before it has ended
                if self.num_timesteps:
                    after_update(self.num_timesteps)
                # Its learning rate may follow a schedule, its entropy bonus may not.
                self.model.ent_coef = entropy * schedule(self.num_timesteps / env_steps)

            def _on_step(self) -> bool:
                return True

        self._model.learn(self._env_steps, callback=AfterUpdate())
        after_update(self._model.num_timesteps)

    def act(self, entries: Tensor, first: bool) -> Tensor:
        starts = np.full(len(entries), first)
        self._state = None if first else self._state
        action, self._state = self._model.predict(entries.numpy(), self._state, starts, deterministic=False)
        return torch.from_numpy(action)


def _vec_env(trials: Trials):
    """`Trials` as an env of SB3's, which begins the next trial by itself."""
    from stable_baselines3.common.vec_env import VecEnv

    class TrialVecEnv(VecEnv):
        def __init__(self):
            seen = gymnasium.spaces.Box(-np.inf, np.inf, (trials.input_size,), np.float32)
            super().__init__(trials.rows, seen, gymnasium.spaces.Discrete(trials.num_actions))

        def reset(self) -> np.ndarray:
            return trials.begin().numpy()

        def step_async(self, actions: np.ndarray) -> None:
            self._actions = torch.from_numpy(actions)

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict]]:
            entries, reward, done = trials.step(self._actions)
            infos = [{"terminal_observation": row} for row in entries.numpy()] if done else [{}] * trials.rows
            entries = trials.begin() if done else entries
            return entries.numpy(), reward.numpy(), np.full(trials.rows, done), infos

        def close(self) -> None:
            """There is nothing to close."""

        def env_is_wrapped(self, wrapper_class, indices=None) -> list[bool]:
            return [False] * trials.rows

        def env_method(self, method_name, *args, indices=None, **kwargs):
            raise NotImplementedError

        def get_attr(self, attr_name, indices=None) -> list:
            return [getattr(self, attr_name, None)] * trials.rows

        def set_attr(self, attr_name, value, indices=None) -> None:
            setattr(self, attr_name, value)

    return TrialVecEnv()


PROGRAMS = {"plain": PlainRL2, "sb3": recurrent_ppo}
