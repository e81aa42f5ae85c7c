"""Reads images: files of any mode, and the bundled digits."""

import glob
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform
from torch import Tensor, nn
from torchvision.transforms import Compose, Grayscale

from ..models.classifier import image_config
from ..models.variants import ASSETS
from ..weights.files import PathLike, open_regular

__all__ = ['Found', 'bundled_digits', 'find_images', 'image_transform', 'preprocess', 'read_image', 'readable_suffixes']

RECOGNISED = {'BUFR', 'GRIB', 'HDF5', 'MPEG'}  # by Pillow, which has no decoder for them
DIGIT_SIZE = 8  # pixels; digits.png has a row of held-out digits for each of the ten labels


@dataclass
class Found:
    """What `find_images` found."""

    files: list[Path] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # names and patterns without a file, and why
    skipped: list[tuple[str, str]] = field(default_factory=list)  # files in folders, and why


def find_images(patterns: Iterable[str]) -> Found:
    """Finds image files.

    Args:
        patterns: Names of files, of folders (for all images below them, also behind links), and globs.
    """
    found = Found()
    for pattern in patterns:
        if os.path.isdir(pattern):
            before = len(found.files)
            find_below(pattern, found)
            if len(found.files) == before:
                found.failed.append((pattern, 'there is no image in this folder'))
        elif not os.path.lexists(pattern) and glob.has_magic(pattern):
            names = sorted(name for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
            found.files += map(Path, names)
            found.failed += [] if names else [(pattern, 'matches no file')]
        elif pattern:
            found.files.append(Path(pattern))
        else:
            found.failed.append(("''", 'this is no name of a file'))
    return found


def find_below(folder: str, found: Found) -> None:
    """Adds all images below a folder, in order."""

    def fail(error: OSError) -> None:
        found.failed.append((str(error.filename), f'this folder can not be read: {error.strerror}'))

    suffixes = readable_suffixes()
    seen: set[str] = set()  # a link may lead to a folder above it
    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        folders.sort()
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        for name in sorted(names):
            file = Path(here, name)
            if not os.path.isfile(file):
                found.skipped.append((str(file), 'a link to nothing' if file.is_symlink() else 'no file'))
            elif file.suffix.lower() not in suffixes:
                found.skipped.append((str(file), 'no image of a format that Pillow reads'))
            else:
                found.files.append(file)


def readable_suffixes() -> set[str]:
    """Suffixes of the formats that Pillow reads, not only writes, as PDF, or recognises."""
    Image.init()
    return {suffix for suffix, kind in Image.EXTENSION.items() if kind in Image.OPEN and kind not in RECOGNISED}


def read_image(path: PathLike, rotate: bool = True) -> Image.Image:
    """Reads an image of any mode as RGB, 8 bits a channel.

    16-bit greys are scaled to 8 bits, and transparent pixels become white.

    Args:
        path: File to read.
        rotate: Apply EXIF orientation; not where boxes or masks were made on the pixels as they are stored.

    Raises:
        ValueError: If it can't be read, with the reason in one line.
    """
    try:
        with open_regular(path) as file, Image.open(file) as opened:
            opened.load()
            image = ImageOps.exif_transpose(opened) if rotate else opened.copy()
    except FileNotFoundError:
        raise ValueError('there is no such file') from None
    except Image.UnidentifiedImageError:
        raise ValueError('this is not an image, or of a format that Pillow does not know') from None
    except Exception as error:  # a decoder of damaged data can raise nearly anything
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'this image can not be read: {reason}') from error

    if image.mode == 'F':
        raise ValueError('pixels of this image are floating-point numbers, whose white is unknown; save it with 8 bits')
    if image.mode.startswith('I'):  # Pillow would clip instead of scale
        greys = np.asarray(image).astype(np.int64)
        if greys.min() < 0 or greys.max() > 65535:
            raise ValueError('greys of this image go beyond 16 bits; save it with 8 bits')
        image = Image.fromarray((greys // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    image = image.convert('RGB')
    if max(image.size) > 100 * min(image.size):
        raise ValueError(f'an image of {image.width} x {image.height} pixels is too narrow to cut a square from')
    return image


def image_transform(config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """What makes a model's input, (C, H, W), of an RGB image; `config` is that of `image_config`."""
    transform: Callable[[Image.Image], Tensor] = create_transform(**config)
    return Compose([Grayscale(), transform]) if config['input_size'][0] == 1 else transform


def preprocess(model: nn.Module, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Preprocesses an RGB image for a model.

    Returns:
        The model's input, (C, H, W), and the same without normalisation, (3, H, W) in 0..1, to look at.
    """
    config = image_config(model)
    x = image_transform(config)(image)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return x, (x * std + mean).clamp(0, 1).expand(3, -1, -1)


def bundled_digits() -> list[tuple[Image.Image, str]]:
    """The bundled handwritten digits, which the embedded model was not trained on, with their labels."""
    size = DIGIT_SIZE
    with Image.open(ASSETS / 'digits.png') as image:
        boxes = [(x, y, x + size, y + size) for y in range(0, image.height, size) for x in range(0, image.width, size)]
        return [(image.crop(box).convert('RGB'), str(box[1] // size)) for box in boxes]
