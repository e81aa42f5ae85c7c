"""Reads images: files of any mode, and the bundled digits."""

import glob
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from ..models.variants import ASSETS
from ..weights.files import PathLike

__all__ = ['bundled_digits', 'find_images', 'preprocess', 'read_image']

DIGIT_SIZE = 8  # pixels; digits.png has a row of held-out digits for each of the ten labels


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Finds image files.

    Args:
        patterns: Names of files, of folders (for all images below them), and globs.

    Returns:
        The files, and the patterns without any file, each with the reason.
    """
    files: list[Path] = []
    failed: list[tuple[str, str]] = []
    suffixes = set(Image.registered_extensions())
    for pattern in patterns:
        path = Path(pattern)
        if path.is_dir():
            found = sorted(file for file in path.rglob('*') if file.suffix.lower() in suffixes and file.is_file())
        elif not path.exists() and glob.has_magic(pattern):
            found = sorted(Path(name) for name in glob.glob(pattern, recursive=True) if os.path.isfile(name))
        else:
            found = [path]
        if not found:
            failed.append((pattern, 'there is no image in this folder' if path.is_dir() else 'matches no file'))
        files += found
    return files, failed


def read_image(path: PathLike) -> Image.Image:
    """Reads an image of any mode as RGB, 8 bits a channel.

    EXIF orientation is applied, 16-bit greys are scaled to 8 bits, and transparent pixels become white.

    Raises:
        ValueError: If it can't be read, with the reason in one line.
    """
    try:
        with Image.open(path) as file:
            file.load()
            image = ImageOps.exif_transpose(file)
    except FileNotFoundError:
        raise ValueError('there is no such file') from None
    except Image.UnidentifiedImageError:
        raise ValueError('this is not an image, or of a format that Pillow does not know') from None
    except Exception as error:  # a decoder of damaged data can raise nearly anything
        raise ValueError(
            f'this image can not be read: {" ".join(str(error).split()) or type(error).__name__}'
        ) from error

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


def preprocess(model: nn.Module, image: Image.Image) -> tuple[Tensor, Tensor]:
    """Preprocesses an image for a model.

    Returns:
        The model's input, (3, H, W), and the same without normalisation, in 0..1, to look at.
    """
    config = resolve_model_data_config(model)
    x = create_transform(**config)(image)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return x, (x * std + mean).clamp(0, 1)


def bundled_digits() -> list[tuple[Image.Image, str]]:
    """The bundled handwritten digits, which the embedded model was not trained on, with their labels."""
    size = DIGIT_SIZE
    with Image.open(ASSETS / 'digits.png') as image:
        boxes = [(x, y, x + size, y + size) for y in range(0, image.height, size) for x in range(0, image.width, size)]
        return [(image.crop(box).convert('RGB'), str(box[1] // size)) for box in boxes]
