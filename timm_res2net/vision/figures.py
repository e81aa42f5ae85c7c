"""Draws the figures of predictions and accuracy, and saves all figures. Imports matplotlib only when it draws.

Each `plot_` function writes one file atomically. It raises ImportError if matplotlib is missing, OSError if the file
cannot be written, and ValueError for a suffix that matplotlib does not know.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from .._files import atomic_write, require_writable
from .explain import Explanation, center_of_mass

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure


def new_figure(width: float, height: float) -> 'Figure':
    """Makes a matplotlib figure, sized in inches."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ImportError('drawing requires matplotlib: pip install "timm_res2net[plot]"') from error
    return matplotlib.figure.Figure(figsize=(width, height), layout='constrained')


def as_text(name: str) -> str:
    """Escapes dollar signs, between which matplotlib would typeset a formula."""
    return name.replace('$', r'\$')


def save(figure: 'Figure', out: str) -> None:
    """Writes a figure in the format that the file's suffix names, or as PNG without a suffix."""
    atomic_write(out, lambda path: figure.savefig(path, dpi=120, format=Path(out).suffix[1:] or 'png'))


def require_drawable(out: str) -> None:
    """Raises the error that `save` would raise; call it before long work."""
    figure = new_figure(1, 1)
    if (suffix := Path(out).suffix[1:] or 'png').lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f'cannot draw {out!r}: {suffix!r} is not a format of matplotlib. Use .png, .pdf or .svg')
    require_writable(out)


def plot_confusion(confusion: Tensor, names: Sequence[str], title: str, out: str) -> None:
    """Draws a confusion matrix (classes, classes): counts by true class (rows) and predicted class (columns)."""
    count = len(names)
    inches = 3.5 + 0.22 * min(count, 40)
    figure = new_figure(inches + 0.8, inches)
    panel = figure.subplots()
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)  # of each class's images
    image = panel.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, label='share of the class', shrink=0.8)
    if count <= 40:
        labels = [as_text(name if len(name) <= 24 else f'{name[:23]}\N{HORIZONTAL ELLIPSIS}') for name in names]
        panel.set_xticks(range(count), labels, rotation=90)
        panel.set_yticks(range(count), labels)
        for row, column in confusion.nonzero().tolist() if count <= 20 else ():
            color = 'white' if share[row, column] > 0.5 else 'black'
            number = str(int(confusion[row, column]))
            panel.text(column, row, number, ha='center', va='center', color=color, fontsize=8)
    panel.set_xlabel('predicted class')
    panel.set_ylabel('true class')
    panel.set_title(as_text(title))
    save(figure, out)


def plot_pyramid(shown: Tensor, features: Sequence[Tensor], strides: Sequence[int], out: str) -> None:
    """Draws an image (3, H, W) next to its feature maps (C, h, w), as root mean squares over channels."""
    figure = new_figure(2.4 * (len(features) + 1), 3.4)
    panels = figure.subplots(1, len(features) + 1)
    panels[0].imshow(shown.permute(1, 2, 0).numpy(), interpolation='nearest')
    panels[0].set_title(f'image\n{shown.shape[2]} x {shown.shape[1]}')
    for panel, feature, stride in zip(panels[1:], features, strides):
        channels, height, width = feature.shape
        is_tiny = min(height, width) < 4
        energy = feature.square().mean(dim=0).sqrt().numpy()
        panel.imshow(energy, cmap='viridis', interpolation='nearest', alpha=0.25 if is_tiny else 1)
        panel.set_title(f'stride {stride}\n{channels} channels, {width} x {height}')
        if is_tiny:
            panel.set_xlabel('too few pixels\nto locate objects', color='firebrick')
    for panel in panels:
        hide_axes(panel)
    save(figure, out)


def hide_axes(panel: 'Axes') -> None:
    panel.set_xticks([])
    panel.set_yticks([])
    panel.spines[:].set_visible(False)


def plot_explanation(explanation: Explanation, out: str) -> None:
    """Draws an image, its class activation map and probabilities, and below them the receptive field of each split."""
    figure = new_figure(2.6 * max(len(explanation.fields), 3), 6.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])  # an array, although annotated as one figure
    upper, lower = parts
    image, heat, bars = upper.subplots(1, 3)
    image.imshow(explanation.image)
    image.set_title('image')
    hide_axes(image)

    names = [as_text(each.label.split(',')[0]) for each in explanation.predictions]  # the first synonym
    height, width = explanation.image.shape[:2]
    limit = max(np.abs(explanation.activation_map).max(), 1e-6)
    heat.imshow(explanation.image.mean(axis=2), cmap='gray', vmin=0, vmax=1.3)
    overlay = heat.imshow(
        explanation.activation_map,
        cmap='RdBu_r',
        vmin=-limit,
        vmax=limit,
        alpha=0.55,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation='bilinear',
    )
    heat.set_title(f'class activation map: {names[0]}')
    hide_axes(heat)
    upper.colorbar(overlay, ax=heat, shrink=0.8, label='logit')

    bars.barh(range(len(names)), [each.probability for each in explanation.predictions], color='#3b6ea5')
    bars.set_yticks(range(len(names)), names)
    bars.invert_yaxis()
    bars.set_xlim(0, 1)
    bars.set_title('probability')
    bars.spines[['top', 'right']].set_visible(False)
    draw_fields(lower, explanation)
    save(figure, out)


def draw_fields(figure: 'SubFigure', explanation: Explanation) -> None:
    """Draws the receptive fields of all splits around the same pixel and at the same scale."""
    from matplotlib.patches import Circle

    fields, radii = explanation.fields, explanation.radii
    centers = [center_of_mass(field) for field in fields]
    size = fields.shape[-1]
    reach = int(min(size // 2, max(4, 2.5 * max(radii))))
    row, column = (int(np.clip(middle, reach, size - reach - 1)) for middle in np.mean(centers, axis=0))
    panels = np.atleast_1d(figure.subplots(1, len(fields)))
    for i, (panel, field) in enumerate(zip(panels, fields)):
        panel.imshow(np.sqrt(field), cmap='magma')
        panel.set_xlim(column - reach, column + reach)
        panel.set_ylim(row + reach, row - reach)
        y, x = centers[i]
        panel.add_patch(Circle((x, y), radii[i], fill=False, color='white', linewidth=1, linestyle='--'))
        name = 'not convolved' if i == len(fields) - 1 and len(fields) > 1 else f'split {i + 1}'
        panel.set_title(f'{name}\nradius {radii[i]:.1f} pixels')
        hide_axes(panel)
    figure.suptitle(
        f'effective receptive field of each split of {explanation.block}, in a window of {2 * reach} pixels'
    )
