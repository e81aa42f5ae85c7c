"""Checks of a model before it is used."""

from collections.abc import Mapping

import torch
from timm.layers import DropBlock2d, DropPath
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

DIFFER_IN_TRAINING = _NormBase, _DropoutNd, DropPath, DropBlock2d


def require_eval_mode(model: nn.Module) -> None:
    """Raises ValueError if a model, or a norm or dropout in it, is in training mode; other layers ignore the mode."""
    if model.training or any(each.training and isinstance(each, DIFFER_IN_TRAINING) for each in model.modules()):
        raise ValueError(
            f'{type(model).__name__} is in training mode: its norms would use the statistics of each batch. '
            'Call its .eval() first.'
        )


def is_finite(tensor: Tensor) -> bool:
    """Returns whether a tensor contains neither NaN nor infinity; `isfinite` takes ten times as long."""
    return tensor.numel() == 0 or all(bool(limit.isfinite()) for limit in torch.aminmax(tensor.float()))


def not_finite(state: Mapping[str, Tensor]) -> list[str]:
    """Returns the names of tensors that contain NaN or infinity; a tensor on the meta device contains neither."""
    known = {name: tensor for name, tensor in state.items() if tensor.is_floating_point() and not tensor.is_meta}
    return [name for name, tensor in known.items() if not is_finite(tensor)]


def require_finite_weights(model: nn.Module) -> None:
    """Raises ValueError if any tensor of a model is on the meta device, or contains NaN or infinity."""
    state = model.state_dict()
    if absent := [name for name, tensor in state.items() if tensor.is_meta]:
        raise ValueError(f'{len(absent)} tensors are on the meta device, without values (first: {absent[0]!r})')
    if bad := not_finite(state):
        raise ValueError(f'{len(bad)} tensors contain NaN or infinity (first: {bad[0]!r})')
