"""Deformable 3x3 convolutions, on torchvision's operator, with the tensor names of mmcv's packs.

Papers: `Deformable Convolutional Networks` - https://arxiv.org/abs/1703.06211, and, for version 2 with a mask,
`Deformable ConvNets v2` - https://arxiv.org/abs/1811.11168
"""

from typing import Any

import torch
import torch.fx
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

__all__ = ['VERSIONS', 'DeformableConv2d']

torch.fx.wrap('deform_conv2d')  # tracing can't follow its checks of shapes

VERSIONS = {  # channels that the offsets of nine taps take
    'v1': 18,
    'v2': 27,  # with a mask
}


class DeformableConv2d(nn.Conv2d):
    """A 3x3 convolution whose taps are moved by offsets, (y, x) in pixels, that another convolution computes.

    At first all offsets are zero. Version 1 then computes what a plain convolution does, up to rounding. Version 2 also
    multiplies every tap by a mask, sigmoid of zero at first: it begins with half of what a plain one computes, as in
    mmcv.

    Args:
        in_channels: Input channels.
        out_channels: Output channels.
        stride: Stride.
        dilation: Dilation, and padding.
        groups: Groups of the convolution. All of them share the offsets.
        version: 'v1', or 'v2' with a mask.
        bias: Add a bias.
        device: Device of the tensors.
        dtype: Data type of the tensors.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        version: str = 'v2',
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias, **dd)
        self.has_mask = version == 'v2'
        self.conv_offset = nn.Conv2d(in_channels, VERSIONS[version], 3, stride, dilation, dilation, **dd)
        self.zero_offsets()

    @classmethod
    def like(cls, conv: nn.Conv2d, version: str) -> 'DeformableConv2d':
        """Makes a deformable convolution of a plain one, with its weights."""
        dd: dict[str, Any] = dict(device=conv.weight.device, dtype=conv.weight.dtype)
        deformable = cls(
            conv.in_channels,
            conv.out_channels,
            conv.stride[0],
            conv.dilation[0],
            conv.groups,
            version,
            conv.bias is not None,
            **dd,
        )
        deformable.weight, deformable.bias = conv.weight, conv.bias
        return deformable

    @torch.jit.ignore
    def zero_offsets(self) -> None:
        """Sets what computes the offsets to zero."""
        nn.init.zeros_(self.conv_offset.weight)
        if self.conv_offset.bias is not None:
            nn.init.zeros_(self.conv_offset.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves, (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), sizes rounded up."""
        offset = self.conv_offset(x)  # (N, 18 or 27, H / stride, W / stride)
        mask: Tensor | None = None
        if self.has_mask:
            mask = offset[:, 18:].sigmoid()
            offset = offset[:, :18]
        x = x.contiguous()  # a split is a view, which the operator doesn't take on all devices
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)
