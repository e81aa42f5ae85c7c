"""Loads the models and images that arguments name."""

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import nn

from .._errors import UnknownModelError
from .._files import PathLike
from .._images import read_image
from ..models.variants import ARCHS, WEIGHTS
from ..vision.predict import is_exported, name_classes, pretrained_model
from ..vision.validate import sort_classes
from ..weights.checkpoints import Checkpoint, read_checkpoint
from ..weights.config import read_labels
from ..weights.loading import load_folder, load_model
from ..weights.matching import find_model
from .output import describe_training, print

PHOTO = 'res2net50d.in1k'  # the default model for photos


def read_weights(args: argparse.Namespace, path: str | None, exported: bool = True) -> Checkpoint | str | None:
    """Reads one value of --weights. Returns the path of an exported model as it is; refuses it unless `exported`."""
    if path is not None and not is_exported(path):
        return read_checkpoint(path, weights_from=args.weights_from)
    if path is not None and not exported:
        raise ValueError(f'{path} is an exported model, which hides its layers. Pass the weights it was made from')
    if args.weights_from is not None:
        args.error('--weights-from would have no effect: only a checkpoint file can have averaged weights')
    return path


def make_classifier(
    args: argparse.Namespace, name: str | None, weights: Checkpoint | str | None, device: torch.device | str = 'cpu'
) -> nn.Module:
    """Makes a command's model from a name or from `read_weights`, and describes the weights on stderr."""
    names = read_label_names(args)
    model: Any = pretrained_model(name, weights, device, getattr(args, 'trust', False))
    checkpoint = weights if isinstance(weights, Checkpoint) else None
    file = weights if checkpoint is None else checkpoint.file
    if not model.num_classes:
        raise ValueError(f'{file or name} has no classifier. Pass weights that have one')
    if names is not None:
        name_classes(model, names)
    if file is not None:
        lines = describe_training(model.pretrained_cfg, model.num_classes, checkpoint)
        print('\n'.join([f'weights      {file}', *lines]), file=sys.stderr)
    return model


def make_source(args: argparse.Namespace, **options: Any) -> tuple[Any, Checkpoint | None]:
    """Loads SOURCE (a file, a folder or published weights); returns the model, and the checkpoint if it is a file."""
    source = args.source
    if os.path.lexists(source) and not os.path.isdir(source):
        checkpoint = read_checkpoint(source, weights_from=args.weights_from)
        name, found, _ = find_model(checkpoint, args.model)
        return load_model(checkpoint, name, **found, **options).eval(), checkpoint
    if args.model is not None or args.weights_from is not None:
        args.error(f'--model and --weights-from would have no effect: {source} already determines the model')
    if os.path.isdir(source):
        return load_folder(source, **options), None
    if ':' not in source and source.partition('.')[0] not in ARCHS:
        raise UnknownModelError.among(source, WEIGHTS, kind='file, folder or published weights')
    return pretrained_model(source, **options), None


def read_label_names(args: argparse.Namespace) -> list[str] | None:
    """Reads the names of --labels, in the order of --class-order if they are folders."""
    is_folder = args.labels is not None and os.path.isdir(args.labels)
    if args.class_order and not (is_folder or hasattr(args, 'folder')):  # validate also sorts its FOLDER
        args.error('--class-order would have no effect: --labels is not a folder')
    if args.labels is None:
        return None
    names = read_labels(args.labels)
    return sort_classes(names, args.class_order) if is_folder else names


def image_reader(args: argparse.Namespace) -> Callable[[PathLike], Image.Image]:
    """Returns `read_image` with the limit of --max-pixels, which replaces Pillow's own limit."""
    Image.MAX_IMAGE_PIXELS = None
    return partial(read_image, max_pixels=args.max_pixels)


def read_image_argument(args: argparse.Namespace) -> Image.Image:
    """Reads IMAGE; if that fails, raises ValueError with the name of the file."""
    try:
        return image_reader(args)(args.image)
    except ValueError as error:
        raise ValueError(f'{args.image}: {error}') from error
