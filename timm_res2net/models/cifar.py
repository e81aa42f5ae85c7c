"""The 29-layer trunk for CIFAR's images of 32 x 32 pixels."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .block import Bottle2neck
from .recompute import Stage
from .trunk import FeatureInfo, Trunk, TrunkOptions, drop_block_layers

__all__ = ['Res2NetCifar']


class Res2NetCifar(Trunk):
    """ResNeXt-29's trunk with Res2Net blocks: a 3x3 stem without pooling and three stages.

    The literature leaves two definitions. With `first_block='group'` convolutions and classifier have the sizes that
    the paper (table 4) prints: 24.3 M for 6c 24w 4s, 33.8 M for 8c 25w 4s, 36.7 M for 6c 24w 6s; exactly 24,302,116,
    33,829,172 and 36,718,372, norms not counted. It is what the authors say of their code for CIFAR: each stage begins
    with a grouped convolution. With the block as it was published, `first_block='official'`, there are 23,705,732,
    32,957,436 and 36,146,180 parameters, norms counted, which is no number of the paper's.

    The paper's sizes with SE (26.0, 34.0 and 36.9 M) can't be reproduced: they exceed those without by 1.7, 0.2 and
    0.2 M, but attention on the same outputs of 256, 512 and 1024 channels adds the same to all three, 521,808 for the
    usual reduction by 16.

    Args:
        layers: Blocks of each stage.
        channels: Planes of each stage; it has four times as many output channels.
        base_width: Channels of one split and group for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: What the first block of a stage computes, a key of `FIRST_BLOCKS`.
        num_classes: Classes, 0 for none.
        output_stride: 1, 2 or 4; stages beyond it are dilated.
        **options: See `TrunkOptions`.

    Raises:
        ValueError: For an argument that the network doesn't support.
    """

    parts = ('conv1', 'bn1', 'act1', 'layer1', 'layer2', 'layer3')
    densest: ClassVar[dict[str, Any]] = dict(output_stride=1)

    def __init__(
        self,
        layers: Sequence[int] = (3, 3, 3),
        channels: Sequence[int] = (64, 128, 256),
        *,
        base_width: float = 24,
        cardinality: int = 6,
        first_block: str = 'group',
        num_classes: int = 100,
        output_stride: int = 4,
        **options: Any,
    ) -> None:
        opts = TrunkOptions(
            base_width=base_width, cardinality=cardinality, first_block=first_block, num_classes=num_classes, **options
        )
        super().__init__(opts)
        if output_stride not in (1, 2, 4):
            raise ValueError(f'output_stride={output_stride} is not possible; choose 1, 2 or 4')
        if len(layers) != 3 or len(channels) != 3:
            raise ValueError(f'layers={layers} and channels={channels} must have an entry for each of 3 stages')

        inplanes = 64
        self.conv1, self.bn1, self.act1 = opts.conv(opts.in_chans, inplanes, 3, act_layer=opts.act)
        self.feature_info = [FeatureInfo(num_chs=inplanes, reduction=1, module='act1')]
        reduction, dilation = 1, 1
        stages = []
        for i, (depth, planes, drop_block) in enumerate(
            zip(layers, channels, drop_block_layers(opts.drop_block_rate)[1:])
        ):
            nominal_stride, first_dilation = 1 if i == 0 else 2, dilation
            stride = nominal_stride if reduction < output_stride else 1
            reduction, dilation = reduction * stride, dilation * nominal_stride // stride
            outplanes = planes * Bottle2neck.expansion
            shortcut = nn.Sequential(*opts.conv(inplanes, outplanes, 1, stride))
            block = opts.block(dilation=dilation, dilate_pool=True, drop_block=drop_block)
            first = block(inplanes, planes, stride, shortcut, first_dilation=first_dilation)
            stages.append(Stage(first, *(block(outplanes, planes) for _ in range(depth - 1))))
            inplanes = outplanes
            self.feature_info.append(FeatureInfo(num_chs=inplanes, reduction=reduction, module=f'layer{i + 1}'))
        self.layer1, self.layer2, self.layer3 = stages
        self.add_head(inplanes, opts)

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that sort parameters into groups in the order of execution, as timm's optimizers want them.

        Args:
            coarse: A group for each stage, instead of one for each block.
        """
        return dict(stem=r'^conv1|bn1', blocks=r'^layer(\d+)' if coarse else r'^layer(\d+)\.(\d+)')

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features, (N, in_chans, H, W) to (N, num_features, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))  # (N, 64, H, W)
        x = self.layer1(x)  # (N, 256, H, W) with default channels
        x = self.layer2(x)  # (N, 512, H / 2, W / 2)
        return self.layer3(x)  # (N, 1024, H / 4, W / 4)
