"""Fuses a model for inference: folds all of its batch norms into convolutions."""

from functools import partial

from timm.models import FeatureDictNet, FeatureHookNet, reparameterize_model
from timm.models.resnet import ResNet
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from ..models.block import Bottle2neck
from ..models.dla import DlaRoot
from ..models.fold import NOT_TRAINABLE, fold_norms, require_eval_mode
from ..models.trunk import Trunk

__all__ = ['fuse']

# Modules that run their children in the order of registration.
SEQUENTIAL = nn.Sequential, DlaRoot, Trunk, ResNet, FeatureDictNet, FeatureHookNet, IntermediateLayerGetter


def fuse(model: nn.Module) -> nn.Module:
    """Makes a model for inference that computes the same, up to rounding (1e-5 of the largest output).

    Every batch norm of a network of this package, and of what runs its modules in order, as `nn.Sequential` does, is
    folded into the convolution before it; a module of other code keeps its norms. In blocks without a cascade the
    convolutions that run side by side and the pool beside them become one grouped convolution, where one can compute
    the same: not with an activation other than ReLU, and not for Paddle's pool, which doesn't count the padding.
    `timm.models.reparameterize_model` does the same to the blocks alone.

    The result can't be trained: its `train()` raises an error. It exports, scripts and gives features like the model
    that it was made from.

    Args:
        model: A model of this package, or one that contains some, in evaluation mode. It is not changed.

    Returns:
        A fused copy.

    Raises:
        ValueError: If the model is in training mode, or has no Res2Net block.
    """
    require_eval_mode(model)
    if not any(isinstance(module, Bottle2neck) for module in model.modules()):
        raise ValueError(f'{type(model).__name__} has no Res2Net block; give a model that was made by this package')
    wrapped = reparameterize_model(nn.Sequential(model))  # because timm fuses submodules, but not the model itself
    fused = wrapped.get_submodule('0')
    for module in fused.modules():
        if isinstance(module, SEQUENTIAL):
            fold_norms(module)
    # Before any module's mode is set, which `nn.Module.train` does from the outside in.
    fused.train = partial(refuse_training, fused)  # type: ignore[method-assign]
    return fused


def refuse_training(model: nn.Module, mode: bool = True) -> nn.Module:
    """The `train` of a fused model."""
    if mode:
        raise ValueError(NOT_TRAINABLE)
    return type(model).train(model, False)
