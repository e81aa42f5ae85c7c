"""ResNet trunk: timm's own, with Res2Net blocks."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from timm.layers import AvgPool2dSame
from timm.models.resnet import ResNet
from torch import nn

from .block import Bottle2neck, Layer, norm_factory
from .pool import DilatedAvgPool2d
from .recompute import Stage, set_grad_checkpointing

__all__ = ['Res2Net']


class Res2Net(ResNet):
    """timm's ResNet with Res2Net blocks.

    It takes the block's arguments by name, refuses what the blocks don't support, and leaves norm statistics exact
    under gradient checkpointing. The rest is timm's.

    Args:
        layers: Blocks of each of the four stages.
        scale: Splits of a block.
        base_width: Channels of one split for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: What the first block of a stage computes, a key of `FIRST_BLOCKS`.
        attn_layer: Attention class or its name in timm.
        output_stride: 8, 16 or 32; stages beyond it are dilated.
        dilate_pool: Dilate the average pools, too, where stages are dilated. Weights then compute, on a denser grid,
            what they compute in the undilated network. timm leaves the pools as they are, so with `output_stride=8`
            its features are some percent off; that is the default here, for equality with timm. Attention that pools
            over the whole image differs on a denser grid in any case.
        norm_layer: Norm class or its name in timm; also one that takes no device and dtype, as torchvision's.
        **kwargs: Other arguments of timm's `ResNet`.

    Raises:
        ValueError: For an argument that the network doesn't support.
        TypeError: For an argument that timm's `ResNet` doesn't know.
    """

    densest: ClassVar[dict[str, Any]] = dict(output_stride=8, dilate_pool=True)

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        scale: int = 4,
        base_width: float = 26,
        cardinality: int = 1,
        first_block: str = 'official',
        attn_layer: str | Layer | None = None,
        output_stride: int = 32,
        dilate_pool: bool = False,
        norm_layer: str | Layer = 'batchnorm2d',
        **kwargs: Any,
    ) -> None:
        if output_stride not in (8, 16, 32):
            raise ValueError(f'output_stride={output_stride} is not possible; choose 8, 16 or 32')
        super().__init__(
            Bottle2neck,  # type: ignore[arg-type]  # timm's annotation allows only its own blocks
            tuple(layers),
            base_width=base_width,  # type: ignore[arg-type]  # an int in the annotation; timm multiplies by it
            cardinality=cardinality,
            output_stride=output_stride,
            norm_layer=norm_factory(norm_layer),
            block_args=dict(scale=scale, first_block=first_block, attn_layer=attn_layer, dilate_pool=dilate_pool),
            **kwargs,
        )
        for name in ('layer1', 'layer2', 'layer3', 'layer4'):
            setattr(self, name, Stage(*self.get_submodule(name).children()))
        if dilate_pool:
            dilate_shortcut_pools(self)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches gradient checkpointing of each block; unlike timm's, norm statistics stay exact."""
        set_grad_checkpointing(self, enable)


def dilate_shortcut_pools(model: nn.Module) -> None:
    """Replaces the average pools in the shortcuts of dilated stages, for which timm's ResNet takes `AvgPool2dSame`."""
    for block in model.modules():
        if isinstance(block, Bottle2neck) and isinstance(block.downsample, nn.Sequential):
            pool, conv = block.downsample[0], block.convs[0]
            if isinstance(pool, AvgPool2dSame) and isinstance(conv, nn.Conv2d):
                block.downsample[0] = DilatedAvgPool2d(conv.dilation[0], count_include_pad=False, kernel_size=2)
