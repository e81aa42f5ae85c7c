"""`timm-res2net export`: writes a file that runs without this package."""

import argparse
from itertools import chain

from ..deploy.export import PRECISIONS, export
from ..recipes.arguments import positive
from .options import Commands
from .output import describe_training, print
from .sources import make_source

__all__ = ['add_export']


def add_export(commands: Commands) -> None:
    """Adds the arguments of `export`."""
    command = commands.add_parser(
        'export',
        help='write a file that runs without this package',
        description='Exports a model to ONNX (.onnx), OpenVINO (.xml and .bin) or torch (.pt2), loads the file by its '
        'own runtime, and compares it with the model before it appears.',
    )
    command.add_argument('source', metavar='SOURCE', help='a name, a file of weights, or a folder that convert made')
    command.add_argument('out', metavar='OUT', help='what to write; the suffix says the format')
    command.add_argument('--model', metavar='NAME', help='the model that the file fits (default: found out)')
    choices = dict.fromkeys(chain.from_iterable(PRECISIONS.values()))  # in their order, each once
    command.add_argument('--precision', choices=choices, default='float32', help='default: float32')
    command.add_argument('--images', metavar='FOLDER', help='images to calibrate int8 with, and to compare with')
    command.add_argument('--batch', type=positive, metavar='N', help='the only batch size (default: any)')
    command.add_argument('--size', type=positive, metavar='PX', help="height and width (default: the model's)")
    command.add_argument('--features', action='store_true', help='export the feature maps instead of the classifier')
    command.add_argument('--compile', action='store_true', help='compile .pt2 to machine code of this machine')
    command.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Exports a model, and prints how the file compares with it."""
    model, converted = make_source(args, **(dict(features_only=True) if args.features else {}))
    done = export(
        model,
        args.out,
        precision=args.precision,
        images=args.images,
        batch=args.batch,
        size=args.size,
        compile=args.compile,
    )
    print(f'wrote {done.file}, {done.bytes / 1e6:.2f} MB: {done.path}')
    compared = f'{done.images} {"images" if args.images else "random images"}'
    print(f'compared with the model on {compared}, by its own runtime:')
    print(f'  largest difference {done.largest_difference:.2e} of the largest output')
    print(f'  mean difference    {done.mean_difference:.2e} (root mean square, relative)')
    if done.agreement is not None:
        print(f'  likeliest class    the same for {done.agreement:.2%}')
    if converted is not None:
        lines = describe_training(converted.training, model.pretrained_cfg, converted.num_classes)
        print('\n'.join(lines[:1] if args.features else lines))
    return 0
