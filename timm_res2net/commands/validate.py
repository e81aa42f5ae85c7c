"""`timm-res2net validate`: measures accuracy."""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

from ..models.classifier import class_names
from ..vision.figures import plot_confusion, require_drawable
from ..vision.predict import is_exported
from ..vision.validate import labelled_images, validate
from .options import Commands, add_classifying, add_labels, refuse
from .output import left_out, print, print_table, report_left_out
from .sources import PHOTO, make_classifier, read_weights

__all__ = ['add_validate']


def add_validate(commands: Commands) -> None:
    """Adds the arguments of `validate`."""
    command = commands.add_parser(
        'validate',
        help='measure accuracy on a folder of images',
        description='Measures top-1 and top-5 on images in a folder for each class, or listed in a file. With several '
        'files of weights, or a model and its export to 8 bits, their results stand side by side.',
        usage='timm-res2net validate FOLDER [--model NAME] [--weights FILE ...] [OPTION ...]',  # FOLDER before FILE ...
    )
    command.add_argument('folder', metavar='FOLDER', help='a folder for each class, or all images')
    command.add_argument('--model', metavar='NAME', help=f'default: {PHOTO}, or what each FILE of weights fits')
    command.add_argument('--weights', nargs='+', metavar='FILE', help='files of weights, or exported models')
    command.add_argument('--truth', metavar='FILE', help='a line for each image: path, space, name or number of class')
    add_labels(command)
    command.add_argument('--confusion', metavar='PNG', help='draw which classes the last one takes for which')
    add_classifying(command)
    command.set_defaults(run=run_validate)


def run_validate(args: argparse.Namespace) -> int:
    """Prints the accuracy of models on a folder; 1 if an image could not be read, or a class has none."""
    if args.confusion is not None:
        require_drawable(args.confusion)
    files: list[str | None] = [*(args.weights or ())]
    only_exported = all(file and is_exported(file) for file in files)
    if only_exported and (args.model or not files):
        files.insert(0, None)  # the model itself, beside its exports
    elif only_exported:
        refuse(args, 'exported models run as they are', '--compile')
    default = None if args.weights else PHOTO
    rows: list[Sequence[str]] = [('model', 'images', 'top-1', 'top-5')]
    items, failed = [], []
    for file in files:
        exported = file is not None and is_exported(file)
        model = make_classifier(
            None if exported else args.model or default,
            read_weights(file),
            args.labels,
            'cpu' if exported and args.model else args.device,
        )
        name = str(file or args.model or default)
        images = labelled_images(args.folder, class_names(model), args.truth)
        bar = partial(tqdm, total=len(images.files), desc=name, unit='image', disable=None, leave=False)
        found = validate(model, images, args.batch_size, args.compile, bar)
        rows.append((name, str(found.images), f'{found.top1:.2f} %', f'{found.top5:.2f} %'))
        items.append(dict(model=name, images=found.images, top1=found.top1, top5=found.top5))
        failed += [failure for failure in found.failed if failure not in failed]
    if args.json:
        print(json.dumps(dict(results=items, **left_out(failed, found.skipped)), indent=2))
    else:
        print_table(rows, left=(0,))
    if args.confusion is not None:
        plot_confusion(found.confusion, class_names(model), f'{name}: {found.top1:.2f} % right', args.confusion)
        print(f'\ndrawn to {args.confusion}', file=sys.stderr if args.json else sys.stdout)
    return report_left_out(failed, found.skipped)
