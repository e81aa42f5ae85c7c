"""The Res2Net block, the one idea that every network of this package is built from.

A bottleneck's 3x3 convolution over `scale * width` channels becomes a cascade of `scale - 1` convolutions over `width`
channels each. Each split is added to the output of the split before it; the last split is not convolved. Counted in
pixels of its stage, the i-th output of an undilated block has seen 2i + 3 of them across, so one block sees several
scales at once. Paper: `Res2Net: A New Multi-scale Backbone Architecture` - https://arxiv.org/abs/1904.01169
"""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from timm.layers import create_attn, get_norm_layer
from torch import Tensor, nn

from .fold import Foldable, fold_norm, fold_norms, merge_convs
from .layers import DeformableConv2d, DilatedAvgPool2d
from .spec import FIRST_BLOCKS, NetworkSpec, Splits, activation_name, hidden_attention, require_one_of

Layer = Callable[..., nn.Module]


class Bottle2neck(Foldable):
    """Res2Net bottleneck: 1x1 convolution, cascade of 3x3 convolutions over splits of the channels, 1x1 convolution.

    Maps (N, inplanes, H, W) to (N, planes * expansion, H / stride, W / stride), sizes rounded up. Tensor names are
    those of timm and of the authors: `conv1 bn1 convs.k bns.k conv3 bn3 se downsample`. With `scale=1` it is the plain
    ResNe(X)t bottleneck.

    Args:
        inplanes: Input channels.
        planes: Base of the block's widths: it has `planes * expansion` output channels.
        stride: Stride of the block, 1 or 2.
        downsample: Projection for the shortcut, None for the identity. In timm's ResNet the first block of every stage
            has one (unless it has stride 1, as stage 1 and dilated stages have, and keeps the channels) and no other
            block does, which is how a block knows its position if `first` is None.
        cardinality: Groups of each 3x3 convolution; above 1 this is Res2NeXt.
        base_width: Channels of one split for 64 planes; a split has `floor(planes * base_width / 64) * cardinality`.
        scale: Number of splits.
        dilation: Dilation of the blocks that follow in the stage.
        first_dilation: Dilation of this block's 3x3 convolutions, `dilation` if None.
        first: Whether this block is the first one of its stage.
        first_block: How a first block computes its splits, a key of `FIRST_BLOCKS`: 'official', 'paddle', 'mmdet' or
            'group'.
        style: Position of the stride: 'pytorch', in the 3x3 convolutions and the pool of the last split, or 'caffe', in
            the first 1x1 convolution. With 'caffe' the splits are those of a first block at stride 1.
        deformable: Version of deformable 3x3 convolutions, 'v1' or 'v2', None for plain ones.
        last_act: Whether an activation follows the residual add.
        dilate_pool: Dilate the average pool of the last split like the convolutions. Only then does a dilated network
            compute the undilated one on a denser grid. timm leaves the pool undilated.
        act_layer: Activation class, one instance for each site (hooks and attribution methods tell sites apart).
        norm_layer: Norm class.
        attn_layer: Attention class or its name in timm, right before the residual add, where the paper (3.2.2) has SE.
        drop_block: Makes the DropBlock layer that follows the concatenated splits.
        drop_path: Stochastic depth layer of the residual branch.
        device: Device of the tensors.
        dtype: Data type of the tensors.

    Raises:
        ValueError: If the block does not support an argument.

    Example:
        >>> block = Bottle2neck(256, 64, scale=4, base_width=26)
        >>> block(torch.randn(1, 256, 56, 56)).shape
        torch.Size([1, 256, 56, 56])
    """

    expansion = 4

    def __init__(
        self,
        inplanes: int,
        planes: int,
        stride: int = 1,
        downsample: nn.Module | None = None,
        cardinality: int = 1,
        base_width: float = 26,
        scale: int = 4,
        dilation: int = 1,
        first_dilation: int | None = None,
        first: bool | None = None,
        first_block: str = 'official',
        style: str = 'pytorch',
        deformable: str | None = None,
        last_act: bool = True,
        dilate_pool: bool = False,
        act_layer: Layer = nn.ReLU,
        norm_layer: Layer = nn.BatchNorm2d,
        attn_layer: str | Layer | None = None,
        drop_block: Layer | None = None,
        drop_path: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale < 1 or cardinality < 1:
            raise ValueError(f'scale={scale} and cardinality={cardinality} must be at least 1')
        require_one_of('first_block', first_block, FIRST_BLOCKS)
        width = int(planes * base_width / 64) * cardinality
        if width < 1:
            raise ValueError(f'base_width={base_width} leaves no channel in a split of a block with {planes} planes')
        outplanes = planes * self.expansion
        first_dilation = first_dilation or dilation
        stride_1x1, stride_3x3 = (stride, 1) if style == 'caffe' else (1, stride)
        splits = Splits(cascade=True, last='kept')
        if first or (first is None and downsample is not None):
            nominal_stride = 1 if style == 'caffe' else stride * dilation // first_dilation
            splits = FIRST_BLOCKS[first_block].splits(nominal_stride)
        num_convs = scale if splits.last == 'convolved' else max(1, scale - 1)

        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        conv1x1: Layer = partial(nn.Conv2d, kernel_size=1, bias=False, **dd)
        grid: dict[str, Any] = dict(stride=stride_3x3, dilation=first_dilation, groups=cardinality)
        conv3x3: Layer = partial(nn.Conv2d, width, width, 3, padding=first_dilation, bias=False, **grid, **dd)
        if deformable is not None:
            conv3x3 = partial(DeformableConv2d, width, width, version=deformable, **grid, **dd)

        self.scale = scale
        self.cascade = splits.cascade
        self.conv1 = conv1x1(inplanes, width * scale, stride=stride_1x1)
        self.bn1 = norm_layer(width * scale, **dd)
        self.act1 = act_layer(inplace=True)
        self.convs = nn.ModuleList(conv3x3() for _ in range(num_convs))
        self.bns = nn.ModuleList(norm_layer(width, **dd) for _ in range(num_convs))
        self.acts = nn.ModuleList(act_layer(inplace=True) for _ in range(num_convs))
        self.pool: nn.Module = nn.Identity()
        if splits.last == 'pooled':
            pool_dilation = first_dilation if dilate_pool else 1
            self.pool = make_pool(stride_3x3, pool_dilation, FIRST_BLOCKS[first_block].count_include_pad)
        self.drop_block = nn.Identity() if drop_block is None else drop_block()
        self.conv3 = conv1x1(width * scale, outplanes)
        self.bn3 = norm_layer(outplanes, **dd)
        self.se = make_attention(attn_layer, outplanes, **dd)
        self.downsample = downsample
        self.drop_path = drop_path
        self.act3 = act_layer(inplace=True) if last_act else nn.Identity()
        self.spec = NetworkSpec(
            first_block=first_block if scale > 1 else NetworkSpec.first_block,  # all are equal without splits
            style=style,
            act_layer=activation_name(act_layer),
            norm_eps=getattr(self.bn1, 'eps', NetworkSpec.norm_eps),
            attn_layer=hidden_attention(attn_layer),
        )

    def zero_init_last(self) -> None:
        """Sets the last norm's weight to zero, so that the block starts training as an identity."""
        weight = getattr(self.bn3, 'weight', None)
        if weight is not None:
            nn.init.zeros_(weight)

    @torch.jit.ignore
    def fuse(self) -> 'Bottle2neck':
        """Returns a block for inference that computes the same; `timm.models.reparameterize_model` calls this.

        Batch norms are folded into the convolutions before them. In a block without cascade, the convolutions and the
        pool of the last split become one grouped convolution where one can compute the same. A block in training mode
        is folded with its running statistics, because timm calls this before `eval()`.
        """
        block = copy.deepcopy(self)
        fold_norms(block)
        for i, (conv, norm) in enumerate(zip(block.convs, block.bns)):
            block.bns[i] = fold_norm(conv, norm)
        if isinstance(block.downsample, nn.Sequential):
            fold_norms(block.downsample)
        plain = all(type(conv) is nn.Conv2d for conv in block.convs)  # not deformable
        folded = all(isinstance(norm, nn.Identity) for norm in block.bns)
        if not block.cascade and len(block.convs) > 1 and plain and folded:
            merged = merge_convs(block.convs, block.scale, block.pool, block.act1)
            if merged is not None:
                block.convs, block.bns, block.acts = nn.ModuleList([merged]), block.bns[:1], block.acts[:1]
                block.pool, block.scale = nn.Identity(), 1
        return block.eval()  # new modules are in training mode

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Runs the block.

        Args:
            x: (N, inplanes, H, W).
            shortcut: (N, planes * expansion, H / stride, W / stride) to add to the branch, from a trunk that projects
                shortcuts itself (DLA). Computed from `x` if None.

        Returns:
            (N, planes * expansion, H / stride, W / stride), sizes rounded up.
        """
        y = self.act1(self.bn1(self.conv1(x)))  # (N, scale * width, H, W); in caffe's style H / stride, W / stride
        splits = y.chunk(self.scale, dim=1) if self.scale > 1 else [y]  # scale x (N, width, H, W)
        outs: list[Tensor] = []
        for i, (conv, bn, act) in enumerate(zip(self.convs, self.bns, self.acts)):
            y = outs[-1] + splits[i] if self.cascade and i > 0 else splits[i]
            outs.append(act(bn(conv(y))))  # (N, width, H / stride, W / stride), the i-th has seen 2i + 3 pixels across
        if len(outs) < self.scale:
            outs.append(self.pool(splits[-1]))
        y = torch.cat(outs, dim=1) if self.scale > 1 else outs[0]  # (N, scale * width, H / stride, W / stride)
        y = self.drop_block(y)

        y = self.bn3(self.conv3(y))  # (N, planes * expansion, H / stride, W / stride)
        if self.se is not None:
            y = self.se(y)
        if self.drop_path is not None:
            y = self.drop_path(y)
        if shortcut is None:
            shortcut = x if self.downsample is None else self.downsample(x)
        y += shortcut
        return self.act3(y)


def make_pool(stride: int, dilation: int, count_include_pad: bool) -> nn.Module:
    """Makes the 3x3 average pool of the last split."""
    if dilation == 1:
        return nn.AvgPool2d(3, stride, padding=1, count_include_pad=count_include_pad)
    if stride > 1:
        raise ValueError('dilate_pool=True is not possible in a block with both a stride and a dilation')
    return DilatedAvgPool2d(dilation, count_include_pad)


def make_attention(attn_layer: str | Layer | None, channels: int, **dd: object) -> nn.Module | None:
    """Makes timm's attention layer of that name or class, or returns None for None."""
    try:
        return create_attn(attn_layer, channels, **dd)
    except AssertionError as error:
        raise ValueError(
            f"attn_layer={attn_layer!r} is not an attention layer of timm, as 'se' and 'eca' are"
        ) from error


def norm_factory(norm_layer: str | Layer, eps: float | None = None) -> Layer:
    """Returns a norm class, or timm's of that name, that takes a device and a dtype, which torchvision's does not."""
    layer = get_norm_layer(norm_layer)
    parameters = inspect.signature(layer).parameters
    if eps is not None:
        layer = partial(layer, eps=eps)
    if 'device' in parameters or any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        return layer

    def on_device(
        num_features: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None, **kwargs: object
    ) -> nn.Module:
        return layer(num_features, **kwargs).to(device=device, dtype=dtype)

    return on_device


def set_spec(model: nn.Module, **fields: Any) -> None:
    """Sets fields of a network's spec that its blocks cannot know; blocks carry it, as features keep only those."""
    for block in model.modules():
        if isinstance(block, Bottle2neck):
            block.spec = replace(block.spec, **fields)


def spec_of(model: nn.Module) -> NetworkSpec | None:
    """Returns the spec of the network in a model, or None if the model contains no Res2Net block.

    Args:
        model: A model, or a module that contains one.

    Example:
        >>> model = timm.create_model('res2net50_vd_26w_4s')
        >>> spec_of(model).first_block
        'paddle'
    """
    return next((block.spec for block in model.modules() if isinstance(block, Bottle2neck)), None)
