"""What a network looks at: where an image speaks for a class, and how far the splits of a block see."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from ..models.block import Bottle2neck
from ..weights.files import replace_file
from .predict import labels_of, new_figure, preprocessed

__all__ = ['class_activation_map', 'draw', 'radius', 'receptive_field']

Array = NDArray[np.float32]


@torch.no_grad()
def class_activation_map(model: nn.Module, images: Tensor, classes: Sequence[int] | None = None) -> Array:
    """Says what each place of an image adds to a class.

    The classifier of these networks is linear in the mean of the features, so its score is a mean over places too, and
    this is what it is the mean of: `map.mean((1, 2)) + bias` is the score. Paper: `Learning Deep Features for
    Discriminative Localization` - https://arxiv.org/abs/1512.04150

    Args:
        model: A model of this package with a classifier on average pooling, in evaluation mode.
        images: (N, in_chans, H, W), preprocessed.
        classes: For each image an index, the likeliest class if None.

    Returns:
        (N, H / 32, W / 32), sizes rounded up, or less with `output_stride`; in the unit of scores before softmax.

    Raises:
        ValueError: If the classifier is not linear in the mean of the features.
    """
    net: Any = model
    weight = getattr(net.get_classifier() if hasattr(net, 'get_classifier') else None, 'weight', None)
    if weight is None or getattr(net.global_pool, 'pool_type', '') != 'avg':
        raise ValueError(
            f'a class activation map needs a classifier on average pooling; this {type(model).__name__} has none'
        )
    features = net.forward_features(images)  # (N, num_features, H / 32, W / 32)
    if classes is None:
        classes = net.forward_head(features).argmax(dim=1).tolist()
    wanted = weight.flatten(1)[list(classes)]  # (N, num_features)
    return torch.einsum('nchw,nc->nhw', features, wanted).float().cpu().numpy()


def receptive_field(model: nn.Module, block: str, images: Tensor, of_block: bool = False) -> Array:
    """Measures from where each split of a block takes what the unit in the middle of its output is.

    That is the magnitude of the gradient, by the image or by the block's input; where it is not zero is the theoretical
    receptive field, which for split i of a cascade is 2i + 3 pixels of the block's input across, where that has no
    dilation. Paper: `Understanding the Effective Receptive Field in Deep Convolutional Neural Networks` -
    https://arxiv.org/abs/1701.04128

    Args:
        model: A model of this package in evaluation mode.
        block: Name of a block in it, such as 'layer2.1'.
        images: (N, in_chans, H, W); the result is a mean over them. Noise tells most about the network itself.
        of_block: Measure in the block's input instead of in the image.

    Returns:
        (splits, H, W), or (splits, h, w) at the resolution of the block's input; each split sums to 1. The last one is
        that which the block doesn't convolve.

    Raises:
        ValueError: If there is no such block.
    """
    names = blocks_in(model, '')
    if block not in names:
        raise ValueError(f'there is no block {block}; there are {", ".join(names) or "none"}')
    unit: Any = model.get_submodule(block)
    inputs: list[Tensor] = []
    splits: list[Tensor] = []
    hooks = [unit.conv1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))]
    passed = [] if len(unit.bns) == unit.scale else [unit.pool]
    for module in [*unit.bns, *passed]:  # copied before an activation works in place, whose gradient may be zero
        hooks.append(module.register_forward_hook(lambda module, args, output: splits.append(output.clone())))
    try:
        x = images.clone().requires_grad_()
        model(x)
    finally:
        for hook in hooks:
            hook.remove()
    fields = []
    for split in splits:
        centre = split[:, :, split.shape[2] // 2, split.shape[3] // 2].sum()
        (gradient,) = torch.autograd.grad(centre, inputs[0] if of_block else x, retain_graph=True)
        magnitude = gradient.abs().sum(dim=(0, 1))
        fields.append(magnitude / magnitude.sum().clamp(min=1e-30))
    return torch.stack(fields).detach().float().cpu().numpy()


def centre(field: Array) -> tuple[float, float]:
    """Row and column of a field's centre of gravity, in pixels; the middle of one that is zero, as of a dead split."""
    rows, columns = np.mgrid[: field.shape[0], : field.shape[1]]
    if not field.any():
        field = np.ones_like(field)
    return float((rows * field).sum() / field.sum()), float((columns * field).sum() / field.sum())


def radius(field: Array) -> float:
    """The root mean square distance of a field's weight from its centre of gravity, in pixels."""
    rows, columns = np.mgrid[: field.shape[0], : field.shape[1]]
    row, column = centre(field)
    moment = (((rows - row) ** 2 + (columns - column) ** 2) * field).sum()
    return float(np.sqrt(moment / max(field.sum(), 1e-30)))


def blocks_of(model: nn.Module, stage: int) -> list[str]:
    """Names of the blocks in a stage, counted from 1 as in `layer1`; ValueError if there is no such stage."""
    info: Any = model.feature_info
    stages = [each['module'] for each in info if blocks_in(model, each['module'])]
    if not 1 <= stage <= len(stages):
        raise ValueError(f'there is no stage {stage}; there are 1 to {len(stages)}, {", ".join(stages)}')
    return blocks_in(model, stages[stage - 1])


def blocks_in(model: nn.Module, part: str) -> list[str]:
    """Names of the blocks in a part of a model, of all for ''."""
    blocks = [name for name, module in model.named_modules() if isinstance(module, Bottle2neck)]
    return [name for name in blocks if name.startswith(part and f'{part}.')]


def draw(model: nn.Module, image: Image.Image, stage: int, out: str, dense: nn.Module | None = None) -> list[str]:
    """Draws an image, where it speaks for the likeliest class, and how far the splits of a block see.

    Args:
        model: A model of this package with a classifier, in evaluation mode.
        image: RGB.
        stage: From 1. Its second block is shown, if it has one: the first block of a stage has no cascade.
        out: File to write; it appears whole or not at all.
        dense: The same network, dilated (`output_stride=8, dilate_pool=True`): it computes the same on a denser grid,
            so the map has more places.

    Returns:
        What is in the picture, as lines of text.

    Raises:
        ValueError: If matplotlib is missing, or there is no such stage, or the file can't be written.
    """
    x, shown_planes = preprocessed(model, image)
    shown = shown_planes.permute(1, 2, 0).numpy()  # (H, W, 3)
    with torch.no_grad():
        probabilities = model(x[None]).softmax(dim=1)[0]
    best = probabilities.topk(min(3, len(probabilities)))
    labels = labels_of(model)
    (heat,) = class_activation_map(dense or model, x[None], [int(best.indices[0])])

    names = blocks_of(model, stage)
    block = names[min(1, len(names) - 1)]
    size = max(shown.shape[0], 96)
    noise = torch.randn(4, x.shape[0], size, size, generator=torch.Generator().manual_seed(0))
    fields = receptive_field(model, block, noise)
    radii, centres = [radius(field) for field in fields], [centre(field) for field in fields]

    columns = max(len(fields), 3)
    figure = new_figure(2.6 * columns, 6.6)
    from matplotlib.patches import Circle

    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])
    upper, lower = parts
    panels = upper.subplots(1, 3)
    panels[0].imshow(shown)
    panels[0].set_title('the image')
    panels[1].imshow(shown.mean(axis=2), cmap='gray', vmin=0, vmax=1.3)
    limit = max(abs(heat.min()), abs(heat.max()), 1e-6)
    height, width = shown.shape[:2]
    place = dict(extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='bilinear')
    overlay = panels[1].imshow(heat, cmap='RdBu_r', vmin=-limit, vmax=limit, alpha=0.55, **place)
    panels[1].set_title(f'what speaks for {short(labels[int(best.indices[0])])}')
    figure.colorbar(overlay, ax=panels[1], shrink=0.8, label='score')
    values = best.values.tolist()[::-1]
    panels[2].barh(range(len(values)), values, color='#3b6ea5')
    panels[2].set_yticks(range(len(values)), [short(labels[index]) for index in best.indices.tolist()[::-1]])
    panels[2].set_xlim(0, 1)
    panels[2].set_title('probability')
    panels[2].spines[['top', 'right']].set_visible(False)
    for panel in panels[:2]:
        panel.axis('off')

    reach = int(min(size // 2, max(4, 2.5 * max(radii))))
    row, column = (int(np.clip(at, reach, size - reach - 1)) for at in np.mean(centres, axis=0))
    panels = np.atleast_1d(lower.subplots(1, len(fields)))
    for i, (panel, field) in enumerate(zip(panels, fields)):
        panel.imshow(np.sqrt(field), cmap='magma')
        panel.set_xlim(column - reach, column + reach)
        panel.set_ylim(row + reach, row - reach)
        ring = dict(fill=False, color='white', linewidth=1, linestyle='--')
        panel.add_patch(Circle(centres[i][::-1], radii[i], **ring))
        name = 'not convolved' if i == len(fields) - 1 and len(fields) > 1 else f'split {i + 1}'
        panel.set_title(f'{name}\nradius {radii[i]:.1f} pixels')
        panel.set_xticks([])
        panel.set_yticks([])
    lower.suptitle(f'from where the splits of {block} take what they see: {2 * reach} pixels of the image across')
    replace_file(out, lambda path: figure.savefig(path, dpi=120))

    lines = [f'{value:7.2%}  {labels[index]}' for value, index in zip(best.values.tolist(), best.indices.tolist())]
    return [*lines, f'{block}: radius of each split {", ".join(f"{each:.1f}" for each in radii)} pixels of the image']


def short(label: str) -> str:
    """The first of the names that a label has, for a picture."""
    return label.split(',')[0]
