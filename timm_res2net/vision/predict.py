"""Classify image files, and look at what the network sees: the work behind `timm-res2net predict` and `features`."""

import difflib
import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from PIL import Image, ImageOps
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from ..res2net import ASSETS
from ..weights.checkpoints import load_checkpoint, read_checkpoint
from ..weights.files import first_line, replace_file

__all__ = ['Prediction', 'load_model', 'plot_pyramid', 'predict', 'read_image']

_logger = logging.getLogger(__name__)

SHEET_CELL = 8  # pixels; the sheet has a row of held-out digits for each of the ten labels


class UnknownModelError(ValueError):
    """No model has this name."""


@dataclass(frozen=True)
class Prediction:
    """A class that an image may belong to."""

    index: int
    label: str
    probability: float


def find_images(patterns: Iterable[str]) -> tuple[list[Path], list[tuple[str, str]]]:
    """Finds the files that are meant by names of files, of folders (with all images below them) and by globs.

    Returns:
        The files, and what names nothing with the reason.
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


def read_image(path: str | os.PathLike[str]) -> Image.Image:
    """Reads an image of any mode as RGB, 8 bits a channel.

    It is turned upright as its EXIF data say, 16-bit greys are scaled to 8 bits, and what is transparent becomes white.

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


def load_model(name: str, weights: str | None = None, device: str | torch.device = 'cpu', **kwargs: Any) -> nn.Module:
    """Makes a model with its published weights, or with those of a file, in evaluation mode.

    Args:
        name: A name that `timm.create_model` takes.
        weights: A file as `load_checkpoint` takes it, with as many classes as it may have.
        device: Where to put the model.
        **kwargs: For `timm.create_model`.

    Raises:
        UnknownModelError: If there is no such model; the message names those most alike.
        ValueError: If the weights can't be had or don't fit, with the reason in one line.
    """
    arch, _, tag = name.partition('.')
    hosted = ':' in name  # hf-hub:..., local-dir:...
    if not hosted and not timm.is_model(arch):
        alike = difflib.get_close_matches(arch, timm.list_models())
        hint = f'; did you mean {" or ".join(alike)}?' if alike else '; `timm-res2net list` shows the family'
        raise UnknownModelError(f'there is no model {name}{hint}')
    try:
        published = hosted or timm.get_pretrained_cfg(name).has_weights
    except RuntimeError:
        tags = ', '.join(timm.list_pretrained(f'{arch}.*'))
        raise UnknownModelError(f'there are no weights {tag} of {arch}; there are {tags or "none"}') from None

    if weights is not None:
        return load_weights(name, weights, **kwargs).to(device).eval()
    if not published:
        raise ValueError(f'there are no published weights of {name}; give yours with --weights FILE')
    try:
        return timm.create_model(name, pretrained=True, **kwargs).to(device).eval()
    except Exception as error:  # a download fails in as many ways as libraries take part in it
        _logger.debug('no weights of %s', name, exc_info=True)
        raise ValueError(
            f'weights of {name} can not be had: {first_line(error)}. If you are offline, give a file with '
            '--weights FILE, or take test_res2net.digits, which needs no network'
        ) from error


def load_weights(name: str, weights: str, **kwargs: Any) -> nn.Module:
    """Makes a model with the weights of a file, which also tell the number of classes."""
    checkpoint = read_checkpoint(weights)
    model = timm.create_model(name, **{'num_classes': checkpoint.num_classes, **kwargs})
    load_checkpoint(model, checkpoint)
    return model


def labels_of(model: nn.Module) -> list[str]:
    """Names of a model's classes: its own, ImageNet's if it has as many, else just numbers."""
    cfg: Any = model.pretrained_cfg
    num_classes: Any = model.num_classes
    names = cfg.get('label_names')
    if names and len(names) == num_classes:
        return list(names)
    subset = infer_imagenet_subset(model)
    if subset is None:
        return [f'class {index}' for index in range(num_classes)]
    info = ImageNetInfo(subset)
    return [info.index_to_description(index) for index in range(num_classes)]


@torch.inference_mode()
def predict(
    model: nn.Module,
    images: Sequence[Any],
    read: Callable[[Any], Image.Image] = read_image,
    topk: int = 5,
    batch_size: int = 16,
) -> Iterator[list[Prediction] | ValueError]:
    """Classifies images, preprocessed as the model's own configuration says.

    Args:
        model: A model with a `pretrained_cfg`, as timm makes it.
        images: Files, or what else `read` takes.
        read: Makes an RGB image of one of them.
        topk: Number of classes to return, of all that there are.
        batch_size: Number of images that are classified at once.

    Yields:
        For each image, in order, its likeliest classes, or the error that prevented it.
    """
    transform = create_transform(**resolve_model_data_config(model))
    labels = labels_of(model)
    device = next(model.parameters()).device
    for start in range(0, len(images), batch_size):
        inputs: list[Tensor] = []  # (C, H, W) each
        errors: list[ValueError | None] = []
        for image in images[start : start + batch_size]:
            try:
                inputs.append(transform(read(image)))
                errors.append(None)
            except ValueError as error:
                errors.append(error)
        if inputs:
            probabilities = model(torch.stack(inputs).to(device)).float().softmax(dim=1)  # (N, classes)
            best = probabilities.topk(min(topk, len(labels)))  # (N, topk) values and indices
            rows = zip(best.values.tolist(), best.indices.tolist())
        for failure in errors:
            yield failure or [Prediction(index, labels[index], value) for value, index in zip(*next(rows))]


def sheet() -> list[tuple[Image.Image, str]]:
    """The bundled digits, none of which the embedded model was trained on, with their labels."""
    size = SHEET_CELL
    with Image.open(ASSETS / 'digits.png') as image:
        boxes = [(x, y, x + size, y + size) for y in range(0, image.height, size) for x in range(0, image.width, size)]
        return [(image.crop(box).convert('RGB'), str(box[1] // size)) for box in boxes]


@torch.inference_mode()
def pyramid(model: nn.Module, image: Image.Image) -> tuple[Tensor, list[Tensor]]:
    """Runs a feature extractor (`features_only=True`) on an image.

    Returns:
        What the model was shown, (3, H, W) in 0..1, and its feature maps, (C, H / stride, W / stride) each.
    """
    x, shown = preprocessed(model, image)
    features = model(x[None].to(next(model.parameters()).device))
    return shown, [feature[0].cpu() for feature in features]


def preprocessed(model: nn.Module, image: Image.Image) -> tuple[Tensor, Tensor]:
    """What a model takes for an image, (3, H, W), and the same as a person can look at it, in 0..1."""
    config = resolve_model_data_config(model)
    x = create_transform(**config)(image)
    mean, std = (torch.tensor(config[key])[:, None, None] for key in ('mean', 'std'))
    return x, (x * std + mean).clamp(0, 1)


def new_figure(width: float, height: float) -> Any:
    """Makes matplotlib's figure of a size in inches; ValueError if matplotlib is missing."""
    try:
        import matplotlib.figure
    except ModuleNotFoundError:
        raise ValueError('a picture needs matplotlib: pip install "timm_res2net[plot]"') from None
    return matplotlib.figure.Figure(figsize=(width, height), layout='constrained')


def plot_pyramid(shown: Tensor, features: Sequence[Tensor], strides: Sequence[int], out: str) -> None:
    """Draws the image beside one panel for each stride, the root mean square over channels.

    Args:
        shown: (3, H, W) in 0..1.
        features: Maps (C, h, w).
        strides: Of each map, in pixels.
        out: File to write; it appears whole or not at all.

    Raises:
        ValueError: If matplotlib is missing or can't write such a file.
    """
    figure = new_figure(2.4 * (len(features) + 1), 3.1)
    panels = figure.subplots(1, len(features) + 1)
    panels[0].imshow(shown.permute(1, 2, 0).numpy(), interpolation='nearest')
    panels[0].set_title(f'image\n{shown.shape[2]} x {shown.shape[1]}')
    for panel, feature, stride in zip(panels[1:], features, strides):
        channels, height, width = feature.shape
        panel.imshow(feature.square().mean(dim=0).sqrt().numpy(), cmap='viridis', interpolation='nearest')
        panel.set_title(f'stride {stride}\n{channels} channels, {width} x {height}')
    for panel in panels:
        panel.axis('off')
    replace_file(out, lambda path: figure.savefig(path, dpi=120))
