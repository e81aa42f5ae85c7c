"""The base of all trunks: common arguments, stages, the head, and extraction of features."""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from timm.layers import (
    DropPath,
    SelectAdaptivePool2d,
    create_classifier,
    get_act_layer,
    get_device_dtype,
    get_norm_layer,
)
from timm.models.resnet import drop_blocks
from torch import Tensor, nn

from .block import Bottle2neck, Layer
from .layers import ConvClassifier, DeformableConv2d
from .recompute import ExactCheckpointing, Stage


@dataclass(frozen=True)
class TrunkOptions:
    """Keyword arguments that all trunks share. A trunk lists those with another default in its own signature.

    `scale`, `base_width`, `cardinality`, `first_block` and `attn_layer` are documented in `Bottle2neck`.

    Args:
        num_classes: Number of classes, 0 for features instead of logits.
        in_chans: Channels of the images.
        global_pool: Kind of pooling: 'avg', 'max', 'avgmax', 'catavgmax', '' for none.
        act_layer: Activation class or its name in timm.
        norm_layer: Norm class or its name in timm.
        norm_eps: Epsilon that norms add to variances, None for the default of the norm class.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth probability of the last block, growing linearly from 0 at the first.
        drop_block_rate: DropBlock probability in the last two stages.
        zero_init_last: Start training with every block as the identity.
        device, dtype: Device and data type of the tensors.
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
    def factory(self) -> dict[str, Any]:
        return dict(device=self.device, dtype=self.dtype)

    @property
    def act(self) -> Layer:
        return get_act_layer(self.act_layer)

    def norm(self, channels: int, **factory: Any) -> nn.Module:
        layer = get_norm_layer(self.norm_layer)
        eps = {} if self.norm_eps is None else {'eps': self.norm_eps}
        try:
            return layer(channels, **eps, **factory)
        except TypeError:  # torchvision's FrozenBatchNorm2d takes no device and dtype
            return layer(channels, **eps).to(**factory)

    def conv(self, in_chs: int, out_chs: int, kernel_size: int, stride: int = 1, act: bool = False) -> list[nn.Module]:
        """Makes a convolution, its norm, and an activation if `act`."""
        padding = kernel_size // 2
        conv = nn.Conv2d(in_chs, out_chs, kernel_size, stride, padding=padding, bias=False, **self.factory)
        layers: list[nn.Module] = [conv, self.norm(out_chs, **self.factory)]
        return [*layers, self.act(inplace=True)] if act else layers

    def block(self, block_cls: type[Bottle2neck] = Bottle2neck, **kwargs: Any) -> Callable[..., Bottle2neck]:
        """Returns a function that makes blocks, with these options, from their channels, stride and position."""
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


class Grid(NamedTuple):
    """Stride and dilations of a stage."""

    trained_stride: int  # stride in training; above `stride` if the stage is dilated instead
    stride: int
    first_dilation: int  # of the 3x3 convolutions in the first block
    dilations: tuple[int, ...]  # of each block; the first block itself has `first_dilation`
    reduction: int  # stride of the stage's output, in pixels of the image


def dense_grids(layers: Sequence[int], strides: Sequence[int], output_stride: int, reduction: int) -> list[Grid]:
    """Returns the grids of stages after a stem of stride `reduction`; those beyond the output stride are dilated."""
    grids, dilation = [], 1
    for depth, trained_stride in zip(layers, strides):
        stride = trained_stride if reduction < output_stride else 1
        first_dilation = dilation
        dilation *= trained_stride // stride
        reduction *= stride
        grids.append(Grid(trained_stride, stride, first_dilation, (dilation,) * depth, reduction))
    return grids


def make_stage(
    block: Callable[..., Bottle2neck], inplanes: int, planes: int, grid: Grid, shortcut: nn.Module | None
) -> Stage:
    """Makes the blocks of a stage. As in timm, only a block with a projected shortcut counts as a first block."""
    first = dict(first=shortcut is not None, dilation=grid.dilations[0], first_dilation=grid.first_dilation)
    blocks = [block(inplanes, planes, grid.stride, shortcut, **first)]
    blocks += [block(planes * Bottle2neck.expansion, planes, dilation=each) for each in grid.dilations[1:]]
    return Stage(*blocks)


class Trunk(ExactCheckpointing):
    """A sequence of parts and a head, with the methods that timm expects of a model.

    A subclass makes the parts, lists their features in `feature_info`, calls `finish`, and defines `forward_features`.
    Its children run in order: `nn.Sequential(*list(model.children())[:-1])` returns pooled features (N, num_features),
    `[:-2]` the map (N, num_features, H, W).
    """

    parts: tuple[str, ...]  # names of the modules that compute the features, in order of execution
    conv_head = False  # whether the classifier is a 1x1 convolution
    densest: ClassVar[dict[str, Any]]  # arguments for the densest grid on which the network computes the same

    feature_info: list[dict[str, Any]]  # timm's: channels, stride and module of each feature
    forward_features: Callable[[Tensor], Tensor]

    @classmethod
    def arguments(cls) -> dict[str, Any]:
        """Returns the keyword arguments of the trunk, including `TrunkOptions`, and their defaults."""
        own = {name: each.default for name, each in inspect.signature(cls).parameters.items() if name != 'options'}
        return {**vars(TrunkOptions()), **own}

    def finish(self, num_features: int, options: TrunkOptions, **spec: Any) -> None:
        """Completes the network once its parts exist: drop layers, fields of the spec, head, and initial weights.

        The spec is stored in the blocks because timm's feature extractors keep nothing else of a trunk.
        """
        blocks = [module for module in self.modules() if isinstance(module, Bottle2neck)]
        for i, block in enumerate(blocks):
            rate = options.drop_path_rate * i / max(1, len(blocks) - 1)  # timm's helper fails on fake tensors
            block.drop_path = DropPath(rate) if rate > 0 else nn.Identity()
            block.spec = replace(block.spec, **spec)
        for part, drop_block in zip(self.parts[-2:], drop_blocks(options.drop_block_rate)[-2:]):
            for module in self.get_submodule(part).modules():
                if drop_block is not None and isinstance(module, Bottle2neck):
                    module.drop_block = drop_block()
        self.num_features = num_features
        self.num_classes = options.num_classes
        self.in_chans = options.in_chans
        self.drop_rate = options.drop_rate
        self._make_classifier(options.global_pool, options.factory)
        self.init_weights(options.zero_init_last)

    def _make_classifier(self, global_pool: str, factory: dict[str, Any]) -> None:
        if self.conv_head and global_pool:
            self.global_pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True)
            pooled = self.num_features * self.global_pool.feat_mult()
            self.fc = ConvClassifier(pooled, self.num_classes, 1, **factory) if self.num_classes else nn.Identity()
        else:
            self.global_pool, self.fc = create_classifier(
                self.num_features, self.num_classes, pool_type=global_pool, use_conv=self.conv_head, **factory
            )
        self.head_hidden_size = self.num_features * self.global_pool.feat_mult()

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initializes convolutions for ReLU by fan-out, and the offsets of deformable ones to zero."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and not module.weight.is_meta:  # there, it takes longer than with values
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.zero_offsets()
            if zero_init_last and isinstance(module, Bottle2neck):
                module.zero_init_last()

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Returns timm's patterns that group parameters for layer decay, in a few large groups if `coarse`."""
        return dict(stem=r'^conv1|bn1|maxpool', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    @torch.jit.ignore
    def get_classifier(self, name_only: bool = False) -> str | nn.Module:
        return 'fc' if name_only else self.fc

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replaces the classifier, with an identity for 0 classes, and the pooling unless `global_pool` is None."""
        self.num_classes = num_classes
        global_pool = self.global_pool.pool_type if global_pool is None else global_pool
        self._make_classifier(global_pool, get_device_dtype(self))
        self.global_pool.train(self.training)
        self.fc.train(self.training)

    def _select_features(self, indices: int | Sequence[int] | None) -> tuple[list[int], int]:
        """Returns the indices counted from 0, and the number of parts that compute these features."""
        count = len(self.feature_info)
        last = count if indices is None else indices
        wanted = range(-last, 0) if isinstance(last, int) else last
        if not wanted or not all(-count <= index < count for index in wanted):
            raise ValueError(f'indices={indices} out of range: {type(self).__name__} has {count} features')
        take = [index % count for index in wanted]
        return take, self.parts.index(self.feature_info[max(take)]['module']) + 1

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = 'NCHW',
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Runs the parts and returns the features of some of them.

        Args:
            x: Images (N, in_chans, H, W).
            indices: Indices into `feature_info`; the last n for an int n; all if None.
            norm: Has no effect: no trunk has a final norm.
            stop_early: Stop after the last of these features.
            output_fmt: Must be 'NCHW'.
            intermediates_only: Return only the list.

        Returns:
            The final features and a list of features, or only the list, in order of execution. Each feature is
            (N, num_chs, H / reduction, W / reduction).

        Raises:
            ValueError: If a feature does not exist, or `output_fmt` is not 'NCHW'.
        """
        if output_fmt != 'NCHW':
            raise ValueError(f"output_fmt={output_fmt!r} is not supported. Choose 'NCHW'.")
        take, end = self._select_features(indices)
        modules = [self.feature_info[index]['module'] for index in take]
        intermediates = []
        for part in self.parts[:end] if stop_early else self.parts:
            x = self.get_submodule(part)(x)
            if part in modules:
                intermediates.append(x)
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Removes parts that the given features do not need, and returns the indices counted from 0.

        Removes the classifier if `prune_head` or if the last part is removed. `prune_norm` has no effect.
        """
        take, end = self._select_features(indices)
        for part in self.parts[end:]:
            setattr(self, part, nn.Identity())
        if end < len(self.parts):
            self.num_features = self.feature_info[max(take)]['num_chs']
        if prune_head or end < len(self.parts):
            self.reset_classifier(0, '')
        return take

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pools and classifies, (N, num_features, H, W) to (N, num_classes), or (N, num_features) if `pre_logits`."""
        x = self.global_pool(x)
        if self.drop_rate:
            x = F.dropout(x, p=float(self.drop_rate), training=self.training)
        return x if pre_logits else self.fc(x)

    def forward(self, x: Tensor) -> Tensor:
        """Classifies images, (N, in_chans, H, W) to (N, num_classes)."""
        return self.forward_head(self.forward_features(x))
