"""ResNet trunk with Res2Net blocks, under timm's tensor names."""

from collections.abc import Sequence
from typing import Any, ClassVar

from timm.layers import AvgPool2dSame
from timm.models.resnet import downsample_conv
from torch import Tensor, nn

from .block import Bottle2neck
from .layers import DilatedAvgPool2d
from .spec import NetworkSpec, require_one_of
from .trunk import Grid, Trunk, TrunkOptions, dense_grids, make_stage


def explicit_grids(layers: Sequence[int], spec: NetworkSpec) -> list[Grid]:
    """Returns the grid of each stage of a network that was trained with the strides and dilations of a spec."""
    grids, prior, reduction = [], 1, 4
    for depth, stride, dilation in zip(layers, spec.strides, spec.dilations):
        dilations = dilation if isinstance(dilation, tuple) else (dilation,) * depth
        if len(dilations) != depth:
            raise ValueError(f'dilations has {len(dilations)} entries for a stage of {depth} blocks: {spec.dilations}')
        reduction *= stride
        grids.append(Grid(stride, stride, dilations[0] if spec.dilate_first else prior, dilations, reduction))
        prior = dilations[-1]
    return grids


def make_stem(opts: TrunkOptions, channels: int, stem_type: str, stem_width: int) -> nn.Module:
    """Makes the stem's convolutions, with the norms and activations between them."""
    if not stem_type:
        return nn.Conv2d(opts.in_chans, channels, 7, 2, padding=3, bias=False, **opts.factory)
    first = 3 * (stem_width // 4) if stem_type == 'deep_tiered' else stem_width
    return nn.Sequential(
        *opts.conv(opts.in_chans, first, 3, stride=2, act=True),
        *opts.conv(first, stem_width, 3, act=True),
        nn.Conv2d(stem_width, channels, 3, padding=1, bias=False, **opts.factory),
    )


def make_shortcut(
    opts: TrunkOptions, inplanes: int, outplanes: int, grid: Grid, kernel_size: int, avg_down: bool, dilate_pool: bool
) -> nn.Module:
    if not avg_down:
        options = dict(first_dilation=grid.first_dilation, norm_layer=opts.norm, **opts.factory)
        return downsample_conv(inplanes, outplanes, kernel_size, grid.stride, grid.dilations[0], **options)
    pool: nn.Module = nn.Identity()
    if grid.stride > 1:
        pool = nn.AvgPool2d(grid.stride, grid.stride, ceil_mode=True, count_include_pad=False)
    elif grid.trained_stride > 1 and dilate_pool:
        pool = DilatedAvgPool2d(grid.first_dilation, count_include_pad=False, kernel_size=2)
    elif grid.trained_stride > 1:  # timm's pool, which is not dilated
        pool = AvgPool2dSame(2, 1, ceil_mode=True, count_include_pad=False)
    return nn.Sequential(pool, *opts.conv(inplanes, outplanes, 1))


class Res2Net(Trunk):
    """ResNet with Res2Net blocks: a stem and four stages, at strides 4, 8, 16 and 32.

    Maps images (N, in_chans, H, W) to logits (N, num_classes). Weights, outputs and gradients are those of timm's
    `ResNet` with its `Bottle2neck`, bit for bit.

    Args:
        layers: Blocks of each of the four stages.
        channels: Planes of each stage, a quarter of its output channels.
        stem_type: '' for one 7x7 convolution, 'deep' for three of 3x3, 'deep_tiered' for three of growing width.
        stem_width: Channels of the first convolutions of a deep stem; its last has twice as many. A plain stem has 64
            channels.
        replace_stem_pool: Replace the stem's max-pool with a strided convolution.
        stem_ceil_mode: Round up the output size of the stem's max-pool.
        down_kernel_size: Kernel size of shortcuts that have a stride or dilation.
        avg_down: Move the stride of shortcuts into an average pool before their convolution.
        style: Where stages have their stride: 'pytorch' (3x3 convolutions) or 'caffe' (first 1x1 convolution).
        deformable: Version of each stage's deformable 3x3 convolutions, 'v1' or 'v2', None for plain ones.
        strides: Stride of each stage in training.
        dilations: Dilation of each stage in training, or of each of its blocks (multi-grid).
        dilate_first: Whether the first block has its stage's dilation, as in most code, or that of the previous stage,
            as in timm and torchvision.
        output_stride: 8, 16 or 32; stages beyond it are dilated instead of strided, for weights that were trained with
            the default strides and dilations. As in timm, a dilated stage with as many channels as the one before it
            has no projection, and weights of the undilated network do not fit.
        dilate_pool: Dilate the average pools of dilated stages, too, so that the network computes exactly the undilated
            one, on a denser grid. timm does not: features are a few percent off with `output_stride=8`, and with 16
            where the map at stride 16 has an odd side. Attention over the whole image always differs.
        **options: Arguments of every trunk, see `timm_res2net.models.trunk.TrunkOptions`: `scale`, `base_width`,
            `cardinality`, `first_block`, `attn_layer`, `num_classes`, `in_chans`, `global_pool`, `act_layer`,
            `norm_layer`, `drop_path_rate` and others.

    Raises:
        ValueError: If the network does not support a value.
        TypeError: If an argument is unknown.

    Example:
        >>> model = timm.create_model('res2net50d', num_classes=10).eval()
        >>> model(torch.randn(1, 3, 224, 224)).shape
        torch.Size([1, 10])
        >>> [tuple(x.shape[1:]) for x in model.forward_intermediates(torch.randn(1, 3, 64, 64))[1]]
        [(64, 32, 32), (256, 16, 16), (512, 8, 8), (1024, 4, 4), (2048, 2, 2)]
    """

    parts = ('conv1', 'bn1', 'act1', 'maxpool', 'layer1', 'layer2', 'layer3', 'layer4')
    densest: ClassVar[dict[str, Any]] = dict(output_stride=8, dilate_pool=True)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        channels: Sequence[int] = (64, 128, 256, 512),
        stem_type: str = '',
        stem_width: int = 64,
        replace_stem_pool: bool = False,
        stem_ceil_mode: bool = False,
        down_kernel_size: int = 1,
        avg_down: bool = False,
        style: str = 'pytorch',
        deformable: Sequence[str | None] = NetworkSpec.deformable,
        strides: Sequence[int] = NetworkSpec.strides,
        dilations: Sequence[int | Sequence[int]] = NetworkSpec.dilations,
        dilate_first: bool = True,
        output_stride: int = 32,
        dilate_pool: bool = False,
        **options: Any,
    ) -> None:
        opts = TrunkOptions(**options)
        super().__init__()
        geometry: dict[str, Any] = dict(
            style=style,
            strides=strides,
            dilations=dilations,
            dilate_first=dilate_first,
            deformable=deformable,
            stem_ceil_mode=stem_ceil_mode,
        )
        spec = NetworkSpec(**geometry)
        default_grid = spec.strides == NetworkSpec.strides and spec.dilations == NetworkSpec.dilations
        require_one_of('output_stride', output_stride, (8, 16, 32))
        require_one_of('stem_type', stem_type, ('', 'deep', 'deep_tiered'))
        if len(layers) != 4 or len(channels) != 4 or min(layers) < 1:
            raise ValueError(f'layers={layers} and channels={channels} must have a positive entry for each of 4 stages')
        if stem_ceil_mode and replace_stem_pool:
            raise ValueError('stem_ceil_mode=True has no effect: replace_stem_pool=True removes the max-pool')
        if not default_grid and (output_stride != 32 or dilate_pool or down_kernel_size != 1):
            raise ValueError(
                'strides and dilations set the whole geometry: do not pass output_stride, dilate_pool or '
                'down_kernel_size with them'
            )

        inplanes = stem_width * 2 if stem_type else 64
        self.conv1 = make_stem(opts, inplanes, stem_type, stem_width)
        self.bn1 = opts.norm(inplanes, **opts.factory)
        self.act1 = opts.act(inplace=True)
        self.maxpool: nn.Module = nn.MaxPool2d(3, 2, padding=1, ceil_mode=stem_ceil_mode)
        if replace_stem_pool:
            self.maxpool = nn.Sequential(*opts.conv(inplanes, inplanes, 3, stride=2, act=True))
        self.feature_info = [dict(num_chs=inplanes, reduction=2, module='act1')]

        stages = []
        grids = dense_grids(layers, spec.strides, output_stride, 4) if default_grid else explicit_grids(layers, spec)
        for i, (grid, planes) in enumerate(zip(grids, channels)):
            outplanes = planes * Bottle2neck.expansion
            shortcut = None
            if grid.stride > 1 or inplanes != outplanes or not default_grid:
                shortcut = make_shortcut(opts, inplanes, outplanes, grid, down_kernel_size, avg_down, dilate_pool)
            if style == 'caffe' and default_grid:  # its 3x3 convolutions follow the stride that dilation replaces
                grid = grid._replace(first_dilation=grid.dilations[0])
            block = opts.block(style=style, deformable=spec.deformable[i], dilate_pool=dilate_pool)
            stages.append(make_stage(block, inplanes, planes, grid, shortcut))
            inplanes = outplanes
            self.feature_info.append(dict(num_chs=outplanes, reduction=grid.reduction, module=f'layer{i + 1}'))
        self.layer1, self.layer2, self.layer3, self.layer4 = stages
        self.finish(inplanes, opts, **geometry)

    def forward_features(self, x: Tensor) -> Tensor:
        """Computes features, (N, in_chans, H, W) to (N, num_features, H / 32, W / 32)."""
        x = self.act1(self.bn1(self.conv1(x)))  # (N, 64, H / 2, W / 2) with default channels
        x = self.maxpool(x)  # (N, 64, H / 4, W / 4)
        x = self.layer1(x)  # (N, 256, H / 4, W / 4)
        x = self.layer2(x)  # (N, 512, H / 8, W / 8)
        x = self.layer3(x)  # (N, 1024, H / 16, W / 16)
        return self.layer4(x)  # (N, 2048, H / 32, W / 32)
