"""Collects images from a tensor, a DataLoader or a folder, to calibrate int8 and to compare outputs."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .._images import find_images, image_transform, read_image
from ..models.classifier import image_config

CALIBRATION_IMAGES = 300  # NNCF's default; more change little

Images = Tensor | Iterable[Any] | str | Path


def calibration_images(model: nn.Module, images: Images | None, shape: tuple[int, ...]) -> Tensor:
    """Takes the first 300 images of a batch or loader, or 300 spread over a folder; `shape` is (C, H, W)."""
    if images is None:
        raise ValueError('int8 requires images to calibrate with. Pass images: a folder, a DataLoader or a tensor.')
    if isinstance(images, str | Path):
        images = read_folder(model, Path(images), shape)
    taken: list[Tensor] = []
    for batch in [images] if isinstance(images, Tensor) else images:
        x = batch[0] if isinstance(batch, tuple | list) and len(batch) else batch
        if not isinstance(x, Tensor):
            raise ValueError(f'images must be tensors, or tuples that start with one, got {type(batch).__name__}')
        if x.shape[1:] != shape or not x.is_floating_point():
            expected = f'(N, {", ".join(map(str, shape))})'
            raise ValueError(f'images must be {expected}, floating-point, got {tuple(x.shape)}, {x.dtype}')
        taken += x.detach().cpu().float()
        if len(taken) >= CALIBRATION_IMAGES:
            break
    if not taken:
        raise ValueError('images is empty. Pass at least one image.')
    return torch.stack(taken[:CALIBRATION_IMAGES])


def read_folder(model: nn.Module, folder: Path, shape: tuple[int, ...]) -> Iterator[Tensor]:
    """Reads images evenly spread over a folder, preprocessed for a model, as batches of one."""
    files = find_images([str(folder)]).files
    if not files:
        raise ValueError(f'no images in {str(folder)!r}')
    transform = image_transform({**image_config(model, shape[0]), 'input_size': shape})
    count = min(len(files), CALIBRATION_IMAGES)
    for i in range(count):
        file = files[i * len(files) // count]  # from all classes: files are sorted by folder
        try:
            image = read_image(file)
        except ValueError as error:
            raise ValueError(f'cannot use {str(file)!r}: {error}') from error
        yield transform(image)[None]


def repeat_to_whole_batches(images: Tensor, batch: int) -> Tensor:
    """Appends the first images again until the last batch is full."""
    return images[torch.arange(-(-len(images) // batch) * batch) % len(images)]
