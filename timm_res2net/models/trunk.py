"""What the trunks of our own have in common: their arguments, a head, and features taken from their parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, TypedDict

import torch
from timm.layers import (
    DropBlock2d,
    DropPath,
    calculate_drop_path_rates,
    create_classifier,
    get_act_layer,
    get_device_dtype,
)
from torch import Tensor, nn

from .block import Bottle2neck, Layer, norm_factory
from .fold import Foldable
from .recompute import set_grad_checkpointing

__all__ = ['FeatureInfo', 'Layers', 'Trunk', 'TrunkOptions', 'conv_norm_act', 'drop_block_layers']

Layers = Callable[..., list[nn.Module]]


class FactoryOptions(TypedDict):
    """Where new tensors go."""

    device: torch.device | str | None
    dtype: torch.dtype | None


class FeatureInfo(TypedDict):
    """What timm wants to know of a feature."""

    num_chs: int
    reduction: int  # stride, in pixels of the image
    module: str


@dataclass(frozen=True)
class TrunkOptions:
    """Keyword arguments that every trunk takes; its signature shows those whose default is its own.

    Args:
        scale: Splits of a block.
        base_width: Channels of one split for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: What the first block of a stage computes, a key of `FIRST_BLOCKS`.
        attn_layer: Attention class or its name in timm.
        num_classes: Classes, 0 for none.
        in_chans: Channels of the image.
        global_pool: Kind of pooling: 'avg', 'max', 'avgmax', 'catavgmax', '' for none.
        act_layer: Activation class or its name in timm.
        norm_layer: Norm class or its name in timm.
        norm_eps: Added to the variances of norms, the norm class's own default if None.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth probability of the last block, growing linearly from 0 at the first.
        drop_block_rate: DropBlock probability in the last two stages.
        zero_init_last: Start training with every block as an identity.
        device: Device of the tensors.
        dtype: Data type of the tensors.
    """

    scale: int = 4
    base_width: float = 26
    cardinality: int = 1
    first_block: str = 'official'
    attn_layer: str | Layer | None = None
    num_classes: int = 1000
    in_chans: int = 3
    global_pool: str = 'avg'
    act_layer: str | Layer = 'relu'
    norm_layer: str | Layer = 'batchnorm2d'
    norm_eps: float | None = None
    drop_rate: float = 0.0
    drop_path_rate: float = 0.0
    drop_block_rate: float = 0.0
    zero_init_last: bool = True
    device: torch.device | str | None = None
    dtype: torch.dtype | None = None

    @property
    def factory(self) -> FactoryOptions:
        """Device and dtype."""
        return FactoryOptions(device=self.device, dtype=self.dtype)

    @property
    def act(self) -> Layer:
        """The activation class."""
        return get_act_layer(self.act_layer)

    @property
    def norm(self) -> Layer:
        """Makes a norm."""
        return norm_factory(self.norm_layer, self.norm_eps)

    @property
    def conv(self) -> Layers:
        """Makes a convolution and its norm, see `conv_norm_act`."""
        return partial(conv_norm_act, norm_layer=self.norm, **self.factory)

    def block(self, block_cls: type[Bottle2neck] = Bottle2neck, **kwargs: Any) -> Callable[..., Bottle2neck]:
        """Makes a function that builds blocks; what remains to be given are channels, stride and place."""
        return partial(
            block_cls,
            scale=self.scale,
            base_width=self.base_width,
            cardinality=self.cardinality,
            first_block=self.first_block,
            attn_layer=self.attn_layer,
            act_layer=self.act,
            norm_layer=self.norm,
            **self.factory,
            **kwargs,
        )


class Trunk(Foldable):
    """A sequence of parts and a head, with the methods that timm expects of a model.

    A subclass makes the parts, lists the features that can be taken in `feature_info`, writes `forward_features` out,
    and calls `add_head`.

    Args:
        options: Of these, the number of classes and of image channels.
    """

    parts: tuple[str, ...]  # names of the modules that make the features, in the order in which they run
    conv_head = False  # a 1x1 convolution as classifier
    densest: ClassVar[dict[str, Any]]  # arguments for the densest grid on which the network computes the same

    forward_features: Callable[[Tensor], Tensor]

    def __init__(self, options: TrunkOptions) -> None:
        super().__init__()
        self.num_classes = options.num_classes
        self.in_chans = options.in_chans
        self.feature_info: list[FeatureInfo] = []

    def add_head(self, num_features: int, options: TrunkOptions) -> None:
        """Adds stochastic depth and the head to the parts, and initialises everything.

        Args:
            num_features: Channels of the last part.
            options: Of the trunk.
        """
        blocks = [module for module in self.modules() if isinstance(module, Bottle2neck)]
        rates: list[float] = calculate_drop_path_rates(options.drop_path_rate, len(blocks))  # type: ignore[assignment]
        for block, rate in zip(blocks, rates):
            block.drop_path = DropPath(rate) if rate > 0 else None
        self.num_features = num_features
        self.head_drop = nn.Dropout(options.drop_rate)
        self._make_classifier(options.global_pool, options.factory)
        self.init_weights(options.zero_init_last)

    def _make_classifier(self, global_pool: str, factory: FactoryOptions) -> None:
        self.global_pool, self.fc = create_classifier(
            self.num_features, self.num_classes, pool_type=global_pool, use_conv=self.conv_head, **factory
        )
        self.flatten = nn.Flatten(1) if global_pool and self.conv_head else nn.Identity()
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = False) -> None:
        """Initialises the convolutions for ReLU by their fan-out, and optionally makes each block an identity."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for module in self.modules():
            if zero_init_last and isinstance(module, Bottle2neck):
                module.zero_init_last()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches gradient checkpointing of the blocks; norm statistics stay exact."""
        set_grad_checkpointing(self, enable)

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        """Returns the classifier, or its name."""
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier by a new one.

        Args:
            num_classes: Classes, 0 for none.
            global_pool: Kind of pooling, the present one if None.
        """
        self.num_classes = num_classes
        self._make_classifier(
            self.global_pool.pool_type if global_pool is None else global_pool, get_device_dtype(self)
        )
        for module in (self.global_pool, self.fc, self.flatten):
            module.train(self.training)

    def _select_features(self, indices: int | Sequence[int] | None) -> tuple[list[int], list[str], int]:
        """Returns indices of features, the names of the parts of all features, and how many parts the last one needs.

        Raises:
            ValueError: For no feature, or one that doesn't exist.
        """
        names = [info['module'] for info in self.feature_info]
        everything = range(len(names))
        wanted = range(-indices, 0) if isinstance(indices, int) else everything if indices is None else indices
        if not wanted or not all(-len(names) <= index < len(names) for index in wanted):
            raise ValueError(
                f'indices={indices} are not possible; this {type(self).__name__} has {len(names)} features'
            )
        take = [everything[index] for index in wanted]
        return take, names, self.parts.index(names[max(take)]) + 1

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the parts and returns the outputs of some.

        Args:
            x: (N, in_chans, H, W).
            indices: Of `feature_info`: the last n for an int, those of a list, all if None.
            norm: Without effect, there is no final norm.
            stop_early: Stop after the last part that is to be returned.
            output_fmt: Only 'NCHW'.
            intermediates_only: Leave out the final features.

        Returns:
            Final features and a list of those of parts, or just the list; each (N, C, H / reduction, W / reduction).
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} is not possible; choose 'NCHW'")
        take, names, end = self._select_features(indices)
        intermediates = []
        for part in self.parts[:end] if stop_early else self.parts:
            x = self.get_submodule(part)(x)
            if part in names and names.index(part) in take:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes the parts that some of the features don't need.

        Args:
            indices: Features to keep, as in `forward_intermediates`.
            prune_norm: Without effect, there is no final norm.
            prune_head: Remove the classifier. It is removed in any case if the last part is.

        Returns:
            The indices of these features.
        """
        take, _, end = self._select_features(indices)
        for part in self.parts[end:]:
            setattr(self, part, nn.Identity())
        if end < len(self.parts):
            self.num_features = self.feature_info[max(take)]['num_chs']
        if prune_head or end < len(self.parts):
            self.reset_classifier(0, '')
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies, (N, num_features, H, W) to (N, num_classes), or (N, num_features) if `pre_logits`."""
        x = self.head_drop(self.global_pool(x))
        return self.flatten(x if pre_logits else self.fc(x))

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images, (N, in_chans, H, W) to (N, num_classes)."""
        return self.forward_head(self.forward_features(x))


def conv_norm_act(
    in_chs: int,
    out_chs: int,
    kernel_size: int,
    stride: int = 1,
    *,
    norm_layer: Layer,
    act_layer: Layer | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> list[nn.Module]:
    """Makes a convolution, its norm, and an activation if `act_layer` is given."""
    dd = FactoryOptions(device=device, dtype=dtype)
    conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=kernel_size // 2, bias=False, **dd)
    layers: list[nn.Module] = [conv, norm_layer(out_chs, **dd)]
    return layers if act_layer is None else [*layers, act_layer(inplace=True)]


def drop_block_layers(drop_prob: float) -> list[Layer | None]:
    """What makes the DropBlock layers of four stages: none in the first two; block sizes and rates are timm's."""
    if not drop_prob:
        return [None] * 4
    layer = partial(DropBlock2d, drop_prob=drop_prob)
    return [None, None, partial(layer, block_size=5, gamma_scale=0.25), partial(layer, block_size=3, gamma_scale=1.0)]
