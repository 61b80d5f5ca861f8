"""Natural mistakes, one a row: each must raise an error of the right kind that says what is wrong and what to do."""

import math
from functools import partial

import gymnasium
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torch.distributions import Categorical
from torchrl.collectors import Collector
from torchrl.data import Unbounded
from torchrl.envs import Compose, GymEnv, GymWrapper, InitTracker, TransformedEnv, VecNormV2
from torchrl.modules import ProbabilisticActor

from rl2_torchrl import (
    ActorCritic,
    AdaptationCurve,
    AdaptiveAgent,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    MLPEncoder,
    PPOUpdate,
    PreviousStep,
    RecurrentActor,
    RecurrentCore,
    RL2PPOLoss,
    TaskBelief,
    TaskSampler,
    Trial,
    TrialAdvantage,
    TrialCollector,
    adaptation_curve,
    check_training,
    describe,
    linear_decay,
    train,
    with_shuffled_rewards,
    with_zeroed_memory,
)
from rl2_torchrl.envs import (
    BernoulliBandit,
    GymVectorEnv,
    PointRobot,
    QuadraticBandit,
    TabularMDP,
    uniform_means,
    uniform_targets,
)
from rl2_torchrl.modules import CategoricalActions, ConvEncoder, GaussianActions
from rl2_torchrl.testing import check_trial_env


def bandit(rows=2):
    return BernoulliBandit(3, batch_size=(rows,), seed=0)


def sampler():
    return TaskSampler(uniform_means(3), seed=0)


def started(env):
    env.reset()
    return env


def wrap(*transforms, base=None):
    return TransformedEnv(bandit() if base is None else base, Compose(*transforms))


def env(rows=2, tasks=None, **kwargs):
    return wrap(Trial(episodes=4), tasks or sampler(), PreviousStep(**kwargs), base=bandit(rows))


def quadratic():
    tasks = TaskSampler(uniform_targets(2), seed=0)
    return wrap(Trial(episodes=4), tasks, PreviousStep(), base=QuadraticBandit(2, batch_size=(2,)))


def scalar():
    base = QuadraticBandit(1, batch_size=(2,))
    base.action_spec = Unbounded((2,))
    return wrap(Trial(episodes=4), TaskSampler(uniform_targets(1)), PreviousStep(), base=base)


def greedy(choose):
    return TensorDictModule(choose, ["trans"], ["action"])


def actor(**kwargs):
    return GRUCategoricalActor(5, 3, hidden_size=4, **kwargs)


def critic(**kwargs):
    return GRUValueHead(5, hidden_size=4, **kwargs)


def drawing(distribution):
    return RecurrentActor.from_env(env(), distribution=distribution)


def memoryless():
    logits = TensorDictModule(nn.Linear(5, 3), ["trans"], ["logits"])
    kwargs = {"distribution_class": torch.distributions.Categorical, "return_log_prob": True}
    return ProbabilisticActor(logits, in_keys=["logits"], **kwargs)


def inputs(size=5, **entries):
    entries = {"trans": torch.zeros(2, size), "is_init": torch.ones(2, 1, dtype=torch.bool), **entries}
    return TensorDict(entries, [2])


def collect(steps=4, base=None, policy=None, primers=True):
    """A batch [2, steps] of trials of 4 steps."""
    policy = ActorCritic(actor(), critic()) if policy is None else policy
    kwargs = {"frames_per_batch": 2 * steps, "total_frames": 2 * steps, "auto_register_policy_transforms": primers}
    (batch,) = Collector(env() if base is None else base, policy, **kwargs)
    return batch


def spoil(batch, key, number):
    value = batch[key].clone()
    value[1, 2] = number
    return batch.set(key, value)


def update(batch, advantage=None, terms=(), **kwargs):
    kwargs |= {"minibatches": 2} if terms else {}
    return PPOUpdate(RL2PPOLoss(actor(), critic(), terms=terms), advantage, **kwargs)(batch)


def collector(policy=None, **kwargs):
    policy = ActorCritic(actor(), critic()) if policy is None else policy
    return TrialCollector(env(), policy, **{"frames_per_batch": 8, "total_frames": 8, **kwargs})


def trained_on(collector, **kwargs):
    update = PPOUpdate(RL2PPOLoss(actor(), critic()))
    return train(collector, update, **{"evaluate": None, "check": False, **kwargs})


def trained(**kwargs):
    return trained_on(collector(), **kwargs)


def with_core(core):
    return GRUCategoricalActor(5, 3, core=core)


class Forgetful(RecurrentCore):
    """A core whose step forgets to hand its memory on."""

    def __init__(self, input_size):
        super().__init__(4, {"hidden": (4,)}, input_size=input_size)
        self.layer = nn.Linear(input_size, 4)

    def step(self, x, hidden):
        return self.layer(x)


class Term(nn.Module):
    in_keys = ("actor_features",)

    def __init__(self, function):
        super().__init__()
        self.forward = function


def one_entry():
    term = Term(lambda features: {"loss_size": features.square().mean()})
    term.in_keys = "actor_features"
    return term


def loss_on(batch):
    return RL2PPOLoss(actor(), critic())(batch)


def row(name, mistake, error, message):
    return pytest.param(mistake, error, message, id=name)


# What is wrong, then what to do, with anything between them.
CASES = [
    # Envs and transforms
    row(
        "one info key",
        lambda: GymVectorEnv("CartPole-v1", 2, info_keys="success"),
        TypeError,
        r"its letters.*info_keys=\['success'\]",
    ),
    row("rows in words", lambda: GymVectorEnv("CartPole-v1", "4"), ValueError, "num_envs='4' must be a whole"),
    row("seed in words", lambda: BernoulliBandit(3, seed="1"), TypeError, "seed='1' is no whole number"),
    row("states in words", lambda: TabularMDP("4", 2), ValueError, "num_states='4'.*whole number"),
    row(
        "length in words", lambda: PointRobot(max_episode_steps="5"), ValueError, "max_episode_steps='5'.*whole number"
    ),
    row("tasks in words", lambda: uniform_means("3"), ValueError, "num_arms='3'.*whole number"),
    row("frames that are no list of keys", lambda: collector(keep=3), TypeError, r"keep=3 is no list.*keep=\[3\]"),
    row("half a frame", lambda: collector(frames_per_batch=8.5), ValueError, "frames_per_batch=8.5.*whole number"),
    row("text as input", lambda: spoken("said"), TypeError, r"\['said'\] are no numbers.*leave them out"),
    row(
        "text for a critic",
        lambda: GRUValueHead.from_env(spoken("place"), extra_keys=["said"]),
        TypeError,
        r"\['said'\] are no numbers.*leave them out",
    ),
    row("arms in words", lambda: BernoulliBandit("3"), ValueError, "num_arms='3'.*whole number"),
    row(
        "entry of a term that nobody makes",
        lambda: collector(keep=["actor_featuers"]),
        KeyError,
        "actor_featuers.*nobody makes.*in_keys.*there is",
    ),
    row("no bound", lambda: Trial(), ValueError, "needs a bound.*episodes="),
    row("no episodes", lambda: Trial(episodes=0), ValueError, "episodes=0.*at least 1"),
    row("truth value", lambda: Trial(episodes=True), ValueError, "episodes=True.*whole number"),
    row("one observation", lambda: PreviousStep("seen"), TypeError, r"its letters.*obs_keys=\['seen'\]"),
    row(
        "one entry to keep",
        lambda: TrialCollector(env(), ActorCritic(actor(), critic()), frames_per_batch=8, keep="trans"),
        TypeError,
        r"its letters.*keep=\['trans'\]",
    ),
    row(
        "tasks of NumPy",
        lambda: env(tasks=TaskSampler(lambda size, generator: np.zeros((*size, 3)))).reset(),
        TypeError,
        "gave a ndarray.*torch.Generator",
    ),
    row(
        "one step key",
        lambda: Trial(episodes=2, step_keys="success"),
        TypeError,
        r"read as its letters.*step_keys=\['success'\]",
    ),
    row(
        "vector env of TorchRL's that resets itself",
        lambda: wrap(Trial(episodes=2), PreviousStep(), base=GymEnv("CartPole-v1", num_envs=2)).reset(),
        TypeError,
        "resets its rows by itself.*GymVectorEnv",
    ),
    row(
        "the same wrapped whole",
        lambda: (
            TransformedEnv(
                GymEnv("CartPole-v1", num_envs=2), Compose(Trial(episodes=2), PreviousStep()), auto_unwrap=False
            ).observation_spec
        ),
        TypeError,
        "resets its rows by itself.*GymVectorEnv",
    ),
    row(
        "an env that resets itself",
        lambda: wrap(Trial(episodes=2), base=GymEnv("CartPole-v1", auto_reset=True, auto_reset_replace=False)).reset(),
        TypeError,
        "resets its rows by itself.*without auto_reset=True",
    ),
    row("half a step", lambda: Trial(steps=2.5), ValueError, "steps=2.5.*whole number"),
    row(
        "trial not first", lambda: wrap(sampler(), Trial(steps=4)).reset(), RuntimeError, "TaskSampler comes.*Put Trial"
    ),
    row("no trial", lambda: wrap(PreviousStep()).observation_spec, ValueError, "no Trial before.*Use Compose"),
    row("no trial, keys named", lambda: wrap(PreviousStep([])).rollout(2), ValueError, "no Trial before.*Use Compose"),
    row("batch size 0", lambda: bandit(0), ValueError, r"\(0,\) holds no env.*at least 1"),
    row("no arms", lambda: BernoulliBandit(0), ValueError, "num_arms=0.*at least 1"),
    row(
        "step before reset",
        lambda: bandit().step(TensorDict({"action": torch.zeros(2).long()}, [2])),
        RuntimeError,
        "before reset.*Call reset.*TaskSampler",
    ),
    row(
        "task not in state_spec",
        lambda: wrap(Trial(steps=4), sampler(), base=GymEnv("CartPole-v1")).reset(),
        KeyError,
        "no 'task' in its state_spec.*Declare the task",
    ),
    row(
        "drawn task of a wrong size",
        lambda: env(tasks=TaskSampler(uniform_means(4))).reset(),
        ValueError,
        r"gave \(2, 4\).*asks for \(2, 3\).*one task a row",
    ),
    row(
        "drawn task without batch",
        lambda: env(tasks=TaskSampler(lambda size, generator: torch.zeros(3))).reset(),
        ValueError,
        r"gave \(3,\).*one task a row",
    ),
    row(
        "distribution without generator",
        lambda: env(tasks=TaskSampler(lambda batch_size: torch.rand(*batch_size, 3))).reset(),
        TypeError,
        "takes 1 positional argument but 2 were given",
    ),
    row(
        "means above 1",
        lambda: env(tasks=TaskSampler.fixed(torch.tensor([[0.1] * 3, [2.0] * 3]))).rollout(2),
        ValueError,
        r"row \[1\] is \[2.0, 2.0, 2.0\].*between 0 and 1",
    ),
    row("list as distribution", lambda: TaskSampler([1, 2]), TypeError, r"callable.*TaskSampler\.fixed"),
    row("no fixed tasks", lambda: TaskSampler.fixed(torch.zeros(0, 3)), ValueError, "got no task"),
    row("task as input", lambda: PreviousStep(obs_keys=["task"]), ValueError, "holds the task.*critic"),
    row(
        "truncate in words", lambda: Trial(steps=4, truncate="no"), TypeError, "truncate='no' is neither True nor False"
    ),
    row("sparse in words", lambda: PointRobot(sparse="no"), TypeError, "sparse='no' is neither True nor False"),
    row("no such observation", lambda: env(obs_keys=["pixels"]).observation_spec, KeyError, "pixels.*it has"),
    row(
        "step without counters",
        lambda: started(env()).step(TensorDict({"action": torch.zeros(2).long(), "task": torch.zeros(2, 3)}, [2])),
        KeyError,
        "pass on what reset",
    ),
    # Networks
    row(
        "no PreviousStep",
        lambda: GRUCategoricalActor.from_env(wrap(Trial(steps=4), sampler())),
        KeyError,
        r"no observation \['trans'\].*PreviousStep\(\)",
    ),
    row("Gaussian actor, indices", lambda: GRUGaussianActor.from_env(env()), TypeError, "discrete.*use GRUCategorical"),
    row(
        "categorical actor, reals",
        lambda: GRUCategoricalActor.from_env(quadratic()),
        TypeError,
        "not one categorical choice.*use GRUGaussian",
    ),
    row(
        "scalar action",
        lambda: GRUGaussianActor.from_env(scalar()),
        TypeError,
        r"\(\) each, not \[action_dim\].*Unsqueeze",
    ),
    *(
        row(
            f"agent of another env, {how}",
            lambda options=options: adaptation_curve(
                env(), RecurrentActor({"trans": [7]}, CategoricalActions(3), **options), 2
            ),
            error,
            told,
        )
        for how, options, error, told in (
            ("plain", {}, ValueError, r"x has shape \(\d, 5\); it must be \(\d, 7\)"),
            (
                "normalized",
                {"normalize": True},
                RuntimeError,
                "size of tensor a .5. must match the size of tensor b .7.",
            ),
            ("encoded", {"encoder": MLPEncoder}, RuntimeError, "shapes cannot be multiplied"),
        )
    ),
    row(
        "actions of another env",
        lambda: adaptation_curve(quadratic(), GRUGaussianActor(quadratic().observation_spec["trans"].shape[-1], 5), 2),
        ValueError,
        r"gives actions of shape \[\d, 5\], and the env takes \[\d, \d\]: it was made for another env",
    ),
    row(
        "choices counted from 3",
        lambda: adaptation_curve(env(), greedy(lambda trans: 3 + trans[..., :3].argmax(-1)), 2),
        RuntimeError,
        "index 3 is out of bounds",
    ),
    row(
        "a head of too few choices",
        lambda: adaptation_curve(env(), actor(head=lambda size, _: torch.nn.Linear(size, 2)), 2),
        ValueError,
        "head gives 2 logits, and the env has 3 choices",
    ),
    row(
        "choices of a dimension too many",
        lambda: adaptation_curve(env(), greedy(lambda trans: trans[..., :3].argmax(-1, keepdim=True)), 2),
        ValueError,
        r"actions of shape \[2, 1\], and the env takes \[2\]: .* a dimension too many",
    ),
    row("no actions", lambda: GRUCategoricalActor(5, 0), ValueError, "num_actions=0.*at least 1"),
    row("no units", lambda: GRUValueHead(5, hidden_size=0), ValueError, "hidden_size=0.*at least 1"),
    row("units in words", lambda: GRUValueHead(5, hidden_size="64"), ValueError, "hidden_size='64'.*whole number"),
    row("layers in words", lambda: actor(num_cells=["64"]), ValueError, "num_cells='64'.*whole number"),
    row("one layer", lambda: actor(num_cells=64), TypeError, r"num_cells=64 is no list.*num_cells=\[64\]"),
    row("actions in words", lambda: GRUCategoricalActor(5, "3"), ValueError, "num_actions='3'.*whole number"),
    row(
        "encoder of another size",
        lambda: actor(encoder=nn.Linear(7, 7)),
        RuntimeError,
        r"6x5 and 7x7.*the encoder Linear.*tried on {'trans': 'torch.float32 \[2, 3, 5\]'}",
    ),
    row(
        "encoder of a number",
        lambda: actor(encoder=lambda number: nn.Linear(number, 8)),
        TypeError,
        r"encoder=<function.*the shape of 'trans', torch.Size\(\[5\]\)",
    ),
    row(
        "head of one size", lambda: actor(head=lambda n: nn.Linear(n, 3)), TypeError, "sizes of features and outputs, 4"
    ),
    row("core of two sizes", lambda: with_core(lambda n, m: None), TypeError, "core=<function.*size of its input, 5"),
    row("no word on normalize", lambda: actor(normalize=None), TypeError, "normalize=None is neither True nor False"),
    row(
        "the same with an env",
        lambda: GRUValueHead.from_env(env(), normalize="no"),
        TypeError,
        "normalize='no' is neither True",
    ),
    row("detach in words", lambda: MemoryValueHead(4, detach="no"), TypeError, "detach='no' is neither True nor False"),
    row("one_hot in words", lambda: GRUCategoricalActor(5, 3, one_hot="no"), TypeError, "one_hot='no' is neither True"),
    row(
        "distribution as a class",
        lambda: drawing(CategoricalActions),
        TypeError,
        r"is no Action.*CategoricalActions\(3\)",
    ),
    row("the same of PyTorch's", lambda: drawing(Categorical), TypeError, "Categorical'> is no ActionDistribution"),
    row(
        "distribution in words",
        lambda: drawing("tanh"),
        TypeError,
        "'tanh' is no Action.*TanhGaussianActions.from_spec",
    ),
    row(
        "what gives none", lambda: drawing(lambda spec: spec), TypeError, "(?s)is no ActionDistribution: give one such"
    ),
    row(
        "the same by hand", lambda: RecurrentActor(5, Categorical), TypeError, "Categorical'> is no ActionDistribution"
    ),
    row("convolutions that stand still", lambda: ConvEncoder([3, 9, 9], stride=0), ValueError, "stride=0.*at least 1"),
    row(
        "log std of each",
        lambda: GaussianActions(2, init_log_std=torch.zeros(2)),
        ValueError,
        "only one element tensors",
    ),
    row("skip in words", lambda: actor(skip="no"), TypeError, "skip='no' is neither True nor False"),
    row("activation in words", lambda: actor(activation="relu"), TypeError, "activation='relu' makes no layers.*class"),
    row("one activation for all", lambda: actor(activation=nn.ReLU()), TypeError, r"ReLU\(\) makes no layers.*class"),
    row(
        "one entry for a list of them", lambda: RL2PPOLoss(actor(), critic(), terms=[one_entry()]), TypeError, "in_keys"
    ),
    row(
        "values by two names",
        lambda: PPOUpdate(RL2PPOLoss(actor(), critic(value_key="v"))),
        ValueError,
        "critic writes .*'v'.*the advantage reads 'state_value'.*set_keys",
    ),
    row("number as batch size", lambda: BernoulliBandit(3, batch_size=8), TypeError, r"=8 is a number.*=\(8,\)"),
    row("class of optimizers", lambda: update(collect(), optimizer=torch.optim.SGD), TypeError, "=SGD is a class"),
    row("actor in the loss's place", lambda: PPOUpdate(actor()), TypeError, "trains a loss.*not GRUCategoricalActor"),
    row("encoder in words", lambda: actor(encoder="mlp"), TypeError, "not callable.*encoder='mlp' is called with"),
    row("core of PyTorch's", lambda: with_core(nn.GRU), TypeError, "GRU'> is called with the size"),
    row("core of PyTorch's, made", lambda: with_core(nn.GRU(5, 4)), TypeError, "GRU.* is no core.*LSTMCore"),
    row("core of PyTorch's, to be made", lambda: with_core(partial(nn.GRU, hidden_size=4)), TypeError, "is no core"),
    row("core in words", lambda: with_core("lstm"), TypeError, "'lstm' is called with the size"),
    row("core without its memory", lambda: with_core(Forgetful)(inputs()), TypeError, r"Forgetful.step.*\*memory"),
    row(
        "the same in a rollout",
        lambda: next(iter(collector(with_core(Forgetful)))),
        TypeError,
        r"Forgetful.step.*\*memory",
    ),
    row(
        "no such slot",
        lambda: GRUCategoricalActor.from_env(env(), hidden=32),
        TypeError,
        "unexpected keyword argument 'hidden'",
    ),
    row(
        "encoder that flattens time",
        lambda: GRUCategoricalActor(5, 3, encoder=lambda shape: nn.Sequential(nn.Linear(5, 4), nn.Flatten(0, -2))),
        ValueError,
        r"'trans'.*\(6, 4\) of \[2, 3\].*keep all leading dimensions",
    ),
    row("one extra key", lambda: critic(extra_keys="time_left"), TypeError, r"its letters.*extra_keys=\['time_left'\]"),
    row(
        "one extra key from env",
        lambda: GRUValueHead.from_env(env(), extra_keys="time_left"),
        TypeError,
        r"its letters.*extra_keys=\['time_left'\]",
    ),
    row(
        "encoder of an entry that is not there",
        lambda: GRUCategoricalActor.from_env(env(), encoder={"pixels": MLPEncoder}),
        KeyError,
        r"\['pixels'\], only \[[^]]*'trans'[^]]*\]: name one of these[^P]*$",
    ),
    row("no such extra key", lambda: GRUValueHead.from_env(env(), extra_keys=["goal"]), KeyError, "goal.*only"),
    row("wrong input size", lambda: actor()(inputs(6)), ValueError, "6 entries.*input_size=5.*from_env"),
    row(
        "wrong memory shape",
        lambda: actor()(inputs(actor_hidden=torch.zeros(2, 4))),
        ValueError,
        r"\(2, 4\).*\[\*B, 1, 4\].*primers",
    ),
    row("no is_init", lambda: actor()(inputs().exclude("is_init")), KeyError, r"'is_init'.*InitTracker\(\)"),
    row("no input", lambda: critic()(inputs().exclude("trans")), KeyError, r"'trans'.*PreviousStep\(\)"),
    row(
        "wrong features size",
        lambda: ActorCritic(actor(), MemoryValueHead(8, detach=True))(inputs()),
        RuntimeError,
        "2x4 and 8x1",
    ),
    row(
        "features of an unknown actor",
        lambda: MemoryValueHead.from_env(env(), memoryless(), detach=True),
        AttributeError,
        "no attribute 'hidden_size'",
    ),
    row(
        "class as env",
        lambda: RecurrentActor.from_env(BernoulliBandit),
        TypeError,
        r"the class BernoulliBandit is no env: RecurrentActor.from_env\(env, ...\)",
    ),
    row("no env for an actor", lambda: GRUCategoricalActor.from_env(None), TypeError, "NoneType is no env: GRUCat"),
    row("no env for reals", lambda: GRUGaussianActor.from_env(env), TypeError, "function is no env: GRUGaussian"),
    row("no env for a critic", lambda: GRUValueHead.from_env("CartPole-v1"), TypeError, "str is no env: GRUValueHead"),
    row(
        "no env for a value head", lambda: MemoryValueHead.from_env(None, actor()), TypeError, "is no env: MemoryValue"
    ),
    row("no env to check", lambda: check_trial_env(BernoulliBandit), TypeError, "the class BernoulliBandit is no env"),
    row(
        "class as actor",
        lambda: MemoryValueHead.from_env(env(), GRUCategoricalActor, detach=True),
        AttributeError,
        "no attribute .hidden_size",
    ),
    row("no critic", lambda: ActorCritic(actor(), None), TypeError, "NoneType is no critic.*second.*GRUValueHead.from"),
    row(
        "classes as networks",
        lambda: ActorCritic(GRUCategoricalActor, GRUValueHead),
        TypeError,
        "the class GRUCategoricalActor has no action distribution",
    ),
    row("class as critic", lambda: RL2PPOLoss(actor(), GRUValueHead), TypeError, "the class GRUValueHead is no critic"),
    row("class as policy", lambda: collector(GRUCategoricalActor), TypeError, r"is no policy.*Collector\(env, policy"),
    row("critic before actor", lambda: ActorCritic(critic(), actor()), TypeError, "GRUValueHead.*actor comes first"),
    # Loss, advantage
    row(
        "critic first in the loss", lambda: RL2PPOLoss(critic(), actor()), TypeError, "GRUValueHead.*actor comes first"
    ),
    row("negative clip", lambda: RL2PPOLoss(actor(), critic(), clip_epsilon=-0.1), ValueError, "-0.1.*Usual are"),
    row("clip above 1", lambda: RL2PPOLoss(actor(), critic(), clip_epsilon=1.5), ValueError, "1.5.*Usual are"),
    row("negative critic_coeff", lambda: RL2PPOLoss(actor(), critic(), critic_coeff=-1.0), ValueError, "at least 0"),
    row("loss without advantage", lambda: loss_on(collect()), KeyError, r"no 'advantage'.*call TrialAdvantage"),
    row(
        "advantage without its last dimension",
        lambda: loss_on(collect().set("advantage", torch.zeros(2, 4))),
        ValueError,
        r"\(2, 4\).*must be \[\*B, T, 1\]",
    ),
    row(
        "three clips",
        lambda: RL2PPOLoss(actor(), critic(), clip_epsilon=(0.1, 0.2, 0.3)),
        ValueError,
        "too many values",
    ),
    row("belief of a size in words", lambda: TaskBelief(4, "3"), ValueError, "target_size='3'.*whole number"),
    row("one term", lambda: RL2PPOLoss(actor(), critic(), terms=TaskBelief(4, 3)), TypeError, "terms=.*no list"),
    row("a function", lambda: RL2PPOLoss(actor(), critic(), terms=[abs]), TypeError, "nn.Module with in_keys"),
    row("YAML's 1e-3", lambda: update(None, lr="1e-3"), TypeError, "lr='1e-3' is no number but str"),
    row("a bound as text", lambda: update(None, max_grad_norm="0.5"), TypeError, "max_grad_norm='0.5' is no number"),
    row("a seed for a generator", lambda: update(None, generator=0), TypeError, "int is no generator"),
    row("a discount as text", lambda: TrialAdvantage(gamma="0.9"), TypeError, "gamma='0.9' is no number"),
    row(
        "a clip as text", lambda: RL2PPOLoss(actor(), clip_epsilon="0.2"), TypeError, "clip_epsilon='0.2' is no number"
    ),
    row(
        "a weight as text",
        lambda: RL2PPOLoss(actor(), entropy_bonus=True, entropy_coeff="0.01"),
        TypeError,
        "entropy_coeff='0.01' is no number",
    ),
    row(
        "belief of other features",
        lambda: update(collect(), terms=[TaskBelief(32, 3)]),
        ValueError,
        "features_size=32, and the actor's features are 4 numbers",
    ),
    row(
        "term without names",
        lambda: update(collect(), terms=[Term(lambda x: x.mean())]),
        TypeError,
        "Term returned a Tensor.*by name",
    ),
    row(
        "term of many numbers",
        lambda: update(collect(), terms=[Term(lambda x: {"loss_mine": x})]),
        ValueError,
        r"Term.*'loss_mine' of shape \(1, 4, 4\).*mean",
    ),
    row(
        "the same by autograd",
        lambda: update(collect(), terms=[Term(lambda x: {"loss_mine": x})], backend="autograd"),
        ValueError,
        r"Term.*'loss_mine' of shape \(1, 4, 4\).*mean",
    ),
    row("normalize in words", lambda: TrialAdvantage(normalize="no"), TypeError, "normalize='no' is neither True nor"),
    row("scaling in words", lambda: TrialAdvantage(scale_rewards="no"), TypeError, "scale_rewards='no' is neither"),
    row(
        "shuffle in words", lambda: update(collect(), shuffle="no"), TypeError, "shuffle='no' is neither True nor False"
    ),
    row("gamma above 1", lambda: TrialAdvantage(gamma=1.1), ValueError, r"gamma=1.1.*\[0, 1\]"),
    row("negative lambda", lambda: TrialAdvantage(lmbda=-0.1), ValueError, r"lmbda=-0.1.*\[0, 1\]"),
    row("unknown value target", lambda: TrialAdvantage(value_target="td"), ValueError, "'td': choose 'return'"),
    # Updates on collected data
    row("bptt does not divide", lambda: update(collect(), bptt=3), ValueError, r"bptt=3.*4 steps.*\[1, 2, 4\]"),
    row("bptt too long", lambda: update(collect(), bptt=8), ValueError, r"bptt=8.*4 steps.*\[1, 2, 4\]"),
    row("bptt 0", lambda: update(collect(), bptt=0), ValueError, "bptt=0.*at least 1"),
    row("no epochs", lambda: update(collect(), epochs=0), ValueError, "epochs=0.*at least 1"),
    row(
        "entropy schedule without entropy",
        lambda: PPOUpdate(RL2PPOLoss(actor(), critic()), entropy_schedule=linear_decay),
        ValueError,
        "entropy_schedule moves one weight.*entropy_bonus=True",
    ),
    row("values not stored", lambda: update(collect(policy=actor())), KeyError, "no 'state_value'.*ActorCritic"),
    row(
        "hidden states not collected",
        lambda: update(
            collect(base=wrap(Trial(episodes=4), sampler(), PreviousStep(), InitTracker()), primers=False), bptt=2
        ),
        KeyError,
        "rows go on .*'actor_hidden'.*auto_register_policy_transforms=True",
    ),
    row(
        "hidden states not kept",
        lambda: update(collect(4).exclude("actor_hidden", "critic_hidden"), bptt=2),
        KeyError,
        "'actor_hidden', 'critic_hidden'.*auto_register_policy_transforms=True",
    ),
    row(
        "batch cuts trials, and nothing is kept beyond",
        lambda: update(collect(6).exclude(("next", "trans"))),
        KeyError,
        "2 trials are cut.*lacks.*'trans'.*bptt=6",
    ),
    row(
        "NaN reward",
        lambda: update(spoil(collect(), ("next", "reward"), math.nan)),
        FloatingPointError,
        "reward is nan.*row.*1.*step 2.*mend",
    ),
    row(
        "infinite value",
        lambda: update(spoil(collect(), "state_value", math.inf)),
        FloatingPointError,
        "state_value is inf.*row.*1.*step 2.*mend",
    ),
    row(
        "NaN observation",
        lambda: update(spoil(collect(), "trans", math.nan), minibatches=1),
        FloatingPointError,
        "not finite in epoch 0, minibatch.*not changed",
    ),
    row("too many minibatches", lambda: update(collect()), ValueError, "4 minibatches.*2 chunks.*fewer minibatches"),
    row(
        "no gradient left", lambda: update(collect(), max_grad_norm=0), ValueError, "max_grad_norm=0.*positive, or None"
    ),
    row(
        "negative entropy weight",
        lambda: RL2PPOLoss(actor(), critic(), entropy_coeff=-1.0),
        ValueError,
        "at least 0",
    ),
    row(
        "entropy without its bonus",
        lambda: RL2PPOLoss(actor(), critic(), entropy_coeff=0.01),
        ValueError,
        "entropy_coeff=0.01.*without a bonus.*entropy_bonus=True",
    ),
    # Training
    row(
        "update before collector", lambda: trained_on(nn.Identity()), TypeError, "Identity is no collector.*comes first"
    ),
    row(
        "loss as the update",
        lambda: train(collector(), RL2PPOLoss(actor(), critic()), evaluate=None),
        TypeError,
        r"RL2PPOLoss is no update.*PPOUpdate\(",
    ),
    row(
        "policy as the update",
        lambda: train(collector(), actor(), evaluate=None),
        TypeError,
        r"GRUCategoricalActor is no update.*PPOUpdate\(",
    ),
    row(
        "class as the update",
        lambda: train(collector(), PPOUpdate, evaluate=None),
        TypeError,
        "the class PPOUpdate is no update",
    ),
    row(
        "class as the agent",
        lambda: AdaptiveAgent.from_policy(GRUCategoricalActor, env()),
        TypeError,
        r"the class GRUCategoricalActor is no policy: from_policy\(",
    ),
    row("resume in words", lambda: trained(checkpoints="a", resume="no"), TypeError, "resume='no' is neither True nor"),
    row("check in words", lambda: trained(check="no"), TypeError, "check='no' is neither True nor False"),
    row("progress in words", lambda: trained(progress="no"), TypeError, "progress='no' is neither True nor False"),
    row("update before collector, described", lambda: describe(nn.Identity(), collector()), TypeError, "comes first"),
    row("no update to describe", lambda: describe(collector(), actor()), TypeError, "is no PPOUpdate"),
    row("update before collector, checked", lambda: check_training(actor(), collector()), TypeError, "comes first"),
    row("interval in words", lambda: trained(eval_interval="5"), ValueError, "eval_interval='5'.*whole number"),
    row("evaluate as a number", lambda: trained(evaluate=3), TypeError, "evaluate=3 is no function.*eval_interval="),
    row("stop as a number", lambda: trained(stop=100), TypeError, "stop=100 is no function.*total_frames="),
    row("logger in words", lambda: trained(logger="wandb"), TypeError, "'wandb' is no logger.*CSVLogger"),
    row("checkpoints without a folder", lambda: trained(checkpoints=True), TypeError, "=True is no folder.*path"),
    row("a folder of no name", lambda: trained(checkpoints=""), ValueError, "checkpoints is empty, .* current folder"),
    row(
        "one setting to change",
        lambda: trained(checkpoints="runs", resume=True, resume_changes="update.lr"),
        TypeError,
        r"its letters.*resume_changes=\['update.lr'\]",
    ),
    # Evaluation
    row("no trials to play", lambda: adaptation_curve(env(), actor(), 0), ValueError, "num_trials=0.*at least 1"),
    row(
        "evaluation with moving statistics",
        lambda: adaptation_curve(normalized(VecNormV2), actor(), 2),
        ValueError,
        r"VecNormV2 is not frozen.*frozen_copy\(\)",
    ),
    row(
        "policy before env", lambda: adaptation_curve(actor(), env(), 2), TypeError, r"no env: adaptation_curve\(env, "
    ),
    row(
        "greedy in words", lambda: adaptation_curve(env(), actor(), 2, deterministic="no"), TypeError, "is neither True"
    ),
    row(
        "env before policy",
        lambda: AdaptiveAgent.from_policy(env(), actor()),
        TypeError,
        r"no env: from_policy\(policy, env",
    ),
    row("half a trial to play", lambda: adaptation_curve(env(), actor(), 2.5), ValueError, "num_trials=2.5"),
    row(
        "evaluation without Trial", lambda: adaptation_curve(bandit(), actor(), 2), ValueError, "has no Trial.*Compose"
    ),
    row(
        "trials that do not end",
        lambda: adaptation_curve(env(), actor(), 2, max_trial_steps=3),
        RuntimeError,
        "max_trial_steps=3.*Bound the trial",
    ),
    row(
        "NaN reward in an evaluation",
        lambda: adaptation_curve(nan_env(), GRUGaussianActor.from_env(quadratic()), 2),
        FloatingPointError,
        "reward is nan in row 0, episode 0 of trial 0.*Mend the env",
    ),
    row(
        "shuffling one row",
        lambda: adaptation_curve(env(1), actor(), 2, ablation=with_shuffled_rewards()),
        ValueError,
        "several rows.*batch size",
    ),
    row(
        "shuffling what is not there",
        lambda: adaptation_curve(env(), actor(), 2, ablation=with_shuffled_rewards(in_key="obs")),
        KeyError,
        "no 'obs'.*in_key=",
    ),
    row(
        "zeroing another policy's memory",
        lambda: adaptation_curve(env(), actor(), 2, ablation=with_zeroed_memory(critic())),
        ValueError,
        r"no \['critic_hidden'\] to zero, the memory of another: give with_zeroed_memory the one that plays",
    ),
    row(
        "zeroing an agent's memory",
        lambda: with_zeroed_memory(AdaptiveAgent.from_policy(actor(), env())),
        TypeError,
        r"AdaptiveAgent is no policy: with_zeroed_memory\(policy\).*its \.policy",
    ),
    row(
        "ablation that is not called",
        lambda: adaptation_curve(env(), actor(), 2, ablation=with_zeroed_memory),
        TypeError,
        r"dict is no policy: with_zeroed_memory\(policy\) takes",
    ),
    row(
        "agent that plays", lambda: adaptation_curve(env(), 3, 2), TypeError, r"int is no policy: adaptation.*\.policy"
    ),
    row("zeroing no memory", lambda: with_zeroed_memory(memoryless()), ValueError, "no hidden state.*it reads"),
    row("curve of an array", lambda: AdaptationCurve(np.zeros((2, 3))), TypeError, "no tensor but ndarray.*as_tensor"),
    row("shuffling by a seed", lambda: with_shuffled_rewards(0), TypeError, "int is no generator.*manual_seed"),
    row("curve of one dimension", lambda: AdaptationCurve(torch.zeros(3)), ValueError, r"\(3,\).*unsqueeze"),
    row("curve of no trial", lambda: AdaptationCurve(torch.zeros(0, 3)), ValueError, r"\(0, 3\).*at least one"),
    row("curve of whole numbers", lambda: AdaptationCurve(torch.zeros(2, 3).long()), ValueError, "int64.*floats"),
    row("infinite returns", lambda: AdaptationCurve(torch.full((2, 3), math.inf)), ValueError, "infinities.*mend"),
]


class Speaking(gymnasium.Env):
    """Shows where it is, and says something."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Dict(place=gymnasium.spaces.Box(0, 1, (1,)), said=gymnasium.spaces.Text(5))

    def reset(self, **kwargs):
        return {"place": np.zeros(1, dtype=np.float32), "said": "yes"}, {}


def spoken(key):
    """A trial env that shows the agent the entry ``key`` of `Speaking`."""
    speaking = wrap(Trial(steps=4), PreviousStep([key]), base=GymWrapper(Speaking()))
    assert speaking.observation_spec["trans"].shape == (5,)
    return speaking


def normalized(norm):
    return wrap(Trial(episodes=2), norm(in_keys=["observation"]), PreviousStep(), base=GymEnv("CartPole-v1"))


def nan_env():
    tasks = TaskSampler.fixed(torch.full((2, 2), math.nan))
    return wrap(Trial(episodes=4), tasks, PreviousStep(), base=QuadraticBandit(2, batch_size=(2,)))


@pytest.mark.parametrize(("mistake", "error", "message"), CASES)
@pytest.mark.filterwarnings("ignore:The env passed to Collector is missing transforms:FutureWarning")
def test_a_mistake_is_named_and_mended(mistake, error, message):
    with pytest.raises(error, match=f"(?s){message}") as raised:
        mistake()
    assert raised.type is error
