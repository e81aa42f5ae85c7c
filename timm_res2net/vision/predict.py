"""Classifies images, and loads the model for it."""

import difflib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn

from ..models.classifier import as_classifier, registered_cfg
from ..weights.errors import first_line
from ..weights.loading import load_model
from .images import preprocess, read_image

__all__ = ['Prediction', 'UnknownModelError', 'class_names', 'feature_pyramid', 'predict', 'pretrained_model']

_logger = logging.getLogger(__name__)

ImageT = TypeVar('ImageT')


class UnknownModelError(ValueError):
    """No model has this name."""


@dataclass(frozen=True)
class Prediction:
    """A class that an image may belong to."""

    index: int
    label: str
    probability: float


def pretrained_model(
    name: str | None, weights: str | None = None, device: str | torch.device = 'cpu', **kwargs: Any
) -> nn.Module:
    """Makes a model with its published weights, or with those of a file, in evaluation mode.

    Args:
        name: A name that `timm.create_model` takes. None for the model that `weights` fit.
        weights: A file for `timm_res2net.load_model`; the model gets its number of classes.
        device: Where to put the model.
        **kwargs: For `timm.create_model`.

    Raises:
        UnknownModelError: If there is no such model; the message names those most alike.
        ValueError: If the weights can't be loaded, with the reason in one line.
    """
    if name is None:
        if weights is None:
            raise ValueError('give the name of a model, or a file of weights')
        return load_model(weights, **kwargs).to(device).eval()
    arch, _, tag = name.partition('.')
    hosted = ':' in name  # hf-hub:..., local-dir:...
    if not hosted and not timm.is_model(arch):
        alike = difflib.get_close_matches(arch, timm.list_models())
        hint = f'; did you mean {" or ".join(alike)}?' if alike else '; `timm-res2net list` shows the family'
        raise UnknownModelError(f'there is no model {name}{hint}')
    try:
        published = hosted or registered_cfg(name).has_weights
    except RuntimeError:
        tags = ', '.join(timm.list_pretrained(f'{arch}.*'))
        raise UnknownModelError(f'there are no weights {tag} of {arch}; there are {tags or "none"}') from None

    if weights is not None:
        return load_model(weights, name, **kwargs).to(device).eval()
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


def class_names(model: nn.Module) -> list[str]:
    """Names of a model's classes: its own, ImageNet's if it has as many, else just numbers."""
    net = as_classifier(model)
    num_classes, names = net.num_classes, net.pretrained_cfg.get('label_names')
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
    images: Sequence[ImageT],
    read: Callable[[ImageT], Image.Image] = read_image,  # type: ignore[assignment]
    topk: int = 5,
    batch_size: int = 16,
) -> Iterator[list[Prediction] | ValueError]:
    """Classifies images, preprocessed as the model's own configuration says.

    Args:
        model: A model with a `pretrained_cfg`, as timm makes it.
        images: Files, or other arguments of `read`.
        read: Reads one of them as an RGB image.
        topk: Number of classes to return, of all that there are.
        batch_size: Number of images that are classified at once.

    Yields:
        For each image, in order, its likeliest classes, or the error that prevented it.
    """
    transform = create_transform(**resolve_model_data_config(model))
    labels = class_names(model)
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


@torch.inference_mode()
def feature_pyramid(model: nn.Module, image: Image.Image) -> tuple[Tensor, list[Tensor]]:
    """Runs a feature extractor (`features_only=True`) on an image.

    Returns:
        The model's input as it looks, (3, H, W) in 0..1, and its feature maps, (C, H / stride, W / stride) each.
    """
    x, shown = preprocess(model, image)
    features = model(x[None].to(next(model.parameters()).device))
    return shown, [feature[0].cpu() for feature in features]
