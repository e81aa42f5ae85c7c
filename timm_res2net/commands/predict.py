"""Classifies images. If a model has one logit, its sigmoid is the probability of the class."""

import argparse
from collections.abc import Sequence
from typing import Any

from PIL import Image
from tqdm import tqdm

from .._images import bundled_digits, find_images
from ..models.classifier import model_name
from ..models.variants import EMBEDDED
from ..recipes.arguments import positive
from ..vision.predict import Prediction, predict
from .options import CLASSIFYING, add_options, add_weights, probability
from .output import print, print_json, print_predictions, report_left_out
from .sources import PHOTO, image_reader, make_classifier, read_weights


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('images', nargs='*', metavar='IMAGE', help='files, folders or globs (default: bundled digits)')
    add_weights(command, f'{PHOTO}, {EMBEDDED} for the bundled digits')
    add_options(command, '--labels', '--class-order', '--multi-label', *CLASSIFYING)
    command.add_argument('--topk', type=positive, metavar='K', help='classes per image (default: 5; multi-label: all)')
    command.add_argument(
        '--threshold', type=probability, metavar='P', help='lowest probability to print (default: 0; multi-label: 0.5)'
    )


def run(args: argparse.Namespace) -> int:
    """Prints the classes of each image as soon as they are found, or all as JSON; returns 1 if any image fails."""
    default = None if args.weights else PHOTO if args.images else EMBEDDED
    model = make_classifier(args, args.model or default, read_weights(args, args.weights), args.device)
    name = args.model or default or model_name(model)
    images = find_images(args.images)
    sources: Sequence[Any] = images.files
    names: Sequence[str] = [str(file) for file in images.files]
    if not args.images:
        sources, names = zip(*bundled_digits())
    found = predict(
        model,
        sources,
        image_reader(args) if args.images else Image.Image.copy,
        topk=args.topk or (None if args.multi_label else 5),
        threshold=(0.5 if args.multi_label else 0) if args.threshold is None else args.threshold,
        batch_size=args.batch_size,
        multi_label=args.multi_label,
    )
    results: list[tuple[str, list[Prediction]]] = []
    for file, predictions in zip(names, tqdm(found, total=len(names), unit='image', disable=None, leave=False)):
        if isinstance(predictions, ValueError):
            images.failed.append((file, str(predictions)))
            continue
        results.append((file, predictions))
        if args.images and not args.json:
            print(file)
            print_predictions(predictions)
    if args.json:
        items = [dict(file=file, predictions=[vars(each) for each in predictions]) for file, predictions in results]
        print_json(items, images.failed, images.skipped, model=name)
    elif not args.images:
        show_digits(name, results)
    return report_left_out(images.failed, images.skipped)


def show_digits(name: str, results: Sequence[tuple[str, list[Prediction]]]) -> None:
    """Prints the predicted classes of the bundled digits next to the true ones."""
    print(f'{name} on handwritten digits that it was not trained on\n\ntruth   predicted')
    for digit in sorted({truth for truth, _ in results}):
        best = [predictions[0] for truth, predictions in results if truth == digit and predictions]
        print(f'  {digit}     {"   ".join(f"{each.label} ({each.probability:4.0%})" for each in best)}')
    right = sum(each.label in (truth, f'class {truth}') for truth, predictions in results for each in predictions[:1])
    print(f'\n{right} of {len(results)} are correct. Try a photo: timm-res2net predict PHOTO.jpg --model {PHOTO}')
