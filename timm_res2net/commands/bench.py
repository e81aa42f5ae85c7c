"""Measures the speed of models and of timm's own, after checking that all compute the same outputs."""

import argparse
import json
from collections.abc import Sequence

from .._files import atomic_write_text, require_writable
from ..deploy.backends import PRECISIONS
from ..deploy.bench import MODELS, OPPONENTS, Result, bench, environment
from ..recipes.arguments import positive
from .options import add_options
from .output import print, print_table


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('--models', nargs='+', default=MODELS, metavar='NAME', help=f'default: {" ".join(MODELS)}')
    command.add_argument('--batch', nargs='+', type=positive, default=[8], metavar='N', help='batch sizes (default: 8)')
    command.add_argument('--size', nargs='+', type=positive, default=[224], metavar='PX', help='sizes (default: 224)')
    dtypes = ['float32', 'bfloat16']
    command.add_argument('--dtype', nargs='+', choices=PRECISIONS, default=dtypes, help=f'default: {" ".join(dtypes)}')
    command.add_argument('--against', default='timm', metavar='A,B', help=f'{",".join(OPPONENTS)} (default: timm)')
    command.add_argument('--train', action='store_true', help='measure training steps, not inference')
    command.add_argument('--rounds', type=positive, default=20, metavar='N', help='measurements per row (default: 20)')
    add_options(command, '--device')
    command.add_argument('--json', metavar='FILE', help='write the results to this file')


def run(args: argparse.Namespace) -> None:
    if args.json is not None:
        require_writable(args.json)
    results = bench(
        models=args.models,
        batches=args.batch,
        sizes=args.size,
        dtypes=args.dtype,
        against=args.against.split(','),
        train=args.train,
        device=args.device,
        rounds=args.rounds,
    )
    about, part = environment(), 'training' if args.train else 'inference'
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    print(f'\n{part}')
    show_results(results)
    if args.json is not None:
        document = {'environment': about, part: [vars(each) for each in results]}
        atomic_write_text(args.json, json.dumps(document, indent=1) + '\n')
        print(f'\nwrote {args.json}')


def show_results(results: Sequence[Result]) -> None:
    """Prints a line for each result."""
    rows = [('model', 'batch', 'size', 'way', 'type', 'ms', '+-', 'images/s', 'x-timm', 'MB')]
    for each in results:
        ratio = '-' if each.ratio is None else f'{each.ratio:.2f}'
        memory = '-' if each.peak_memory is None else f'{each.peak_memory / 1e6:.0f}'
        numbers = f'{each.milliseconds:.1f}', f'{each.spread:.1f}', f'{each.images_per_second:.1f}'
        rows.append((each.model, str(each.batch), str(each.size), each.way, each.dtype, *numbers, ratio, memory))
    print_table(rows, left=(0, 3, 4))
