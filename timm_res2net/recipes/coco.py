"""Data sets in COCO's format (https://cocodataset.org/#format-data), checked when they are opened, and their masks."""

import contextlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from .. import _images as images
from .._errors import first_line, sanitize

IGNORED = 255  # label of pixels that are neither trained on nor evaluated
CLEAN = v2.Compose([v2.ConvertBoundingBoxFormat('XYXY'), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


class CocoImages(torch.utils.data.Dataset[dict[str, Any]]):
    """The images of `FOLDER/NAME/` with the objects of `FOLDER/annotations/instances_NAME.json`.

    An item has `image` (3, H, W) in 0..1, `image_id`, and `target` with `boxes` (N, 4), as corners in pixels, and
    `labels` (N,) from 1. Crowds and boxes smaller than a pixel are left out. (torchvision's
    `wrap_dataset_for_transforms_v2` keeps crowds, and has no boxes for an image without objects.)

    Raises ValueError if the part is missing or its annotations cannot be used.
    """

    def __init__(self, folder: Path, name: str, transform: Callable[..., Any] | None = None) -> None:
        from pycocotools.coco import COCO

        file = folder / 'annotations' / f'instances_{name}.json'
        if not file.is_file() or not (folder / name).is_dir():
            raise ValueError(f'{str(folder)!r} has no part {name!r} in the COCO format: it needs {name}/ and {file}.')
        self.folder, self.transform = folder / name, transform
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                self.coco: Any = COCO(str(file))
            self.ids = sorted(self.coco.imgs)
            categories = self.coco.loadCats(sorted(self.coco.cats))
            self.labels = {each['id']: i + 1 for i, each in enumerate(categories)}
            self.names = [sanitize(each['name']) for each in categories]
            self.files = [str(self.coco.imgs[each]['file_name']) for each in self.ids]
            self.objects: list[dict[str, Any]] = self.coco.dataset.get('annotations', [])
            self.require_usable()
        except Exception as error:  # a file can contain anything
            raise ValueError(f'cannot use the COCO annotations {str(file)!r}: {first_line(error)}') from error

    def require_usable(self) -> None:
        """Raises ValueError for the first image or object that cannot be used, and completes the others."""
        if not self.ids or not self.names:
            raise ValueError('no images or no categories')
        for number in self.ids:
            if type(number) is not int or abs(number) >= 2**63:
                raise ValueError(f'image id {number!r} is not an integer of at most 63 bits')
        for each in self.objects:
            box: Any = each.get('bbox')
            area, crowd = each.get('area', 0), each.setdefault('iscrowd', 0)
            for is_usable, problem in (
                (each.get('image_id') in self.coco.imgs, f'unknown image {each.get("image_id")!r}'),
                (each.get('category_id') in self.labels, f'unknown category {each.get("category_id")!r}'),
                (are_finite(box, 4), f'box {box!r} is not four finite numbers'),
                (are_finite([area], 1), f'area {area!r} is not a finite number'),
                (crowd in (0, 1), f'iscrowd {crowd!r} is neither 0 nor 1'),
            ):
                if not is_usable:
                    raise ValueError(f'object {each.get("id")!r}: {problem}')
            each.setdefault('area', box[2] * box[3])  # optional in the file, required by pycocotools

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> Tensor:
        """Reads an image, (3, H, W) in 0..1; ValueError if that fails."""
        return read_image(self.folder / self.files[index])

    def annotations(self, index: int) -> list[dict[str, Any]]:
        """Returns the annotations of an image."""
        return self.coco.imgToAnns[self.ids[index]]

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.read(index)
        objects = [each for each in self.annotations(index) if not each['iscrowd']]
        sides = torch.tensor([each['bbox'] for each in objects], dtype=torch.float32).reshape(-1, 4)
        size = (image.shape[1], image.shape[2])
        boxes = BoundingBoxes(sides, format=BoundingBoxFormat.XYWH, canvas_size=size)
        labels = torch.tensor([self.labels[each['category_id']] for each in objects], dtype=torch.int64)
        target = CLEAN(dict(boxes=boxes, labels=labels))
        if self.transform is not None:
            image, target = self.transform(F.to_image(image), target)
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return dict(image=image.as_subclass(Tensor), target=target, image_id=self.ids[index])


def are_finite(values: Any, count: int) -> bool:
    """Returns whether a list from JSON has `count` finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(each, int | float) and math.isfinite(each) for each in values)


def read_image(path: Path) -> Tensor:
    """Reads an image, (3, H, W) in 0..1, as stored: boxes and masks ignore its orientation in EXIF."""
    try:
        image = images.read_image(path, rotate=False)
    except ValueError as error:
        raise ValueError(sanitize(f'cannot read {str(path)!r}: {error}', 500)) from error
    return F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)


def semantic_mask(dataset: CocoImages, index: int, size: tuple[int, int]) -> Tensor:
    """Returns the label of each pixel, (H, W): that of the smallest object there, 0 for none, `IGNORED` for crowds."""
    mask = np.zeros(size, np.uint8)
    for each in sorted(dataset.annotations(index), key=lambda each: -each['area']):
        try:
            covered = object_mask(each.get('segmentation'), *size)
        except Exception as error:  # a segmentation can contain anything
            where = f'cannot draw object {each["id"]!r} of {dataset.files[index]!r}'
            raise ValueError(sanitize(f'{where}: {first_line(error)}', 500)) from error
        mask[covered] = IGNORED if each['iscrowd'] else dataset.labels[each['category_id']]
    return torch.from_numpy(mask)


def object_mask(segmentation: Any, height: int, width: int) -> NDArray[np.bool_]:
    """Draws polygons or run lengths. Without the checks, pycocotools would write beyond its memory."""
    from pycocotools import mask

    if not segmentation:
        raise ValueError('it has no segmentation')
    if isinstance(segmentation, dict):
        if list(segmentation['size']) != [height, width]:
            raise ValueError(f'its mask has size {segmentation["size"]}, the image {[height, width]}')
        counts = segmentation['counts']
        runs = np.array(decode_runs(counts) if isinstance(counts, str) else counts, np.int64)
        if runs.sum() != height * width or runs.min() < 0 or runs.max() > height * width:
            raise ValueError('its run lengths do not add up to the pixels of the image')
        return np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(width, height).T
    for polygon in segmentation:
        if len(polygon) < 6 or len(polygon) % 2:
            raise ValueError('a polygon has fewer than three points, or half a point')
        if not are_finite(polygon, len(polygon)) or max(map(abs, polygon)) > 10 * max(height, width):
            raise ValueError('a polygon has points far outside the image')
    drawn: NDArray[np.uint8] = mask.decode(mask.merge(mask.frPyObjects(segmentation, height, width)))
    return drawn.astype(bool)


def decode_runs(text: str) -> list[int]:
    """Decodes COCO's compressed run lengths: 5 bits a character, least significant first, as differences."""
    runs: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        value |= (code & 0x1F) << bits
        bits += 5
        if bits > 60:
            raise ValueError('its run lengths are damaged')
        if not code & 0x20:  # the last character of this number
            value -= (1 << bits) if code & 0x10 else 0
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = bits = 0
    return runs
