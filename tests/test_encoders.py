"""Encoders: what they read and give, sizes that find each other, images and dicts from an env."""

from functools import partial

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.collectors import Collector
from torchrl.data import Binary, Bounded, Categorical, Composite, Unbounded
from torchrl.envs import Compose, TransformedEnv
from torchrl.modules import set_recurrent_mode

from rl2_torchrl import (
    ActorCritic,
    GRUCategoricalActor,
    GRUGaussianActor,
    GRUValueHead,
    MemoryValueHead,
    PPOUpdate,
    PreviousStep,
    RL2PPOLoss,
    TaskSampler,
    Trial,
    TrialCollector,
    adaptation_curve,
)
from rl2_torchrl.envs import BernoulliBandit, TensorEnv, uniform_means
from rl2_torchrl.modules import (
    CategoricalActions,
    ConvEncoder,
    GRUCore,
    ImageEncoder,
    MLPEncoder,
    RecurrentActor,
    RecurrentCritic,
)
from rl2_torchrl.modules.layers import Concat


class SeenBandit(BernoulliBandit):
    """A bandit that shows an image, or another table of bytes, and two numbers."""

    def __init__(self, dtype=torch.uint8, size=(3, 9, 9), **kwargs):
        super().__init__(3, **kwargs)
        rows, self.size = self.batch_size, size
        self.observation_spec = Composite(
            pixels=Unbounded((*rows, *size), dtype=dtype), place=Unbounded((*rows, 2)), shape=rows
        )
        self.state_spec["place"] = self.observation_spec["place"].clone()

    def _shown(self, td):
        shown = {"pixels": torch.randint(256, (*self.batch_size, *self.size), dtype=torch.uint8)}
        return td.update({**shown, "place": torch.rand(*self.batch_size, 2)})

    def _reset(self, tensordict=None, **kwargs):
        return self._shown(super()._reset(tensordict, **kwargs))

    def _step(self, tensordict):
        return self._shown(super()._step(tensordict))


def make_env(**kwargs):
    tasks = TaskSampler(uniform_means(3), seed=0)
    return TransformedEnv(
        SeenBandit(batch_size=(2,), seed=0, **kwargs), Compose(Trial(episodes=4), tasks, PreviousStep(["place"]))
    )


def inputs(*shape, **entries):
    return TensorDict({"is_init": torch.ones(*shape, 1, dtype=torch.bool), **entries}, shape)


# -------------------------------------------------------------------- alone
def test_mlp_by_hand():
    mlp = MLPEncoder([2, 2], num_cells=[3, 2])
    first, _, second, _ = mlp.layers
    x = torch.randn(5, 7, 2, 2)
    torch.testing.assert_close(mlp(x), second(first(x.flatten(-2)).relu()).relu())
    scalar = MLPEncoder([], num_cells=[3])
    torch.testing.assert_close(scalar(x), scalar.layers(x.unsqueeze(-1)))
    with pytest.raises(ValueError, match="at least one layer"):
        MLPEncoder(3, num_cells=[])


@pytest.mark.parametrize("batch", [(), (4,), (4, 7), (2, 4, 7)])
def test_convolutions_of_any_batch_are_those_of_each_image(batch):
    conv, x = ConvEncoder([3, 9, 11]), torch.randint(256, (*batch, 3, 9, 11), dtype=torch.uint8)
    out = conv(x)
    assert out.shape == (*batch, 64)
    # uint8 is scaled to [0, 1].
    each = torch.stack([conv.net(image.float().unsqueeze(0) / 255)[0] for image in x.reshape(-1, 3, 9, 11)])
    torch.testing.assert_close(out, each.reshape(*batch, 64))
    torch.testing.assert_close(conv(x.float() / 255), out)


def test_images_with_channels_last_are_turned():
    torch.manual_seed(0)
    last = ConvEncoder([9, 11, 3])
    first = ConvEncoder([3, 9, 11])
    first.net.load_state_dict(
        {f"{int(k.split('.')[0]) - 1}.{k.split('.')[1]}": v for k, v in last.net.state_dict().items()}
    )
    x = torch.randint(256, (2, 3, 9, 11), dtype=torch.uint8)
    torch.testing.assert_close(last(x.movedim(-3, -1)), first(x))


def test_images_that_cannot_be_convolved():
    with pytest.raises(ValueError, match="too small for 2.*num_channels="):
        ConvEncoder([3, 4, 4])
    with pytest.raises(ValueError, match=r"\[channels, height, width\], not \(64, 64\)"):
        ConvEncoder([64, 64])


# -------------------------------------------------------------- in a network
ENCODERS = {
    "class": MLPEncoder,
    "function": lambda shape: nn.Sequential(nn.Linear(shape[0], 11), nn.Tanh()),
    "module": nn.Sequential(nn.Linear(5, 11), nn.Tanh()),
    "by entry": {"trans": MLPEncoder},
    "tensordict module": TensorDictModule(nn.Linear(5, 11), ["trans"], ["encoded"]),
}


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("make", [RecurrentActor, RecurrentCritic])
def test_the_core_reads_what_the_encoder_gives(kind, make):
    sizes = (5, CategoricalActions(3)) if make is RecurrentActor else (5,)
    network = make(*sizes, encoder=ENCODERS[kind], hidden_size=4)
    modules = (network.module[0] if make is RecurrentActor else network).module
    encoder, core, _ = modules
    assert core.in_keys[0] == encoder.out_keys[0] != "trans"
    assert core.input_size == (64 if kind in ("class", "by entry") else 11)
    td = network(inputs(3, trans=torch.randn(3, 5)))
    torch.testing.assert_close(td[core.in_keys[0]], encoder.module(td["trans"]))
    with set_recurrent_mode(True):
        network(inputs(3, 6, trans=torch.randn(3, 6, 5)))


def _layer(size, read, made):
    return TensorDictModule(nn.Linear(size, 4), [read], [made])


def test_of_a_sequence_of_modules_the_last_one_is_read():
    encoder = TensorDictSequential(_layer(5, "trans", "first"), TensorDictSequential(_layer(4, "first", "second")))
    core = TensorDictSequential(
        GRUCore(4, 6, in_key="second", hidden_key="low", features_key="below"),
        GRUCore(6, 3, in_key="below", hidden_key="high", features_key="above"),
    )
    critic = RecurrentCritic(5, encoder=encoder, core=core)
    assert (critic.features_key, critic.hidden_size) == ("above", 3)
    critic(inputs(3, trans=torch.randn(3, 5)))["state_value"].sum().backward()
    assert all(p.grad is not None for p in critic.parameters())
    in_place = TensorDictSequential(_layer(5, "trans", "seen"), _layer(4, "seen", "seen"))
    assert RecurrentCritic(5, encoder=in_place).module[1].in_keys[0] == "seen"


def test_skip_goes_from_what_the_core_reads():
    actor = GRUGaussianActor(5, 2, encoder=partial(MLPEncoder, num_cells=[7]), num_cells=[8], skip=True, hidden_size=4)
    first = next(layer for layer in actor.module[0].module[-1].module.modules() if isinstance(layer, nn.Linear))
    assert first.in_features == 4 + 7
    td = actor(inputs(3, trans=torch.randn(3, 5)))
    head = actor.module[0].module[-1].module.mean.head
    read = torch.cat((td["actor_features"].relu(), td["actor_features_trans"]), -1)
    torch.testing.assert_close(td["loc"], head.layers[1:](read))


def test_value_head_with_hidden_layers_and_skip():
    critic = GRUValueHead(5, num_cells=[8], skip=True, hidden_size=4)
    first, last = (layer for layer in critic.modules() if isinstance(layer, nn.Linear))
    td = critic(inputs(3, trans=torch.randn(3, 5)))
    read = torch.cat((td["critic_features"].relu(), td["trans"]), -1)
    torch.testing.assert_close(td["state_value"], last(first(read).relu()))


def test_image_and_dict_from_an_env():
    env = make_env()
    encoder = {"pixels": partial(ConvEncoder, out_features=6), "place": partial(MLPEncoder, num_cells=[5])}
    torch.manual_seed(0)
    actor = GRUCategoricalActor.from_env(env, encoder=encoder, hidden_size=4, init_range=0.5)
    critic = GRUValueHead.from_env(env, encoder={"pixels": ConvEncoder}, extra_keys=["time_left"], init_range=0.5)
    # 2 numbers, 3 actions, reward and done stand in "trans"; beside it 6 features of the image and 5 of the place.
    assert actor.module[0].module[-2].input_size == 7 + 6 + 5
    assert critic.module[-2].input_size == 7 + 1 + 64
    policy = ActorCritic(actor, critic)
    (batch,) = Collector(env, policy, frames_per_batch=16, total_frames=16, auto_register_policy_transforms=True)
    with set_recurrent_mode(True):
        again = batch.select(*policy.in_keys).clone()
        torch.testing.assert_close(actor.get_dist(again).log_prob(batch["action"]), batch["action_log_prob"])
        torch.testing.assert_close(critic(again)["state_value"], batch["state_value"])
    other = batch.select(*policy.in_keys).clone()
    other["pixels"] = 255 - other["pixels"]
    with set_recurrent_mode(True):
        assert not torch.equal(critic(other)["state_value"], batch["state_value"])


def test_a_users_convolution_need_not_know_of_time():
    env = make_env(dtype=torch.float32)
    net = nn.Sequential(nn.Conv2d(3, 4, 9), nn.Flatten())
    actor = GRUCategoricalActor.from_env(env, encoder={"pixels": net}, hidden_size=4)
    assert isinstance(actor.module[0].module[0].module, ImageEncoder)
    assert actor.module[0].module[-2].input_size == 7 + 4


class Symbols(nn.Module):
    """Embeds the bytes that it is given."""

    def __init__(self, shape):
        super().__init__()
        self.embedding, self.seen = nn.Embedding(256, 2), None

    def forward(self, x):
        self.seen = x
        return self.embedding(x.long()).flatten(1)


class Halves(nn.Module):
    """Scales them by itself."""

    def __init__(self, shape):
        super().__init__()
        self.linear, self.seen = nn.Linear(shape.numel(), 2), None

    def forward(self, x):
        self.seen = x
        return self.linear(x.flatten(1).to(self.linear.weight) / 2)


class Reals(Halves):
    def forward(self, x):
        self.seen = x
        return self.linear(x.flatten(1))


@pytest.mark.parametrize("encoder", [Symbols, Halves, Reals])
def test_a_users_module_is_given_bytes_as_they_are_unless_an_image_encoder_scales_them(encoder):
    env, is_scaled = make_env(), encoder is Reals
    if is_scaled:
        with pytest.raises(RuntimeError) as told:  # at once, and not at the first step
            GRUCategoricalActor.from_env(env, encoder={"pixels": encoder}, hidden_size=4)
        assert "'torch.uint8 [2, 3, 3, 9, 9]'" in told.value.__notes__[0]
        assert "or be ImageEncoder(module, shape)" in told.value.__notes__[0]
    make = (lambda shape: ImageEncoder(encoder(shape), shape)) if is_scaled else encoder
    actor = GRUCategoricalActor.from_env(env, encoder={"pixels": make}, hidden_size=4)
    module = next(module for module in actor.modules() if isinstance(module, encoder))
    adaptation_curve(env, actor, 2)
    assert module.seen.dtype == (torch.float32 if is_scaled else torch.uint8)
    assert (0 < module.seen.max() <= 1) == is_scaled
    assert module.seen.shape[1:] == (3, 9, 9)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.uint8])
def test_other_images_are_reals_to_a_module_that_takes_bytes(dtype):
    module = Halves(torch.Size([3, 4]))
    encoder = ImageEncoder(module, [3, 4], scale=False).double()
    assert encoder(torch.ones(2, 5, 3, 4, dtype=dtype)).shape == (2, 5, 2)
    assert module.seen.dtype == (dtype if dtype == torch.uint8 else torch.float64)


def test_an_embedding_of_choices_may_be_an_encoder():
    shapes = {"trans": [5], "kind": Categorical(4, shape=())}
    actor = RecurrentActor(shapes, CategoricalActions(3), encoder={"kind": nn.Embedding(4, 2)})
    assert actor.module[0].module[-2].input_size == 5 + 2
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        RecurrentActor({"trans": [5], "x": [2]}, CategoricalActions(3), encoder={"x": nn.Linear(3, 3)})


def test_flags_and_choices_may_stand_beside_reals():
    class Pool(nn.Linear):
        def forward(self, trans, kind, legal):
            return super().forward(torch.cat([trans, nn.functional.one_hot(kind, 3), (~legal).float()], -1))

    encoder = TensorDictModule(Pool(5 + 3 + 2, 4), ["trans", "kind", "legal"], ["seen"])
    shapes = {"trans": [5], "kind": Categorical(3, shape=()), "legal": Binary(2, dtype=torch.bool)}
    assert RecurrentActor(shapes, CategoricalActions(3), encoder=encoder).module[0].module[-2].input_size == 4
    with pytest.raises(RuntimeError) as told:
        RecurrentActor({**shapes, "kind": []}, CategoricalActions(3), encoder=encoder)
    assert "A shape stands for reals; from_env, or a spec in its place, tells" in told.value.__notes__[0]


def test_an_image_that_nobody_reads_is_convolved():
    env = make_env()
    for network in (GRUCategoricalActor, GRUValueHead):
        assert any(isinstance(module, ConvEncoder) for module in network.from_env(env).modules())
        blind = network.from_env(env, encoder={"pixels": None})
        assert not any(isinstance(module, ConvEncoder) for module in blind.modules())
        both = network.from_env(env, encoder=MLPEncoder)
        read = [getattr(module, "in_keys", None) for module in both.modules()]
        assert ["trans"] in read
        assert ["pixels"] in read
    told = TransformedEnv(SeenBandit(batch_size=(2,)), Compose(Trial(episodes=4), PreviousStep(["pixels"])))
    GRUCategoricalActor.from_env(told)


@pytest.mark.parametrize("shape", [(3, 4), (3, 9, 9)])
def test_what_the_head_reads_needs_no_encoder_unless_it_is_an_image(shape):
    class Corner(nn.Linear):
        def forward(self, features, shown):
            return super().forward(features) + shown.flatten(-len(shape))[..., :3]

    env, head = make_env(size=shape), TensorDictModule(Corner(4, 3), ["actor_features", "pixels"], ["logits"])
    actor = GRUCategoricalActor.from_env(env, head=head, hidden_size=4)
    assert any(isinstance(module, ConvEncoder) for module in actor.modules()) == (len(shape) == 3)
    assert "pixels" in actor.in_keys
    adaptation_curve(env, actor, 4)


def test_encoders_that_do_not_fit():
    with pytest.raises(KeyError, match=r"encoders for \['pixels'\].*\['trans'\]"):
        RecurrentActor(5, CategoricalActions(3), encoder={"pixels": ConvEncoder})
    with pytest.raises(ValueError, match=r"'pixels' has shape \(3, 9, 9\) and no encoder"):
        RecurrentActor({"trans": [5], "pixels": [3, 9, 9]}, CategoricalActions(3))
    with pytest.raises(ValueError, match=r"encoder of \['x'\] makes .*must give \[\*B, n\]"):
        RecurrentActor({"trans": [5], "x": [4, 9]}, CategoricalActions(3), encoder={"x": nn.Conv1d(4, 4, 3)})
    with pytest.raises(KeyError, match=r"reads \['time_left'\], whose shape"):
        RecurrentCritic({"trans": [5]}, extra_keys=["time_left"])
    with pytest.raises(ValueError, match="say each entry's shape"):
        RecurrentCritic(6, extra_keys=["time_left"], encoder=MLPEncoder)
    with pytest.raises(KeyError, match="goal"):
        GRUCategoricalActor.from_env(make_env(), encoder={"goal": MLPEncoder, "pixels": None})


def test_further_inputs_that_are_no_vectors():
    with pytest.raises(ValueError, match=r"has shape \(\) and no encoder.*'x': MLPEncoder"):
        RecurrentCritic({"trans": [5], "x": []}, extra_keys=["x"])
    critic = RecurrentCritic({"trans": [5], "x": []}, extra_keys=["x"], encoder={"x": MLPEncoder})
    assert critic(inputs(2, trans=torch.zeros(2, 5), x=torch.zeros(2)))["state_value"].shape == (2, 1)
    with pytest.raises(ValueError, match=r"has shape \(3, 9, 9\) and no encoder.*'x': ConvEncoder"):
        RecurrentCritic({"trans": [5], "x": [3, 9, 9]}, extra_keys=["x"])


def test_two_cameras_whose_images_have_one_name_are_both_seen():
    left, right = ("left", "pixels"), ("right", "pixels")
    shapes = {"trans": [5], left: [3, 9, 9], right: [3, 9, 9]}
    actor = RecurrentActor(
        shapes, CategoricalActions(3), encoder=dict.fromkeys((left, right), ConvEncoder), init_range=1.0
    )
    assert actor.module[0].module[-2].input_size == 5 + 64 + 64
    images = {side: {"pixels": torch.rand(2, 3, 9, 9)} for side in ("left", "right")}
    seen = inputs(2, trans=torch.randn(2, 5), **images)
    logits = [actor(seen.clone().set(key, torch.rand(2, 3, 9, 9)))["logits"] for key in (left, right)]
    assert not any(torch.equal(each, actor(seen.clone())["logits"]) for each in logits)


def test_entries_that_would_have_one_name_are_refused():
    for keys, normalize in (((("a", "b_c"), ("a_b", "c")), False), (("normalized",), True)):
        shapes, encoder = {"trans": [5], **dict.fromkeys(keys, [4])}, dict.fromkeys(keys, MLPEncoder)
        with pytest.raises(ValueError, match="two have one name, and one would be lost"):
            RecurrentActor(shapes, CategoricalActions(3), encoder=encoder, normalize=normalize)
    RecurrentActor({"trans": [5], "input": [4]}, CategoricalActions(3), encoder={"input": MLPEncoder})


def test_encoders_take_the_networks_dtype():
    actor = RecurrentActor(5, CategoricalActions(3), encoder=MLPEncoder, dtype=torch.float64)
    assert {p.dtype for p in actor.parameters()} == {torch.float64}
    assert actor(inputs(3, trans=torch.randn(3, 5)))["logits"].dtype == torch.float64


def test_bytes_that_come_first_cut_nothing_off():
    seen, time = torch.tensor([[255, 0]], dtype=torch.uint8), torch.tensor([[0.5]], dtype=torch.float64)
    assert torch.equal(Concat()(seen, time), torch.tensor([[1.0, 0.0, 0.5]], dtype=torch.float64))
    assert torch.equal(Concat()(time, seen), torch.tensor([[0.5, 1.0, 0.0]], dtype=torch.float64))
    assert torch.equal(Concat()(seen, seen), torch.tensor([[1.0, 0.0, 1.0, 0.0]]))
    assert torch.equal(Concat()(torch.tensor([[3]]), time), torch.tensor([[3.0, 0.5]], dtype=torch.float64))


def test_a_normalized_input_is_tried_in_the_dtype_that_it_comes_in():
    env = TransformedEnv(
        BernoulliBandit(3, batch_size=(2,)), Compose(Trial(episodes=2), TaskSampler(uniform_means(3)), PreviousStep())
    )

    def make(shape):
        return nn.Linear(*shape, 4)

    RecurrentActor.from_env(env, normalize=True, encoder=make)
    with pytest.raises(RuntimeError, match="(?s)same dtype.*let it cast"):  # and not in the first rollout
        RecurrentActor.from_env(env, normalize=True, encoder=make, dtype=torch.float64)


class _Shows(TensorEnv):
    """Numbers of any dtype, from 0 to 5."""

    def __init__(self, dtype):
        spec = Binary(3, dtype=dtype) if dtype == torch.bool else Bounded(0, 5, (3,), dtype=dtype)
        spaces = {"observation_spec": spec, "action_spec": Categorical(2), "task_spec": None}
        super().__init__(**spaces, max_episode_steps=3, batch_size=(8,), seed=0)

    def begin(self, task, rows):
        return torch.zeros(8, 1), self._seen()

    def advance(self, state, action):
        return state, self._seen(), action.float().unsqueeze(-1), None, None

    def _seen(self):
        return torch.randint(0, 6, (8, 3), generator=self.generator).to(self.observation_spec["observation"].dtype)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.int64, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("extra", [False, True])
def test_data_of_any_dtype_are_read_as_modules_read_them(dtype, extra):
    """By encoders and heads: bytes are scaled, and nothing else."""
    metrics = []
    for way in ("parts", "autograd"):
        torch.manual_seed(0)
        env = TransformedEnv(_Shows(dtype), Compose(Trial(episodes=2), PreviousStep()))
        encoder = {} if extra else {"encoder": {"observation": partial(MLPEncoder, num_cells=[4])}}
        actor = GRUCategoricalActor.from_env(env, hidden_size=4, init_range=1.0, **encoder)
        told = {"extra_keys": ["observation"]} if extra else {}
        critic = MemoryValueHead.from_env(env, actor, num_cells=[4], detach=False, init_range=1.0, **told)
        update = PPOUpdate(RL2PPOLoss(actor, critic), minibatches=4, epochs=2, shuffle=False, backend=way)
        (batch,) = TrialCollector(env, ActorCritic(actor, critic), frames_per_batch=48, total_frames=48)
        metrics.append(update(batch))
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-4, abs=1e-6)
