"""`timm-res2net card`: shows model cards."""

import argparse
import os
import sys

from tqdm import tqdm

from ..hub.cards import card, problems_of
from ..hub.catalogue import catalogue
from ..hub.client import problems_on_hub
from ..models.variants import WEIGHTS
from ..weights.errors import UnknownModelError
from ..weights.files import atomic_write_text, make_folder, read_text
from .options import Commands, refuse
from .output import print

__all__ = ['add_card']


def add_card(commands: Commands) -> None:
    """Adds the arguments of `card`."""
    command = commands.add_parser('card', help='show model cards', description='Shows the cards of published weights.')
    command.add_argument('name', nargs='?', metavar='NAME', help='such as res2net50d.in1k, or a file to validate')
    command.add_argument('--all', action='store_true', help='write all of them, and a README.md, to a folder')
    command.add_argument('--out', metavar='DIR', help='the folder (default: hub_cards)')
    command.add_argument('--validate', action='store_true', help='check it here and, if it can be reached, on the Hub')
    command.set_defaults(run=run_card)


def run_card(args: argparse.Namespace) -> int:
    """Prints a card, writes all, or checks one."""
    if args.all:
        refuse(args, '--all writes the cards of all published weights', 'NAME', '--validate')
        folder = 'hub_cards' if args.out is None else args.out
        make_folder(folder)
        for name in tqdm(WEIGHTS, unit='card', disable=None, leave=False):
            atomic_write_text(f'{folder}/{name}.md', card(name))
        atomic_write_text(f'{folder}/README.md', catalogue())
        print(f'wrote {len(WEIGHTS)} cards and README.md to {folder}')
        return 0
    refuse(args, 'cards are written by --all', '--out')
    if args.name is None:
        args.error('name published weights, or say --all; `timm-res2net list --pretrained` shows them')
    try:
        text = read_text(args.name) if os.path.isfile(args.name) else card(args.name)
    except ValueError as error:
        if os.path.isfile(args.name):
            raise
        raise UnknownModelError(f'there is no file {args.name}, and {error}') from error
    if not args.validate:
        print(text, end='')
        return 0
    problems = problems_of(text) + problems_on_hub(text)
    for problem in problems:
        print(f'timm-res2net: {args.name}: {problem}', file=sys.stderr)
    if not problems:
        print(f'{args.name} is a good card')
    return 1 if problems else 0
