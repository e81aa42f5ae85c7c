"""Reads detection sets in COCO's format (https://cocodataset.org/#format-data), and checks them first."""

import contextlib
import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F
from torchvision.tv_tensors import BoundingBoxes, BoundingBoxFormat

from .. import _images as images
from .._errors import first_line, sanitize

CLEAN = v2.Compose([v2.ConvertBoundingBoxFormat('XYXY'), v2.ClampBoundingBoxes(), v2.SanitizeBoundingBoxes()])


class CocoImages(Dataset[dict[str, Any]]):
    """The images of `FOLDER/NAME/` with the objects of `FOLDER/annotations/instances_NAME.json`.

    An item has `image` (3, H, W) in 0..1, `target` with `boxes` (N, 4), as corners in pixels, and `labels` (N,) from 1,
    and its `index`. Crowds and boxes smaller than a pixel are left out. (torchvision's
    `wrap_dataset_for_transforms_v2` keeps crowds, and has no boxes for an image without objects.)
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
        """Raises ValueError for the first object that cannot be used, and fills in optional fields."""
        if not self.ids or not self.names:
            raise ValueError('no images or no categories')
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

    def __getitem__(self, index: int) -> dict[str, Any]:
        file, info = self.folder / self.files[index], self.coco.imgs[self.ids[index]]
        image = read_image(file)
        size = (image.shape[1], image.shape[2])
        annotated = (info.get('height', size[0]), info.get('width', size[1]))
        if annotated != size:  # such as those of an image that was annotated in its EXIF orientation
            raise ValueError(sanitize(f'{str(file)!r} has {size} pixels, but its annotations are for {annotated}', 500))
        objects = [each for each in self.coco.imgToAnns[self.ids[index]] if not each['iscrowd']]
        sides = torch.tensor([each['bbox'] for each in objects], dtype=torch.float32).reshape(-1, 4)
        boxes = BoundingBoxes(sides, format=BoundingBoxFormat.XYWH, canvas_size=size)
        labels = torch.tensor([self.labels[each['category_id']] for each in objects], dtype=torch.int64)
        target = CLEAN(dict(boxes=boxes, labels=labels))
        if self.transform is not None:
            image, target = self.transform(F.to_image(image), target)
        target = {name: value.as_subclass(Tensor) for name, value in target.items()}
        return dict(image=image.as_subclass(Tensor), target=target, index=index)


def are_finite(values: Any, count: int) -> bool:
    """Returns whether a list from JSON has `count` finite numbers."""
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(isinstance(each, int | float) and math.isfinite(each) for each in values)


def read_image(path: Path) -> Tensor:
    """Reads an image, (3, H, W) in 0..1, as stored: boxes and masks do not follow its EXIF orientation."""
    try:
        image = images.read_image(path, rotate=False)
    except ValueError as error:
        raise ValueError(sanitize(f'cannot read {str(path)!r}: {error}', 500)) from error
    return F.to_dtype(F.to_image(image), torch.float32, scale=True).as_subclass(Tensor)
