"""Big-Little trunk with Res2Net blocks.

Papers: `Big-Little Net` - https://arxiv.org/abs/1807.03848, and Res2Net's own, whose bLRes2Net-50 this is.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Bottle2neck, Layer
from .recompute import Stage
from .trunk import FeatureInfo, Layers, Trunk, TrunkOptions, drop_block_layers

__all__ = ['Res2NetBigLittle']


class BigLittleStem(nn.Module):
    """Two ways from stride 2 to 4, one convolution and a thinner sequence of three, added and mixed.

    Args:
        conv: Makes a convolution and norm from (in_chs, out_chs, kernel_size, stride).
        chs: Input and output channels.
        alpha: Factor by which the little branch is thinner.
        act_layer: Activation class.
    """

    def __init__(self, conv: Layers, chs: int, alpha: int, act_layer: Layer) -> None:
        super().__init__()
        self.big = nn.Sequential(*conv(chs, chs, 3, stride=2))
        self.little = nn.Sequential(
            *conv(chs, chs // alpha, 3, act_layer=act_layer),
            *conv(chs // alpha, chs // alpha, 3, stride=2, act_layer=act_layer),
            *conv(chs // alpha, chs, 1),
        )
        self.act = act_layer(inplace=True)
        self.fusion = nn.Sequential(*conv(chs, chs, 1, act_layer=act_layer))

    def forward(self, x: Tensor) -> Tensor:
        """Runs both branches, (N, chs, H, W) to (N, chs, H / 2, W / 2)."""
        return self.fusion(self.act(self.big(x) + self.little(x)))


class BigLittleModule(nn.Module):
    """Many blocks at half the resolution beside few and thin ones at full, added, and fused by one more block.

    Args:
        conv: Makes a convolution and norm from (in_chs, out_chs, kernel_size, stride).
        block: Makes a block.
        in_chs: Input channels.
        out_chs: Output channels.
        depth: Blocks of the big branch and the fusion together.
        stride: Of the fusion, 1 or 2.
        alpha: Factor by which the little branch is thinner.
        beta: Factor by which the little branch is shallower.
        act_layer: Activation class.
    """

    def __init__(
        self,
        conv: Layers,
        block: Layer,
        in_chs: int,
        out_chs: int,
        depth: int,
        stride: int,
        alpha: int,
        beta: int,
        act_layer: Layer,
    ) -> None:
        super().__init__()
        self.big = stage(conv, block, in_chs, out_chs, depth - 1, stride=2, last_act=False)
        self.little = stage(conv, block, in_chs, out_chs // alpha, max(1, depth // beta - 1))
        self.little_e = nn.Sequential(*conv(out_chs // alpha, out_chs, 1))
        self.act = act_layer(inplace=True)
        self.fusion = stage(conv, block, out_chs, out_chs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        """Runs both branches and the fusion, (N, in_chs, H, W) to (N, out_chs, H / stride, W / stride)."""
        big = self.big(x)  # (N, out_chs, H / 2, W / 2); first, as it is registered first, which FullGrad relies on
        little = self.little_e(self.little(x))  # (N, out_chs, H, W)
        return self.fusion(self.act(F.interpolate(big, size=little.shape[2:]) + little))  # nearest neighbours of big


def stage(
    conv: Layers,
    block: Layer,
    inplanes: int,
    outplanes: int,
    depth: int,
    stride: int = 1,
    dilation: int = 1,
    last_act: bool = True,
) -> Stage:
    """Makes blocks in sequence.

    Args:
        conv: Makes a convolution and norm from (in_chs, out_chs, kernel_size, stride).
        block: Makes a block.
        inplanes: Input channels.
        outplanes: Output channels.
        depth: Number of blocks.
        stride: Of the first block.
        dilation: 2 for a stage that is dilated instead of having stride 2.
        last_act: Whether the last block ends with an activation.
    """
    first = stride * dilation > 1
    planes = outplanes // Bottle2neck.expansion
    layers: list[nn.Module] = [nn.AvgPool2d(3, stride, padding=1)] if first else []
    if inplanes != outplanes:
        layers += conv(inplanes, outplanes, 1)
    shortcut = nn.Sequential(*layers) if layers else None
    acts = [True] * (depth - 1) + [last_act]
    grid = dict(first=first, dilation=dilation, first_dilation=1)
    blocks = [block(inplanes, planes, stride, shortcut, last_act=acts[0], **grid)]
    blocks += [block(outplanes, planes, dilation=dilation, last_act=act) for act in acts[1:]]
    return Stage(*blocks)


class Res2NetBigLittle(Trunk):
    """Big-Little Net with Res2Net blocks: many blocks work at half the resolution, beside few and thin ones at full.

    The paper says of bLRes2Net-50 that it replaces the bottleneck by the Res2Net module, and no more. Whether a block
    with stride 1 that changes channels (as the little branch has it) is a first block, without a cascade, is open, and
    no parameter depends on it. Here a block is a first one if it has stride 2, the rule of the authors' DLA.

    Args:
        layers: Blocks of each stage.
        alpha: Factor by which little branches are thinner.
        beta: Factor by which little branches are shallower.
        output_stride: 16 or 32; for 16 the last stage is dilated. In the others big branches halve the resolution.
        tap_layer2: List the features of `layer2` (stride 16, 512 channels), too. Those of `layer3` have the same
            stride, and necks expect each stride once.
        **options: See `TrunkOptions`.

    Raises:
        ValueError: For an argument that the network doesn't support.
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
        tap_layer2: bool = False,
        **options: Any,
    ) -> None:
        opts = TrunkOptions(**options)
        super().__init__(opts)
        if output_stride not in (16, 32):
            raise ValueError(f'output_stride={output_stride} is not possible; choose 16 or 32')
        if len(layers) != 4 or min(layers[:3]) < 2:
            raise ValueError(f'layers={layers} must have an entry for each of 4 stages, at least 2 in the first three')
        blocks = [opts.block(drop_block=drop_block) for drop_block in drop_block_layers(opts.drop_block_rate)]
        conv, act = opts.conv, opts.act

        def module(i: int, in_chs: int, out_chs: int, stride: int) -> BigLittleModule:
            return BigLittleModule(conv, blocks[i], in_chs, out_chs, layers[i], stride, alpha, beta, act)

        stride = output_stride // 16
        self.conv1, self.bn1, self.act1 = conv(opts.in_chans, 64, 7, stride=2, act_layer=act)
        self.bl_init = BigLittleStem(conv, 64, alpha, act)
        self.layer1 = module(0, 64, 256, stride=2)
        self.layer2 = module(1, 256, 512, stride=2)
        self.layer3 = module(2, 512, 1024, stride=1)
        self.layer4 = stage(conv, blocks[3], 1024, 2048, layers[3], stride, dilation=2 // stride)
        reductions = {'act1': 2, 'bl_init': 4, 'layer1': 8, 'layer2': 16, 'layer3': 16, 'layer4': output_stride}
        channels = (64, 64, 256, 512, 1024, 2048)
        self.feature_info = [
            FeatureInfo(num_chs=chs, reduction=reduction, module=name)
            for chs, (name, reduction) in zip(channels, reductions.items())
            if tap_layer2 or name != 'layer2'
        ]
        self.add_head(2048, opts)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups in the order of execution, as timm's optimizers want them.

        Args:
            coarse: A group for each stage, instead of one for each branch and fusion of the Big-Little stages.
        """
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
