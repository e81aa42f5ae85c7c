"""Finds and reads image files, prepares images for a model, and holds the bundled digits."""

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

from ._errors import sanitize
from ._files import PathLike, open_regular
from .models.classifier import image_config
from .models.variants import ASSETS

MAX_PIXELS = 50_000_000  # of one image; reading takes at most 16 bytes a pixel
# Pillow hands PostScript to Ghostscript, which runs it as a program. It recognizes the others, but cannot decode them.
REFUSED_FORMATS = {'EPS', 'BUFR', 'GRIB', 'HDF5', 'MPEG'}
# Images are resized to input_size / crop_pct; without limits, a config file could ask for more memory than there is.
LARGEST_SIZE, SMALLEST_CROP, LARGEST_CROP = 4096, 0.5, 2
INTERPOLATIONS = 'nearest', 'bilinear', 'bicubic', 'box', 'hamming', 'lanczos'  # those that timm supports
CROP_MODES = 'center', 'squash', 'border'  # timm silently treats any other value as 'center'
LARGEST_NUMBER = torch.finfo(torch.float32).max
IMAGE_SETTINGS: dict[str, tuple[Callable[[Any], bool], str]] = {
    'input_size': (
        lambda sizes: len(sizes) == 3 and all(type(size) is int and 1 <= size <= LARGEST_SIZE for size in sizes),
        f'three integers from 1 to {LARGEST_SIZE}',
    ),
    'interpolation': (INTERPOLATIONS.__contains__, f'one of {", ".join(INTERPOLATIONS)}'),
    'mean': (
        lambda means: 1 <= len(means) <= LARGEST_SIZE and all(0 <= each <= LARGEST_NUMBER for each in means),
        'finite non-negative numbers',
    ),
    'std': (
        lambda stds: 1 <= len(stds) <= LARGEST_SIZE and all(0 < each <= LARGEST_NUMBER for each in stds),
        'finite positive numbers',
    ),
    'crop_pct': (lambda crop: SMALLEST_CROP <= crop <= LARGEST_CROP, f'between {SMALLEST_CROP} and {LARGEST_CROP}'),
    'crop_mode': (CROP_MODES.__contains__, f'one of {", ".join(CROP_MODES)}'),
}
DIGIT_SIZE = 8  # pixels; digits.png has a row of held-out digits for each of the ten labels


@dataclass
class Found:
    """The image files that `find_images` found, and the paths that it could not use."""

    files: list[Path] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)  # (path or pattern, reason)
    skipped: list[str] = field(default_factory=list)  # files in folders, without an image suffix


def find_images(patterns: Iterable[str]) -> Found:
    """Finds image files given as file names, folders (searched recursively, following links) and globs."""
    found = Found()
    for pattern in patterns:
        if os.path.isdir(pattern):
            files, problem = search_folder(pattern, found), 'no images in this folder'
        elif os.path.lexists(pattern) or not glob.has_magic(pattern):
            files, problem = [Path(pattern)], ''
        else:
            names = filter(os.path.isfile, glob.glob(pattern, recursive=True))
            files, problem = sorted(map(Path, names)), 'no file matches this pattern'
        found.files += files
        if not files:
            found.failed.append((pattern, problem))
    return found


def search_folder(folder: str, found: Found) -> list[Path]:
    """Returns all images below a folder, in sorted order; adds other files and unreadable folders to `found`."""

    def fail(error: OSError) -> None:
        found.failed.append((str(error.filename), f'cannot read this folder: {error.strerror}'))

    images: list[Path] = []
    suffixes = readable_suffixes()
    seen: set[str] = set()  # a link may lead back to a parent folder
    for here, folders, names in os.walk(folder, followlinks=True, onerror=fail):
        if os.path.realpath(here) in seen:
            folders.clear()
            continue
        seen.add(os.path.realpath(here))
        folders.sort()
        for file in sorted(Path(here, name) for name in names):
            if file.suffix.lower() in suffixes:
                images.append(file)
            else:
                found.skipped.append(str(file))
    return images


def readable_formats() -> list[str]:
    """Returns the names of the image formats that Pillow can decode safely."""
    Image.init()
    return [name for name in Image.ID if name not in REFUSED_FORMATS]


def readable_suffixes() -> set[str]:
    """Returns the file suffixes of the readable formats, without formats that Pillow only writes, such as .pdf."""
    formats = readable_formats()
    return {suffix for suffix, name in Image.EXTENSION.items() if name in formats}


def read_image(path: PathLike, rotate: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads an image of any mode as 8-bit RGB; ValueError if that fails.

    Images of 16 bits are scaled to 8 bits, and transparent pixels become white. The EXIF orientation is applied; pass
    `rotate=False` where boxes or masks refer to the pixels as stored.
    Pillow's own limit, `PIL.Image.MAX_IMAGE_PIXELS`, applies as well.
    """
    try:
        with open_regular(path) as file, Image.open(file, formats=readable_formats()) as opened:
            width, height = opened.size
            if width * height > max_pixels:
                raise ValueError(f'{width} x {height} pixels exceed {max_pixels:,}. Shrink it, or raise --max-pixels')
            if max(width, height) > 100 * min(width, height):
                raise ValueError(f'{width} x {height} pixels are too narrow to crop a square from')
            opened.load()
            if rotate:
                ImageOps.exif_transpose(opened, in_place=True)
            image: Image.Image = opened
    except FileNotFoundError:
        raise ValueError('no such file') from None
    except Image.UnidentifiedImageError:
        raise ValueError('not an image in a format that Pillow reads') from None
    except Exception as error:  # decoders of damaged data raise almost anything
        reason = getattr(error, 'strerror', None) or ' '.join(str(error).split()) or type(error).__name__
        raise ValueError(f'cannot read this image: {reason}') from error

    if image.mode == 'F':
        raise ValueError('pixels are floating-point values of unknown range. Save the image with 8 bits')
    if image.mode.startswith('I'):  # Pillow would clip these instead of scaling them
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 65535 or (image.mode == 'I' and pixels.max() < 256):
            raise ValueError('pixels are 32-bit integers of unknown range. Save the image with 8 or 16 bits')
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert('RGBA')
        image = Image.alpha_composite(Image.new('RGBA', image.size, 'white'), image)
    return image.convert('RGB')


def check_image_settings(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the image settings in an untrusted configuration, lists as tuples; ValueError if one is invalid."""
    settings: dict[str, Any] = {}
    for key, (is_valid, kind) in IMAGE_SETTINGS.items():
        value = tuple(cfg[key]) if isinstance(cfg.get(key), list) else cfg.get(key)
        if value is None:
            continue
        try:
            valid = is_valid(value)
        except Exception:  # values of the wrong type can raise anything
            valid = False
        if not valid:
            raise ValueError(f'{key} must be {kind}, got {sanitize(repr(value), 80)}')
        settings[key] = value
    return settings


def image_transform(config: Mapping[str, Any]) -> Callable[[Image.Image], Tensor]:
    """Makes the transform from an RGB image to a model's input (C, H, W); `config` comes from `image_config`."""
    transform: Callable[[Image.Image], Tensor] = create_transform(**config)
    return Compose([Grayscale(), transform]) if config['input_size'][0] == 1 else transform


def preprocess(model: nn.Module, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Returns a model's input (C, H, W) for an RGB image, and the same pixels for display, (3, H, W) in 0..1."""
    config = image_config(model)
    x = image_transform(config)(image)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return x, (x * std + mean).clamp(0, 1).expand(3, -1, -1)


def bundled_digits() -> list[tuple[Image.Image, str]]:
    """Returns the bundled handwritten digits with their labels; the embedded model was not trained on them."""
    size = DIGIT_SIZE
    with Image.open(ASSETS / 'digits.png') as image:
        boxes = [(x, y, x + size, y + size) for y in range(0, image.height, size) for x in range(0, image.width, size)]
        return [(image.crop(box).convert('RGB'), str(box[1] // size)) for box in boxes]
