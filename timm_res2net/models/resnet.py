"""ResNet trunk: timm's own, with Res2Net blocks."""

from collections.abc import Sequence
from typing import Any

import timm.models
import torch
from timm.layers import AvgPool2dSame
from timm.models.resnet import ResNet

from ..weights.dialects import require_same_function, translate
from ..weights.readers import read
from .block import Bottle2neck, DilatedAvgPool2d, Layer, Stage, norm_maker, set_grad_checkpointing

__all__ = ['Res2Net']


class Res2Net(ResNet):
    """timm's ResNet with Res2Net blocks.

    It takes the block's arguments by name, refuses what the blocks can't honour, and leaves norm statistics exact under
    gradient checkpointing; all else is timm's.

    Args:
        layers: Blocks of each of the four stages.
        scale: Splits of a block.
        base_width: Channels of one split for 64 planes.
        cardinality: Groups of the 3x3 convolutions.
        first_block: What the first block of a stage computes, see `Bottle2neck`.
        attn_layer: Attention class or its name in timm.
        output_stride: 8, 16 or 32; stages beyond it are dilated.
        dilate_pool: Dilate the average pools, too, where stages are dilated. Weights then compute, on a denser grid,
            what they compute in the undilated network. timm leaves the pools as they are, so with `output_stride=8`
            its features are some percent off; that is the default here, for equality with timm. Attention that pools
            over the whole image is another thing on a denser grid in any case.
        norm_layer: Norm class or its name in timm; also one that knows no device and dtype, as torchvision's.
        **kwargs: Other arguments of timm's `ResNet`.

    Raises:
        ValueError: For an argument that the network can't honour.
        TypeError: For an argument that timm's `ResNet` doesn't know.
    """

    def __init__(
        self,
        layers: Sequence[int] = (3, 4, 6, 3),
        *,
        scale: int = 4,
        base_width: int = 26,
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
            Bottle2neck,
            layers,
            base_width=base_width,
            cardinality=cardinality,
            output_stride=output_stride,
            norm_layer=norm_maker(norm_layer),
            block_args=dict(scale=scale, first_block=first_block, attn_layer=attn_layer, dilate_pool=dilate_pool),
            **kwargs,
        )
        for name in ('layer1', 'layer2', 'layer3', 'layer4'):
            stage: Any = Stage(*getattr(self, name))
            setattr(self, name, stage)
            shortcut = stage[0].downsample
            if (
                dilate_pool and shortcut is not None and isinstance(shortcut[0], AvgPool2dSame)
            ):  # timm's where it dilates
                dilation = stage[0].convs[0].dilation[0]
                shortcut[0] = DilatedAvgPool2d(dilation, count_include_pad=False, kernel_size=2)

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Switches gradient checkpointing of each block; unlike timm's, norm statistics stay exact."""
        set_grad_checkpointing(self, enable)

    @torch.jit.ignore
    def load_pretrained(self, file: str) -> None:
        """Loads the file of published weights that `pretrained_cfg` describes, in whatever format its owner keeps it.

        timm calls this for weights that are marked `custom_load`. It adapts the classifier and the number of image
        channels, as for weights in its own format.

        Args:
            file: See `timm_res2net.load_checkpoint`, which is for files that are not in `pretrained_cfg`.

        Raises:
            CheckpointError: If the file can't be read, or is of a network that computes something else.
        """
        translation = translate(read(file).tree)
        require_same_function(self, translation.first_block, file)
        cfg = {**self.pretrained_cfg, 'state_dict': translation.state, 'custom_load': False}
        timm.models.load_pretrained(self, cfg, num_classes=self.num_classes, in_chans=self.in_chans)
