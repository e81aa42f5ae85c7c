"""Models and images that arguments name."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image
from torch import nn

from .._errors import UnknownModelError
from .._files import PathLike
from .._images import read_image
from ..models.variants import WEIGHTS
from ..vision.predict import is_exported, name_classes, pretrained_model
from ..vision.validate import sort_classes
from ..weights.checkpoints import Checkpoint, read_checkpoint
from ..weights.config import read_labels
from ..weights.convert import convert
from ..weights.loading import load_folder, load_model
from .options import refuse
from .output import describe_training, print

PHOTO = 'res2net50d.in1k'  # the default model for photos


def read_weights(args: argparse.Namespace, path: str | None, parameters: bool = False) -> Checkpoint | str | None:
    """Reads a value of --weights; the path of an exported model stays a path, or `parameters` refuses it."""
    if path is not None and not is_exported(path):
        return read_checkpoint(path, **selected_weights(args))
    if path is not None and parameters:
        raise ValueError(f'{path} is an exported model, which hides its layers. Pass the weights it was made from')
    refuse(args, 'only a checkpoint can have averaged weights', '--weights-from')
    return path


def selected_weights(args: argparse.Namespace) -> dict[str, str]:
    """Returns --weights-from as a keyword argument, if it is given."""
    return {'weights_from': args.weights_from} if args.weights_from else {}


def make_classifier(
    args: argparse.Namespace, name: str | None, weights: Checkpoint | str | None, device: torch.device | str = 'cpu'
) -> nn.Module:
    """Makes the model of a command from a name or from `read_weights`, and prints what the weights record."""
    names = read_label_names(args)
    model: Any = pretrained_model(name, weights, device, getattr(args, 'trust', False))
    file = weights.file if isinstance(weights, Checkpoint) else weights
    if not model.num_classes:
        raise ValueError(f'{file or name} has no classifier. Pass weights that have one')
    recorded: Any = weights
    if not isinstance(weights, Checkpoint):  # an exported model records all that it uses
        labels = tuple(model.pretrained_cfg.get('label_names') or ())
        recorded = SimpleNamespace(images=model.pretrained_cfg, labels=labels, labels_from=file)
    if names is not None:
        name_classes(model, names)
    if file is not None:
        lines = [f'weights      {file}', *describe_training(recorded, model.pretrained_cfg, model.num_classes)]
        print('\n'.join(lines), file=sys.stderr)
    return model


def make_source(args: argparse.Namespace, **options: Any) -> tuple[Any, Checkpoint | None]:
    """Makes the model of SOURCE, a file, a folder or published weights; and the checkpoint of a file."""
    source = args.source
    if os.path.lexists(source) and not os.path.isdir(source):
        done = convert(source, dry_run=True, model=args.model, **selected_weights(args))
        return load_model(done.checkpoint, done.name, **done.args, **options).eval(), done.checkpoint
    is_published = ':' in source or any(source in (name, name.partition('.')[0]) for name in WEIGHTS)
    if not is_published and not os.path.isdir(source):
        raise UnknownModelError.among(source, WEIGHTS, kind='file, folder or published weights')
    refuse(args, f'{source} already determines the model', '--model', '--weights-from')
    return load_folder(source, **options) if os.path.isdir(source) else pretrained_model(source, **options), None


def read_label_names(args: argparse.Namespace) -> list[str] | None:
    """Reads the names of --labels, in the order of --class-order if they are folders."""
    if args.labels is None:
        return None
    names = read_labels(args.labels)
    return sort_classes(names, args.class_order) if os.path.isdir(args.labels) else names


def image_reader(args: argparse.Namespace) -> Callable[[PathLike], Image.Image]:
    """Returns `read_image` with the limit of --max-pixels, which replaces the limit of Pillow."""
    Image.MAX_IMAGE_PIXELS = None
    return partial(read_image, max_pixels=args.max_pixels)


def read_image_argument(args: argparse.Namespace) -> Image.Image:
    """Reads IMAGE; the ValueError names the file."""
    try:
        return image_reader(args)(args.image)
    except ValueError as error:
        raise ValueError(f'{args.image}: {error}') from error
