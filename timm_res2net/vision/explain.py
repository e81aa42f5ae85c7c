"""What a network looks at: class activation maps and receptive fields."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..deploy.images import preprocess
from ..models.block import Bottle2neck
from ..models.classifier import as_classifier, class_names
from ..models.fold import require_eval_mode
from .predict import Prediction

__all__ = ['Explanation', 'class_activation_map', 'explain', 'radius', 'receptive_field']

Array = NDArray[np.float32]


@torch.no_grad()
def class_activation_map(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Array:
    """Computes how much each position of an image adds to the score of a class.

    The classifier of these networks is linear in the mean of the features, so its score is the mean of this map:
    `map.mean((1, 2)) + bias`. Paper: `Learning Deep Features for
    Discriminative Localization` - https://arxiv.org/abs/1512.04150

    Args:
        model: A model of this package with a classifier on average pooling, in evaluation mode.
        images: (N, in_chans, H, W), preprocessed.
        classes: For each image an index, the likeliest class if None.

    Returns:
        (N, H / 32, W / 32), sizes rounded up, or less with `output_stride`; in the unit of scores before softmax.

    Raises:
        ValueError: If the model is in training mode, or the classifier not linear in the mean of the features.
    """
    require_eval_mode(model)
    get_classifier = getattr(model, 'get_classifier', None)
    weight = getattr(get_classifier() if get_classifier else None, 'weight', None)
    pool_type = getattr(getattr(model, 'global_pool', None), 'pool_type', '')
    if not isinstance(weight, Tensor) or pool_type != 'avg':
        raise ValueError(
            f'a class activation map needs a classifier on average pooling; this {type(model).__name__} has none'
        )
    net = as_classifier(model)
    features = net.forward_features(images)  # (N, num_features, H / 32, W / 32)
    if classes is None:
        classes = net.forward_head(features).argmax(dim=1).tolist()
    wanted = weight.flatten(1)[list(classes)]  # (N, num_features)
    return torch.einsum('nchw,nc->nhw', features, wanted).float().cpu().numpy()


def receptive_field(model: nn.Module, block: str, images: Tensor, of_block: bool = False) -> Array:
    """Measures how much each input pixel influences the central unit of each split of a block.

    The influence is the magnitude of the gradient with respect to the image or to the block's input. It is not zero
    within the theoretical receptive field, which for split i of an undilated cascade is 2i + 3 pixels of the block's
    input across. Paper: `Understanding the Effective Receptive Field in Deep Convolutional Neural Networks` -
    https://arxiv.org/abs/1701.04128

    Args:
        model: A model of this package in evaluation mode.
        block: Name of a block in it, such as 'layer2.1'.
        images: (N, in_chans, H, W); the result is a mean over them. Noise shows the network itself best.
        of_block: Measure in the block's input instead of in the image.

    Returns:
        (splits, H, W), or (splits, h, w) at the resolution of the block's input; each split sums to 1. The last split
        is the one that the block doesn't convolve, but for first blocks of `'group'`, which convolve all.

    Raises:
        ValueError: If the model is in training mode, or there is no such block.
    """
    require_eval_mode(model)
    names = blocks_in(model, '')
    if block not in names:
        raise ValueError(f'there is no block {block}; there are {", ".join(names) or "none"}')
    unit = model.get_submodule(block)
    assert isinstance(unit, Bottle2neck)
    inputs: list[Tensor] = []
    splits: list[Tensor] = []
    hooks = [unit.conv1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))]
    last = [] if len(unit.bns) == unit.scale else [unit.pool]
    for module in [*unit.bns, *last]:  # copied before an activation, which works in place and may have no gradient
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


def center_of_mass(field: Array) -> tuple[float, float]:
    """Row and column of a field's center of mass, in pixels; the middle for a field of zeros, as of a dead split."""
    rows, columns = np.mgrid[: field.shape[0], : field.shape[1]]
    if not field.any():
        field = np.ones_like(field)
    return float((rows * field).sum() / field.sum()), float((columns * field).sum() / field.sum())


def radius(field: Array) -> float:
    """The root mean square distance of a field's weight from its center of mass, in pixels."""
    rows, columns = np.mgrid[: field.shape[0], : field.shape[1]]
    row, column = center_of_mass(field)
    moment = (((rows - row) ** 2 + (columns - column) ** 2) * field).sum()
    return float(np.sqrt(moment / max(field.sum(), 1e-30)))


def blocks_of(model: nn.Module, stage: int) -> list[str]:
    """Names of the blocks in a stage, counted from 1 as in `layer1`; ValueError if there is no such stage."""
    info = as_classifier(model).feature_info
    stages = [each['module'] for each in info if blocks_in(model, each['module'])]
    if not 1 <= stage <= len(stages):
        raise ValueError(f'there is no stage {stage}; there are 1 to {len(stages)}, {", ".join(stages)}')
    return blocks_in(model, stages[stage - 1])


def blocks_in(model: nn.Module, part: str) -> list[str]:
    """Names of the blocks in a part of a model, of all for ''."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Bottle2neck)]
    return [name for name in blocks if name.startswith(part and f'{part}.')]


@dataclass(frozen=True)
class Explanation:
    """What `explain` computed, to be drawn."""

    image: Array  # (H, W, 3) in 0..1
    predictions: list[Prediction]  # the likeliest classes
    activation_map: Array  # (h, w), of the likeliest class
    block: str  # name of the block below
    fields: Array  # (splits, H, W), receptive field of each of its splits in the image

    @property
    def radii(self) -> list[float]:
        """The radius of each receptive field, in pixels of the image."""
        return [radius(field) for field in self.fields]


def explain(model: nn.Module, image: Image.Image, stage: int, dense: nn.Module | None = None) -> Explanation:
    """Computes a class activation map of an image, and how far the splits of a block see.

    Args:
        model: A model of this package with a classifier, in evaluation mode.
        image: RGB.
        stage: From 1. Its second block is measured, if it has one: the first block of a stage has no cascade.
        dense: The same network, dilated (`output_stride=8, dilate_pool=True`): it computes the same on a denser grid,
            so the map has more positions.

    Raises:
        ValueError: If there is no such stage.
    """
    names = blocks_of(model, stage)
    block = names[min(1, len(names) - 1)]
    x, visible = preprocess(model, image)
    x = x.to(next(model.parameters()).device)
    with torch.no_grad():
        probabilities = model(x[None]).softmax(dim=1)[0]
    best = probabilities.topk(min(3, len(probabilities)))
    labels = class_names(model)
    predictions = [
        Prediction(index, labels[index], value) for value, index in zip(best.values.tolist(), best.indices.tolist())
    ]
    (activation_map,) = class_activation_map(dense or model, x[None], [predictions[0].index])
    size = max(visible.shape[1], 96)
    noise = torch.randn(4, x.shape[0], size, size, generator=torch.Generator().manual_seed(0)).to(x.device)
    fields = receptive_field(model, block, noise)
    return Explanation(visible.permute(1, 2, 0).numpy(), predictions, activation_map, block, fields)
