"""Classifies images. A network with one logit gives the probability of its class by a sigmoid."""

import argparse
import json
from collections.abc import Callable
from functools import partial
from typing import Any

from tqdm import tqdm

from .._images import bundled_digits, find_images
from ..models.classifier import model_name
from ..models.variants import EMBEDDED
from ..recipes.arguments import positive
from ..vision.predict import is_exported, predict
from .options import CLASSIFYING, add_options, add_weights, probability, refuse
from .output import left_out, print, print_predictions, report_left_out
from .sources import PHOTO, image_reader, make_classifier, read_weights


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('images', nargs='*', metavar='IMAGE', help='files, folders or globs (default: bundled digits)')
    add_weights(command, f'{PHOTO}, {EMBEDDED} for the bundled digits')
    add_options(command, '--labels', '--class-order', '--multi-label', *CLASSIFYING)
    command.add_argument(
        '--topk', type=positive, metavar='K', help='most classes to show (default: 5; multi-label: all)'
    )
    command.add_argument(
        '--threshold', type=probability, metavar='P', help='least probability to show (default: 0; multi-label: 0.5)'
    )


def run(args: argparse.Namespace) -> int:
    """Classifies images; returns 1 if any of them fails."""
    if args.weights and is_exported(args.weights):
        refuse(args, 'an exported model runs unchanged', '--compile')
    default = None if args.weights else PHOTO if args.images else EMBEDDED
    model = make_classifier(args, args.model or default, read_weights(args, args.weights), args.device)
    name = args.model or default or model_name(model)
    classify = partial(
        predict,
        model,
        topk=args.topk or (None if args.multi_label else 5),
        threshold=(0.5 if args.multi_label else 0) if args.threshold is None else args.threshold,
        batch_size=args.batch_size,
        compile=args.compile,
        multi_label=args.multi_label,
    )
    return predict_files(args, name, classify) if args.images else predict_digits(args, name, classify)


def predict_files(args: argparse.Namespace, name: str, classify: Callable[..., Any]) -> int:
    """Prints the classes of image files as they are found, or all together as JSON."""
    images = find_images(args.images)
    results = []
    predictions = tqdm(
        classify(images.files, image_reader(args)), total=len(images.files), unit='image', disable=None, leave=False
    )
    for file, found in zip(images.files, predictions):
        if isinstance(found, ValueError):
            images.failed.append((str(file), str(found)))
            continue
        results.append(dict(file=str(file), predictions=[vars(each) for each in found]))
        if not args.json:
            print(file)
            print_predictions(found)
    if args.json:
        print(json.dumps(dict(model=name, results=results, **left_out(images.failed, images.skipped)), indent=2))
    return report_left_out(images.failed, images.skipped)


def predict_digits(args: argparse.Namespace, name: str, classify: Callable[..., Any]) -> int:
    """Prints the classes of the bundled digits next to the truth."""
    images, truths = zip(*bundled_digits())
    results = [
        (truth, found)
        for truth, found in zip(truths, classify(images, read=lambda image: image))
        if not isinstance(found, ValueError)
    ]
    if args.json:
        items = [dict(truth=truth, predictions=[vars(each) for each in found]) for truth, found in results]
        print(json.dumps(dict(model=name, results=items, failed=[], skipped=[]), indent=2))
        return 0
    print(f'{name} on handwritten digits that it was not trained on\n\ntruth   predicted')
    for digit in sorted({*truths}):
        best = [found[0] for truth, found in results if truth == digit and found]
        print(f'  {digit}     {"   ".join(f"{each.label} ({each.probability:4.0%})" for each in best)}')
    right = sum(each.label in (truth, f'class {truth}') for truth, found in results for each in found[:1])
    print(f'\n{right} of {len(results)} are right. Try a photo: timm-res2net predict PHOTO.jpg --model {PHOTO}')
    return 0
