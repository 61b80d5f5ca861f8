"""Processes that update together, for tests/test_learners.py: ``python -m tests.data_parallel SIZE FOLDER``.

Rank 0 takes the same steps alone, on the batches of all, and writes how far the two are apart.
"""

import json
import multiprocessing
import signal
import sys
from copy import deepcopy
from pathlib import Path

import torch
from tensordict import TensorDict
from torch import distributed as dist
from torchrl.envs import Compose, TransformedEnv

from rl2_torchrl import (
    ActorCritic,
    Callback,
    GRUCategoricalActor,
    GRUValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    train,
)
from rl2_torchrl.envs import BernoulliBandit, uniform_means

ROWS, STEPS = 9, 12  # trials last 5 steps: batches cut them
#: Options of `PPOUpdate`, and in capitals those of `Learner`.
CASES = {
    "parts": {"backend": "parts", "epochs": 3},
    "autograd": {"backend": "autograd", "epochs": 3},
    "clipped gradients": {"max_grad_norm": 0.05, "epochs": 3},
    "clipped gradients by autograd": {"max_grad_norm": 0.05, "epochs": 3, "backend": "autograd"},
    "early stop": {"target_kl": 0.01, "lr": 0.03, "epochs": 20},
    "in order": {"shuffle": False, "bptt": 4, "epochs": 3},
    "normalised inputs and rewards": {"NORMALIZE": True},
    "no generator": {"generator": None},
    "float64": {"DTYPE": torch.float64, "epochs": 3, "max_grad_norm": 0.05},
}


class Learner:
    """Networks, collector and update of a process; ``seed`` of the networks, ``own`` of what it plays."""

    def __init__(self, seed, own, group, *, DTYPE=torch.float32, NORMALIZE=False, rows=ROWS, loss=None, **options):
        torch.manual_seed(seed)
        trial = Compose(Trial(episodes=5), TaskSampler(uniform_means(3), seed=own), PreviousStep())
        env = TransformedEnv(BernoulliBandit(3, batch_size=(rows,), seed=own), trial)
        actor = GRUCategoricalActor.from_env(env, hidden_size=6, normalize=NORMALIZE).to(DTYPE)
        critic = GRUValueHead.from_env(env, hidden_size=6, normalize=NORMALIZE).to(DTYPE)
        self.loss = RL2PPOLoss(actor, critic, entropy_bonus=True, **(loss or {}))
        sizes = {"bptt": 3, "epochs": 2, "minibatches": 5, "lr": 1e-2}
        options = {**sizes, "generator": torch.Generator().manual_seed(3), **options}
        advantage = TrialAdvantage(scale_rewards=NORMALIZE, critic=ActorCritic(actor, critic))
        self.update = PPOUpdate(self.loss, advantage, process_group=group, **options)
        frames = {"frames_per_batch": rows * STEPS, "total_frames": 100 * rows * STEPS}
        torch.manual_seed(own)
        self.collector = TrialCollector(env, ActorCritic(actor, critic), keep=self.update.in_keys, **frames)
        self.collector.set_seed(own)


def joint(batch):
    batches = [None] * dist.get_world_size()
    dist.all_gather_object(batches, batch.to_dict())
    return TensorDict.cat([TensorDict(each, batch.shape) for each in batches])


def distance(one, other):
    states = one.state_dict(), other.state_dict()
    return max(float((states[0][name].double() - states[1][name].double()).abs().max()) for name in states[0])


def compare(rank, **options):
    """Three updates together and alone: how far networks and metrics are apart."""
    together = Learner(seed=10 * rank, own=100 + rank, group=dist.group.WORLD, **options)
    alone = Learner(seed=0, own=0, group=None, **options)
    alone.loss.load_state_dict(together.loss.state_dict())
    if options.get("generator", "one") is None:  # it draws what the group drew
        alone.update._minibatches.generator = deepcopy(together.update._generator)
    began, metrics = deepcopy(alone.loss), []
    for batch, _ in zip(together.collector, range(3), strict=False):
        whole = joint(batch)
        metrics.append((together.update(batch.clone()), alone.update(whole)))
    apart = {name: abs(own[name] - each) for own, single in metrics for name, each in single.items()}
    return {
        "apart": distance(together.loss, alone.loss),
        "moved": distance(began, alone.loss),
        "metrics apart": apart,
        "epochs": [own["epochs"] for own, _ in metrics],
        "backend": together.update.backend,
        "gradient": [single.get("grad_norm", 0.0) for _, single in metrics],
    }


def message(function):
    try:
        function()
    except (ValueError, RuntimeError) as error:
        return str(error)
    return "nothing was raised"


def refused(rank):
    """What is raised, by what is wrong."""
    world = dist.group.WORLD

    def update(rows=ROWS, change=0.0, **options):
        one = Learner(0, rank, world, rows=rows, **options)
        with torch.no_grad():
            next(one.loss.parameters()).add_(change)
        one.update(next(iter(one.collector)))

    return {
        "other rows": message(lambda: update(rows=ROWS + rank)),
        "other networks": message(lambda: update(change=rank)),
        "few chunks": message(lambda: update(rows=1, bptt=None, minibatches=2)),
        "normalised by minibatch": message(lambda: update(loss={"normalize_advantage": True})),
    }


def trained(rank, **options):
    """A training that only one process is asked to end, after three updates."""
    one = Learner(0, 100 + rank, dist.group.WORLD)
    evaluate = {"evaluate": lambda: {"score": 1.0}, "eval_interval": 20}
    result = train(one.collector, one.update, progress=False, **evaluate, **options)
    weights = [None] * dist.get_world_size()
    dist.all_gather_object(weights, [p.tolist() for p in one.loss.parameters()])
    return {
        "updates": len(result.history),
        "same": all(weight == weights[0] for weight in weights),
        "interrupted": result.interrupted,
        "evaluated": ["eval/score" in row for row in result.history],
    }


def stopped(rank):
    return trained(rank, stop=lambda row: rank == 1 and row["env_steps"] >= 3 * ROWS * STEPS)


class CtrlC(Callback):
    """In the third update of the second process."""

    def after_update(self, row, progress):
        if dist.get_rank() == 1 and row["env_steps"] == 3 * ROWS * STEPS:
            signal.raise_signal(signal.SIGINT)


def resumed(rank, folder):
    """What a resume says where the second process's checkpoint is another one than the first's, or lost; and one of all."""
    own, elsewhere = (Path(folder, f"{name}-{rank}") for name in ("run", "elsewhere"))

    def learn(updates, checkpoints, resume=True, **options):
        one = Learner(0, 100 + rank, dist.group.WORLD)
        options |= {"checkpoints": checkpoints, "resume": resume, "check": False, "checkpoint_interval": 1}
        stop = {"stop": lambda row: row["env_steps"] >= updates * ROWS * STEPS}
        return len(train(one.collector, one.update, evaluate=None, progress=False, **stop, **options).history)

    learn(2, own, resume=False)
    found = {"lost": message(lambda: learn(3, elsewhere if rank else own))}
    if rank:
        own.joinpath(f"checkpoint-{2 * ROWS * STEPS}.safetensors").unlink()
    found["older"] = message(lambda: learn(3, own))
    own.joinpath(f"checkpoint-{2 * ROWS * STEPS}.safetensors").unlink(missing_ok=True)
    return {**found, "updates": learn(3, own)}


def main(rank, size, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size)
    found = {name: compare(rank, **options) for name, options in CASES.items()}
    found |= {
        "refused": refused(rank),
        "stopped": stopped(rank),
        "interrupted": trained(rank, callbacks=[CtrlC()]),
        "resumed": resumed(rank, folder),
    }
    Path(folder, f"found-{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    size, forks = int(sys.argv[1]), multiprocessing.get_context("fork")  # new ones would each import PyTorch
    processes = [forks.Process(target=main, args=(rank, size, sys.argv[2])) for rank in range(size)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    sys.exit(max(process.exitcode != 0 for process in processes))
