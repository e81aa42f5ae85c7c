"""Loads classifiers, and classifies images."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from PIL import Image
from timm.models import parse_model_name
from torch import Tensor, nn

from .._errors import first_line
from .._files import PathLike
from .._images import image_transform, preprocess, read_image
from ..deploy.backends import BACKENDS
from ..deploy.exported import ExportedModel, load_exported
from ..deploy.optimize import optimize
from ..hub.pull import fetch_file
from ..models.checks import require_eval_mode
from ..models.classifier import class_names, image_config, registered_cfg
from ..weights.checkpoints import Checkpoint
from ..weights.config import CONFIG_FILE, require_labels
from ..weights.loading import load_model, require_known

_logger = logging.getLogger(__name__)

ImageT = TypeVar('ImageT')
FEW_IMAGES = 16  # so few that fusing the model takes longer than it saves


@dataclass(frozen=True)
class Prediction:
    """A class that an image may belong to."""

    index: int
    label: str
    probability: float


def pretrained_model(
    name: str | None,
    weights: PathLike | Checkpoint | None = None,
    device: str | torch.device = 'cpu',
    trust: bool = False,
    **kwargs: Any,
) -> nn.Module:
    """Loads a model in evaluation mode: one with published weights, one with the weights of a file, or an exported one.

    Without a name, makes the model that the weights fit. `trust` allows exported `.pt2` files, which can run any code.
    """
    if weights is not None and not isinstance(weights, Checkpoint) and is_exported(weights):
        if name is not None or kwargs or str(device) != 'cpu':
            raise ValueError(f'{weights} is an exported model, which runs unchanged on the CPU. Pass no other options')
        return load_exported(weights, trust=trust)
    if weights is not None:
        return load_model(weights, name, **kwargs).to(device).eval()
    assert name is not None
    require_known(name)
    if ':' not in name and not registered_cfg(name).has_weights:
        raise ValueError(f'no published weights for {name}. Pass a weights file')
    try:
        source = pin_cached_commit(name, kwargs.get('cache_dir'))
        return timm.create_model(source, pretrained=True, **kwargs).to(device).eval()
    except Exception as error:  # each library that takes part in a download raises its own errors
        _logger.debug('cannot load the weights of %s', name, exc_info=True)
        problem = f'cannot load the weights of {name}: {first_line(error)}'
        if not name.startswith('local-dir:'):
            problem += '. If you are offline, pass a weights file, or use test_res2net.digits, which needs no download'
        raise ValueError(problem) from error


def pin_cached_commit(name: str, cache_dir: PathLike | None) -> str:
    """Pins the name of a model on the Hub to its newest commit, after caching and verifying its config.

    timm then reads the cache. For a branch instead of a commit, it would retry for half a minute while offline.
    """
    source, hub_id = parse_model_name(name)
    found = fetch_file(hub_id, CONFIG_FILE, cache_dir) if source == 'hf-hub' else None
    return name if found is None else f'hf-hub:{hub_id.partition("@")[0]}@{found.parent.name}'


def is_exported(file: PathLike) -> bool:
    """Returns whether a file has the suffix of an exported model, rather than of weights."""
    return os.fspath(file).endswith(tuple(BACKENDS))


def name_classes(model: nn.Module, labels: Sequence[str]) -> None:
    """Names the classes of a model or an exported model; ValueError unless there is one name per class.

    A model with one logit also accepts two names; the logit is that of the second.
    """
    net: Any = model
    if net.num_classes == 1 and len(labels) == 2:
        labels = labels[1:]
    require_labels(labels, net.num_classes)
    net.pretrained_cfg['label_names'] = tuple(labels)


def label_classes(model: nn.Module) -> list[str]:
    """Returns the names of a model's classes; a single unnamed logit is 'positive'."""
    names = class_names(model)
    return ['positive'] if names == ['class 0'] else names


def predict(
    model: nn.Module,
    images: Sequence[ImageT],
    read: Callable[[ImageT], Image.Image] = read_image,  # type: ignore[assignment]
    topk: int | None = 5,
    threshold: float = 0,
    **options: Any,
) -> Iterator[list[Prediction] | ValueError]:
    """Classifies images; yields the most likely classes of each image, in order, or the error that prevented this.

    Keeps at most `topk` classes (None for all) with at least the probability `threshold`. `options` are for `classify`.
    """
    labels = label_classes(model)
    for scores in classify(model, images, read, **options):
        if isinstance(scores, ValueError):
            yield scores
        else:
            best = scores.topk(min(topk or len(labels), len(labels)))
            pairs = zip(best.values.tolist(), best.indices.tolist())
            yield [Prediction(i, labels[i], value) for value, i in pairs if value >= threshold]


def classify(
    model: nn.Module,
    images: Sequence[ImageT],
    read: Callable[[ImageT], Image.Image],
    batch_size: int = 16,
    multi_label: bool = False,
) -> Iterator[Tensor | ValueError]:
    """Yields the probabilities (classes,) of each image, in order, or the error that prevented it.

    They come from a softmax, or from a sigmoid for a single logit. With `multi_label`, an image can belong to several
    classes, and each logit gets its own sigmoid. `images` are files, or whatever `read` accepts; several threads call
    it. The model must be in evaluation mode. It is fused unless there are only a few images.
    """
    require_eval_mode(model)
    config = image_config(model)
    transform = image_transform(config)
    example = torch.zeros(min(batch_size, len(images)), *config['input_size'])
    fixed = None  # the only batch size of an exported model
    if isinstance(model, ExportedModel):
        fixed = model.record['input'][0]
    else:
        example = example.to(next(model.parameters()))  # its device and data type
        if len(images) > FEW_IMAGES:
            try:
                model = optimize(model, example, compile=False)
            except ValueError as error:  # timm's other models have nothing to fuse
                _logger.debug('%s runs unchanged: %s', type(model).__name__, error)
    size = fixed or batch_size

    def load(image: ImageT) -> Tensor | ValueError:
        try:
            return transform(read(image))  # (C, H, W)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:  # Pillow decodes without the GIL
        loading = pool.map(load, images[:size])
        for start in range(0, len(images), size):
            batch = list(loading)
            loading = pool.map(load, images[start + size : start + 2 * size])  # while the model runs
            inputs = [each for each in batch if isinstance(each, Tensor)]
            if inputs:
                x = torch.stack(inputs + inputs[:1] * ((fixed or 0) - len(inputs))).to(example)
                with torch.inference_mode():
                    logits = model(x).float()
                is_sigmoid = multi_label or logits.shape[1] == 1
                rows = iter((logits.sigmoid() if is_sigmoid else logits.softmax(dim=1)).cpu())
            for each in batch:
                scores = next(rows) if isinstance(each, Tensor) else each
                if isinstance(scores, Tensor) and not scores.isfinite().all():  # the network overflowed
                    scores = ValueError('the model returns NaN or infinity for this image')
                yield scores


@torch.inference_mode()
def feature_pyramid(model: nn.Module, image: Image.Image) -> tuple[Tensor, list[Tensor]]:
    """Returns an image as the model sees it, (3, H, W) in 0..1, and its feature maps (C, h, w)."""
    x, shown = preprocess(model, image)
    features = model(x[None].to(next(model.parameters()).device))
    return shown, [feature[0].cpu() for feature in features]
