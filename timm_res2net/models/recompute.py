"""Gradient checkpointing that leaves norm statistics exact.

Checkpointing runs a part of the network again in the backward pass instead of keeping its activations. timm's version
updates the running statistics of norms in both runs, this one only in the first, so a training step gives the same
model with and without checkpointing.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
import torch.utils.checkpoint
from timm.models import FeatureDictNet, FeatureHookNet, FeatureListNet
from timm.models._features import FeatureGetterNet  # timm has no public name for it
from torch import Tensor, nn

from .fold import Foldable


class BufferCopies:
    """Reusable context in which a module reads and updates copies of its buffers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.originals: list[tuple[nn.Module, str, Tensor]] = []

    def __enter__(self) -> None:
        owners = self.module.modules()
        self.originals = [(owner, *item) for owner in owners for item in owner.named_buffers(recurse=False)]
        for owner, name, buffer in self.originals:
            setattr(owner, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for owner, name, buffer in self.originals:
            setattr(owner, name, buffer)


def recompute(run: Callable[..., Tensor], *args: object, buffers_of: nn.Module) -> Tensor:
    """Runs a function, keeping only its arguments, and runs it again in the backward pass, on copies of the buffers."""
    if torch.jit.is_tracing():  # torch.jit.trace refuses checkpointed parts
        return run(*args)
    # torch.compile accepts no context and, from torch 2.9 on, needs none: it does not repeat updates of buffers.
    if torch.compiler.is_compiling():
        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)
    contexts = nullcontext(), BufferCopies(buffers_of)
    return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False, context_fn=lambda: contexts)


class Stage(nn.Sequential):
    """Blocks in sequence. While `grad_checkpointing` is set, each block is recomputed in the backward pass."""

    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__(*blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = recompute(block, x, buffers_of=block)
            else:
                x = block(x)
        return x


class ExactCheckpointing(Foldable):
    """Mixin for networks with parts that call `recompute`, and for timm's feature extractors around them."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turns gradient checkpointing of the blocks on or off. Unlike in timm, norm statistics stay exact."""
        for module in self.modules():
            is_part = 'grad_checkpointing' in vars(module) and not hasattr(module, 'set_grad_checkpointing')
            if is_part:  # not a feature extractor, in which the flag would turn on timm's version
                vars(module)['grad_checkpointing'] = enable


class FeatureList(ExactCheckpointing, FeatureListNet):
    """timm's `FeatureListNet` with exact checkpointing."""


class FeatureDict(ExactCheckpointing, FeatureDictNet):
    """timm's `FeatureDictNet` with exact checkpointing."""


class FeatureHook(ExactCheckpointing, FeatureHookNet):
    """timm's `FeatureHookNet` with exact checkpointing."""


class FeatureGetter(ExactCheckpointing, FeatureGetterNet):
    """timm's `FeatureGetterNet` with exact checkpointing."""
