"""Measures the accuracy of a model on a folder of images."""

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils import natural_key
from torch import Tensor, nn

from .._files import PathLike, read_text
from .._images import Found, find_images, read_image
from .predict import classify, label_classes

_logger = logging.getLogger(__name__)

CLASS_ORDERS: dict[str, Callable[[str], Any]] = {'natural': natural_key, 'lexicographic': str}  # timm's, torchvision's


@dataclass
class LabeledImages(Found):
    """Image files and their classes."""

    classes: list[int] = field(default_factory=list)  # one per file


@dataclass(frozen=True)
class Validation:
    """A model's accuracy on images of known classes."""

    images: int  # read and classified
    top1: float  # % whose most likely class is correct
    top5: float  # % whose class is among the five most likely
    confusion: Tensor  # (classes, classes), counts by true class (rows) and predicted class (columns)
    unread: list[tuple[str, str]]  # (file that cannot be classified, reason)


def decided_classes(model: nn.Module) -> list[str]:
    """Returns the names of the classes that a model decides between; a single logit decides between two."""
    names = label_classes(model)
    return names if len(names) > 1 else [f'not {names[0]}', names[0]]


def sort_classes(names: Iterable[str], order: str | None = None) -> list[str]:
    """Sorts the names of class folders; `order` is a key of `CLASS_ORDERS`.

    The default is timm's natural order. Logs a warning if no order is given and it makes a difference.
    """
    natural, lexicographic = (sorted(names, key=key) for key in CLASS_ORDERS.values())
    if order is None and natural != lexicographic:
        first = next(pair for pair in zip(natural, lexicographic) if pair[0] != pair[1])
        _logger.warning(
            "class folders are sorted in natural order (%r before %r), timm's default; for weights trained with "
            "torchvision's ImageFolder, pass --class-order lexicographic",
            *first,
        )
    return lexicographic if order == 'lexicographic' else natural


def labeled_images(
    folder: PathLike, names: Sequence[str], truth: PathLike | None = None, class_order: str | None = None
) -> LabeledImages:
    """Finds images and their classes; ValueError if there are none, or a class is unknown.

    Args:
        folder: Contains a subfolder for each class, or all images if `truth` lists their classes.
        names: Class names, from `decided_classes`. Subfolders are named after them or after ImageNet's synsets. If no
            subfolder is, there must be one per class, and `class_order` decides which is which.
        truth: A text file with one line per image: its path in the folder, a space, and its class's name or number.
        class_order: See `sort_classes`.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f'{root} is not a folder')
    index = class_numbers(names)
    if truth is not None:
        return images_in_list(root, truth, index, len(names))

    folders = [each.name for each in os.scandir(root) if each.is_dir() and not each.name.startswith('.')]
    strange = [name for name in folders if name not in index]
    if len(strange) == len(folders) == len(names):
        index = {name: i for i, name in enumerate(sort_classes(folders, class_order))}
    elif len(strange) == 1 and len(names) == 2 and names[0] == f'not {names[1]}':
        index[strange[0]] = 0
    elif strange:
        raise ValueError(
            f'cannot match {len(folders)} folders of {root} with {len(names)} classes: {min(strange)!r} is not the '
            'name of exactly one class. Rename the folders, name the classes with --labels, or list images with --truth'
        )
    found = find_images(str(root / name) for name in sorted(folders, key=natural_key))
    if not found.files:
        raise ValueError(f'no images in the subfolders of {root}. If it has no folders, list images with --truth')
    return LabeledImages(**vars(found), classes=[index[file.relative_to(root).parts[0]] for file in found.files])


def class_numbers(names: Sequence[str]) -> dict[str, int]:
    """Maps class names to class numbers; for ImageNet's classes, also synsets such as 'n01440764'.

    Leaves out names that several classes share: ImageNet has two cranes, the bird and the machine.
    """
    subset = infer_imagenet_subset({'num_classes': len(names)})
    synsets = ImageNetInfo(subset).label_names() if subset else []
    counts = Counter(names)
    return {name: i for each in (synsets, names) for i, name in enumerate(each) if counts[name] < 2}


def images_in_list(root: Path, truth: PathLike, index: dict[str, int], count: int) -> LabeledImages:
    """Finds the images and classes that the file `truth` of `labeled_images` lists."""
    images = LabeledImages()
    for number, line in enumerate(read_text(truth).splitlines(), 1):
        if not line.strip():
            continue
        name, label = split_line(line.strip(), root)
        class_number = index.get(label, int(label) if label.isdecimal() else count)
        if class_number >= count:
            raise ValueError(
                f'cannot use line {number} of {truth}: {label!r}, the class of {name}, is not the name or number of '
                'exactly one class'
            )
        images.files.append(root / name)
        images.classes.append(class_number)
    if not images.files:
        raise ValueError(f'no images in {truth}')
    return images


def split_line(line: str, root: Path) -> tuple[str, str]:
    """Splits a line into path and class; both may contain spaces.

    The path is the longest prefix that is a file, or else everything before the first space.
    """
    words = line.split(' ')
    ends = (end for end in range(len(words) - 1, 1, -1) if os.path.isfile(root / ' '.join(words[:end])))
    end = next(ends, 1)
    return ' '.join(words[:end]), ' '.join(words[end:]).strip()


def validate(
    model: nn.Module,
    images: LabeledImages,
    batch_size: int = 16,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = iter,
    read: Callable[[PathLike], Image.Image] = read_image,
) -> Validation:
    """Classifies images and counts correct predictions; ValueError if no image can be classified.

    A single logit predicts class 1 if its probability is at least 0.5, else class 0. `progress` wraps the iterator over
    images to show a progress bar; the other arguments are those of `classify`.
    """
    count = len(decided_classes(model))
    confusion = torch.zeros(count, count, dtype=torch.long)
    unread, among_five = [], 0
    scores = progress(classify(model, images.files, read, batch_size))
    for file, truth, found in zip(images.files, images.classes, scores):
        if isinstance(found, ValueError):
            unread.append((str(file), str(found)))
            continue
        if len(found) == 1:
            found = torch.cat([1 - found, found])
        best = found.topk(min(5, count)).indices.tolist()
        among_five += truth in best
        confusion[truth, best[0]] += 1
    done = len(images.files) - len(unread)
    if not done:
        raise ValueError(f'could not classify any of {len(unread)} images. The first: {unread[0][1]}')
    right = int(confusion.diagonal().sum())
    return Validation(done, 100 * right / done, 100 * among_five / done, confusion, unread)
