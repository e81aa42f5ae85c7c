"""Folding for inference: batch norms into convolutions, parallel convolutions into one grouped convolution.

`Bottle2neck.fuse` folds one block, `timm_res2net.fuse` a whole model.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from .layers import DeformableConv2d, DilatedAvgPool2d


class Foldable(nn.Module):
    """Mixin for networks with norms that can be folded, after which the network stays in evaluation mode.

    `train()` then has no effect, and raises no error because many programs call it on a model that contains a fused
    one: to use it as a teacher, for instance, or to trace it. Gradients are those of a network with frozen norms.
    """

    def train(self, mode: bool = True) -> Any:
        return super().train(mode and not any(isinstance(module, FoldedNorm) for module in self.modules()))


class FoldedNorm(Foldable, nn.Identity):
    """Replaces a norm that was folded into the convolution before it."""


def fold_norm(conv: nn.Module | None, norm: nn.Module) -> nn.Module:
    """Folds a norm into the convolution before it and returns a `FoldedNorm`, or the norm itself if it cannot."""
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d):
        return norm
    if norm.running_mean is None or norm.running_var is None:
        return norm
    if 'weight' not in dict(conv.named_parameters(recurse=False)):  # pruned or normalized: recomputed at each call
        return norm
    if not isinstance(getattr(norm, 'act', None), nn.Identity | None):  # timm has norms that include an activation
        return norm
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return FoldedNorm().eval()


def fold_norms(module: nn.Module) -> None:
    """Folds norms into convolutions among the children of a module that runs them in order."""
    before = None
    for name, child in list(module.named_children()):
        setattr(module, name, fold_norm(before, child))
        before = child[-1] if isinstance(child, nn.Sequential) and len(child) else child  # such as a deep stem


def merge_convs(modules: Iterable[nn.Module], scale: int, pool: nn.Module, act: nn.Module) -> nn.Conv2d | None:
    """Merges parallel 3x3 convolutions and the pool of the last split into one grouped convolution, or returns None.

    One activation follows the grouped convolution, so the last split passes through it, too. A ReLU does not
    change that split, pooled or not, because the split is the output of a ReLU. Merging is impossible with another
    activation, with deformable convolutions, and with a pool that does not count the padding or has another dilation.
    """
    convs = [cast(nn.Conv2d, module) for module in modules]
    if len(convs) == 1 or any(isinstance(each, DeformableConv2d) for each in convs):
        return None
    conv = convs[0]
    weights: list[Tensor] = [each.weight for each in convs]  # (width, width / cardinality, 3, 3) each
    biases = [cast(Tensor, each.bias) for each in convs]  # of the folded norms
    if len(convs) < scale:
        kernel = kernel_of_pool(pool, conv)
        if kernel is None or not isinstance(act, nn.ReLU | nn.ReLU6):
            return None
        identity = torch.eye(conv.weight.shape[1]).repeat(conv.groups, 1)  # output channel i reads input channel i
        weights.append((identity[:, :, None, None] * kernel).to(conv.weight))
        biases.append(torch.zeros_like(biases[0]))
    grid: Any = dict(stride=conv.stride, padding=conv.padding, dilation=conv.dilation)
    merged = nn.Conv2d(conv.in_channels * scale, conv.out_channels * scale, 3, groups=conv.groups * scale, **grid)
    merged.weight, merged.bias = (nn.Parameter(torch.cat(each).detach()) for each in (weights, biases))
    return merged


def kernel_of_pool(pool: nn.Module, conv: nn.Conv2d) -> Tensor | None:
    """Returns the 3x3 kernel with which `conv` would compute a pool or an identity, or None if there is none."""
    if isinstance(pool, nn.AvgPool2d | DilatedAvgPool2d):
        dilation = pool.dilation if isinstance(pool, DilatedAvgPool2d) else 1
        return torch.full((3, 3), 1 / 9) if pool.count_include_pad and conv.dilation == (dilation, dilation) else None
    return F.pad(torch.ones(1, 1), [1, 1, 1, 1]) if conv.stride == (1, 1) else None
