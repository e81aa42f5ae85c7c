"""`timm-res2net bench`: measures models beside timm's own."""

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..deploy.bench import MODELS, OPPONENTS, Result, bench, environment, growth
from ..deploy.optimize import DTYPES
from ..recipes.arguments import device, positive
from ..vision.figures import plot_bench, plot_growth, require_drawable
from ..weights.files import atomic_write_text, require_writable
from .options import Commands, refuse
from .output import print, print_table

__all__ = ['add_bench']

DTYPE_NAMES = {str(dtype).removeprefix('torch.'): dtype for dtype in DTYPES}


def add_bench(commands: Commands) -> None:
    """Adds the arguments of `bench`."""
    command = commands.add_parser(
        'bench',
        help="measure models beside timm's own",
        description="Measures models beside timm's own, in turns in one run: in inference as they are, fused and "
        'optimized, or in training. All ways have to compute the same before any is measured.',
    )
    command.add_argument('--models', nargs='+', metavar='NAME', help=f'default: {" ".join(MODELS)}')
    command.add_argument('--batch', nargs='+', type=positive, metavar='N', help='images (default: 8)')
    command.add_argument('--size', nargs='+', type=positive, metavar='PX', help='default: 224')
    command.add_argument('--dtype', nargs='+', choices=DTYPE_NAMES, help='default: float32 bfloat16')
    command.add_argument('--against', type=opponents, metavar='A,B', help=f'of {",".join(OPPONENTS)} (default: timm)')
    command.add_argument('--train', action='store_true', help='measure steps of training')
    command.add_argument(
        '--growth', action='store_true', help='measure how cost grows with scale, batch and image size'
    )
    command.add_argument('--rounds', type=positive, default=20, metavar='N', help='measurements of each (default: 20)')
    command.add_argument('--device', type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)')
    command.add_argument('--json', metavar='FILE', help='write all figures to this file')
    command.add_argument('--plot', metavar='PNG', help='draw them to this file')
    command.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Prints how fast models are, writes and draws it."""
    if args.json is not None:
        require_writable(args.json)
    if args.plot is not None:
        require_drawable(args.plot)
    if args.growth:
        refuse(
            args, '--growth says what it measures', '--models', '--batch', '--size', '--dtype', '--against', '--train'
        )
        parts = growth(args.device, args.rounds)
    else:
        if args.train and set(args.against or ()) - {'timm', 'inductor'}:
            refuse(args, "training is compared with timm's own and with what inductor compiles", '--against')
        dtypes = [DTYPE_NAMES[name] for name in args.dtype or ()]
        options = dict(models=args.models, batches=args.batch, sizes=args.size, dtypes=dtypes, against=args.against)
        given: dict[str, Any] = {name: value for name, value in options.items() if value}
        results = bench(**given, train=args.train, device=args.device, rounds=args.rounds)
        parts = {'training' if args.train else 'inference': results}
    about = environment()
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    for part, results in parts.items():
        print(f'\n{part}')
        show_results(results)
    if args.json is not None:
        document = dict(environment=about, **{part: [vars(each) for each in found] for part, found in parts.items()})
        atomic_write_text(args.json, json.dumps(document, indent=1) + '\n')
        print(f'\nwrote {args.json}')
    if args.plot is not None:
        plot_growth(parts, args.plot) if args.growth else plot_bench(results, args.plot)
        print(f'\ndrawn to {args.plot}')
    return 0


def show_results(results: Sequence[Result]) -> None:
    """Prints a line for each result."""
    head = 'model batch size way type ms +- images/s x-timm of-peak operators MB'
    rows = [tuple(head.split())]
    for each in results:
        numbers = f'{each.milliseconds:.1f}', f'{each.spread:.1f}', f'{each.images_per_second:.1f}'
        ratio = '-' if each.ratio is None else f'{each.ratio:.2f}'
        memory = '-' if each.peak_memory is None else f'{each.peak_memory / 1e6:.0f}'
        place = each.model, str(each.batch), str(each.size), each.way, each.dtype
        rows.append((*place, *numbers, ratio, f'{each.share_of_peak:.0%}', str(each.operators or '-'), memory))
    print_table(rows, left=(0, 3, 4))


def opponents(text: str) -> tuple[str, ...]:
    """An argument that is names of what to measure against."""
    names = tuple(text.split(','))
    if unknown := set(names) - set(OPPONENTS):
        raise argparse.ArgumentTypeError(f'{", ".join(unknown)} is not of {", ".join(OPPONENTS)}')
    return names
