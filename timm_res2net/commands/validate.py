"""Measures top-1 and top-5 accuracy. Compares several weights files, or a model with its exports."""

import argparse
import sys
from collections.abc import Sequence
from functools import partial

from tqdm import tqdm

from ..vision.figures import plot_confusion, require_drawable
from ..vision.predict import is_exported
from ..vision.validate import decided_classes, labeled_images, validate
from .options import CLASSIFYING, add_options, add_weights
from .output import print, print_json, print_table, report_left_out
from .sources import PHOTO, image_reader, make_classifier, read_weights


def add_arguments(command: argparse.ArgumentParser) -> None:
    # argparse's own usage puts FOLDER after `--weights PATH ...`, which would consume it.
    command.usage = 'timm-res2net validate FOLDER [--model NAME] [--weights PATH ...] [OPTION ...]'
    command.add_argument('folder', metavar='FOLDER', help='contains a folder per class, or all images with --truth')
    add_weights(command, PHOTO, several=True)
    command.add_argument('--truth', metavar='FILE', help='has a line per image: path, space, class name or number')
    command.add_argument('--confusion', metavar='PNG', help='draw the confusion matrix of the last model')
    add_options(command, '--labels', '--class-order', *CLASSIFYING)


def run(args: argparse.Namespace) -> int:
    """Prints the accuracy of models; returns 1 if an image cannot be read, or a class folder has none."""
    if args.confusion is not None:
        require_drawable(args.confusion)
    paths: list[str | None] = args.weights or [None]
    exported = [path for path in paths if path and is_exported(path)]
    if exported == paths and args.model:
        paths = [None, *paths]  # first the model itself, for comparison with its exports
    default = args.model or (None if args.weights else PHOTO)
    rows: list[Sequence[str]] = [('model', 'images', 'top-1', 'top-5')]
    results, failed = [], []
    for path, weights in [(path, read_weights(args, path)) for path in paths]:  # before the first one takes an hour
        model = make_classifier(
            args,
            None if path in exported else default,
            weights,
            'cpu' if path in exported and args.model else args.device,
        )
        name = str(path or default)
        names = decided_classes(model)
        images = labeled_images(args.folder, names, args.truth, args.class_order)
        bar = partial(tqdm, total=len(images.files), desc=name, unit='image', disable=None, leave=False)
        found = validate(model, images, args.batch_size, bar, image_reader(args))
        rows.append((name, str(found.images), f'{found.top1:.2f} %', f'{found.top5:.2f} %'))
        results.append(dict(model=name, images=found.images, top1=found.top1, top5=found.top5))
        failed += [failure for failure in images.failed + found.unread if failure not in failed]
    if args.json:
        print_json(results, failed, images.skipped)
    else:
        print_table(rows, left=(0,))
    if args.confusion is not None:
        plot_confusion(found.confusion, names, f'{name}: top-1 {found.top1:.2f} %', args.confusion)
        print(f'\nwrote {args.confusion}', file=sys.stderr if args.json else sys.stdout)
    return report_left_out(failed, images.skipped)
