"""The 29-layer trunk for CIFAR's images of 32 x 32 pixels."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import get_act_layer
from timm.models.resnet import drop_blocks
from torch import Tensor, nn

from .block import Bottle2neck, Layer, Stage, norm_maker
from .trunk import Trunk, conv_norm_act

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
        scale: Splits of a block.
        base_width: Channels of one split and group for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: What the first block of a stage computes, see `Bottle2neck`.
        attn_layer: Attention class or its name in timm.
        num_classes: Classes, 0 for none.
        in_chans: Channels of the image.
        global_pool: Kind of pooling: 'avg', 'max', 'avgmax', 'catavgmax', '' for none.
        output_stride: 1, 2 or 4; stages beyond it are dilated.
        act_layer: Activation class or its name in timm.
        norm_layer: Norm class or its name in timm.
        drop_rate: Dropout probability before the classifier.
        drop_path_rate: Stochastic depth probability of the last block, growing linearly from 0 at the first.
        drop_block_rate: DropBlock probability in the last two stages.
        zero_init_last: Let each block be an identity at the start of training.
        device: Device of the tensors.
        dtype: Data type of the tensors.

    Raises:
        ValueError: For an argument that the network can't honour.
    """

    parts = ('conv1', 'bn1', 'act1', 'layer1', 'layer2', 'layer3')

    def __init__(
        self,
        layers: Sequence[int] = (3, 3, 3),
        channels: Sequence[int] = (64, 128, 256),
        *,
        scale: int = 4,
        base_width: int = 24,
        cardinality: int = 6,
        first_block: str = 'group',
        attn_layer: str | Layer | None = None,
        num_classes: int = 100,
        in_chans: int = 3,
        global_pool: str = 'avg',
        output_stride: int = 4,
        act_layer: str | Layer = 'relu',
        norm_layer: str | Layer = 'batchnorm2d',
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        drop_block_rate: float = 0.0,
        zero_init_last: bool = True,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(num_classes, in_chans)
        if output_stride not in (1, 2, 4):
            raise ValueError(f'output_stride={output_stride} is not possible; choose 1, 2 or 4')
        if len(layers) != 3 or len(channels) != 3:
            raise ValueError(f'layers={layers} and channels={channels} must have an entry for each of 3 stages')
        dd = {'device': device, 'dtype': dtype}
        act, norm = get_act_layer(act_layer), norm_maker(norm_layer)
        splits: dict[str, Any] = dict(scale=scale, base_width=base_width, cardinality=cardinality)
        block = partial(
            Bottle2neck, first_block=first_block, attn_layer=attn_layer, act_layer=act, norm_layer=norm, **splits, **dd
        )

        inplanes = 64
        self.conv1, self.bn1, self.act1 = conv_norm_act(in_chans, inplanes, 3, norm_layer=norm, act_layer=act, **dd)
        self.feature_info = [dict(num_chs=inplanes, reduction=1, module='act1')]
        reduction, dilation = 1, 1
        stages = []
        for i, (depth, planes, drop_block) in enumerate(zip(layers, channels, drop_blocks(drop_block_rate)[1:])):
            step, first_dilation = 1 if i == 0 else 2, dilation
            stride = step if reduction < output_stride else 1
            reduction, dilation = reduction * stride, dilation * step // stride
            outplanes = planes * Bottle2neck.expansion
            shortcut = nn.Sequential(*conv_norm_act(inplanes, outplanes, 1, stride, norm_layer=norm, **dd))
            later = partial(block, dilation=dilation, drop_block=drop_block)
            first = later(inplanes, planes, stride, shortcut, first_dilation=first_dilation)
            stages.append(Stage(first, *(later(outplanes, planes) for _ in range(depth - 1))))
            inplanes = outplanes
            self.feature_info.append(dict(num_chs=inplanes, reduction=reduction, module=f'layer{i + 1}'))
        self.layer1, self.layer2, self.layer3 = stages
        self.finish(inplanes, global_pool, drop_rate, drop_path_rate, zero_init_last, **dd)

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
