"""Detection sets in COCO's format: reading, evaluating by pycocotools, drawing.

A set is a folder with `NAME/` for the images and `annotations/instances_NAME.json`, as COCO itself is published
(https://cocodataset.org/#format-data).
"""

import contextlib
import io
import math
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F
from torchvision.utils import draw_bounding_boxes, make_grid

from ..deploy import images
from ..weights.errors import first_line
from ..weights.files import atomic_write

__all__ = [
    'AREAS',
    'IGNORED',
    'SHOWN',
    'CocoImages',
    'average_precision',
    'draw',
    'enlarge',
    'require_sheet',
    'save_sheet',
    'semantic_mask',
]

AREAS = 32, 96  # pixels across of a square at which medium and large objects begin; COCO's
IGNORED = 255  # label of pixels that count for nothing
SHOWN = 12  # images in a picture

Target = dict[str, Tensor]


class CocoImages(torch.utils.data.Dataset[tuple[Tensor, Target]]):
    """Images, (3, H, W) in 0..1, with `boxes` (N, 4) of corners in pixels, `labels` (N,) from 1, and `image_id`.

    Crowds and boxes without area are left out.

    Args:
        folder: The set.
        name: Of the part.

    Raises:
        ValueError: If there is no such part, or its annotations can't be read or used.
        ImportError: If pycocotools is not installed.
    """

    def __init__(self, folder: Path, name: str) -> None:
        from pycocotools.coco import COCO

        file = folder / 'annotations' / f'instances_{name}.json'
        if not file.is_file() or not (folder / name).is_dir():
            raise ValueError(f"{folder} is no set in COCO's format with a part {name}: it has no {name}/ or no {file}")
        self.images = folder / name
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco: Any = COCO(str(file))
            self.ids = sorted(self.coco.imgs)
            categories = self.coco.loadCats(sorted(self.coco.cats))
            self.labels = {each['id']: i + 1 for i, each in enumerate(categories)}
            self.names = [str(each['name']) for each in categories]
            self.files = [str(self.coco.imgs[each]['file_name']) for each in self.ids]
            self.objects: list[dict[str, Any]] = self.coco.dataset.get('annotations', [])
            problem = next(self.problems(), None)
        except Exception as error:  # a file can hold anything
            raise ValueError(f"{file} has no annotations in COCO's format: {error!r}") from error
        if not self.ids or not self.names:
            raise ValueError(f'{file} has no images or no categories')
        if problem is not None:
            raise ValueError(f'{file} has {problem}')
        for each in self.objects:  # what evaluation and masks take for given
            each.setdefault('area', each['bbox'][2] * each['bbox'][3])
            each.setdefault('iscrowd', 0)

    def problems(self) -> Iterator[str]:
        """What of images and objects can't be used, one after another."""
        for number in self.ids:
            if type(number) is not int or abs(number) >= 2**63:
                yield f'an image of id {number!r}; ids of images are integers of up to 63 bits'
        for each in self.objects:
            if each['image_id'] not in self.coco.imgs:
                yield f'an object of image {each["image_id"]}, which it does not define, number {each["id"]}'
            if each['category_id'] not in self.labels:
                yield f'an object of category {each["category_id"]}, which it does not define, number {each["id"]}'
            if len(each['bbox']) != 4 or not all(map(math.isfinite, each['bbox'])):
                yield f'an object whose box is {each["bbox"]}, not four finite numbers, number {each["id"]}'

    def __len__(self) -> int:
        return len(self.ids)

    def image(self, index: int) -> Tensor:
        """An image, (3, H, W) in 0..1; ValueError if it can't be read."""
        return read_image(self.images / self.files[index])

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """COCO's descriptions of the objects in an image."""
        return self.coco.imgToAnns.get(self.ids[index], [])

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image = self.image(index)
        height, width = image.shape[1:]
        found = [each for each in self.annotations(index) if not each['iscrowd']]
        corners = torch.tensor([each['bbox'] for each in found], dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        corners[:, 0::2].clamp_(0, width)
        corners[:, 1::2].clamp_(0, height)
        labels = torch.tensor([self.labels[each['category_id']] for each in found], dtype=torch.int64)
        kept = (corners[:, 2:] > corners[:, :2]).all(dim=1)
        return image, dict(boxes=corners[kept], labels=labels[kept], image_id=torch.tensor(self.ids[index]))


def read_image(path: Path) -> Tensor:
    """Reads an image, (3, H, W) in 0..1, as it is stored, like boxes and masks; ValueError if that is not possible."""
    try:
        image = images.read_image(path, rotate=False)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
    return F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)


def semantic_mask(dataset: CocoImages, index: int, size: tuple[int, int]) -> Tensor:
    """The label of each pixel, (H, W): 0 for none, that of the smallest object, `IGNORED` for crowds.

    Raises:
        ValueError: If an object has no outline, or one that can't be drawn.
    """
    mask = np.zeros(size, np.uint8)
    for each in sorted(dataset.annotations(index), key=lambda each: -each['area']):
        if not each.get('segmentation'):
            raise ValueError(f'{dataset.files[index]} has an object without segmentation, number {each["id"]}')
        try:
            if isinstance(each['segmentation'], list) and min(map(len, each['segmentation'])) < 6:
                raise ValueError('a polygon has less than three points')  # pycocotools takes some for a box
            covered = dataset.coco.annToMask(each).astype(bool)
            if covered.shape != size:
                raise ValueError(f'it is of {covered.shape} pixels, and the image has {size}')
        except Exception as error:  # pycocotools raises nearly anything
            text = f'{dataset.files[index]} has an object whose segmentation can not be drawn, number {each["id"]}'
            raise ValueError(f'{text}: {first_line(error)}') from error
        mask[covered] = IGNORED if each['iscrowd'] else dataset.labels[each['category_id']]
    return torch.from_numpy(mask)


def average_precision(
    dataset: CocoImages, found: Sequence[tuple[int, Target]], areas: tuple[int, int] = AREAS
) -> dict[str, float]:
    """COCO's average precision of detections, in %; boxes without area don't count.

    Args:
        dataset: The truth.
        found: For each image its `image_id`, and `boxes`, `labels` and `scores` as detectors of torchvision return.
        areas: Pixels across of a square at which medium and large objects begin.

    Returns:
        AP (mean over overlaps of 0.5 to 0.95), AP50 and AP75, and AP of small, medium and large objects, -1 if there
        are none of them in the set; all are 0 if nothing was found.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    categories = {label: category for category, label in dataset.labels.items()}
    results = [
        dict(image_id=image_id, category_id=categories[label], bbox=[x, y, right - x, bottom - y], score=score)
        for image_id, each in found
        for (x, y, right, bottom), label, score in zip(
            each['boxes'].tolist(), each['labels'].tolist(), each['scores'].tolist()
        )
    ]
    if not results:
        return dict.fromkeys(('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'), 0.0)
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        # pycocotools takes an object of id 0 for none, and keeps only one of those with the same id.
        shown = [each for each in dataset.objects if min(each['bbox'][2:]) > 0]
        numbered = [{**each, 'id': number} for number, each in enumerate(shown, 1)]
        truth.dataset = {**dataset.coco.dataset, 'annotations': numbered}
        truth.createIndex()
        evaluation: Any = COCOeval(truth, truth.loadRes(results), 'bbox')
        small, medium = areas
        edges = 0, small**2, medium**2, 1e10
        evaluation.params.imgIds = sorted({image_id for image_id, _ in found})
        evaluation.params.areaRng = [[0, 1e10], *map(list, pairwise(edges))]
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    values = [round(100 * float(value), 3) if value >= 0 else -1.0 for value in evaluation.stats[:6]]
    return dict(zip(('AP', 'AP50', 'AP75', 'APs', 'APm', 'APl'), values))


def enlarge(image: Tensor, width: int = 300) -> Tensor:
    """An image (3, H, W), in 0..1 or of bytes, to one of bytes, as many whole times larger as a width allows."""
    factor = max(1, width // image.shape[2])
    return F.to_dtype(image, torch.uint8, scale=True).repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def draw(image: Tensor, boxes: Tensor, texts: Sequence[str], width: int = 300) -> Tensor:
    """An image (3, H, W) in 0..1, enlarged to a width, with boxes and their texts; (3, h, w) of bytes."""
    large = enlarge(image, width)
    boxes = boxes * (large.shape[2] / image.shape[2])
    return draw_bounding_boxes(large, boxes, list(texts), colors='yellow', width=2) if len(boxes) else large


def require_sheet(out: str) -> None:
    """Raises the error that `save_sheet` would, before the work whose picture it is to be."""
    save_sheet([torch.zeros(3, 1, 1, dtype=torch.uint8)], out, replace=False)


def save_sheet(pictures: Sequence[Tensor], out: str, replace: bool = True) -> None:
    """Writes pictures, (3, h, w) of bytes, side by side in rows of six, in the format of the suffix, PNG without one.

    Raises:
        ValueError: If Pillow can't write the format.
        OSError: If the file can't be written.
    """
    height, width = (max(each.shape[side] for each in pictures) for side in (1, 2))
    padded = [F.pad(each, [0, 0, width - each.shape[2], height - each.shape[1]], fill=255) for each in pictures]
    sheet = make_grid(torch.stack(padded), nrow=6, pad_value=255)
    kind = None if Path(out).suffix else 'png'
    atomic_write(out, lambda path: F.to_pil_image(sheet).save(path, format=kind), replace)
