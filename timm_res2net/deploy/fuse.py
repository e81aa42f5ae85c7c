"""Fuses a model for inference: folds all of its batch norms into convolutions."""

import copy
from functools import partial

from timm.models import FeatureDictNet, FeatureHookNet, reparameterize_model
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from ..models.block import Bottle2neck
from ..models.checks import require_eval_mode
from ..models.dla import DlaRoot
from ..models.fold import fold_norms
from ..models.trunk import Trunk

# Modules that run their children in the order of registration.
SEQUENTIAL = nn.Sequential, DlaRoot, Trunk, FeatureDictNet, FeatureHookNet, IntermediateLayerGetter


def fuse(model: nn.Module) -> nn.Module:
    """Returns a copy of a model for inference that computes the same, up to rounding (1e-5 of the largest output).

    Folds every batch norm of this package's networks into the convolution before it, and also those of modules that
    run their children in order, such as `nn.Sequential`; other modules keep their norms. In blocks without a cascade,
    the parallel convolutions and the pool become one grouped convolution where that is exact: a pooled or unchanged
    split requires ReLU, and a pool must count the padding, unlike Paddle's. `timm.models.reparameterize_model` does the
    same, but to blocks only.

    Fuse a model before you cast it to half precision: folding in half precision is about 1 % off.

    The copy can be exported, scripted and asked for features like the original. It stays in evaluation mode: `train()`
    has no effect on it, even inside another model, and gradients pass through it as through frozen norms.

    Args:
        model: A model of this package, or a module that contains one, in evaluation mode. It is not changed.

    Returns:
        The fused copy.

    Raises:
        ValueError: If the model is in training mode, or has no Res2Net block.

    Example:
        >>> model = timm.create_model('res2net50d').eval()
        >>> fused = timm_res2net.fuse(model)
        >>> x = torch.randn(1, 3, 64, 64)
        >>> torch.testing.assert_close(fused(x), model(x), rtol=1e-4, atol=1e-4)
    """
    require_eval_mode(model)
    if not any(isinstance(module, Bottle2neck) for module in model.modules()):
        raise ValueError(f'cannot fuse a {type(model).__name__}: it has no Res2Net block. Pass a Res2Net.')
    wrapped = reparameterize_model(nn.Sequential(model))  # timm fuses submodules, but not the model itself
    fused = wrapped.get_submodule('0')
    for module in fused.modules():
        if isinstance(module, SEQUENTIAL):
            fold_norms(module)
    fused.train = partial(stay_in_eval_mode, fused)  # type: ignore[method-assign]
    return fused


def fuse_in_float32(model: nn.Module) -> nn.Module:
    """Fuses a float32 copy of a model, because folding norms in half precision would lose accuracy."""
    return fuse(copy.deepcopy(model).float())


def stay_in_eval_mode(model: nn.Module, mode: bool = True) -> nn.Module:
    """Replaces `train` of a fused model, as modules of other packages in it would otherwise change their mode."""
    return type(model).train(model, False)
