"""Classifies images, and loads the model for it."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import timm
import torch
from PIL import Image
from timm.models import parse_model_name
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from ..deploy.images import image_transform, preprocess, read_image
from ..deploy.optimize import optimize
from ..deploy.runtimes import SUFFIXES, load_exported
from ..hub.pull import bring_file
from ..models.classifier import class_names, image_config, registered_cfg
from ..models.fold import require_eval_mode
from ..weights.checkpoints import Checkpoint
from ..weights.convert import require_as_many_labels
from ..weights.errors import first_line
from ..weights.files import PathLike
from ..weights.folder import CONFIG_FILE
from ..weights.loading import load_model, require_known

__all__ = ['Prediction', 'classify', 'feature_pyramid', 'is_exported', 'name_classes', 'predict', 'pretrained_model']

_logger = logging.getLogger(__name__)

ImageT = TypeVar('ImageT')
HANDFUL = 16  # images for which fusing and starting processes takes longer than it saves


@dataclass(frozen=True)
class Prediction:
    """A class that an image may belong to."""

    index: int
    label: str
    probability: float


def pretrained_model(
    name: str | None, weights: PathLike | Checkpoint | None = None, device: str | torch.device = 'cpu', **kwargs: Any
) -> nn.Module:
    """Makes a model with its published weights, or with those of a file, in evaluation mode.

    Args:
        name: A name that `timm.create_model` takes. None for the model that `weights` fit.
        weights: A file for `timm_res2net.load_model`, whose number of classes the model gets; or an exported model.
        device: Where to put the model.
        **kwargs: For `timm.create_model`.

    Raises:
        UnknownModelError: If there is no such model; the message names those most alike.
        ValueError: If the weights can't be loaded, with the reason in one line.
    """
    if weights is not None and not isinstance(weights, Checkpoint) and is_exported(weights):
        if name is not None or kwargs or str(device) != 'cpu':
            raise ValueError(f'{weights} is an exported model, which runs as it is, on the CPU: give nothing else')
        exported = load_exported(weights)
        if exported.record['features']:
            raise ValueError(f'{weights} returns feature maps and no classes; export it without --features')
        return exported
    if weights is not None:
        return load_model(weights, name, **kwargs).to(device).eval()
    if name is None:
        raise ValueError('give the name of a model, or a file of weights')
    require_known(name)
    if ':' not in name and not registered_cfg(name).has_weights:
        raise ValueError(f'there are no published weights of {name}; give a file of yours')
    try:
        source = commit_in_cache(name, kwargs.get('cache_dir'))
        return timm.create_model(source, pretrained=True, **kwargs).to(device).eval()
    except Exception as error:  # a download fails in as many ways as libraries take part in it
        _logger.debug('no weights of %s', name, exc_info=True)
        problem = f'weights of {name} can not be had: {first_line(error)}'
        if not name.startswith('local-dir:'):
            problem += (
                '. If you are offline, give a file of weights, or take test_res2net.digits, which needs no network'
            )
        raise ValueError(problem) from error


def commit_in_cache(name: str, cache_dir: PathLike | None) -> str:
    """The name of a model on the Hub with its last commit, whose verified configuration is in the cache then.

    timm takes it from there without asking; by itself it would ask for half a minute, with a line each time.
    """
    source, hub_id = parse_model_name(name)
    found = bring_file(hub_id, CONFIG_FILE, cache_dir) if source == 'hf-hub' else None
    return name if found is None else f'hf-hub:{hub_id.partition("@")[0]}@{found.parent.name}'


def is_exported(file: PathLike) -> bool:
    """Whether a file's name is that of an exported model, and not of weights."""
    return os.fspath(file).endswith(SUFFIXES)


def name_classes(model: nn.Module, labels: Sequence[str]) -> None:
    """Gives names to the classes of a model, also of an exported one; ValueError if there are not as many."""
    net: Any = model
    require_as_many_labels(labels, net.num_classes)
    net.pretrained_cfg['label_names'] = tuple(labels)


def predict(
    model: nn.Module,
    images: Sequence[ImageT],
    read: Callable[[ImageT], Image.Image] = read_image,  # type: ignore[assignment]
    topk: int = 5,
    batch_size: int = 16,
    compile: bool = False,
) -> Iterator[list[Prediction] | ValueError]:
    """Classifies images, preprocessed as the model's own configuration says.

    Args:
        model: A model with a `pretrained_cfg`, as timm makes it, in evaluation mode, or an exported one.
        images: Files, or other arguments of `read`.
        read: Reads one of them as an RGB image.
        topk: Number of classes to return, of all that there are.
        batch_size: Number of images that are classified at once.
        compile: Compile the model first, which pays for thousands of images.

    Yields:
        For each image, in order, its likeliest classes, or the error that prevented it.

    Raises:
        ValueError: If the model is in training mode.
    """
    labels = class_names(model)
    for scores in classify(model, images, read, batch_size, compile):
        if isinstance(scores, ValueError):
            yield scores
        else:
            best = scores.topk(min(topk, len(labels)))  # values and indices
            yield [Prediction(i, labels[i], value) for value, i in zip(best.values.tolist(), best.indices.tolist())]


def classify(
    model: nn.Module, images: Sequence[ImageT], read: Callable[[ImageT], Image.Image], batch_size: int, compile: bool
) -> Iterator[Tensor | ValueError]:
    """Computes the probabilities of classes, (classes,) for each image in order, or the error that prevented it.

    For more than a handful of images the model is fused, and several processes read images.
    """
    require_eval_mode(model)
    config = image_config(model)
    parameter = next(model.parameters(), None)  # an exported model has none
    device, dtype = (torch.device('cpu'), torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    exported: Any = model
    fixed = exported.record['input'][0] if parameter is None else None  # the only batch size of an exported model
    many = len(images) > HANDFUL
    if parameter is not None and (many or compile):
        example = torch.zeros(min(batch_size, len(images)), *config['input_size'], device=device, dtype=dtype)
        try:
            model = optimize(model, example, compile=compile)
        except ValueError as error:  # timm's other models have nothing to fuse
            _logger.debug('%s runs as it is: %s', type(model).__name__, error)
    loader: DataLoader[Any] = DataLoader(
        ReadImages(images, read, image_transform(config)),
        batch_size=fixed or batch_size,
        num_workers=min(4, os.cpu_count() or 1) if many and read is read_image else 0,
        collate_fn=list,
    )
    for batch in loader:
        inputs = [image for image in batch if isinstance(image, Tensor)]  # (C, H, W) each
        if inputs:
            x = torch.stack(inputs + inputs[:1] * ((fixed or 0) - len(inputs)))
            with torch.inference_mode():
                probabilities = model(x.to(device, dtype)).float().softmax(dim=1).cpu()  # (N, classes)
        rows = iter(probabilities) if inputs else iter(())
        for image in batch:
            found = next(rows) if isinstance(image, Tensor) else image
            if isinstance(found, Tensor) and not found.isfinite().all():  # of weights that overflow
                found = ValueError('the model gives no finite number for this image')
            yield found


class ReadImages(Dataset[Any]):
    """Reads and preprocesses images; one that can't be read becomes its error."""

    def __init__(self, images: Sequence[Any], read: Callable[[Any], Image.Image], transform: Callable[..., Tensor]):
        self.images, self.read, self.transform = images, read, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | ValueError:
        try:
            return self.transform(self.read(self.images[index]))
        except ValueError as error:
            return ValueError(str(error))  # which can be sent to another process


@torch.inference_mode()
def feature_pyramid(model: nn.Module, image: Image.Image) -> tuple[Tensor, list[Tensor]]:
    """Runs a feature extractor (`features_only=True`) on an image.

    Returns:
        The model's input as it looks, (3, H, W) in 0..1, and its feature maps, (C, H / stride, W / stride) each.
    """
    x, shown = preprocess(model, image)
    features = model(x[None].to(next(model.parameters()).device))
    return shown, [feature[0].cpu() for feature in features]
