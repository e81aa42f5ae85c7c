"""What detectors and segmenters share: arguments, a backbone's weights and what of it is frozen, begin and end."""

import argparse
import os
from collections.abc import Callable, Sequence, Sized
from typing import Any

import torch
from timm.utils.model import freeze, freeze_batch_norm_2d
from torch import nn

from ..weights.loading import load_checkpoint
from .arguments import device
from .coco import require_sheet
from .training_loop import add_settings, best_weights, join_processes, rank, report

__all__ = ['add_arguments', 'begin', 'choices_of', 'data_of', 'end', 'prepare']


def add_arguments(parser: argparse.ArgumentParser, backbone: str) -> None:
    """Adds the arguments that recipes with a backbone share: data, run, backbone, training."""
    parser.add_argument('out', help="the run's folder")
    parser.add_argument('--train', default='train', help='part to train with (default: train)')
    parser.add_argument('--val', default='val', help='part to evaluate with (default: val)')
    parser.add_argument('--backbone', default=backbone, help="timm's name of a model (default: %(default)s)")
    source = parser.add_mutually_exclusive_group()
    source.add_argument('--pretrained', action='store_true', help="begin with timm's weights of that name")
    source.add_argument('--weights', help='begin with the weights in this file, of whatever code base')
    parser.add_argument('--frozen-stages', type=int, default=-1, help='features not to train, with all before: 0, ...')
    parser.add_argument('--frozen-norms', action='store_true', help="don't train the backbone's batch norms")
    workers = min(4, os.cpu_count() or 1)
    parser.add_argument('--workers', type=int, default=workers, help='processes to read images (default: %(default)s)')
    parser.add_argument('--device', type=device, default='cpu')
    parser.add_argument('--resume', action='store_true', help='go on with the run in the folder')
    parser.add_argument('--show', metavar='PNG', help='at the end, draw what the best model finds')
    add_settings(parser)


def choices_of(args: argparse.Namespace, *more: str) -> dict[str, Any]:
    """What a resumed run has to agree with, beside the settings of training."""
    names = 'train', 'val', 'backbone', 'pretrained', 'weights', 'frozen_stages', 'frozen_norms', *more
    return {name: getattr(args, name) for name in names}


def data_of(images: Sized, dataset: Sized, categories: Sequence[Any]) -> dict[str, Any]:
    """What tells a resumed run that it has other data; a folder doesn't, as it may have moved."""
    return dict(images=[len(images), len(dataset)], categories=categories)


def begin(args: argparse.Namespace) -> None:
    """Joins the processes that torchrun has started, seeds the new weights, and checks where to draw.

    Raises:
        ValueError: If the picture's format is not known.
        OSError: If it can't be written.
    """
    join_processes(args.device)
    torch.manual_seed(args.seed)
    if args.show is not None:
        require_sheet(args.show)


def end(
    args: argparse.Namespace,
    model: nn.Module,
    history: Sequence[dict[str, Any]],
    show: Callable[[nn.Module, str, torch.device], None],
) -> None:
    """Prints the metrics of each epoch, and has `show` draw what the best model finds if that is wanted."""
    if rank() != 0:
        return
    print(report(history))
    if args.show is not None:
        model.load_state_dict(best_weights(args.out))
        show(model.eval(), args.show, args.device)


def prepare(body: Any, weights: str | None = None, frozen_stages: int = -1, frozen_norms: bool = False) -> None:
    """Loads weights into a backbone, then freezes parts of it.

    Args:
        body: A model of timm with `features_only`.
        weights: File to load.
        frozen_stages: The last of the model's features that is not trained, with all that leads to it: -1 for none, 0
            for the first one, which is of the stem, 1 for that of the first stage, and so on.
        frozen_norms: Don't train batch norms anywhere.

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
        freeze(root, names_up_to(root, modules[frozen_stages].split('.')))
    if frozen_norms:
        freeze_batch_norm_2d(root)


def names_up_to(root: Any, path: list[str]) -> list[str]:
    """The modules that come before one, and that itself, by their dotted names.

    Args:
        root: What holds them.
        path: The names that lead to it; timm joins some of them by underscores.

    Raises:
        ValueError: If there is none.
    """
    names: list[str] = []
    for name, child in root.named_children():
        for depth in range(1, len(path) + 1):
            if name == '_'.join(path[:depth]):
                rest = path[depth:]
                return [*names, *(f'{name}.{each}' for each in names_up_to(child, rest))] if rest else [*names, name]
        names.append(name)
    raise ValueError(f'{type(root).__name__} has no module {".".join(path)} to freeze')
