"""Reads segmentation sets: images, each with a mask of the same stem, in one of three layouts.

images/NAME/, masks/NAME/
NAME/images/, NAME/masks/                                           the layout of PraNet's sets
ImageSets/Segmentation/NAME.txt, JPEGImages/, SegmentationClass/    VOC
"""

from collections.abc import Callable
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
from .coco import read_image

IGNORED = 255  # label of pixels that are neither trained on nor evaluated

Pair = tuple[Tensor, Tensor]


class MaskedImages(Dataset[dict[str, Any]]):
    """The images and masks of one part of a data set, optionally augmented.

    `classes` is the number of labels, including the background. Binary masks have a `threshold` instead: pixels of at
    least this gray level (0..255) are foreground. An item has `image` (3, H, W) in 0..1, `mask` (H, W) of labels, and
    its `index`.
    """

    def __init__(
        self,
        folder: Path,
        part: str,
        classes: int | None,
        threshold: int | None = None,
        augment: Callable[[Tensor, Tensor], Pair] | None = None,
    ) -> None:
        if (classes is None) == (threshold is None):
            raise ValueError('masks of labels need --classes N, binary masks need --binary. Use one of them.')
        self.names = ['background', 'foreground'] if classes is None else [str(label) for label in range(classes)]
        if len(self.names) > IGNORED:
            raise ValueError(f'cannot use {classes} classes: labels are 0 to {IGNORED - 1}')
        self.pairs, self.threshold, self.augment = find_pairs(folder, part), threshold, augment

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> Pair:
        """Reads an image and its mask; ValueError if that fails or the two do not fit together."""
        file, mask_file = self.pairs[index]
        image = read_image(file)
        if self.threshold is None:
            mask = read_labels(mask_file)
        else:  # the mask can have any format and mode, such as JPEG
            mask = (read_image(mask_file)[0] * 255 >= self.threshold - 0.5).long()
        name = sanitize(file)
        if image.shape[1:] != mask.shape:
            raise ValueError(f'{name!r} has {tuple(image.shape[1:])} pixels, but its mask {tuple(mask.shape)}')
        wrong = mask[((mask < 0) | (mask >= len(self.names))) & (mask != IGNORED)]
        if len(wrong):
            raise ValueError(f'the mask of {name!r} has label {int(wrong[0])}, but there are {len(self.names)} classes')
        return image, mask

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = self.read(index)
        if self.augment is not None:
            image, mask = self.augment(image, mask)
        return dict(image=image, mask=mask, index=index)


def augment(size: int, image: Tensor, mask: Tensor) -> Pair:
    """Resizes by a factor from 0.5 to 2, then crops or pads to `size` pixels, and mirrors half of the images."""
    factor = 0.5 + 1.5 * torch.rand(()).item()
    fill: Any = {tv_tensors.Image: 0.5, tv_tensors.Mask: IGNORED}
    change = v2.Compose([
        v2.Resize([max(1, round(side * factor)) for side in mask.shape]),
        v2.RandomCrop((size, size), pad_if_needed=True, fill=fill),
        v2.RandomHorizontalFlip(),
    ])  # fmt: skip
    image, mask = change(tv_tensors.Image(image), tv_tensors.Mask(mask.to(torch.uint8)))
    return image.as_subclass(Tensor), mask.as_subclass(Tensor).long()


def find_pairs(folder: Path, part: str) -> list[tuple[Path, Path]]:
    """Pairs images with their masks; ValueError if there are none, or an image has no mask."""
    voc = folder / 'ImageSets' / 'Segmentation' / f'{part}.txt'
    if voc.is_file():
        stems = read_text(voc).split()
        return [(folder / 'JPEGImages' / f'{each}.jpg', folder / 'SegmentationClass' / f'{each}.png') for each in stems]
    inner = (folder / part / 'images').is_dir()
    images, masks = (
        list_images(folder / part / kind if inner else folder / kind / part) for kind in ('images', 'masks')
    )
    by_stem = {path.stem: path for path in masks}
    if lacking := [path for path in images if path.stem not in by_stem]:
        raise ValueError(f'{len(lacking)} of {len(images)} images have no mask of the same name: {str(lacking[0])!r}')
    if not images:
        raise ValueError(
            f'{str(folder)!r} has no part {part!r}: it needs {part}/images and {part}/masks, '
            f'images/{part} and masks/{part}, or ImageSets/Segmentation/{part}.txt'
        )
    return [(path, by_stem[path.stem]) for path in images]


def list_images(folder: Path) -> list[Path]:
    files = [path for path in sorted(folder.glob('[!.]*')) if path.is_file()]
    return [path for path in files if path.suffix.lower() in readable_suffixes()]


def read_labels(path: Path) -> Tensor:
    """Reads a mask of labels, (H, W), from an image with one channel; ValueError if that fails."""
    try:
        with open_regular(path) as file, Image.open(file, formats=readable_formats()) as mask:
            labels = np.array(mask)
    except Exception as error:  # a decoder of damaged data can raise nearly anything
        raise ValueError(sanitize(f'cannot read {str(path)!r}: {error}', 500)) from error
    if labels.ndim != 2 or labels.dtype.kind not in 'biu':
        raise ValueError(f'{str(path)!r} is not a mask: it must have one channel, with integer labels')
    return torch.from_numpy(labels.astype(np.int64))


def require_foreground(dataset: MaskedImages) -> None:
    """Raises ValueError if no pixel of any mask is foreground."""
    found: set[int] = set()
    for index in range(len(dataset)):
        found.update(dataset.read(index)[1].unique().tolist())
        if not found <= {0, IGNORED}:
            return
    count = len(dataset)
    if dataset.threshold is not None:
        raise ValueError(f'no pixel in {count} masks reaches level {dataset.threshold}. Use a smaller --threshold.')
    if IGNORED in found:
        raise ValueError(f'{count} masks have only the levels 0 and {IGNORED}. For binary masks, use --binary.')
