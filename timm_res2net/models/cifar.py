"""The 29-layer trunk for the 32 x 32 pixel images of CIFAR."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor, nn

from .block import Bottle2neck
from .spec import require_one_of
from .trunk import Trunk, TrunkOptions, dense_grids, make_stage


class Res2NetCifar(Trunk):
    """ResNeXt-29 with Res2Net blocks, for images of 32 x 32 pixels: a 3x3 stem without pooling and three stages.

    Maps images (N, in_chans, H, W) to logits (N, num_classes). The literature allows two definitions. With
    `first_block='group'`, each stage begins with a grouped convolution, as the authors describe their code for CIFAR.
    Convolutions and classifier then have 24,302,116 parameters (6c 24w 4s), 33,829,172 (8c 25w 4s) and 36,718,372 (6c
    24w 6s), which are the 24.3, 33.8 and 36.7 M of the paper's table 4. With the published block,
    `first_block='official'`, the networks have 23,705,732, 32,957,436 and 36,146,180 parameters, norms included; these
    sizes are not in the paper.

    The paper's sizes with SE (26.0, 34.0 and 36.9 M) cannot be reproduced: they exceed those without SE by 1.7, 0.2 and
    0.2 M, but attention with the default reduction by 16 adds 521,808 parameters to each.

    Args:
        layers: Blocks of each stage.
        channels: Planes of each stage, a quarter of its output channels.
        base_width: Channels of one split and group for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: How the first block of a stage computes its splits, a key of `FIRST_BLOCKS`.
        num_classes: Number of classes, 0 for features instead of logits.
        output_stride: 1, 2 or 4; stages beyond it are dilated.
        **options: Arguments of every trunk, see `timm_res2net.models.trunk.TrunkOptions`.

    Raises:
        ValueError: If the network does not support a value.
        TypeError: If an argument is unknown.

    Example:
        >>> model = timm.create_model('res2next29_6c_24w_4s').eval()
        >>> model(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 100])
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
        super().__init__()
        require_one_of('output_stride', output_stride, (1, 2, 4))
        if len(layers) != 3 or len(channels) != 3 or min(layers) < 1:
            raise ValueError(f'layers={layers} and channels={channels} must have a positive entry for each of 3 stages')

        inplanes = 64
        self.conv1, self.bn1, self.act1 = opts.conv(opts.in_chans, inplanes, 3, act=True)
        self.feature_info = [dict(num_chs=inplanes, reduction=1, module='act1')]
        stages = []
        grids = dense_grids(layers, (1, 2, 2), output_stride, reduction=1)
        for i, (grid, planes) in enumerate(zip(grids, channels)):
            outplanes = planes * Bottle2neck.expansion
            shortcut = nn.Sequential(*opts.conv(inplanes, outplanes, 1, grid.stride))
            stages.append(make_stage(opts.block(dilate_pool=True), inplanes, planes, grid, shortcut))
            inplanes = outplanes
            self.feature_info.append(dict(num_chs=inplanes, reduction=grid.reduction, module=f'layer{i + 1}'))
        self.layer1, self.layer2, self.layer3 = stages
        self.finish(inplanes, opts)

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features, (N, in_chans, H, W) to (N, num_features, H / 4, W / 4)."""
        x = self.act1(self.bn1(self.conv1(x)))  # (N, 64, H, W)
        x = self.layer1(x)  # (N, 256, H, W) with default channels
        x = self.layer2(x)  # (N, 512, H / 2, W / 2)
        return self.layer3(x)  # (N, 1024, H / 4, W / 4)
