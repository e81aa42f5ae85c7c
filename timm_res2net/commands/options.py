"""What arguments of several commands share."""

import argparse
from typing import TypeAlias

__all__ = ['Commands', 'add_labels', 'add_timeout', 'refuse']

# What add_subparsers returns; argparse has no public name for it.
Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'


def add_labels(command: argparse.ArgumentParser) -> None:
    """Adds the argument that names classes."""
    command.add_argument(
        '--labels', metavar='PATH', help='names of the classes: a text file, a line each, or the folder of the data'
    )


def add_timeout(command: argparse.ArgumentParser) -> None:
    """Adds the argument that says how long the Hub is waited for."""
    command.add_argument(
        '--timeout', type=float, metavar='S', help='seconds to wait for the Hub (default: $TIMM_RES2NET_TIMEOUT or 120)'
    )


def refuse(args: argparse.Namespace, why: str, *options: str) -> None:
    """Ends the program, as for any other wrong call, if options are given that would have no effect."""
    if given := [option for option in options if getattr(args, option.removeprefix('--').lower())]:
        args.error(f'{" and ".join(given)} would have no effect: {why}')
