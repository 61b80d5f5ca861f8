"""What stands before and behind the core: `MLPEncoder`, `ConvEncoder` or your own encoder, and the head."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from operator import index

import torch
from tensordict import NestedKey, TensorDict
from tensordict.nn import TensorDictModule, TensorDictModuleBase, TensorDictSequential
from torch import Tensor, nn
from torchrl.data import TensorSpec

from rl2_torchrl.arguments import noted, whole, whole_numbers
from rl2_torchrl.gradients.chain import ChainPart
from rl2_torchrl.gradients.part import IGNORED, Part, brings, is_bare
from rl2_torchrl.kernels.functions import as_reals
from rl2_torchrl.modules.cores import sub_key

__all__ = [
    *("Concat", "ConvEncoder", "Encoder", "Head", "ImageEncoder", "MLPEncoder", "SkipHead"),
    *("Entries", "by_entry", "encoding", "out_of_place", "output_key", "output_size", "shape_of"),
]

#: What a network reads, batch dimensions aside: specs, or shapes of reals in the network's dtype.
Entries = Mapping[NestedKey, TensorSpec | Sequence[int]]
#: A module of ``[*B, *shape]`` to ``[*B, n]``, or a function of that shape that makes one.
EntryEncoder = nn.Module | Callable[[torch.Size], nn.Module]
#: What a network takes: one for its transition input, or one for each entry.
Encoder = EntryEncoder | Mapping[NestedKey, EntryEncoder | None]


class Layers(nn.Module):
    """What a class below computes `by_torch`; where no gradient is asked for, the kernels of its part do.

    So do rollouts, with the same numbers as TorchRL's own loop to the last bit.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``[*B, n]`` to ``[*B, m]``."""
        if torch.is_grad_enabled() or not is_bare(self):
            return self.by_torch(x)
        return self.step_function()(x)

    def by_torch(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        raise NotImplementedError

    def step_function(self) -> Callable[[Tensor], Tensor]:
        part = self.gradient_part(["x"], ["y"])
        return self.by_torch if part is None else part.step_function(self.by_torch)


class MLPEncoder(Layers):
    """Linear layers, each with an activation: ``[*B, *shape]`` to ``[*B, num_cells[-1]]``.

    Args:
        shape: shape of the entry, flattened, or its size. The transition input's is ``[input_size]``.
        num_cells: sizes of the layers. Default one of 64.
        activation: Default `torch.nn.ReLU`.
        **factory: device and dtype of the parameters.

    Examples:
        >>> MLPEncoder(5, num_cells=[32, 16])(torch.zeros(4, 10, 5)).shape
        torch.Size([4, 10, 16])
    """

    def __init__(
        self,
        shape: int | Sequence[int],
        num_cells: Sequence[int] = (64,),
        *,
        activation: Callable[[], nn.Module] = nn.ReLU,
        **factory,
    ):
        super().__init__()
        self.shape = torch.Size(shape if isinstance(shape, Sequence) else (index(shape),))
        sizes = [self.shape.numel(), *whole_numbers("num_cells", num_cells)]
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"shape={shape!r} and num_cells={num_cells!r} must be at least one layer of at least 1.")
        layers = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, **factory), activation()]
        self.layers = nn.Sequential(*layers)

    def by_torch(self, x: Tensor) -> Tensor:
        x = as_reals(x, self.layers[0].weight)
        return self.layers(x.flatten(-len(self.shape)) if self.shape else x.unsqueeze(-1))

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        return ChainPart.of(self, self.layers, in_keys, out_keys) if len(self.shape) == 1 else None


class ImageEncoder(nn.Module):
    """Lets a module of images ``[N, *shape]`` read ``[*B, *shape]``; uint8 is scaled to [0, 1], all else is read as it is.

    Args:
        net: maps ``[N, *shape]`` to ``[N, n]``.
        shape: shape of one image, such as ``[channels, height, width]``.
        scale: whether uint8 is scaled; else ``net`` is given it as it is. Default True.

    Examples:
        >>> net = nn.Sequential(nn.Conv2d(3, 4, 5), nn.Flatten())
        >>> ImageEncoder(net, [3, 5, 5])(torch.zeros(2, 7, 3, 5, 5, dtype=torch.uint8)).shape
        torch.Size([2, 7, 4])
    """

    def __init__(self, net: nn.Module, shape: Sequence[int], *, scale: bool = True):
        super().__init__()
        self.net, self.shape, self.scale = net, torch.Size(shape), scale

    def forward(self, x: Tensor) -> Tensor:
        batch = x.shape[: x.ndim - len(self.shape)]
        if self.scale or x.dtype != torch.uint8:
            x = as_reals(x, next(self.net.parameters(), torch.empty(0)))
        out = self.net(x.reshape(-1, *self.shape))
        return out.reshape(*batch, *out.shape[1:])


class ConvEncoder(ImageEncoder):
    """Convolutions and one linear layer: images ``[*B, channels, height, width]`` to ``[*B, out_features]``.

    Images with their channels last, as Gymnasium's envs have them, are turned: those whose last size alone is 1, 3 or 4.

    Args:
        shape: ``[channels, height, width]`` or ``[height, width, channels]``.
        out_features: size of what it gives. Default 64.
        num_channels: of each convolution. Default 16 and 32.
        kernel_size, stride: of all convolutions. Default 3 and 2.
        activation: after each layer. Default `torch.nn.ReLU`.
        **factory: device and dtype of the parameters.

    Examples:
        >>> ConvEncoder([3, 16, 16])(torch.zeros(2, 7, 3, 16, 16, dtype=torch.uint8)).shape
        torch.Size([2, 7, 64])
    """

    def __init__(
        self,
        shape: Sequence[int],
        out_features: int = 64,
        *,
        num_channels: Sequence[int] = (16, 32),
        kernel_size: int = 3,
        stride: int = 2,
        activation: Callable[[], nn.Module] = nn.ReLU,
        **factory,
    ):
        shape = tuple(map(index, shape))
        if len(shape) != 3:
            raise ValueError(f"images have shape [channels, height, width], not {shape}.")
        is_last = shape[-1] in (1, 3, 4) and shape[0] not in (1, 3, 4)
        channels, *size = (shape[2], *shape[:2]) if is_last else shape
        kernel_size, stride = whole("kernel_size", kernel_size), whole("stride", stride)
        layers: list[nn.Module] = [_ChannelsFirst()] if is_last else []
        for outputs in whole_numbers("num_channels", num_channels):
            layers += [nn.Conv2d(channels, outputs, kernel_size, stride, **factory), activation()]
            channels, size = outputs, [(n - kernel_size) // stride + 1 for n in size]
            if min(size) < 1:
                raise ValueError(
                    f"images {tuple(shape)} are too small for {len(num_channels)} such convolutions: give fewer or smaller ones, "
                    "encoder={...: partial(ConvEncoder, num_channels=[16])}, or an MLPEncoder."
                )
        inputs, outputs = channels * size[0] * size[1], whole("out_features", out_features)
        layers += [nn.Flatten(), nn.Linear(inputs, outputs, **factory), activation()]
        super().__init__(nn.Sequential(*layers), shape)


class _ChannelsFirst(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return images.movedim(-1, -3)


class Concat(nn.Module):
    """Concatenates its inputs ``[*B, n_i]`` to ``[*B, sum n_i]``, in the dtype of the first reals; uint8 is scaled to [0, 1]."""

    def forward(self, *inputs: Tensor) -> Tensor:
        if len(inputs) == 1:
            return inputs[0]
        like = next((x for x in inputs if x.is_floating_point()), torch.empty(0))  # bytes would cut reals off
        return torch.cat([as_reals(x, like) for x in inputs], -1)

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> Part:
        return Part(self, in_keys, out_keys)


def by_entry(encoder: Encoder | None, in_key: NestedKey) -> TensorDictModuleBase | Mapping[NestedKey, EntryEncoder]:
    """Encoders by the entries that they read, a single one ``in_key``; a TensorDictModule names its entries itself."""
    if isinstance(encoder, TensorDictModuleBase | Mapping):
        return encoder
    return {} if encoder is None else {in_key: encoder}


def encoding(
    encoder: TensorDictModuleBase | Mapping, entries: Entries, out_key: NestedKey, **factory
) -> tuple[list[TensorDictModuleBase], NestedKey, int]:
    """Modules that make one vector of ``entries``, its key and its size.

    ``encoder`` is what `by_entry` gives; entries without one are taken as they are. What is made is named after ``out_key``;
    ``factory`` is device and dtype for modules that functions make.
    """
    is_whole = isinstance(encoder, TensorDictModuleBase)
    encoded = encoder.in_keys if is_whole else list(encoder)
    if unknown := [key for key in encoded if key not in entries]:
        raise KeyError(f"there are encoders for {unknown}, but the network reads {list(entries)}; from_env adds them.")
    modules = [encoder] if is_whole else [_module_of(*item, entries, out_key, factory) for item in encoder.items()]
    shapes = {key: shape_of(entries[key]) for key in entries if key not in encoded}
    for key, shape in shapes.items():
        if len(shape) != 1:
            fits = "ConvEncoder" if len(shape) == 3 else "MLPEncoder"
            raise ValueError(f"{key!r} has shape {tuple(shape)} and no encoder: encoder={{{key!r}: {fits}}}.")
    names = [*shapes, *map(output_key, modules)]
    if len(set(names)) < len(names):
        raise ValueError(f"of the inputs {names} two have one name, and one would be lost: RenameTransform mends it.")
    sizes = {key: shape.numel() for key, shape in shapes.items()}
    sizes |= {output_key(module): output_size(module, entries) for module in modules}
    if len(sizes) == 1:
        return modules, *sizes.popitem()
    whole = sub_key(out_key, "input")
    return [*modules, TensorDictModule(Concat(), list(sizes), [whole])], whole, sum(sizes.values())


def shape_of(entry: TensorSpec | Sequence[int]) -> torch.Size:
    """Shape of one of the `Entries`."""
    return torch.Size(getattr(entry, "shape", entry))


def _module_of(key: NestedKey, encoder: EntryEncoder, entries: Entries, out_key: NestedKey, factory: Mapping):
    shape = shape_of(entries[key])
    if isinstance(encoder, nn.Module):
        module = encoder
    else:
        with noted(f"{encoder=} is called with the shape of {key!r}, {shape}, and makes a module."):
            module = encoder(shape).to(**factory)
    if len(shape) > 1 and not isinstance(module, ImageEncoder | MLPEncoder):
        module = ImageEncoder(module, shape, scale=False)
    return TensorDictModule(module, [key], [sub_key(out_key, key if isinstance(key, str) else "_".join(key))])


def output_key(module: TensorDictModuleBase) -> NestedKey:
    """What an encoder or core makes: its first output, of a sequence that of its last module."""
    while isinstance(module, TensorDictSequential):
        *_, module = module._module_iter()
    return next(key for key in module.out_keys if key != IGNORED)


def output_size(module: TensorDictModuleBase, entries: Entries) -> int:
    """Size of the vector that an encoder or core makes of ``entries``."""
    like = next(module.parameters(), torch.empty(0))
    is_core = "is_init" in module.in_keys
    lead = [1] if is_core else [2, 3]  # encoders see sequences too, cores in recurrent mode alone
    row = {key: _zeros(entries[key], lead, like) for key in module.in_keys if key in entries}
    tried = {key: f"{x.dtype} {list(x.shape)}" for key, x in row.items()}
    told = (
        f"This was the {'core' if is_core else 'encoder'} {getattr(module, 'module', module)}, tried on {tried}. It is "
        "given what the env shows, tables of other whole numbers than bytes as reals: let it cast whole numbers and flags, "
        "embed choices, x.long(), and divide images of bytes, x / 255, or be ImageEncoder(module, shape), which does. A "
        "shape stands for reals; from_env, or a spec in its place, tells of other dtypes."
    )
    row["is_init"] = torch.ones(*lead, 1, dtype=torch.bool, device=like.device)
    with torch.no_grad(), noted(told):
        out = module(TensorDict(row, lead if is_core else [])).get(output_key(module))
    if out.shape[:-1] != torch.Size(lead):
        raise ValueError(
            f"the encoder of {module.in_keys} makes {tuple(out.shape)} of {lead} rows; it must give [*B, n], and keep all leading "
            "dimensions."
        )
    return out.shape[-1]


def _zeros(entry: TensorSpec | Sequence[int], lead: Sequence[int], like: Tensor) -> Tensor:
    dtype = entry.dtype if isinstance(entry, TensorSpec) else like.dtype
    return torch.zeros(*lead, *shape_of(entry), dtype=dtype, device=like.device)


def out_of_place(module: nn.Module) -> nn.Module:
    """``module``, of whose layers none writes over what it reads (``inplace=True``), since others read that too."""
    for layer in module.modules():
        # To a TensorDictModule the same word says where it writes its outputs, and of a scripted module it is a constant.
        if vars(layer).get("inplace", False) and not isinstance(layer, TensorDictModuleBase):
            layer.inplace = False
    return module


# --------------------------------------------------------------------- heads
class Head(Layers):
    """``W f(h) + b``: an activation and one linear layer, with hidden layers before it if you like.

    Args:
        in_features: size of what it reads.
        out_features: size of what it gives.
        init_range: weights and bias of the last layer are drawn from U(-init_range, init_range).
        activation: module class before each linear layer. Default `torch.nn.ReLU`.
        num_cells: sizes of further hidden layers before the last. Default none.
        skip_size: the last so many inputs go past the first activation, which would cut off their sign. Default 0.
        **factory: device and dtype of the parameters.

    Examples:
        >>> Head(8, 3, init_range=1e-3, num_cells=[16])(torch.zeros(4, 8)).shape
        torch.Size([4, 3])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        init_range: float,
        activation: Callable[[], nn.Module] = nn.ReLU,
        num_cells: Sequence[int] = (),
        skip_size: int = 0,
        **factory,
    ):
        super().__init__()
        self.in_features, self.skip_size = whole("in_features", in_features), skip_size
        sizes = [*whole_numbers("num_cells", num_cells), whole("out_features", out_features)]
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise((self.in_features, *sizes)):
            layers += [activation(), nn.Linear(inputs, outputs, **factory)]
        for parameter in layers[-1].parameters():
            nn.init.uniform_(parameter, -init_range, init_range)
        self.layers = out_of_place(nn.Sequential(*layers))

    def by_torch(self, features: Tensor) -> Tensor:
        if not self.skip_size:
            return self.layers(features)
        features, skipped = features.split([self.in_features - self.skip_size, self.skip_size], -1)
        return self.layers[1:](torch.cat((self.layers[0](features), skipped), -1))

    def step_function(self) -> Callable[[Tensor], Tensor]:
        first, *others = self.layers
        if not self.skip_size or (behind := ChainPart.of(self, others, ["x"], ["y"])) is None:
            return super().step_function()
        sizes, behind = [self.in_features - self.skip_size, self.skip_size], behind.step_function(self.layers[1:])

        def step(x: Tensor) -> Tensor:
            features, skipped = x.split(sizes, -1)
            return behind(torch.cat((first(features), skipped), -1))

        return step

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        return None if self.skip_size else ChainPart.of(self, self.layers, in_keys, out_keys)


class SkipHead(nn.Module):
    """A head that reads a core's features, detached or not, and further inputs, ``skip_size`` of which go past its activation."""

    def __init__(self, head: Head, detach: bool = False):
        super().__init__()
        self.head, self.detach, self.concat = head, detach, Concat()

    def forward(self, features: Tensor, *extra: Tensor) -> Tensor:
        return self.head(self.concat(features.detach() if self.detach else features, *extra))

    def step_function(self) -> Callable[..., Tensor]:
        head = self.head.step_function() if brings(self.head, "step_function") else self.head
        return lambda *inputs: head(self.concat(*inputs))

    def gradient_part(self, in_keys: Sequence[NestedKey], out_keys: Sequence[NestedKey]) -> ChainPart | None:
        is_chain = brings(self.head, "gradient_part") and (self.head.skip_size > 0) == (len(in_keys) > 1)
        return ChainPart.of(self, self.head.layers, in_keys, out_keys) if is_chain else None

    @classmethod
    def built(cls, input_size: int, features_size: int, out_features: int, *, num_cells, **kwargs) -> SkipHead:
        """One on features and the core's input, whose weights are drawn for that input alone (He et al. 2015)."""
        if not num_cells:
            raise ValueError("skip=True without num_cells=[64], say: one layer only adds what is seen and remembered.")
        head = Head(features_size + input_size, out_features, num_cells=num_cells, skip_size=input_size, **kwargs)
        nn.init.kaiming_uniform_(head.layers[1].weight.detach()[:, features_size:], nonlinearity="relu")
        return cls(head)
