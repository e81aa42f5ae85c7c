"""What detectors and segmenters do with a backbone before training: take weights, freeze stages and norms."""

import argparse
import os
from typing import Any

import torch
from timm.utils.model import freeze, freeze_batch_norm_2d

from ..weights.loading import load_checkpoint
from .training_loop import add_settings

__all__ = ['add_arguments', 'choices_of', 'prepare']


def add_arguments(parser: argparse.ArgumentParser, backbone: str) -> None:
    """Adds the arguments that recipes with a backbone share: data, run, backbone, training."""
    parser.add_argument('out', help="the run's folder")
    parser.add_argument('--train', default='train', help='part to train with (default: train)')
    parser.add_argument('--val', default='val', help='part to evaluate with (default: val)')
    parser.add_argument('--backbone', default=backbone, help="timm's name of a model (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--pretrained', action='store_true', help="begin with timm's weights of that name")
    source.add_argument('--weights', help='begin with the weights in this file, of whatever code base')
    parser.add_argument('--frozen-stages', type=int, default=-1, help='0: the stem, 1: and the first stage, ...')
    parser.add_argument('--frozen-norms', action='store_true', help="don't train the backbone's norms")
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument('--workers', type=int, default=workers, help='processes to read images (default: %(default)s)')
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--resume', action='store_true', help='go on with the run in the folder')
    parser.add_argument('--show', metavar='PNG', help='at the end, draw what the best model finds')
    add_settings(parser)


def choices_of(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a resumed run has to agree with, beside the settings of training."""
    names = 'train', 'val', 'backbone', 'pretrained', 'weights', 'frozen_stages', 'frozen_norms', *more
    return {name: getattr(args, name) for name in names}


def prepare(body: Any, weights: str | None = None, frozen_stages: int = -1, frozen_norms: bool = False) -> None:
    """Loads weights into a backbone, then freezes parts of it.

    Args:
        body: A model of timm with `features_only`.
        weights: File to load.
        frozen_stages: Features, with all that leads to them, that are not trained: -1 for none, 0 for the stem, 1 for
            the stem and the first stage, and so on.
        frozen_norms: Don't train norms anywhere.

    Raises:
        ValueError: If there is no such stage.
        CheckpointError: If the file doesn't fit.
        TypeError: If a file is given for a model of other packages.
    """
    if weights is not None:
        load_checkpoint(body, weights)
    root = getattr(body, 'model', body)  # which of them it is depends on how timm takes features out of the model
    if frozen_stages >= 0:
        modules = [each['module'] for each in body.feature_info.info]
        if frozen_stages >= len(modules):
            raise ValueError(f'there is no stage {frozen_stages} to freeze; the last one is {len(modules) - 1}')
        names = [child for child, _ in root.named_children()]
        freeze(root, names[: names.index(modules[frozen_stages].split('.')[0]) + 1])
    if frozen_norms:
        freeze_batch_norm_2d(root)
