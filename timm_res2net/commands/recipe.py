"""`timm-res2net recipe`: shows configurations for timm's train script."""

import argparse
from pathlib import Path

from ..weights.files import atomic_write_text
from .options import Commands, refuse
from .output import print

__all__ = ['add_recipe']

RECIPES = Path(__file__).parents[1] / 'recipes'


def add_recipe(commands: Commands) -> None:
    """Adds the arguments of `recipe`."""
    command = commands.add_parser(
        'recipe',
        help="show configurations for timm's train script",
        description="Lists configurations for timm's train script, or prints or writes one: "
        'train.py --device-modules timm_res2net --config FILE --data-dir DIR',
    )
    command.add_argument('name', nargs='?', metavar='NAME', help='such as imagenet; all are listed without')
    command.add_argument('--out', metavar='FILE', help='write it to this file')
    command.set_defaults(run=run_recipe)


def run_recipe(args: argparse.Namespace) -> int:
    """Lists the recipes, or prints or writes one."""
    recipes = {path.stem: path.read_text() for path in sorted(RECIPES.glob('*.yaml'))}
    if args.name is None:
        refuse(args, 'name the recipe to write', '--out')
        for name, text in recipes.items():
            print(f'{name:{max(map(len, recipes))}}  {text.splitlines()[0].removeprefix("# ").rstrip(":")}')
        return 0
    args.name = args.name.removesuffix('.yaml')
    if args.name not in recipes:
        args.error(f'there is no recipe {args.name}; there are {", ".join(recipes)}')
    if args.out is None:
        print(recipes[args.name], end='')
        return 0
    atomic_write_text(args.out, recipes[args.name])
    print(f'wrote {args.out}')
    return 0
