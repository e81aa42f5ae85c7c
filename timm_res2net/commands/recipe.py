"""Prints configurations for timm's train.py. Use them with --device-modules timm_res2net --config FILE."""

import argparse
from pathlib import Path

from .._files import atomic_write_text
from .output import print, print_table

RECIPES = Path(__file__).parents[1] / 'recipes'


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('name', nargs='?', metavar='NAME', help='such as imagenet (default: list all)')
    command.add_argument('--out', metavar='FILE', help='write the recipe to this file')


def run(args: argparse.Namespace) -> None:
    recipes = {path.stem: path.read_text() for path in sorted(RECIPES.glob('*.yaml'))}
    if args.name is None:
        if args.out is not None:
            args.error('--out would have no effect: name the recipe to write')
        titles = {name: text.partition('\n')[0].removeprefix('# ').rstrip(':') for name, text in recipes.items()}
        print_table([*titles.items()], left=(0, 1))
        return
    text = recipes.get(args.name.removesuffix('.yaml'))
    if text is None:
        args.error(f'no recipe {args.name!r}. Choose from {", ".join(recipes)}')
    elif args.out is None:
        print(text, end='')
    else:
        atomic_write_text(args.out, text)
        print(f'wrote {args.out}')
