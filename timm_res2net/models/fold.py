"""Folding for inference: batch norms into convolutions, parallel convolutions into one grouped convolution.

`Bottle2neck.fuse` uses this for one block, `timm_res2net.fuse` for a whole model.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torchvision.ops import FrozenBatchNorm2d

from .pool import DilatedAvgPool2d

if TYPE_CHECKING:  # block.py imports this file
    from .block import Bottle2neck

__all__ = ['fold_block', 'fold_norms', 'require_eval_mode']


def require_eval_mode(module: nn.Module) -> None:
    """Raises a ValueError for a module in training mode, whose norms use batch statistics that can't be folded."""
    if any(submodule.training for submodule in module.modules()):
        raise ValueError(
            f'this {type(module).__name__} is in training mode, where its norms take the statistics of each batch; '
            'fuse it after .eval()'
        )


class FoldedNorm(nn.Identity):
    """Takes the place of a norm that was folded into the convolution before it."""

    def __init__(self) -> None:
        super().__init__()
        self.training = False

    def train(self, mode: bool = True) -> FoldedNorm:
        """Raises a ValueError for training mode: without its norms a network would train differently, and worse."""
        if mode:
            raise ValueError('a fused model has no norms left to train with; train the model that it was made from')
        return super().train(False)


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


def fold_block(block: Bottle2neck) -> Bottle2neck:
    """Copies a block and folds all that can be folded in the copy.

    Raises:
        ValueError: If the block is in training mode.
    """
    require_eval_mode(block)
    block = copy.deepcopy(block)
    fold_norms(block)
    for i, (conv, norm) in enumerate(zip(block.convs, block.bns)):
        block.bns[i] = fold_norm(conv, norm)
    if isinstance(block.downsample, nn.Sequential):
        fold_norms(block.downsample)
    merge_splits(block)
    return block.eval()  # new modules are in training mode


def merge_splits(block: Bottle2neck) -> None:
    """Replaces the convolutions of a block without cascade, and the pool beside them, by one grouped convolution.

    The grouped convolution is followed by one activation, so the last split passes it, too. ReLU doesn't change that
    split, pooled or not, because it is the output of a ReLU. These blocks stay as they are: with a cascade, with
    another activation and a last split that isn't convolved, with norms that were not folded, and with a pool that no
    convolution can compute, because it doesn't count the padding or has another dilation.
    """
    convs = [cast(nn.Conv2d, conv) for conv in block.convs]
    if block.cascade or len(convs) == 1 or not all(isinstance(norm, nn.Identity) for norm in block.bns):
        return
    conv = convs[0]
    no_bias = torch.zeros_like(conv.weight[:, 0, 0, 0])
    weights: list[Tensor] = [each.weight for each in convs]  # (width, width / cardinality, 3, 3) each
    biases: list[Tensor] = [no_bias if each.bias is None else each.bias for each in convs]
    if len(convs) < block.scale:
        kernel = kernel_of_pool(block.pool, conv)
        if kernel is None or not isinstance(block.act1, nn.ReLU | nn.ReLU6):
            return
        identity = torch.eye(conv.weight.shape[1]).repeat(conv.groups, 1)  # output channel i reads input channel i
        weights.append((identity[:, :, None, None] * kernel).to(conv.weight))
        biases.append(no_bias)
    merged = nn.Conv2d(
        conv.in_channels * block.scale,
        conv.out_channels * block.scale,
        3,
        stride=cast(tuple[int, int], conv.stride),
        padding=cast(tuple[int, int], conv.padding),
        dilation=cast(tuple[int, int], conv.dilation),
        groups=conv.groups * block.scale,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    merged.weight, merged.bias = (nn.Parameter(torch.cat(each).detach()) for each in (weights, biases))
    block.convs, block.bns, block.acts = nn.ModuleList([merged]), block.bns[:1], block.acts[:1]
    block.pool, block.scale = nn.Identity(), 1


def kernel_of_pool(pool: nn.Module, conv: nn.Conv2d) -> Tensor | None:
    """The 3x3 kernel with which a convolution on the grid of `conv` computes what a pool does; None if none does."""
    if isinstance(pool, nn.AvgPool2d | DilatedAvgPool2d):
        dilation = pool.dilation if isinstance(pool, DilatedAvgPool2d) else 1
        return torch.full((3, 3), 1 / 9) if pool.count_include_pad and conv.dilation == (dilation, dilation) else None
    return F.pad(torch.ones(1, 1), [1, 1, 1, 1]) if conv.stride == (1, 1) else None
