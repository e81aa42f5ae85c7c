"""Layers that torch lacks: a dilated average pool, a deformable convolution, a convolution as classifier."""

from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

torch.fx.wrap('deform_conv2d')  # tracing cannot follow its shape checks
torch.fx.wrap('classify')

VERSIONS = {  # channels of the offsets, (y, x) for each of nine taps
    'v1': 18,
    'v2': 27,  # with a mask
}


class DilatedAvgPool2d(nn.Module):
    """Average over neighbors that are `dilation` pixels apart, at stride 1.

    A 3 x 3 window is centered; a 2 x 2 window extends to the right and down. Positions beyond the border count as zeros
    if `count_include_pad`; otherwise they do not count.
    """

    def __init__(self, dilation: int, count_include_pad: bool = True, kernel_size: int = 3) -> None:
        super().__init__()
        self.dilation = dilation
        self.count_include_pad = count_include_pad
        self.kernel_size = kernel_size

    def window_sum(self, x: Tensor) -> Tensor:
        """Sums the window of each pixel, first over rows, then over columns; (N, C, H, W) to (N, C, H, W)."""
        d, before = self.dilation, self.dilation * (self.kernel_size - 2)
        x = F.pad(x, [before, d, before, d])
        if self.kernel_size == 2:
            x = x[:, :, :-d] + x[:, :, d:]
            return x[..., :-d] + x[..., d:]
        x = x[:, :, : -2 * d] + x[:, :, d:-d] + x[:, :, 2 * d :]
        return x[..., : -2 * d] + x[..., d:-d] + x[..., 2 * d :]

    def forward(self, x: Tensor) -> Tensor:
        if self.count_include_pad:
            return self.window_sum(x) / (self.kernel_size * self.kernel_size)
        return self.window_sum(x) / self.window_sum(torch.ones_like(x[:1, :1]))


class DeformableConv2d(nn.Conv2d):
    """A 3x3 convolution that moves its taps by offsets (y, x), in pixels, which another convolution computes.

    Uses torchvision's operator and the tensor names of mmcv. Offsets start at zero: version 1 then computes the plain
    convolution, up to rounding. Version 2 also multiplies every tap by a mask, which starts at sigmoid(0), so it
    starts with half of that output, as in mmcv. All groups share the offsets.

    Papers: `Deformable Convolutional Networks` - https://arxiv.org/abs/1703.06211, and, for version 2,
    `Deformable ConvNets v2` - https://arxiv.org/abs/1811.11168
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        version: str = 'v2',
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        dd: dict[str, Any] = dict(device=device, dtype=dtype)
        super().__init__(in_channels, out_channels, 3, stride, dilation, dilation, groups, bias=False, **dd)
        self.has_mask = version == 'v2'
        self.conv_offset = nn.Conv2d(in_channels, VERSIONS[version], 3, stride, dilation, dilation, **dd)
        self.zero_offsets()

    @torch.jit.ignore
    def zero_offsets(self) -> None:
        for parameter in self.conv_offset.parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """Convolves, (N, in_channels, H, W) to (N, out_channels, H / stride, W / stride), sizes rounded up."""
        offset = self.conv_offset(x)  # (N, 18 or 27, H / stride, W / stride)
        mask: Tensor | None = None
        if self.has_mask:
            mask = offset[:, 18:].sigmoid()
            offset = offset[:, :18]
        x = x.contiguous()  # a split is a view, which some of the operator's kernels do not accept
        return deform_conv2d(x, offset, self.weight, self.bias, self.stride, self.padding, self.dilation, mask)


def classify(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Classifies features, (N, C) to (N, classes), or those of each pixel, (N, C, H, W) to (N, classes, H, W)."""
    return F.conv2d(x[:, :, None, None], weight, bias).flatten(1) if x.dim() == 2 else F.conv2d(x, weight, bias)


class ConvClassifier(nn.Conv2d):
    """A 1x1 convolution that classifies pooled features, (N, C) to (N, classes), as DLA weight files require.

    Flat inputs and outputs let `nn.Sequential(*model.children())` run.
    Maps are classified pixel by pixel, as timm's test-time pooling expects of a convolutional classifier.
    """

    def forward(self, x: Tensor) -> Tensor:
        return classify(x, self.weight, self.bias)
