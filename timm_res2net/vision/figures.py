"""All pictures of the package; the one place that needs matplotlib."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from ..deploy.bench import Result
from ..models.variants import ARCHS, WEIGHTS
from ..weights.files import atomic_write, require_writable
from .explain import Explanation, center_of_mass

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = [
    'new_figure',
    'plot_bench',
    'plot_catalogue',
    'plot_confusion',
    'plot_explanation',
    'plot_growth',
    'plot_pyramid',
    'require_drawable',
    'save',
]

GROWTH = {
    'scale': 'splits, equally wide',
    'batch': 'images in a batch',
    'size': 'image height and width, pixels',
}


def new_figure(width: float, height: float) -> 'Figure':
    """Makes matplotlib's figure of a size in inches; ImportError if matplotlib is missing."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError as error:
        raise ImportError('a picture needs matplotlib: pip install "timm_res2net[plot]"') from error
    return matplotlib.figure.Figure(figsize=(width, height), layout='constrained')


def save(figure: 'Figure', out: str) -> None:
    """Writes a figure to a file, atomically, in the format of its suffix, as PNG without one.

    Raises:
        OSError: If the file can't be written.
        ValueError: If matplotlib doesn't know its suffix.
    """
    atomic_write(out, lambda path: figure.savefig(path, dpi=120, format=Path(out).suffix[1:] or 'png'))


def require_drawable(out: str) -> None:
    """Raises the error that `save` would, before the work whose picture it is to be."""
    figure = new_figure(1, 1)
    if (suffix := Path(out).suffix[1:] or 'png').lower() not in figure.canvas.get_supported_filetypes():
        raise ValueError(f'{out} can not be drawn: {suffix} is no format of pictures; name it .png, .pdf or .svg')
    require_writable(out)


def plot_catalogue(weights: Sequence[Mapping[str, Any]], out: str) -> None:
    """Draws accuracy over cost.

    Args:
        weights: Of each set its `name` with a tag, `gmacs`, `params`, and `top1` in %.
        out: File to write.

    Raises:
        ValueError: If there is none.
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    if not weights:
        raise ValueError('there are no weights to draw; choose others by the pattern')
    figure = new_figure(10, 6.5)
    panel = figure.subplots()
    tags = {each['name'].partition('.')[2]: None for each in weights}  # in order
    for tag in tags:
        those = [each for each in weights if each['name'].partition('.')[2] == tag]
        sizes = [each['params'] / 4e5 for each in those]
        panel.scatter([each['gmacs'] for each in those], [each['top1'] for each in those], sizes, alpha=0.6, label=tag)
    # Names of neighbours are on different sides.
    for i, each in enumerate(sorted(weights, key=lambda each: (round(each['gmacs']), each['top1']))):
        side: dict[str, Any] = dict(xytext=(7, -2), ha='left') if i % 2 else dict(xytext=(-7, -2), ha='right')
        at = each['gmacs'], each['top1']
        panel.annotate(each['name'].partition('.')[0], at, textcoords='offset points', fontsize=7, **side)
    panel.set_xscale('log')
    panel.set_xticks([3, 4, 6, 8, 12, 16], ['3', '4', '6', '8', '12', '16'])
    panel.minorticks_off()
    panel.set_xlim(2.4, 24)
    panel.set_xlabel('GMACs at 224 x 224 (the area of a circle is the number of parameters)')
    panel.set_ylabel('ImageNet-1k top-1, %')
    panel.grid(alpha=0.3)
    panel.legend(loc='lower right', title='weights')
    save(figure, out)


def plot_confusion(confusion: Tensor, names: Sequence[str], title: str, out: str) -> None:
    """Draws which classes are taken for which.

    Args:
        confusion: (classes, classes), images of the first class that were taken for the second.
        names: Of the classes; they are written at the axes if there are not more than forty.
        title: Above the picture.
        out: File to write.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    count = len(names)
    inches = 3.5 + 0.22 * min(count, 40)
    figure = new_figure(inches + 0.8, inches)
    panel = figure.subplots()
    share = confusion / confusion.sum(dim=1, keepdim=True).clamp(min=1)  # of the images of a class
    image = panel.imshow(share.numpy(), cmap='Blues', vmin=0, vmax=1, interpolation='nearest')
    figure.colorbar(image, label='share of the class', shrink=0.8)
    if count <= 40:
        short = [name if len(name) <= 24 else f'{name[:23]}\N{HORIZONTAL ELLIPSIS}' for name in names]
        panel.set_xticks(range(count), short, rotation=90)
        panel.set_yticks(range(count), short)
        for row, column in confusion.nonzero().tolist() if count <= 20 else ():
            color = 'white' if share[row, column] > 0.5 else 'black'
            number = int(confusion[row, column])
            panel.text(column, row, str(number), ha='center', va='center', color=color, fontsize=8)
    panel.set_xlabel('predicted')
    panel.set_ylabel('truth')
    panel.set_title(title)
    save(figure, out)


def plot_pyramid(shown: Tensor, features: Sequence[Tensor], strides: Sequence[int], out: str) -> None:
    """Draws the image beside one panel for each stride, the root mean square over channels.

    Args:
        shown: (3, H, W) in 0..1.
        features: Maps (C, h, w).
        strides: Of each map, in pixels.
        out: File to write.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    figure = new_figure(2.4 * (len(features) + 1), 3.1)
    panels = figure.subplots(1, len(features) + 1)
    panels[0].imshow(shown.permute(1, 2, 0).numpy(), interpolation='nearest')
    panels[0].set_title(f'image\n{shown.shape[2]} x {shown.shape[1]}')
    for panel, feature, stride in zip(panels[1:], features, strides):
        channels, height, width = feature.shape
        panel.imshow(feature.square().mean(dim=0).sqrt().numpy(), cmap='viridis', interpolation='nearest')
        panel.set_title(f'stride {stride}\n{channels} channels, {width} x {height}')
    for panel in panels:
        panel.axis('off')
    save(figure, out)


def plot_explanation(explanation: Explanation, out: str) -> None:
    """Draws an image, its class activation map and probabilities, and below them the receptive field of each split.

    Args:
        explanation: The figures.
        out: File to write.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    figure = new_figure(2.6 * max(len(explanation.fields), 3), 6.6)
    parts: Any = figure.subfigures(2, 1, height_ratios=[1.15, 1])  # an array; the stub says one figure
    upper, lower = parts
    image, heat, bars = upper.subplots(1, 3)
    image.imshow(explanation.image)
    image.set_title('the image')
    image.axis('off')
    draw_heat(upper, heat, explanation)
    draw_probabilities(bars, explanation)
    draw_fields(lower, explanation)
    save(figure, out)


def draw_heat(figure: 'SubFigure', panel: 'Axes', explanation: Explanation) -> None:
    """Draws the class activation map over the grey image."""
    heat = explanation.activation_map
    height, width = explanation.image.shape[:2]
    limit = max(abs(heat.min()), abs(heat.max()), 1e-6)
    panel.imshow(explanation.image.mean(axis=2), cmap='gray', vmin=0, vmax=1.3)
    overlay = panel.imshow(
        heat,
        cmap='RdBu_r',
        vmin=-limit,
        vmax=limit,
        alpha=0.55,
        extent=(-0.5, width - 0.5, height - 0.5, -0.5),
        interpolation='bilinear',
    )
    panel.set_title(f'class activation map: {short(explanation.predictions[0].label)}')
    panel.axis('off')
    figure.colorbar(overlay, ax=panel, shrink=0.8, label='score')


def draw_probabilities(panel: 'Axes', explanation: Explanation) -> None:
    """Draws a bar for each of the likeliest classes."""
    predictions = explanation.predictions[::-1]
    rows = range(len(predictions))
    panel.barh(rows, [each.probability for each in predictions], color='#3b6ea5')
    panel.set_yticks(rows, [short(each.label) for each in predictions])
    panel.set_xlim(0, 1)
    panel.set_title('probability')
    panel.spines[['top', 'right']].set_visible(False)


def draw_fields(figure: 'SubFigure', explanation: Explanation) -> None:
    """Draws the receptive field of each split, all around the same pixel at the same scale."""
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
        panel.add_patch(Circle(centers[i][::-1], radii[i], fill=False, color='white', linewidth=1, linestyle='--'))
        name = 'not convolved' if i == len(fields) - 1 and len(fields) > 1 else f'split {i + 1}'
        panel.set_title(f'{name}\nradius {radii[i]:.1f} pixels')
        panel.set_xticks([])
        panel.set_yticks([])
    figure.suptitle(
        f'effective receptive field of each split of {explanation.block}, {2 * reach} pixels of the image across'
    )


def short(label: str) -> str:
    """The first of the names that a label has."""
    return label.split(',')[0]


def plot_bench(results: Sequence[Result], out: str) -> None:
    """Draws throughput against accuracy, and how many times as fast as timm's own each way is.

    Args:
        results: Of `bench`; those of the first batch and image size are drawn.
        out: File to write.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    shown = [r for r in results if (r.batch, r.size) == (results[0].batch, results[0].size)]
    ways = list(dict.fromkeys((r.way, r.dtype) for r in shown))
    colours = {way: f'C{i}' for i, way in enumerate(ways)}
    models = list(dict.fromkeys(r.model for r in shown))
    figure = new_figure(12, 1.8 + 1.1 * len(models))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for model in models:
        of_model = [r for r in shown if r.model == model]
        weights = next((each for name, each in WEIGHTS.items() if name.split('.')[0] == model), None)
        if weights is None or weights.top5 is None:  # not of ImageNet
            continue
        area = ARCHS[model].params / 2e5
        for r in of_model:
            left.scatter(r.images_per_second, weights.top1, area, colours[r.way, r.dtype], alpha=0.6, linewidths=0)
        fastest = max(r.images_per_second for r in of_model)
        left.annotate(model, (fastest, weights.top1), (0, 9), textcoords='offset points', fontsize=8, ha='right')
    left.set(xlabel='images per second', ylabel='ImageNet top-1, %', title='Throughput and accuracy; area: parameters')
    left.margins(0.15)
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        ratios = {models.index(r.model): r.ratio for r in shown if (r.way, r.dtype) == way and r.ratio}
        rows = [row + (i - (len(ways) - 1) / 2) * height for row in ratios]
        bars = right.barh(rows, list(ratios.values()), height, color=colours[way], label=', '.join(way))
        right.bar_label(bars, fmt='%.2f', fontsize=7, padding=2)
    right.axvline(1, color='black', linewidth=0.8)
    right.set_yticks(range(len(models)), models)
    right.invert_yaxis()
    right.set(xlabel="throughput, times timm's own", title=f'Batch {shown[0].batch}, {shown[0].size} x {shown[0].size}')
    figure.legend(*right.get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8)
    save(figure, out)


def plot_growth(parts: Mapping[str, Sequence[Result]], out: str) -> None:
    """Draws the time of an image over scale, batch size and image size, a panel for each part of `growth`.

    Args:
        parts: Of `growth`.
        out: File to write.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    figure = new_figure(11, 3.8)
    panels = figure.subplots(1, len(parts))
    for panel, (part, results) in zip(panels, parts.items()):
        for way in dict.fromkeys((r.way, r.dtype) for r in results):
            points = [
                (ARCHS[r.model].args['scale'] if part == 'scale' else getattr(r, part), r.milliseconds / r.batch)
                for r in results
                if (r.way, r.dtype) == way
            ]
            panel.plot(*zip(*sorted(points)), marker='o', label=', '.join(way))
        panel.set(xlabel=GROWTH[part], ylabel='milliseconds for an image', xticks=[x for x, _ in points])
        panel.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8)
    save(figure, out)
