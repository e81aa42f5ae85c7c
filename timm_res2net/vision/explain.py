"""Explains predictions: class activation maps and receptive fields."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from .._images import preprocess
from ..models.block import Bottle2neck
from ..models.checks import require_eval_mode
from ..models.classifier import as_classifier
from .predict import Prediction, predict

Array = NDArray[np.float32]


@torch.no_grad()
def class_activation_map(model: nn.Module, images: Tensor, classes: Sequence[int] | Tensor | None = None) -> Array:
    """Computes how much each position of an image contributes to the logit of a class.

    The classifier of these networks is linear in the mean of the features, so a logit is the mean of its map plus the
    bias: `map.mean((1, 2)) + bias`. Paper: `Learning Deep Features for Discriminative Localization` -
    https://arxiv.org/abs/1512.04150

    Args:
        model: A model of this package with average pooling and a classifier, in evaluation mode.
        images: (N, in_chans, H, W), preprocessed.
        classes: A class index for each image; the most likely class if None.

    Returns:
        (N, H / stride, W / stride), rounded up, in units of logits. The stride is that of the last features, mostly 32.

    Raises:
        ValueError: If the model is in training mode, its classifier is not linear in the mean of the features, or there
            is not one class for each image.
        TypeError: If the model is not a classification model.

    Example:
        >>> model = timm.create_model('test_res2net.digits', pretrained=True).eval()
        >>> class_activation_map(model, torch.zeros(1, 3, 64, 64)).shape
        (1, 2, 2)
    """
    require_eval_mode(model)
    net = as_classifier(model)
    weight = getattr(net.get_classifier(), 'weight', None)
    if weight is None or net.global_pool.pool_type != 'avg':
        raise ValueError(f'cannot explain this {type(model).__name__}: it has no classifier after average pooling')
    features = net.forward_features(images)  # (N, num_features, H / stride, W / stride)
    indices = torch.as_tensor(net.forward_head(features).argmax(dim=1) if classes is None else classes).tolist()
    if len(indices) != len(images) or not all(0 <= index < net.num_classes for index in indices):
        expected = f'an index from 0 to {net.num_classes - 1} for each of {len(images)} images'
        raise ValueError(f'classes must have {expected}, got {indices}')
    wanted = weight.flatten(1)[indices]  # (N, num_features)
    return torch.einsum('nchw,nc->nhw', features, wanted).float().cpu().numpy()


@torch.inference_mode(False)
@torch.enable_grad()
def receptive_field(model: nn.Module, block: str, images: Tensor, of_block: bool = False) -> Array:
    """Measures how much each input pixel influences the central unit of each split of a block.

    The influence is the magnitude of the gradient. It is zero outside the theoretical receptive field: in an undilated
    cascade, split i (from 0) sees a window of 2i + 3 pixels of the block's input. Paper: `Understanding the Effective
    Receptive Field in Deep Convolutional Neural Networks` - https://arxiv.org/abs/1701.04128

    Args:
        model: A model of this package in evaluation mode.
        block: Name of a block of the model, such as 'layer2.1'.
        images: (N, in_chans, H, W). The result is averaged over them. Use noise to measure the network, not a photo.
        of_block: Measure the influence of the block's input instead of the image's.

    Returns:
        (splits, H, W), or (splits, h, w) at the resolution of the block's input; each split sums to 1. The last split
        is not convolved, unless it is the only one or the block is a first block of the kind 'group'.

    Raises:
        ValueError: If the model is in training mode, or has no such block.

    Example:
        >>> model = timm.create_model('test_res2net.digits', pretrained=True).eval()
        >>> receptive_field(model, 'layer2.1', torch.randn(4, 3, 96, 96)).shape
        (4, 96, 96)
    """
    require_eval_mode(model)
    names = block_names(model, '')
    if block not in names:
        raise ValueError(f'no block {block!r} in this model. Its blocks: {", ".join(names) or "none"}')
    unit = model.get_submodule(block)
    assert isinstance(unit, Bottle2neck)
    inputs: list[Tensor] = []
    splits: list[Tensor] = []
    hooks = [unit.conv1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))]
    last = [] if len(unit.bns) == unit.scale else [unit.pool]
    for module in [*unit.bns, *last]:  # cloned because activations work in place
        hooks.append(module.register_forward_hook(lambda module, args, output: splits.append(output.clone())))
    try:
        x = images.clone().requires_grad_()
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    fields = []
    for split in splits:
        center = split[:, :, split.shape[2] // 2, split.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(center, inputs[0] if of_block else x, retain_graph=True)
        magnitude = gradient.abs().sum(dim=(0, 1))
        fields.append(magnitude / magnitude.sum().clamp(min=1e-30))
    return torch.stack(fields).detach().float().cpu().numpy()


def center_of_mass(field: Array) -> NDArray[Any]:
    """Returns the row and column of a field's center of mass, in pixels; the middle if the field is all zeros."""
    weights = field if field.any() else np.ones_like(field)
    return (np.indices(field.shape) * weights).sum(axis=(1, 2)) / weights.sum()


def radius(field: Array) -> float:
    """Returns the root mean square distance from a field's center of mass, in pixels."""
    distances = np.indices(field.shape) - center_of_mass(field)[:, None, None]
    return float(np.sqrt((distances**2 * field).sum() / max(field.sum(), 1e-30)))


def stage_block_names(model: nn.Module, stage: int) -> list[str]:
    """Returns the names of the blocks in a stage (the first is 1); ValueError if the stage does not exist."""
    info = as_classifier(model).feature_info
    stages = [each['module'] for each in info if block_names(model, each['module'])]
    if not 1 <= stage <= len(stages):
        raise ValueError(f'no stage {stage} in this model. Choose 1 to {len(stages)}: {", ".join(stages)}')
    return block_names(model, stages[stage - 1])


def block_names(model: nn.Module, part: str) -> list[str]:
    """Returns the names of the blocks inside a module of a model, given its name; '' is the whole model."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Bottle2neck)]
    return [name for name in blocks if name.startswith(part and f'{part}.')]


@dataclass(frozen=True)
class Explanation:
    """An image, its predictions, and where the network looks."""

    image: Array  # (H, W, 3) in 0..1
    predictions: list[Prediction]  # the most likely classes
    activation_map: Array  # (h, w), of the most likely class
    block: str  # name of the measured block
    fields: Array  # (splits, H, W), receptive field of each split of the block
    radii: list[float]  # radius of each field, in image pixels


def explain(
    model: nn.Module, image: Image.Image, stage: int, dense: nn.Module | None = None, multi_label: bool = False
) -> Explanation:
    """Computes the class activation map of an image, and the receptive fields of a block in a stage (from 1).

    `dense` is the same network with dilated stages, which computes the map on a denser grid.
    """
    block = stage_block_names(model, stage)[:2][-1]  # the second if there is one, as the first has no cascade
    (predictions,) = predict(model, [image], read=lambda image: image, topk=3, multi_label=multi_label)
    if isinstance(predictions, ValueError):
        raise predictions
    x, visible = preprocess(model, image)
    x = x.to(next(model.parameters()).device)
    (activation_map,) = class_activation_map(dense or model, x[None], [predictions[0].index])
    size = max(visible.shape[1], 96)
    noise = torch.randn(4, x.shape[0], size, size, generator=torch.Generator().manual_seed(0)).to(x.device)
    fields = receptive_field(model, block, noise)
    radii = [radius(field) for field in fields]
    return Explanation(visible.permute(1, 2, 0).numpy(), predictions, activation_map, block, fields, radii)
