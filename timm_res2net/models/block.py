"""The Res2Net block, from which every network of this package is built.

A bottleneck's 3x3 convolution over `scale * width` channels becomes a cascade of `scale - 1` convolutions over `width`
channels each. The output of each convolution is added to the next split; the last split is not convolved. Output i
(from 0) of an undilated block has seen a window of 2i + 3 pixels, so one block sees several scales at once.

Paper: `Res2Net: A New Multi-scale Backbone Architecture` - https://arxiv.org/abs/1904.01169
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from timm.layers import create_attn
from torch import Tensor, nn

from .fold import Foldable, fold_norm, fold_norms, merge_convs
from .layers import DeformableConv2d, DilatedAvgPool2d
from .spec import FIRST_BLOCKS, LATER_BLOCK, NetworkSpec, activation_name, hidden_attention, require_one_of

Layer = Callable[..., nn.Module]


class Bottle2neck(Foldable):
    """Res2Net bottleneck: 1x1 convolution, cascade of 3x3 convolutions over splits of the channels, 1x1 convolution.

    Tensors have the names of timm and of the authors: `conv1 bn1 convs.k bns.k conv3 bn3 se downsample`. With `scale=1`
    this is the plain ResNe(X)t bottleneck.

    Args:
        inplanes: Input channels.
        planes: Base of the block's widths: it has `planes * expansion` output channels.
        stride: Stride of the block, 1 or 2.
        downsample: Projection for the shortcut, None for the identity.
        cardinality: Groups of each 3x3 convolution; above 1 this is Res2NeXt.
        base_width: Channels of one split for 64 planes; a split has `floor(planes * base_width / 64) * cardinality`.
        scale: Number of splits.
        dilation: Dilation of the stage's 3x3 convolutions.
        first_dilation: Dilation of this block's own 3x3 convolutions, `dilation` if None.
        first: Whether this is the first block of its stage. All others compute their splits as a cascade.
        first_block: How a first block computes its splits: 'official', 'paddle', 'mmdet' or 'group' (`FIRST_BLOCKS`).
        style: 'pytorch' strides the 3x3 convolutions and the pool, 'caffe' the first 1x1 convolution.
        deformable: Version of deformable 3x3 convolutions, 'v1' or 'v2', None for plain ones.
        dilate_pool: Dilate the average pool of the last split like the convolutions. timm does not.
        act_layer: Activation class. Each site gets its own instance, because hooks and attribution methods need that.
        norm_layer: Norm class.
        attn_layer: Attention class or its name in timm, right before the residual addition, as in the paper (3.2.2).
        device, dtype: Device and data type of the tensors.

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
        first: bool = False,
        first_block: str = 'official',
        style: str = 'pytorch',
        deformable: str | None = None,
        dilate_pool: bool = False,
        act_layer: Layer = nn.ReLU,
        norm_layer: Layer = nn.BatchNorm2d,
        attn_layer: str | Layer | None = None,
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
        stride_1x1, stride_3x3 = (stride, 1) if style == 'caffe' else (1, stride)
        first_dilation = first_dilation or dilation
        splits = LATER_BLOCK
        if first:  # its kind depends on the stride that the 3x3 convolutions had in training; dilation may replace it
            trained_stride = 1 if style == 'caffe' else max(stride, stride * dilation // first_dilation)
            at_stride_1, at_stride_2 = FIRST_BLOCKS[first_block]
            splits = at_stride_1 if trained_stride == 1 else at_stride_2
        num_convs = scale if splits.last == 'convolved' else max(1, scale - 1)

        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        conv1x1: Layer = partial(nn.Conv2d, kernel_size=1, bias=False, **dd)
        conv3x3: Layer = partial(nn.Conv2d, kernel_size=3, padding=first_dilation, bias=False)
        if deformable is not None:
            conv3x3 = partial(DeformableConv2d, version=deformable)
        grid: dict[str, Any] = dict(stride=stride_3x3, dilation=first_dilation, groups=cardinality)

        self.scale = scale
        self.cascade = splits.cascade
        self.conv1 = conv1x1(inplanes, width * scale, stride=stride_1x1)
        self.bn1 = norm_layer(width * scale, **dd)
        self.act1 = act_layer(inplace=True)
        self.convs = nn.ModuleList(conv3x3(width, width, **grid, **dd) for _ in range(num_convs))
        self.bns = nn.ModuleList(norm_layer(width, **dd) for _ in range(num_convs))
        self.acts = nn.ModuleList(act_layer(inplace=True) for _ in range(num_convs))
        self.pool: nn.Module = nn.Identity()
        if splits.last == 'pooled':
            self.pool = nn.AvgPool2d(3, stride_3x3, padding=1, count_include_pad=splits.count_include_pad)
            if dilate_pool and first_dilation > 1:
                self.pool = DilatedAvgPool2d(first_dilation, splits.count_include_pad)
        self.drop_block: nn.Module = nn.Identity()  # a trunk sets this, and drop_path
        self.conv3 = conv1x1(width * scale, outplanes)
        self.bn3 = norm_layer(outplanes, **dd)
        self.se = make_attention(attn_layer, outplanes, **dd)
        self.downsample = downsample
        self.drop_path: nn.Module = nn.Identity()
        self.act3 = act_layer(inplace=True)
        self.spec = NetworkSpec(
            first_block=first_block if scale > 1 else NetworkSpec.first_block,  # without splits, all kinds are the same
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

        Folds batch norms into the convolutions before them. In a block without a cascade, the convolutions and the pool
        of the last split become one grouped convolution if one can compute the same. Folds running statistics even
        in training mode, because timm calls this before `eval()`.
        """
        block = copy.deepcopy(self)
        fold_norms(block)
        for i, (conv, norm) in enumerate(zip(block.convs, block.bns)):
            block.bns[i] = fold_norm(conv, norm)
        if isinstance(block.downsample, nn.Sequential):
            fold_norms(block.downsample)
        merged = None
        if not block.cascade and all(isinstance(norm, nn.Identity) for norm in block.bns):
            merged = merge_convs(block.convs, block.scale, block.pool, block.act1)
        if merged is not None:
            block.scale = 1
            block.convs = nn.ModuleList([merged])
            block.bns = block.bns[:1]
            block.acts = block.acts[:1]
            block.pool = nn.Identity()
        return block.eval()  # new modules are in training mode

    def forward(self, x: Tensor, shortcut: Tensor | None = None) -> Tensor:
        """Runs the block.

        Args:
            x: (N, inplanes, H, W).
            shortcut: (N, planes * expansion, H / stride, W / stride) to add to the branch, from a trunk that projects
                shortcuts itself (DLA). Computed from `x` if None.

        Returns:
            (N, planes * expansion, H / stride, W / stride), with sizes rounded up.
        """
        y = self.act1(self.bn1(self.conv1(x)))  # (N, scale * width, H, W); with style 'caffe' H / stride, W / stride
        splits = y.chunk(self.scale, dim=1) if self.scale > 1 else [y]  # scale x (N, width, H, W)
        outs: list[Tensor] = []
        for i, (conv, bn, act) in enumerate(zip(self.convs, self.bns, self.acts)):
            y = outs[-1] + splits[i] if self.cascade and i > 0 else splits[i]
            outs.append(act(bn(conv(y))))  # (N, width, H / stride, W / stride); a cascade has seen 2i + 3 pixels
        if len(outs) < self.scale:
            outs.append(self.pool(splits[-1]))
        y = torch.cat(outs, dim=1) if self.scale > 1 else outs[0]  # (N, scale * width, H / stride, W / stride)
        y = self.drop_block(y)

        y = self.bn3(self.conv3(y))  # (N, planes * expansion, H / stride, W / stride)
        y = self.drop_path(self.se(y))
        if shortcut is None:
            shortcut = x if self.downsample is None else self.downsample(x)
        y += shortcut
        return self.act3(y)


def make_attention(attn_layer: str | Layer | None, channels: int, **dd: object) -> nn.Module:
    """Makes timm's attention layer of that name or class, or an identity for None."""
    try:
        return create_attn(attn_layer, channels, **dd) or nn.Identity()
    except AssertionError as error:
        raise ValueError(f"attn_layer={attn_layer!r} is not known. Choose 'se', 'eca' or another of timm's.") from error


def spec_of(model: nn.Module) -> NetworkSpec | None:
    """Returns the spec of the network in a model, or None if the model contains no Res2Net block."""
    return next((block.spec for block in model.modules() if isinstance(block, Bottle2neck)), None)
