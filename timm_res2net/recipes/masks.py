"""Data sets for segmentation: COCO's, VOC's, plain folders, and the binary masks of polyp and salient-object sets.

annotations/instances_NAME.json, NAME/                              COCO; the smallest object at a pixel wins
ImageSets/Segmentation/NAME.txt, JPEGImages/, SegmentationClass/    VOC
images/NAME/, masks/NAME/                                           a mask for each image, of the same stem
NAME/images/, NAME/masks/                                           the same, as PraNet's sets are published
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from .._errors import sanitize
from .._files import open_regular, read_text
from .._images import readable_formats, readable_suffixes
from .coco import IGNORED, CocoImages, read_image, semantic_mask

Pair = tuple[Tensor, Tensor]
Augment = Callable[[Tensor, Tensor], Pair]


class Masked(Dataset[dict[str, Any]]):
    """Images and masks of labels, optionally augmented; `names` are those of the labels, from 0.

    An item has `image` (3, H, W) in 0..1, `mask` (H, W) of labels, and `image_id`, its index.
    """

    def __init__(
        self, read: Callable[[int], Pair], files: Sequence[Any], names: Sequence[str], change: Augment | None = None
    ) -> None:
        if len(names) > IGNORED:
            raise ValueError(f'cannot use {len(names)} classes: labels are 0 to {IGNORED - 1}')
        self.read, self.files, self.names, self.change = read, files, names, change

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = self.read(index)
        name = sanitize(self.files[index])
        if image.shape[1:] != mask.shape:
            raise ValueError(f'{name!r} has {tuple(image.shape[1:])} pixels, its mask {tuple(mask.shape)}')
        wrong = mask[((mask < 0) | (mask >= len(self.names))) & (mask != IGNORED)]
        if len(wrong):
            raise ValueError(f'the mask of {name!r} has label {int(wrong[0])}, but there are {len(self.names)} classes')
        if self.change is not None:
            image, mask = self.change(image, mask)
        return dict(image=image, mask=mask.long(), image_id=index)


def augment(size: int, image: Tensor, mask: Tensor) -> Pair:
    """Resizes by a factor from 0.5 to 2, then crops or pads to `size` pixels, and mirrors every other image."""
    factor = 0.5 + 1.5 * torch.rand(()).item()
    fill: Any = {tv_tensors.Image: 0.5, tv_tensors.Mask: IGNORED}
    change = v2.Compose([
        v2.Resize([max(1, round(side * factor)) for side in mask.shape]),
        v2.RandomCrop((size, size), pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    image, mask = change(tv_tensors.Image(image), tv_tensors.Mask(mask.to(torch.uint8)))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor)


def open_part(
    folder: Path, part: str, classes: int | None, threshold: int | None = None, change: Augment | None = None
) -> Masked:
    """Opens a part of a data set; ValueError if its layout is unknown.

    `classes` is the number of labels with the background: None for COCO, whose file lists them, and for binary masks,
    where pixels from grey level `threshold` (0..255) on are foreground.
    """
    if (folder / 'annotations').is_dir():
        if classes is not None or threshold is not None:
            raise ValueError(f'{str(folder)!r} is a COCO set, which lists its classes. Omit --classes and --binary.')
        dataset = CocoImages(folder, part)
        return Masked(partial(read_coco, dataset), dataset.files, ['background', *dataset.names], change)
    if (classes is None) == (threshold is None):
        raise ValueError(f'{str(folder)!r} has masks in files. Use either --classes N or --binary.')
    files = find_pairs(folder, part)
    names = ['background', 'foreground'] if classes is None else [str(label) for label in range(classes)]
    return Masked(partial(read_pair, files, threshold), [image for image, _ in files], names, change)


def find_pairs(folder: Path, part: str) -> list[tuple[Path, Path]]:
    """Pairs images with their masks; ValueError if there are none, or an image has no mask."""
    voc = folder / 'ImageSets' / 'Segmentation' / f'{part}.txt'
    if voc.is_file():
        stems = read_text(voc).split()
        return [(folder / 'JPEGImages' / f'{each}.jpg', folder / 'SegmentationClass' / f'{each}.png') for each in stems]
    inner = (folder / part / 'images').is_dir()
    images, masks = (list_images(folder / part / k if inner else folder / k / part) for k in ('images', 'masks'))
    by_stem = {path.stem: path for path in masks}
    if lacking := [path for path in images if path.stem not in by_stem]:
        raise ValueError(f'{len(lacking)} of {len(images)} images have no mask of the same name: {str(lacking[0])!r}')
    if not images:
        raise ValueError(
            f'{str(folder)!r} has no part {part!r}: it needs {part}/images and {part}/masks, '
            f'images/{part} and masks/{part}, ImageSets/Segmentation/{part}.txt, or COCO annotations'
        )
    return [(path, by_stem[path.stem]) for path in images]


def list_images(folder: Path) -> list[Path]:
    """Lists the image files in a folder in order, without hidden ones."""
    files = [path for path in sorted(folder.glob('[!.]*')) if path.is_file()]
    return [path for path in files if path.suffix.lower() in readable_suffixes()]


def require_foreground(dataset: Masked, threshold: int | None) -> None:
    """Raises ValueError if no pixel of any mask is foreground."""
    found: set[int] = set()
    for index in range(len(dataset)):
        found.update(dataset.read(index)[1].unique().tolist())
        if not found <= {0, IGNORED}:
            return
    if threshold is not None:
        raise ValueError(f'no pixel of {len(dataset)} masks reaches level {threshold}. Use a smaller --threshold.')
    if IGNORED in found:
        raise ValueError(f'{len(dataset)} masks have only the levels 0 and {IGNORED}. For binary masks, use --binary.')


def read_pair(files: list[tuple[Path, Path]], threshold: int | None, index: int) -> Pair:
    """Reads an image and its mask; ValueError if that fails."""
    image, path = read_image(files[index][0]), files[index][1]
    if threshold is not None:  # of any format and mode, also JPEG
        return image, (read_image(path)[0] * 255 >= threshold - 0.5).long()
    try:
        with open_regular(path) as file, Image.open(file, formats=readable_formats()) as mask:
            labels = np.array(mask)
    except Exception as error:  # a decoder of damaged data can raise nearly anything
        raise ValueError(sanitize(f'cannot read {str(path)!r}: {error}', 500)) from error
    if labels.ndim != 2 or labels.dtype.kind not in 'biu':
        raise ValueError(f'{str(path)!r} is not a mask: it needs one channel of integers, the labels')
    return image, torch.from_numpy(labels.astype(np.int64))


def read_coco(dataset: CocoImages, index: int) -> Pair:
    """Reads an image of a COCO set and draws its labels; ValueError if that fails."""
    image = dataset.read(index)
    return image, semantic_mask(dataset, index, (image.shape[1], image.shape[2]))
