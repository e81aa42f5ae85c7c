"""Average pooling with dilation, which torch's own pool doesn't have."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ['DilatedAvgPool2d']


class DilatedAvgPool2d(nn.Module):
    """Average over neighbours that are `dilation` pixels apart, at stride 1.

    Args:
        dilation: Distance between neighbours, in pixels.
        count_include_pad: Count positions beyond the border, as zeros.
        kernel_size: 3 for a pixel and those around it, 2 for a pixel and those to its right and below.
    """

    def __init__(self, dilation: int, count_include_pad: bool = True, kernel_size: int = 3) -> None:
        super().__init__()
        self.dilation = dilation
        self.count_include_pad = count_include_pad
        self.kernel_size = kernel_size

    def window_sum(self, x: Tensor) -> Tensor:
        """Sums each pixel's window, (N, C, H, W) to (N, C, H, W): rows first, then columns."""
        d, before = self.dilation, self.dilation * (self.kernel_size - 2)
        x = F.pad(x, [before, d, before, d])
        if self.kernel_size == 2:
            x = x[:, :, :-d] + x[:, :, d:]
            return x[..., :-d] + x[..., d:]
        x = x[:, :, : -2 * d] + x[:, :, d:-d] + x[:, :, 2 * d :]
        return x[..., : -2 * d] + x[..., d:-d] + x[..., 2 * d :]

    def forward(self, x: Tensor) -> Tensor:
        """Averages each pixel's window, (N, C, H, W) to (N, C, H, W)."""
        if self.count_include_pad:
            return self.window_sum(x) / (self.kernel_size * self.kernel_size)
        return self.window_sum(x) / self.window_sum(torch.ones_like(x[:1, :1]))

    def extra_repr(self) -> str:
        return f'dilation={self.dilation}, count_include_pad={self.count_include_pad}, kernel_size={self.kernel_size}'
