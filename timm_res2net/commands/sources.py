"""The models and images that arguments name."""

import argparse
import difflib
import os
import sys
from typing import Any

import torch
from PIL import Image
from torch import nn

from ..deploy.images import read_image
from ..models.variants import WEIGHTS
from ..vision.predict import is_exported, name_classes, pretrained_model
from ..weights.checkpoints import Checkpoint, read_checkpoint
from ..weights.config import load_folder
from ..weights.convert import convert
from ..weights.errors import UnknownModelError
from ..weights.loading import load_model
from ..weights.recorded import Training, read_labels
from .options import refuse
from .output import describe_training, print

__all__ = ['PHOTO', 'make_classifier', 'make_source', 'read_named_image', 'read_parameters', 'read_weights']

PHOTO = 'res2net50d.in1k'


def read_weights(file: str | None) -> Checkpoint | str | None:
    """What --weights names: a checkpoint, or an exported model, which stays the name of a file."""
    return file if file is None or is_exported(file) else read_checkpoint(file)


def read_parameters(file: str | None) -> Checkpoint | None:
    """What --weights names where a network is looked into: a checkpoint.

    Raises:
        ValueError: For an exported model.
        CheckpointError: If the file can't be read.
    """
    weights = read_weights(file)
    if isinstance(weights, str):
        raise ValueError(f'{weights} is an exported model, in which nothing can be looked at; give what it was made of')
    return weights


def make_classifier(
    name: str | None, weights: Checkpoint | str | None, labels: str | None = None, device: torch.device | str = 'cpu'
) -> nn.Module:
    """Makes the model of --model, --weights and --labels, and says what a file tells of its images and classes."""
    names = read_labels(labels) if labels is not None else None
    model: Any = pretrained_model(name, weights, device)
    file, cfg = weights, model.pretrained_cfg
    if isinstance(weights, Checkpoint):
        file, training = weights.file, weights.training
    else:  # an exported model tells all that it uses
        training = Training(dict(cfg), tuple(cfg.get('label_names') or ()), str(file))
    if not model.num_classes:
        raise ValueError(f'{file or name} has no classifier to predict classes with; give weights that have one')
    if names is not None:
        name_classes(model, names)
    if file is not None:
        lines = [f'weights      {file}', *describe_training(training, cfg, model.num_classes)]
        print('\n'.join(lines), file=sys.stderr)
    return model


def make_source(args: argparse.Namespace, **options: Any) -> tuple[Any, Checkpoint | None]:
    """Makes the model of SOURCE and --model: of a folder, of a file of weights, or of a name of published ones.

    Args:
        args: With `source` and `model`.
        **options: For `timm.create_model`.

    Returns:
        The model, and what a file tells of it.

    Raises:
        UnknownModelError: If SOURCE is none of these.
    """
    source = args.source
    is_folder = os.path.isdir(source)
    if os.path.lexists(source) and not is_folder:
        done = convert(source, dry_run=True, model=args.model)
        return load_model(done.checkpoint, done.name, **done.args, **options).eval(), done.checkpoint
    if not is_folder and ':' not in source and not any(source in (name, name.partition('.')[0]) for name in WEIGHTS):
        alike = difflib.get_close_matches(source, WEIGHTS)
        hint = f'did you mean {" or ".join(alike)}?' if alike else '`timm-res2net list --pretrained` shows the names'
        raise UnknownModelError(f'{source} is no file, no folder, and no name of published weights; {hint}')
    refuse(args, f'{source} says which model it is', '--model')
    return load_folder(source, **options) if is_folder else pretrained_model(source, **options), None


def read_named_image(path: str) -> Image.Image:
    """Reads an image; the ValueError for one that can't be read names it."""
    try:
        return read_image(path)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error
