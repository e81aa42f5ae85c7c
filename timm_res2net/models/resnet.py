"""ResNet trunk: timm's own, with Res2Net blocks."""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import AvgPool2dSame, DropPath, calculate_drop_path_rates, get_act_layer
from timm.models.resnet import ResNet
from torch import nn

from .block import Bottle2neck, Layer, norm_factory, set_function
from .deformable import DeformableConv2d
from .fold import Foldable
from .function import Function
from .pool import DilatedAvgPool2d
from .recompute import Stage, set_grad_checkpointing
from .trunk import drop_block_layers

__all__ = ['Res2Net']

OF_STAGES = 'channels', 'avg_down', 'drop_path_rate', 'drop_block_rate', 'zero_init_last', 'device', 'dtype'


class Res2Net(Foldable, ResNet):
    """timm's ResNet with Res2Net blocks.

    It takes the block's arguments by name, refuses what the blocks don't support, and leaves norm statistics exact
    under gradient checkpointing. The rest is timm's.

    Args:
        layers: Blocks of each of the four stages.
        scale: Splits of a block.
        base_width: Channels of one split for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: What the first block of a stage computes, a key of `FIRST_BLOCKS`.
        attn_layer: Attention class or its name in timm.
        style: Where the stride of a stage is: 'pytorch' (3x3 convolutions) or 'caffe' (first 1x1 convolution).
        deformable: For each of the four stages 'v1' or 'v2' for deformable 3x3 convolutions, or None for plain ones.
        strides: Stride of each of the four stages, for a network that was trained with others than 1, 2, 2, 2.
        dilations: Dilation of each of the four stages, for a network that was trained dilated; for a stage with
            another one in each block (multi-grid), the dilations of its blocks.
        dilate_first: Whether `dilations` are also those of the first block of a stage, as in most code. The first block
            has the dilation of the stage before it otherwise, as in timm and torchvision.
        stem_ceil_mode: Round the size of the stem's max-pool up.
        output_stride: 8, 16 or 32; stages beyond it are dilated. This makes a dense network of one that was trained
            with the usual strides, so first blocks keep their function; `strides` and `dilations` are for networks that
            were trained with them. A stage with as many channels as the one before it has no shortcut then, as in timm,
            and its first block is as the others: weights of the undilated network don't fit.
        dilate_pool: Dilate the average pools, too, where stages are dilated. Weights then compute, on a denser grid,
            what they compute in the undilated network. timm leaves the pools as they are, so its features are some
            percent off with `output_stride=8`, and more with 16 where the map at stride 16 has an odd side; that is the
            default here, for equality with timm. Attention that pools over the whole image differs on a denser grid in
            any case.
        act_layer: Activation class or its name in timm.
        norm_layer: Norm class or its name in timm; also one that takes no device and dtype, as torchvision's.
        norm_eps: Added to the variances of norms, the norm class's own default if None.
        **kwargs: Other arguments of timm's `ResNet`.

    Raises:
        ValueError: For an argument that the network doesn't support.
        TypeError: For an argument that timm's `ResNet` doesn't know.
    """

    densest: ClassVar[dict[str, Any]] = dict(output_stride=8, dilate_pool=True)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        scale: int = 4,
        base_width: float = 26,
        cardinality: int = 1,
        first_block: str = 'official',
        style: str = 'pytorch',
        deformable: Sequence[str | None] = Function.deformable,
        strides: Sequence[int] = Function.strides,
        dilations: Sequence[int | Sequence[int]] = Function.dilations,
        dilate_first: bool = True,
        stem_ceil_mode: bool = False,
        attn_layer: str | Layer | None = None,
        output_stride: int = 32,
        dilate_pool: bool = False,
        act_layer: str | Layer = 'relu',
        norm_layer: str | Layer = 'batchnorm2d',
        norm_eps: float | None = None,
        **kwargs: Any,
    ) -> None:
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride={output_stride} is not possible; choose 8, 16 or 32')
        geometry: dict[str, Any] = dict(
            strides=strides,
            dilations=dilations,
            dilate_first=dilate_first,
            deformable=deformable,
            stem_ceil_mode=stem_ceil_mode,
        )
        function = Function(first_block, style, **geometry)
        usual = function.strides == Function.strides and function.dilations == Function.dilations
        if not usual and (output_stride != 32 or dilate_pool):
            raise ValueError('strides and dilations say all of the geometry; leave output_stride and dilate_pool out')
        if not usual and kwargs.get('down_kernel_size', 1) != 1:
            raise ValueError('with strides and dilations a shortcut is a 1x1 convolution; leave down_kernel_size out')
        for depth, dilation in zip(layers, function.dilations):
            if isinstance(dilation, tuple) and len(dilation) != depth:
                raise ValueError(f'dilations has {len(dilation)} entries for a stage of {depth} blocks: {dilations}')
        norm_layer = norm_factory(norm_layer, norm_eps)
        block_args: dict[str, Any] = dict(scale=scale, first_block=first_block, style=style, attn_layer=attn_layer)
        super().__init__(
            Bottle2neck,  # type: ignore[arg-type]  # timm's annotation allows only its own blocks
            tuple(layers),
            base_width=base_width,  # type: ignore[arg-type]  # an int in the annotation; timm multiplies by it
            cardinality=cardinality,
            output_stride=output_stride,
            act_layer=act_layer,
            norm_layer=norm_layer,
            block_args=dict(block_args, dilate_pool=dilate_pool),
            **kwargs,
        )
        if not usual:
            block = partial(
                Bottle2neck,
                cardinality=cardinality,
                base_width=base_width,
                act_layer=get_act_layer(act_layer),
                norm_layer=norm_layer,
                **block_args,
            )
            replace_stages(self, block, layers, function, **{key: kwargs[key] for key in OF_STAGES if key in kwargs})
        for i, version in enumerate(function.deformable):
            blocks = self.get_submodule(f'layer{i + 1}').children()
            setattr(self, f'layer{i + 1}', Stage(*(make_deformable(each, version) for each in blocks)))
        if dilate_pool:
            dilate_shortcut_pools(self)
        if stem_ceil_mode:
            if not isinstance(self.maxpool, nn.MaxPool2d):
                raise ValueError('stem_ceil_mode is for a stem with a plain max-pool')
            self.maxpool.ceil_mode = True
        set_function(self, **{name: getattr(function, name) for name in geometry})

    @torch.jit.ignore
    def init_weights(self, zero_init_last: bool = True) -> None:
        """Initialises as timm does; offsets of deformable convolutions become zero."""
        super().init_weights(zero_init_last)
        for module in self.modules():
            if isinstance(module, DeformableConv2d):
                module.zero_offsets()

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches gradient checkpointing of each block; unlike timm's, norm statistics stay exact."""
        set_grad_checkpointing(self, enable)


def dilate_shortcut_pools(model: nn.Module) -> None:
    """Replaces the average pools in the shortcuts of dilated stages, for which timm's ResNet takes `AvgPool2dSame`."""
    for block in model.modules():
        if isinstance(block, Bottle2neck) and isinstance(block.downsample, nn.Sequential):
            pool, conv = block.downsample[0], block.convs[0]
            if isinstance(pool, AvgPool2dSame) and isinstance(conv, nn.Conv2d):
                block.downsample[0] = DilatedAvgPool2d(conv.dilation[0], count_include_pad=False, kernel_size=2)


def replace_stages(
    model: Res2Net,
    block: partial[Bottle2neck],
    layers: Sequence[int],
    function: Function,
    *,
    channels: Sequence[int] = (64, 128, 256, 512),
    avg_down: bool = False,
    drop_path_rate: float = 0.0,
    drop_block_rate: float = 0.0,
    zero_init_last: bool = True,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Replaces the stages that timm made by stages with other strides and dilations, which timm has no arguments for.

    Arguments are those of `Res2Net`; strides and dilations are the function's. A shortcut at stride 1 has no pool.
    """
    dd: dict[str, Any] = dict(device=device, dtype=dtype)
    rates: list[float] = calculate_drop_path_rates(drop_path_rate, sum(layers))  # type: ignore[assignment]
    rate_of_next = iter(rates)
    (inplanes,) = (conv.in_channels for conv in [model.get_submodule('layer1.0.conv1')] if isinstance(conv, nn.Conv2d))
    reduction, dilation_before = 4, 1
    for i, (depth, planes, drop_block) in enumerate(zip(layers, channels, drop_block_layers(drop_block_rate))):
        stride, dilation, outplanes = function.strides[i], function.dilations[i], planes * Bottle2neck.expansion
        of_blocks = dilation if isinstance(dilation, tuple) else (dilation,) * depth
        conv = nn.Conv2d(inplanes, outplanes, 1, 1 if avg_down else stride, bias=False, **dd)
        shortcut = nn.Sequential(conv, block.keywords['norm_layer'](outplanes, **dd))
        if avg_down:
            pool = nn.AvgPool2d(stride, stride, ceil_mode=True, count_include_pad=False)
            shortcut.insert(0, pool if stride > 1 else nn.Identity())
        first_dilation = of_blocks[0] if function.dilate_first else dilation_before
        of_first = dict(stride=stride, downsample=shortcut, first_dilation=first_dilation)
        blocks = []
        for b, dilation_of_block in enumerate(of_blocks):
            rate = next(rate_of_next)
            drop_path = DropPath(rate) if rate > 0 else None
            options: dict[str, Any] = dict(dilation=dilation_of_block, drop_block=drop_block, drop_path=drop_path)
            blocks.append(block(inplanes, planes, **options, **(of_first if b == 0 else {}), **dd))
            inplanes = outplanes
        setattr(model, f'layer{i + 1}', nn.Sequential(*blocks))
        reduction, dilation_before = reduction * stride, of_blocks[-1]
        model.feature_info[i + 1]['reduction'] = reduction
    model.init_weights(zero_init_last)


def make_deformable(block: nn.Module, version: str | None) -> nn.Module:
    """Replaces the 3x3 convolutions of a block by deformable ones with the same weights, for None by none."""
    if version is None:
        return block
    assert isinstance(block, Bottle2neck)
    for i, conv in enumerate(block.convs):
        assert isinstance(conv, nn.Conv2d)
        block.convs[i] = DeformableConv2d.like(conv, version)
    return block
