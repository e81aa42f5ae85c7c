"""Folding for inference: batch norms into convolutions, parallel convolutions into one grouped convolution.

`Bottle2neck.fuse` uses this for one block, `timm_res2net.fuse` for a whole model.
"""

from collections.abc import Iterable
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from .pool import DilatedAvgPool2d

__all__ = ['NOT_TRAINABLE', 'Foldable', 'FoldedNorm', 'fold_norm', 'fold_norms', 'merge_convs', 'require_eval_mode']

NOT_TRAINABLE = 'a fused model has no norms left to train with; train the model that it was made from'

FoldableT = TypeVar('FoldableT', bound='Foldable')


def require_eval_mode(module: nn.Module) -> None:
    """Raises a ValueError for a module in training mode, whose norms take, and keep, statistics of each batch."""
    if any(submodule.training for submodule in module.modules()):
        raise ValueError(
            f'this {type(module).__name__} is in training mode, where its norms take the statistics of each batch; '
            'call its .eval() first'
        )


class Foldable(nn.Module):
    """Mixin of networks whose norms can be folded. Then they refuse training mode, before any module's mode is set."""

    def train(self: FoldableT, mode: bool = True) -> FoldableT:
        """Raises a ValueError for training mode: without its norms a network would train differently, and worse."""
        if mode and any(isinstance(module, FoldedNorm) for module in self.modules()):
            raise ValueError(NOT_TRAINABLE)
        return super().train(mode)


class FoldedNorm(Foldable, nn.Identity):
    """Takes the place of a norm that was folded into the convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False


def fold_norm(conv: nn.Module | None, norm: nn.Module) -> nn.Module:
    """Folds a norm into the convolution that runs before it, if both are of a kind that can be folded.

    Returns:
        The module for the norm's place: a `FoldedNorm`, or the norm itself if it was not folded.
    """
    if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d | nn.SyncBatchNorm | FrozenBatchNorm2d):
        return norm
    if norm.running_mean is None or norm.running_var is None:
        return norm
    if not isinstance(getattr(norm, 'act', None), nn.Identity | None):  # timm has norms that include an activation
        return norm
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
    )
    return FoldedNorm()


def fold_norms(module: nn.Module) -> None:
    """Folds norms into convolutions among the children of a module that runs them in order."""
    before = None
    for name, child in list(module.named_children()):
        setattr(module, name, fold_norm(before, child))
        before = child[-1] if isinstance(child, nn.Sequential) and len(child) else child  # as in a deep stem


def merge_convs(modules: Iterable[nn.Module], scale: int, pool: nn.Module, act: nn.Module) -> nn.Conv2d | None:
    """Makes one grouped convolution of parallel 3x3 convolutions and, if it isn't convolved, of the last split.

    The grouped convolution is followed by one activation, so the last split passes it, too. ReLU doesn't change that
    split, pooled or not, because it is the output of a ReLU.

    Args:
        modules: The convolutions of the first splits, with their norms folded.
        scale: Number of splits, one more than convolutions if the last one isn't convolved.
        pool: What happens to the last split then.
        act: The activation before and after.

    Returns:
        The convolution; None if none computes the same, because of another activation, or a pool that doesn't count the
        padding or has another dilation.
    """
    convs = [cast(nn.Conv2d, module) for module in modules]
    conv = convs[0]
    no_bias = torch.zeros_like(conv.weight[:, 0, 0, 0])
    weights: list[Tensor] = [each.weight for each in convs]  # (width, width / cardinality, 3, 3) each
    biases: list[Tensor] = [no_bias if each.bias is None else each.bias for each in convs]
    if len(convs) < scale:
        kernel = kernel_of_pool(pool, conv)
        if kernel is None or not isinstance(act, nn.ReLU | nn.ReLU6):
            return None
        identity = torch.eye(conv.weight.shape[1]).repeat(conv.groups, 1)  # output channel i reads input channel i
        weights.append((identity[:, :, None, None] * kernel).to(conv.weight))
        biases.append(no_bias)
    merged = nn.Conv2d(
        conv.in_channels * scale,
        conv.out_channels * scale,
        3,
        stride=cast(tuple[int, int], conv.stride),
        padding=cast(tuple[int, int], conv.padding),
        dilation=cast(tuple[int, int], conv.dilation),
        groups=conv.groups * scale,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    merged.weight, merged.bias = (nn.Parameter(torch.cat(each).detach()) for each in (weights, biases))
    return merged


def kernel_of_pool(pool: nn.Module, conv: nn.Conv2d) -> Tensor | None:
    """The 3x3 kernel with which a convolution on the grid of `conv` computes what a pool does; None if none does."""
    if isinstance(pool, nn.AvgPool2d | DilatedAvgPool2d):
        dilation = pool.dilation if isinstance(pool, DilatedAvgPool2d) else 1
        return torch.full((3, 3), 1 / 9) if pool.count_include_pad and conv.dilation == (dilation, dilation) else None
    return F.pad(torch.ones(1, 1), [1, 1, 1, 1]) if conv.stride == (1, 1) else None
