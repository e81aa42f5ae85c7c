"""Draws images with their objects or labels, with a colour for each class."""

import colorsys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from .._files import atomic_write
from .masks import IGNORED

SHOWN = 6  # images in examples.png
CELL = 320  # pixels across of the space for each of them


def color_of(label: int) -> tuple[int, int, int]:
    """Returns the colour of a label. Hues are a golden ratio apart, so that no two classes look alike."""
    if label == 0:
        return 0, 0, 0
    if label == IGNORED:
        return 128, 128, 128
    color = colorsys.hsv_to_rgb(label * 0.618034 % 1, (1.0, 0.55)[label // 6 % 2], (1.0, 0.8)[label // 12 % 2])
    red, green, blue = (round(255 * value) for value in color)
    return red, green, blue


def paint_labels(mask: Tensor) -> Tensor:
    """Turns a mask of labels, (H, W), into an image, (3, H, W) in 0..1."""
    return torch.tensor([color_of(label) for label in range(256)])[mask.long()].permute(2, 0, 1) / 255


def draw_objects(image: Tensor, objects: Mapping[str, Tensor], names: Sequence[str]) -> Tensor:
    """Outlines and names objects in an image, (3, H, W) in 0..1; `names` are those of labels from 1.

    Small images are enlarged, so that names are readable.
    """
    scale = max(1, CELL // max(image.shape))
    image = image.repeat_interleave(scale, dim=1).repeat_interleave(scale, dim=2)
    labels = objects['labels'].tolist()
    if not labels:
        return image
    colors = [color_of(label) for label in labels]
    return draw_bounding_boxes(image, objects['boxes'] * scale, [names[label - 1] for label in labels], colors, width=2)


def write_picture(image: Tensor, out: Path) -> None:
    """Writes an image, (3, H, W) or (H, W) in 0..1, as PNG."""
    picture = F.to_pil_image(image)
    atomic_write(out, lambda path: picture.save(path, format='PNG'))


def write_grid(images: Sequence[Tensor], columns: int, out: Path) -> None:
    """Writes images of any size, (3, H, W) in 0..1, to equal cells of a PNG, row by row."""
    cells = []
    for image in images:
        height, width = (max(1, side * CELL // max(image.shape)) for side in image.shape[1:])
        resized = F.resize(image, [height, width])
        cells.append(F.pad(resized, [0, 0, CELL - width, CELL - height], fill=1.0))
    write_picture(make_grid(cells, columns, pad_value=1.0), out)
