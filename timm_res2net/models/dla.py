"""DLA trunk with Res2Net blocks.

Papers: `Deep Layer Aggregation` - https://arxiv.org/abs/1707.06484, and Res2Net's own for Res2Net-DLA-60.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from .block import Bottle2neck
from .recompute import recompute
from .spec import require_one_of
from .trunk import Grid, Trunk, TrunkOptions, dense_grids


class DlaBottle2neck(Bottle2neck):
    """The block at DLA's widths: half as many channels inside as outside."""

    expansion = 2


class DlaRoot(nn.Module):
    """Aggregates the outputs of a tree: concatenation, 1x1 convolution, norm, addition if `shortcut`, activation."""

    def __init__(self, opts: TrunkOptions, in_chs: int, out_chs: int, shortcut: bool) -> None:
        super().__init__()
        self.conv, self.bn, self.act = opts.conv(in_chs, out_chs, 1, act=True)
        self.shortcut = shortcut

    def forward(self, children: list[Tensor]) -> Tensor:
        """Aggregates tensors (N, C_i, H, W), where the sum of C_i is in_chs, to (N, out_chs, H, W)."""
        x = self.bn(self.conv(torch.cat(children, dim=1)))
        if self.shortcut:
            x += children[0]
        return self.act(x)


class Level(NamedTuple):
    """Arguments of all trees of a level."""

    opts: TrunkOptions
    grid: Grid
    shortcut_root: bool


class DlaLeaf(nn.Module):
    """The smallest tree: two blocks joined by a root.

    The first leaf of a level has the stride of the level. With `level_root`, the root also gets the input of the leaf,
    pooled to the output's resolution. `root_chs` is the number of channels that the root gets from outside the leaf.
    """

    def __init__(
        self, level: Level, in_chs: int, out_chs: int, first: bool = False, level_root: bool = False, root_chs: int = 0
    ) -> None:
        super().__init__()
        opts, grid = level.opts, level.grid
        block = opts.block(DlaBottle2neck, dilation=grid.dilations[0], dilate_pool=True)
        entry = dict(stride=grid.stride, first_dilation=grid.first_dilation, first=True) if first else {}
        planes = out_chs // DlaBottle2neck.expansion
        self.level_root = level_root
        self.grad_checkpointing = False
        self.downsample = make_pool(grid) if first else nn.Identity()
        self.project = nn.Identity() if in_chs == out_chs else nn.Sequential(*opts.conv(in_chs, out_chs, 1))
        self.tree1 = block(in_chs, planes, **entry)
        self.tree2 = block(out_chs, planes)
        root_chs += 2 * out_chs + (in_chs if level_root else 0)
        self.root = DlaRoot(opts, root_chs, out_chs, level.shortcut_root)

    def forward(self, x: Tensor, children: list[Tensor] | None = None) -> Tensor:
        """Runs the tree, (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride), with sizes rounded up.

        The root also gets the children: (N, C_i, H / stride, W / stride), where the sum of C_i is root_chs.
        """
        if self.grad_checkpointing and not torch.jit.is_scripting():
            return recompute(self.aggregate, x, children, buffers_of=self)
        return self.aggregate(x, children)

    def aggregate(self, x: Tensor, children: list[Tensor] | None) -> Tensor:
        """Computes `forward` without checkpointing."""
        children = [] if children is None else children
        bottom = self.downsample(x)
        if self.level_root:
            children = children + [bottom]  # noqa: RUF005 - TorchScript has no [*children, bottom]
        x1 = self.tree1(x, self.project(bottom))
        x2 = self.tree2(x1)
        return self.root([x2, x1] + children)  # noqa: RUF005


class DlaTree(nn.Module):
    """A tree of depth 2 or more: two trees in sequence. The last root of the second also gets the first's output."""

    def __init__(
        self,
        depth: int,
        level: Level,
        in_chs: int,
        out_chs: int,
        first: bool = False,
        level_root: bool = False,
        root_chs: int = 0,
    ) -> None:
        super().__init__()
        root_chs += out_chs + (in_chs if level_root else 0)
        self.level_root = level_root
        self.downsample = make_pool(level.grid) if level_root else nn.Identity()
        self.tree1 = make_tree(depth - 1, level, in_chs, out_chs, first)
        self.tree2 = make_tree(depth - 1, level, out_chs, out_chs, root_chs=root_chs)

    def forward(self, x: Tensor, children: list[Tensor] | None = None) -> Tensor:
        """Runs both trees, with the shapes of `DlaLeaf`."""
        children = [] if children is None else children
        if self.level_root:
            children = children + [self.downsample(x)]  # noqa: RUF005
        x = self.tree1(x)
        return self.tree2(x, children + [x])  # noqa: RUF005


def make_tree(depth: int, *args: Any, **kwargs: Any) -> nn.Module:
    """Makes a tree of that depth from the arguments of `DlaLeaf`."""
    return DlaLeaf(*args, **kwargs) if depth == 1 else DlaTree(depth, *args, **kwargs)


def make_pool(grid: Grid) -> nn.Module:
    """Makes the 2x2 max-pool that brings the input of a level to the resolution of its output.

    In a dilated level (stride 1), the pool is dilated and sees the same pixels as the strided pool.
    """
    if grid.stride == 1:
        pad = nn.ConstantPad2d((0, grid.first_dilation, 0, grid.first_dilation), float('-inf'))
        return nn.Sequential(pad, nn.MaxPool2d(2, stride=1, dilation=grid.first_dilation))
    return nn.MaxPool2d(2, stride=2, ceil_mode=True)  # rounds odd sizes up, as strided convolutions do


class Res2NetDla(Trunk):
    """DLA with Res2Net blocks and timm's tensor names: a stem, two levels of convolutions and four of nested trees.

    Maps images (N, in_chans, H, W) to logits (N, num_classes). Unlike timm's DLA it supports dilation, checkpointing,
    stochastic depth, other layer classes, and odd image sizes. A dilated network (`output_stride`) computes exactly
    what the undilated one does, on a denser grid.

    Args:
        levels: Number of convolutions in each of the first two levels, depth of the tree in each of the others.
        channels: Output channels of each level.
        base_width: Channels of one split for 64 planes; a block has half as many planes as output channels.
        output_stride: 8, 16 or 32; levels beyond it are dilated.
        shortcut_root: Add a root's first input to its output. This changes the function but adds no tensor.
        zero_init_last: Start training with every block as the identity. timm's DLA does not.
        **options: Arguments of every trunk, see `timm_res2net.models.trunk.TrunkOptions`.

    Raises:
        ValueError: If the network does not support a value.
        TypeError: If an argument is unknown.

    Example:
        >>> model = timm.create_model('dla60_res2net', num_classes=10).eval()
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
        >>> [tuple(x.shape[1:]) for x in model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=3)[1]]
        [(256, 8, 8), (512, 4, 4), (1024, 2, 2)]
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
        super().__init__()
        require_one_of('output_stride', output_stride, (8, 16, 32))
        if len(levels) != 6 or len(channels) != 6 or min(levels) < 1:
            raise ValueError(f'levels={levels} and channels={channels} must have a positive entry for each of 6 levels')
        conv = partial(opts.conv, act=True)
        self.base_layer = nn.Sequential(*conv(opts.in_chans, channels[0], 7))
        self.level0 = nn.Sequential(*conv(channels[0], channels[0], 3))
        self.level1 = nn.Sequential(*conv(channels[0], channels[1], 3, stride=2))
        for part, chs, depth in ((self.level0, channels[0], levels[0]), (self.level1, channels[1], levels[1])):
            for _ in range(depth - 1):
                part.extend(conv(chs, chs, 3))
        self.feature_info = [
            dict(num_chs=channels[0], reduction=1, module='level0'),
            dict(num_chs=channels[1], reduction=2, module='level1'),
        ]

        trees = []
        grids = dense_grids(levels[2:], (2, 2, 2, 2), output_stride, reduction=2)
        for i, grid in enumerate(grids, 2):
            level = Level(opts, grid, shortcut_root)
            trees.append(make_tree(levels[i], level, channels[i - 1], channels[i], first=True, level_root=i > 2))
            self.feature_info.append(dict(num_chs=channels[i], reduction=grid.reduction, module=f'level{i}'))
        self.level2, self.level3, self.level4, self.level5 = trees
        self.finish(channels[-1], opts, shortcut_root=shortcut_root)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        trees = [(r'^level(\d+)\.tree(\d+)', None), (r'^level(\d+)\.root', (2,)), (r'^level(\d+)', (1,))]
        return dict(stem=r'^base_layer', blocks=r'^level(\d+)' if coarse else trees)

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features, (N, in_chans, H, W) to (N, num_features, H / 32, W / 32)."""
        x = self.base_layer(x)  # (N, 16, H, W) with default channels
        x = self.level0(x)  # (N, 16, H, W)
        x = self.level1(x)  # (N, 32, H / 2, W / 2)
        x = self.level2(x)  # (N, 128, H / 4, W / 4)
        x = self.level3(x)  # (N, 256, H / 8, W / 8)
        x = self.level4(x)  # (N, 512, H / 16, W / 16)
        return self.level5(x)  # (N, 1024, H / 32, W / 32)
