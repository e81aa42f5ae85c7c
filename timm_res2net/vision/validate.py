"""Measures how many images of a folder a model classifies rightly."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from timm.utils import natural_key
from torch import Tensor, nn

from ..deploy.images import Found, find_images, read_image
from ..models.classifier import class_names
from ..weights.files import PathLike, read_text
from .predict import classify

__all__ = ['LabelledImages', 'Validation', 'labelled_images', 'validate']


@dataclass
class LabelledImages(Found):
    """What `labelled_images` found."""

    classes: list[int] = field(default_factory=list)  # of the files


@dataclass(frozen=True)
class Validation:
    """How a model does on images whose classes are known."""

    images: int  # that could be read
    top1: float  # % whose likeliest class is right
    top5: float  # % whose class is among the five likeliest
    confusion: Tensor  # (classes, classes), images of the first class that were taken for the second
    failed: list[tuple[str, str]]  # files and folders that could not be read or are empty, and why
    skipped: list[tuple[str, str]]  # what the folders hold beside images, and why


def labelled_images(folder: PathLike, names: Sequence[str], truth: PathLike | None = None) -> LabelledImages:
    """Finds images and their classes.

    Args:
        folder: A folder for each class, or all images together with a file of their classes.
        names: Names of a model's classes. Folders have these names, or are as many, in timm's order: 'c2' before 'c10'.
        truth: A text file with a line for each image: path in the folder, space, name or number of the class. The path
            is the longest beginning, up to a space, that is a file; if none is, it ends at the first space.

    Raises:
        ValueError: If there is no image, the file can't be read, or its classes are not those of the model, or a name
            is that of several.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f'{root} is no folder')
    index = {name: i for i, name in enumerate(names)}
    shared = {name for name in index if names.count(name) > 1} if len(index) < len(names) else set()
    if truth is not None:
        images = LabelledImages()
        for number, line in enumerate(read_text(truth).splitlines(), 1):
            if not line.strip():
                continue
            name, label = split_line(line.strip(), root)
            which = index.get(label, int(label) if label.isdecimal() else -1)
            if not 0 <= which < len(names):
                raise ValueError(f'line {number} of {truth} gives {name} the class {label!r}, which the model lacks')
            if label in shared:
                raise ValueError(f'line {number} of {truth}: {label!r} is the name of several classes; give a number')
            images.files.append(root / name)
            images.classes.append(which)
        if not images.files:
            raise ValueError(f'{truth} has no line with an image and its class')
        return images
    folders = [each.name for each in os.scandir(root) if each.is_dir() and not each.name.startswith('.')]
    classes = sorted(folders, key=natural_key)
    if not classes:
        raise ValueError(f'{root} has no folder for a class; give the classes of its images by a file, --truth')
    if not set(classes) <= index.keys():
        if len(classes) != len(names):
            strange = next(name for name in classes if name not in index)
            raise ValueError(
                f'{root} has {len(classes)} folders and the model {len(names)} classes, of which none is {strange}'
            )
        index = {name: i for i, name in enumerate(classes)}
    elif unclear := shared & {*classes}:
        raise ValueError(f'{min(unclear)!r} in {root} is the name of several classes; give numbers by a file, --truth')
    found = find_images(str(root / name) for name in classes)
    if not found.files:
        raise ValueError(f'there is no image in {root}')
    return LabelledImages(**vars(found), classes=[index[file.relative_to(root).parts[0]] for file in found.files])


def split_line(line: str, root: Path) -> tuple[str, str]:
    """The path and the class in a line of a file for `labelled_images`. Both can have spaces in them."""
    words = line.split(' ')
    ends = (end for end in range(len(words) - 1, 1, -1) if os.path.isfile(root / ' '.join(words[:end])))
    end = next(ends, 1)
    return ' '.join(words[:end]), ' '.join(words[end:]).strip()


def validate(
    model: nn.Module,
    images: LabelledImages,
    batch_size: int = 16,
    compile: bool = False,
    progress: Any = iter,
) -> Validation:
    """Classifies images, preprocessed as the model's own configuration says, and counts what is right.

    Args:
        model: A model as timm makes it in evaluation mode, or an exported one.
        images: What `labelled_images` found.
        batch_size: Number of images that are classified at once.
        compile: Compile the model first.
        progress: Wraps the iterator over images, to show a bar.

    Raises:
        ValueError: If no image can be read.
    """
    count = len(class_names(model))
    confusion = torch.zeros(count, count, dtype=torch.long)
    unread, right, among_five = [], 0, 0
    scores: Iterable[Tensor | ValueError] = progress(classify(model, images.files, read_image, batch_size, compile))
    for file, truth, found in zip(images.files, images.classes, scores):
        if isinstance(found, ValueError):
            unread.append((str(file), str(found)))
            continue
        best = found.topk(min(5, count)).indices.tolist()
        right += best[0] == truth
        among_five += truth in best
        confusion[truth, best[0]] += 1
    done = len(images.files) - len(unread)
    if not done:
        raise ValueError(f'none of {len(unread)} images could be read; the first one: {unread[0][1]}')
    failed = images.failed + unread
    return Validation(done, 100 * right / done, 100 * among_five / done, confusion, failed, images.skipped)
