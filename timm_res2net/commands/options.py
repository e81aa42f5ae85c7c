"""What arguments of several commands share."""

import argparse
from typing import TypeAlias

from ..recipes.arguments import device, positive

__all__ = ['Commands', 'add_classifying', 'add_labels', 'add_timeout', 'refuse']

# What add_subparsers returns; argparse has no public name for it.
Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'


def add_labels(command: argparse.ArgumentParser) -> None:
    """Adds the argument that names classes."""
    command.add_argument(
        '--labels', metavar='PATH', help='names of the classes: a text file, a line each, or the folder of the data'
    )


def add_classifying(command: argparse.ArgumentParser) -> None:
    """Adds the arguments of what classifies many images: how, where, and how it tells."""
    command.add_argument('--compile', action='store_true', help='compile first, for thousands of images')
    command.add_argument('--device', type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)')
    command.add_argument('--batch-size', type=positive, default=16, metavar='N', help='images at once (default: 16)')
    command.add_argument('--json', action='store_true', help='machine-readable output')


def add_timeout(command: argparse.ArgumentParser) -> None:
    """Adds the argument that says how long the Hub is waited for."""
    command.add_argument(
        '--timeout', type=float, metavar='S', help='seconds to wait for the Hub (default: $TIMM_RES2NET_TIMEOUT or 120)'
    )


def refuse(args: argparse.Namespace, why: str, *options: str) -> None:
    """Ends the program, as for any other wrong call, if options are given that would have no effect."""
    if given := [option for option in options if getattr(args, option.removeprefix('--').lower())]:
        args.error(f'{" and ".join(given)} would have no effect: {why}')
