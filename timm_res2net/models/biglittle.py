"""Big-Little trunk with Res2Net blocks.

Papers: `Big-Little Net` - https://arxiv.org/abs/1807.03848, and Res2Net's own for bLRes2Net-50.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Bottle2neck
from .recompute import Stage
from .spec import require_one_of
from .trunk import Trunk, TrunkOptions


class BigLittleStem(nn.Module):
    """Adds two branches of stride 2, one convolution and three with 1 / `alpha` of its channels, and mixes the sum."""

    def __init__(self, opts: TrunkOptions, chs: int, alpha: int) -> None:
        super().__init__()
        self.big = nn.Sequential(*opts.conv(chs, chs, 3, stride=2))
        self.little = nn.Sequential(
            *opts.conv(chs, chs // alpha, 3, act=True),
            *opts.conv(chs // alpha, chs // alpha, 3, stride=2, act=True),
            *opts.conv(chs // alpha, chs, 1),
        )
        self.act = opts.act(inplace=True)
        self.fusion = nn.Sequential(*opts.conv(chs, chs, 1, act=True))

    def forward(self, x: Tensor) -> Tensor:
        """Runs both branches, (N, chs, H, W) to (N, chs, H / 2, W / 2)."""
        return self.fusion(self.act(self.big(x) + self.little(x)))


class BigLittleModule(nn.Module):
    """Many blocks at half the resolution and a few thin blocks at full resolution, added and fused by one more block.

    The big branch and the fusion have `depth` blocks together. The little branch has 1 / `alpha` of the channels and
    about 1 / `beta` of the blocks. The stride, 1 or 2, is that of the fusion.
    """

    def __init__(
        self, opts: TrunkOptions, in_chs: int, out_chs: int, depth: int, stride: int, alpha: int, beta: int
    ) -> None:
        super().__init__()
        self.big = make_blocks(opts, in_chs, out_chs, depth - 1, stride=2)
        self.big[-1].act3 = nn.Identity()  # the activation follows the sum of both branches
        self.little = make_blocks(opts, in_chs, out_chs // alpha, max(1, depth // beta - 1))
        self.little_e = nn.Sequential(*opts.conv(out_chs // alpha, out_chs, 1))
        self.act = opts.act(inplace=True)
        self.fusion = make_blocks(opts, out_chs, out_chs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Runs both branches and the fusion, (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride)."""
        big = self.big(x)  # (N, out_chs, H / 2, W / 2); runs first because FullGrad relies on the order of modules
        little = self.little_e(self.little(x))  # (N, out_chs, H, W)
        return self.fusion(self.act(F.interpolate(big, size=little.shape[2:]) + little))  # nearest pixels of big


def make_blocks(
    opts: TrunkOptions, inplanes: int, outplanes: int, depth: int, stride: int = 1, dilation: int = 1
) -> Stage:
    """Makes a sequence of blocks; the dilation is 2 for a stage that is dilated instead of strided."""
    first = stride * dilation > 1
    planes = outplanes // Bottle2neck.expansion
    layers: list[nn.Module] = [nn.AvgPool2d(3, stride, padding=1)] if first else []
    if inplanes != outplanes:
        layers += opts.conv(inplanes, outplanes, 1)
    shortcut = nn.Sequential(*layers) if layers else None
    block = opts.block(dilation=dilation)
    blocks = [block(inplanes, planes, stride, shortcut, first_dilation=1, first=first)]
    blocks += [block(outplanes, planes) for _ in range(depth - 1)]
    return Stage(*blocks)


class Res2NetBigLittle(Trunk):
    """Big-Little Net with Res2Net blocks: many blocks at half the resolution, and a few thin blocks at full resolution.

    Maps images (N, in_chans, H, W) to logits (N, num_classes). The paper says only that bLRes2Net-50 replaces the
    bottleneck with the Res2Net module. It leaves open whether a little branch's block that changes the channels, at
    stride 1, counts as a first block, without a cascade. No tensor shows that. Here, as in the authors' DLA, only
    blocks of stride 2 are first blocks.

    Args:
        layers: Blocks of each stage.
        alpha: Divisor of the channels of little branches.
        beta: Divisor of the depth of little branches.
        output_stride: 16 or 32; 16 dilates the last stage. The other stages cannot be dilated.
        **options: Arguments of every trunk, see `timm_res2net.models.trunk.TrunkOptions`.

    Raises:
        ValueError: If the network does not support a value.
        TypeError: If an argument is unknown.

    Example:
        >>> model = timm.create_model('blres2net50_26w_4s', num_classes=10).eval()
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
        >>> [tuple(x.shape[1:]) for x in model.forward_intermediates(torch.randn(1, 3, 64, 64), indices=3)[1]]
        [(256, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    """

    parts = ('conv1', 'bn1', 'act1', 'bl_init', 'layer1', 'layer2', 'layer3', 'layer4')
    densest: ClassVar[dict[str, Any]] = dict(output_stride=16)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        alpha: int = 2,
        beta: int = 4,
        output_stride: int = 32,
        **options: Any,
    ) -> None:
        opts = TrunkOptions(**options)
        super().__init__()
        require_one_of('output_stride', output_stride, (16, 32))
        if len(layers) != 4 or min(layers[:3]) < 2:
            raise ValueError(f'layers={layers} must have an entry for each of 4 stages, at least 2 in the first three')
        stride = output_stride // 16
        module = partial(BigLittleModule, opts, alpha=alpha, beta=beta)
        self.conv1, self.bn1, self.act1 = opts.conv(opts.in_chans, 64, 7, stride=2, act=True)
        self.bl_init = BigLittleStem(opts, 64, alpha)
        self.layer1 = module(64, 256, layers[0], stride=2)
        self.layer2 = module(256, 512, layers[1], stride=2)
        self.layer3 = module(512, 1024, layers[2], stride=1)
        self.layer4 = make_blocks(opts, 1024, 2048, layers[3], stride, dilation=2 // stride)
        self.feature_info = [  # not layer2, which has stride 16 like layer3: necks expect each stride once
            dict(num_chs=64, reduction=2, module='act1'),
            dict(num_chs=64, reduction=4, module='bl_init'),
            dict(num_chs=256, reduction=8, module='layer1'),
            dict(num_chs=1024, reduction=16, module='layer3'),
            dict(num_chs=2048, reduction=output_stride, module='layer4'),
        ]
        self.finish(2048, opts)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        if coarse:
            return dict(stem=r'^conv1|bn1|bl_init', blocks=r'^layer(\d+)')
        fusions, branches = (r'^layer([123])\.fusion', (1,)), (r'^layer([123])', (0,))
        return dict(stem=r'^conv1|bn1|bl_init', blocks=[fusions, branches, (r'^layer(4)\.(\d+)', None)])

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features, (N, in_chans, H, W) to (N, 2048, H / 32, W / 32)."""
        x = self.act1(self.bn1(self.conv1(x)))  # (N, 64, H / 2, W / 2)
        x = self.bl_init(x)  # (N, 64, H / 4, W / 4)
        x = self.layer1(x)  # (N, 256, H / 8, W / 8)
        x = self.layer2(x)  # (N, 512, H / 16, W / 16)
        x = self.layer3(x)  # (N, 1024, H / 16, W / 16)
        return self.layer4(x)  # (N, 2048, H / 32, W / 32)
