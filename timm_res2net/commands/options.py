"""Options that several commands share."""

import argparse
from typing import Any

import torch

from .._errors import first_line
from .._images import MAX_PIXELS
from ..recipes.arguments import positive
from ..vision.validate import CLASS_ORDERS


def probability(text: str) -> float:
    if not 0 <= float(text) <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not between 0 and 1')
    return float(text)


def device(text: str) -> torch.device:
    """Parses the name of a device, which this machine must have."""
    try:
        torch.empty(0, device=text).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f'cannot use device {text!r}: {first_line(error)}') from None
    return torch.device(text)


OPTIONS: dict[str, dict[str, Any]] = {
    '--weights-from': dict(
        choices=('ema', 'model'), help='weights to use if a checkpoint has averaged (ema) and latest (model) ones'
    ),
    '--labels': dict(metavar='PATH', help='class names: a file with one per line, or a folder of class folders'),
    '--class-order': dict(
        choices=CLASS_ORDERS, help="order of class folders: timm's ('2' before '10', the default) or torchvision's"
    ),
    '--multi-label': dict(action='store_true', help='an image can have several classes: use sigmoids, not a softmax'),
    '--max-pixels': dict(
        type=positive, default=MAX_PIXELS, metavar='N', help=f'largest image to read (default: {MAX_PIXELS} pixels)'
    ),
    '--trust': dict(action='store_true', help='run an exported .pt2, which can contain any code'),
    '--device': dict(type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)'),
    '--batch-size': dict(type=positive, default=16, metavar='N', help='images per forward pass (default: 16)'),
    '--json': dict(action='store_true', help='machine-readable output'),
}
CLASSIFYING = '--trust', '--device', '--batch-size', '--json', '--max-pixels'  # of predict and validate


def add_options(command: argparse.ArgumentParser, *names: str) -> None:
    for name in names:
        command.add_argument(name, **OPTIONS[name])


def add_weights(command: argparse.ArgumentParser, default: str, several: bool = False) -> None:
    """Adds the options that select a model and its weights."""
    help = 'weights file, or folder that convert, push or pull wrote (default: published weights)'
    command.add_argument('--model', metavar='NAME', help=f'default: {default}, or the model that fits the weights')
    command.add_argument('--weights', nargs='+' if several else None, metavar='PATH', help=help)
    add_options(command, '--weights-from')
