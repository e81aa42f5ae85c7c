"""DLA trunk with Res2Net blocks.

Papers: `Deep Layer Aggregation` - https://arxiv.org/abs/1707.06484, and Res2Net's own, whose Res2Net-DLA-60 this is.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .block import Bottle2neck, Layer
from .recompute import recompute
from .trunk import FeatureInfo, Layers, Trunk, TrunkOptions, drop_block_layers

__all__ = ['Res2NetDla']


class DlaBottle2neck(Bottle2neck):
    """The block at DLA's widths: half as many channels inside as outside."""

    expansion = 2


class DlaRoot(nn.Module):
    """Aggregates the outputs of the parts of a tree: concatenation, 1x1 convolution, norm, activation.

    Args:
        in_chs: Channels of all inputs together.
        out_chs: Output channels.
        shortcut: Add the first input to the convolution's output.
        act_layer: Activation class.
        norm_layer: Norm class.
        **dd: Device and dtype.
    """

    def __init__(
        self, in_chs: int, out_chs: int, shortcut: bool, act_layer: Layer, norm_layer: Layer, **dd: Any
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_chs, out_chs, 1, bias=False, **dd)
        self.bn = norm_layer(out_chs, **dd)
        self.act = act_layer(inplace=True)
        self.shortcut = shortcut

    def forward(self, children: list[Tensor]) -> Tensor:
        """Aggregates tensors (N, C_i, H, W), sum of C_i = in_chs, to (N, out_chs, H, W)."""
        x = self.bn(self.conv(torch.cat(children, dim=1)))
        if self.shortcut:
            x += children[0]
        return self.act(x)


class TreeLayers(NamedTuple):
    """Functions that make the layers of a network's trees."""

    block: Layer  # (in_chs, planes, ...) -> DlaBottle2neck
    project: Layers  # (in_chs, out_chs) -> 1x1 convolution and norm
    root: Layer  # (in_chs, out_chs) -> DlaRoot


class DlaLeaf(nn.Module):
    """The smallest tree: two blocks joined by a root.

    Args:
        layers: Makes blocks, projections and roots.
        in_chs: Input channels.
        out_chs: Output channels.
        dilation: Dilation of the blocks.
        step: Stride and dilation of the first block, in a tree that begins a level. None elsewhere.
        level_root: Give the input, at the output's resolution, to the root as well.
        root_chs: Channels that the root gets from outside.
    """

    def __init__(
        self,
        layers: TreeLayers,
        in_chs: int,
        out_chs: int,
        dilation: int = 1,
        step: tuple[int, int] | None = None,
        level_root: bool = False,
        root_chs: int = 0,
    ) -> None:
        super().__init__()
        self.level_root = level_root
        self.grad_checkpointing = False
        planes = out_chs // DlaBottle2neck.expansion
        first = {} if step is None else dict(stride=step[0], first_dilation=step[1], first=True)
        self.downsample = shrink(step)
        self.project = nn.Identity() if in_chs == out_chs else nn.Sequential(*layers.project(in_chs, out_chs))
        self.tree1 = layers.block(in_chs, planes, dilation=dilation, **first)
        self.tree2 = layers.block(out_chs, planes, dilation=dilation)
        self.root = layers.root(2 * out_chs + root_chs + (in_chs if level_root else 0), out_chs)

    def forward(self, x: Tensor, children: list[Tensor] | None = None) -> Tensor:
        """Runs the tree.

        Args:
            x: (N, in_chs, H, W).
            children: Tensors (N, C_i, H / stride, W / stride) for the root, sum of C_i = root_chs.

        Returns:
            (N, out_chs, H / stride, W / stride), sizes rounded up.
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return recompute(self.aggregate, x, children, buffers_of=self)
        return self.aggregate(x, children)

    def aggregate(self, x: Tensor, children: list[Tensor] | None) -> Tensor:
        """Computes what `forward` returns."""
        children = [] if children is None else children
        bottom = self.downsample(x)
        if self.level_root:
            children = children + [bottom]  # noqa: RUF005 - TorchScript has no [*children, bottom]
        x1 = self.tree1(x, self.project(bottom))
        x2 = self.tree2(x1)
        return self.root([x2, x1] + children)  # noqa: RUF005


class DlaTree(nn.Module):
    """Two trees in sequence; the second one's last root also gets what the first one returns.

    Arguments are those of `DlaLeaf`, after the depth: a tree of depth 2 has two leaves, one of depth 3 four.
    """

    def __init__(
        self,
        depth: int,
        layers: TreeLayers,
        in_chs: int,
        out_chs: int,
        dilation: int = 1,
        step: tuple[int, int] | None = None,
        level_root: bool = False,
        root_chs: int = 0,
    ) -> None:
        super().__init__()
        self.level_root = level_root
        root_chs += out_chs + (in_chs if level_root else 0)
        self.downsample = shrink(step)
        self.tree1 = tree(depth - 1, layers, in_chs, out_chs, dilation, step)
        self.tree2 = tree(depth - 1, layers, out_chs, out_chs, dilation, root_chs=root_chs)

    def forward(self, x: Tensor, children: list[Tensor] | None = None) -> Tensor:
        """Runs both trees; shapes as in `DlaLeaf`."""
        children = [] if children is None else children
        if self.level_root:
            children = children + [self.downsample(x)]  # noqa: RUF005
        x = self.tree1(x)
        return self.tree2(x, children + [x])  # noqa: RUF005


def tree(depth: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Makes a tree of that depth from the arguments of `DlaLeaf`."""
    return DlaLeaf(*args, **kwargs) if depth == 1 else DlaTree(depth, *args, **kwargs)


def shrink(step: tuple[int, int] | None) -> nn.Module:
    """Makes the maximum over 2x2 pixels that brings a tree's input to its output's resolution.

    Where the level is dilated instead (stride 1), the pixels are as far apart as those that the strided pool would see.
    """
    if step is None:
        return nn.Identity()
    stride, dilation = step
    if stride == 1:
        pad = nn.ConstantPad2d((0, dilation, 0, dilation), float('-inf'))
        return nn.Sequential(pad, nn.MaxPool2d(2, stride=1, dilation=dilation))
    return nn.MaxPool2d(2, stride=2, ceil_mode=True)  # rounds odd sizes up, as the convolutions beside it do


class Res2NetDla(Trunk):
    """DLA with Res2Net blocks, on timm's tensor names.

    Unlike timm's DLA it dilates, checkpoints, drops paths, takes layers of any kind, and accepts odd image sizes. In
    its dilated forms (`output_stride`) it computes exactly what the undilated network does, on a denser grid.

    Args:
        levels: Depth of each level: convolutions in the first two, depth of the tree in the others.
        channels: Output channels of each level.
        base_width: Channels of one split for 64 planes, of which a block has half as many as output channels.
        output_stride: 8, 16 or 32; levels beyond it are dilated.
        shortcut_root: Add a root's first input to its output.
        zero_init_last: Start training with every block as an identity. timm's DLA does not.
        **options: See `TrunkOptions`.

    Raises:
        ValueError: For an argument that the network doesn't support.
    """

    parts = ('base_layer', 'level0', 'level1', 'level2', 'level3', 'level4', 'level5')
    conv_head = True
    densest: ClassVar[dict[str, Any]] = dict(output_stride=8)

    def __init__(
        self,
        levels: Sequence[int] = (1, 1, 1, 2, 3, 1),
        channels: Sequence[int] = (16, 32, 128, 256, 512, 1024),
        *,
        base_width: float = 28,
        output_stride: int = 32,
        shortcut_root: bool = False,
        zero_init_last: bool = False,
        **options: Any,
    ) -> None:
        opts = TrunkOptions(base_width=base_width, zero_init_last=zero_init_last, **options)
        super().__init__(opts)
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride={output_stride} is not possible; choose 8, 16 or 32')
        if len(levels) != 6 or len(channels) != 6:
            raise ValueError(f'levels={levels} and channels={channels} must have an entry for each of 6 levels')
        conv: Layers = partial(opts.conv, act_layer=opts.act)
        self.base_layer = nn.Sequential(*conv(opts.in_chans, channels[0], 7))
        self.level0 = nn.Sequential(*conv(channels[0], channels[0], 3))
        self.level1 = nn.Sequential(*conv(channels[0], channels[1], 3, stride=2))
        for level, chs, depth in ((self.level0, channels[0], levels[0]), (self.level1, channels[1], levels[1])):
            for _ in range(depth - 1):
                level.extend(conv(chs, chs, 3))
        self.feature_info = [
            FeatureInfo(num_chs=channels[0], reduction=1, module='level0'),
            FeatureInfo(num_chs=channels[1], reduction=2, module='level1'),
        ]

        project = partial(opts.conv, kernel_size=1)
        root = partial(DlaRoot, shortcut=shortcut_root, act_layer=opts.act, norm_layer=opts.norm)
        reduction, dilation = 2, 1
        trees = []
        for i, drop_block in zip(range(2, 6), drop_block_layers(opts.drop_block_rate)):
            stride = 2 if reduction < output_stride else 1
            step = stride, dilation
            reduction, dilation = reduction * stride, dilation * 2 // stride
            block = opts.block(DlaBottle2neck, dilate_pool=True, drop_block=drop_block)
            layers = TreeLayers(block, project, partial(root, **opts.factory))
            trees.append(tree(levels[i], layers, channels[i - 1], channels[i], dilation, step, level_root=i > 2))
            self.feature_info.append(FeatureInfo(num_chs=channels[i], reduction=reduction, module=f'level{i}'))
        self.level2, self.level3, self.level4, self.level5 = trees
        self.add_head(channels[-1], opts)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups in the order of execution, as timm's optimizers want them.

        Args:
            coarse: A group for each level, instead of one for each block, projection and root.
        """
        if coarse:
            return dict(stem=r'^base_layer', blocks=r'^level(\d+)')
        patterns: list[tuple[str, tuple[int] | None]] = []
        for depth in range(5, -1, -1):  # of nested trees; timm takes the first pattern that matches
            prefix = r'^level(\d+)' + r'\.tree(\d+)' * depth
            patterns += [(prefix + r'\.project', (0,)), (prefix + r'\.root', (3,)), (prefix, None)]
        return dict(stem=r'^base_layer', blocks=patterns)

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features, (N, in_chans, H, W) to (N, num_features, H / 32, W / 32)."""
        x = self.base_layer(x)  # (N, 16, H, W) with default channels
        x = self.level0(x)  # (N, 16, H, W)
        x = self.level1(x)  # (N, 32, H / 2, W / 2)
        x = self.level2(x)  # (N, 128, H / 4, W / 4)
        x = self.level3(x)  # (N, 256, H / 8, W / 8)
        x = self.level4(x)  # (N, 512, H / 16, W / 16)
        return self.level5(x)  # (N, 1024, H / 32, W / 32)
