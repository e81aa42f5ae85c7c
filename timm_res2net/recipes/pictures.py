"""Draws images with their truth and predictions on a grid of equal cells, with a color for each class."""

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..vision.figures import as_text, new_figure, save
from .masks import IGNORED

SHOWN = 6  # images in examples.png


@dataclass(frozen=True)
class Panel:
    """One cell: an image (3, H, W) in 0..1, boxes of objects as corners, and the labels (from 1) that it shows."""

    title: str
    image: Tensor
    boxes: Sequence[Sequence[float]] = ()
    labels: Sequence[int] = ()


def color_of(label: int) -> tuple[float, float, float]:
    """Returns the color of a label. Hues are a golden ratio apart, so that classes look different."""
    if label == 0:
        return 0.0, 0.0, 0.0
    if label == IGNORED:
        return 0.5, 0.5, 0.5
    return colorsys.hsv_to_rgb(label * 0.618034 % 1, (1.0, 0.55)[label // 6 % 2], (1.0, 0.8)[label // 12 % 2])


def paint_labels(mask: Tensor) -> Tensor:
    """Turns a mask of labels, (H, W), into an image, (3, H, W)."""
    return torch.tensor([color_of(label) for label in range(256)])[mask.long()].permute(2, 0, 1)


def draw_grid(panels: Sequence[Panel], names: Sequence[str], out: str, columns: int = 4) -> None:
    """Draws panels row by row, and below them a legend of the classes that occur; `names` belong to labels from 1."""
    from matplotlib.patches import Patch, Rectangle
    from matplotlib.patheffects import Normal, Stroke

    rows = -(-len(panels) // columns)
    used = sorted({label for panel in panels for label in panel.labels})
    figure = new_figure(2.6 * columns, 2.8 * rows + 0.25 * -(-len(used) // (2 * columns)))
    cells: Any = figure.subplots(rows, columns, squeeze=False)
    for cell in cells.flat:
        cell.axis('off')
    for cell, panel in zip(cells.flat, panels):
        height, width = panel.image.shape[1:]
        cell.imshow(panel.image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation='nearest')
        side = max(height, width)  # a square around every image, so that cells have one size
        cell.set(xlim=(width / 2 - side / 2 - 0.5, width / 2 + side / 2 - 0.5))
        cell.set(ylim=(height / 2 + side / 2 - 0.5, height / 2 - side / 2 - 0.5))
        cell.set_title(as_text(panel.title), fontsize=8)
        for (left, top, right, bottom), label in zip(panel.boxes, panel.labels):
            corner = (left - 0.5, top - 0.5)
            box = Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=color_of(label), linewidth=1.2)
            box.set_path_effects([Stroke(linewidth=2.4, foreground='black'), Normal()])
            cell.add_patch(box)
    if used:
        patches = [Patch(color=color_of(label), label=as_text(names[label - 1])) for label in used]
        figure.legend(handles=patches, loc='outside lower center', ncols=2 * columns, fontsize=8)
    save(figure, out)
