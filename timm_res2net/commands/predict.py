"""`timm-res2net predict`: classifies images."""

import argparse
import json
from typing import Any

from tqdm import tqdm

from ..deploy.images import bundled_digits, find_images
from ..models.classifier import model_name
from ..models.variants import EMBEDDED
from ..recipes.arguments import positive
from ..vision.predict import is_exported, predict
from .options import Commands, add_classifying, add_labels, refuse
from .output import left_out, print, report_left_out
from .sources import PHOTO, make_classifier, read_weights

__all__ = ['add_predict']


def add_predict(commands: Commands) -> None:
    """Adds the arguments of `predict`."""
    command = commands.add_parser('predict', help='classify images', description='Classify images.')
    command.add_argument(
        'images', nargs='*', metavar='IMAGE', help='files, folders or globs; bundled digits without any'
    )
    command.add_argument(
        '--model', metavar='NAME', help=f'default: {PHOTO}, {EMBEDDED} for the bundled digits, or what FILE fits'
    )
    command.add_argument('--weights', metavar='FILE', help='a file of weights instead of published ones')
    add_labels(command)
    command.add_argument('--topk', type=positive, default=5, metavar='K', help='classes to show (default: 5)')
    add_classifying(command)
    command.set_defaults(run=run_predict)


def run_predict(args: argparse.Namespace) -> int:
    """Classifies images; 1 if one of them could not be."""
    if args.weights and is_exported(args.weights):
        refuse(args, 'an exported model runs as it is', '--compile')
    bundled = not args.images
    default = None if args.weights else EMBEDDED if bundled else PHOTO
    model = make_classifier(args.model or default, read_weights(args.weights), args.labels, args.device)
    name = args.model or default or model_name(model)
    options = dict(topk=args.topk, batch_size=args.batch_size, compile=args.compile)
    if bundled:
        digits = bundled_digits()
        predictions = predict(model, [image for image, _ in digits], read=lambda image: image, **options)
        rows = [(truth, found) for (_, truth), found in zip(digits, predictions) if not isinstance(found, ValueError)]
        show_digits(name, rows, args.json)
        return 0

    found_images = find_images(args.images)
    files, failed, skipped = found_images.files, found_images.failed, found_images.skipped
    results = []
    bar = tqdm(predict(model, files, **options), total=len(files), unit='image', disable=None, leave=False)
    for file, found in zip(files, bar):
        if isinstance(found, ValueError):
            failed.append((str(file), str(found)))
        else:
            results.append((str(file), found))
            if not args.json:
                print(file)
                for prediction in found:
                    print(f'  {prediction.probability:7.2%}  {prediction.label}')
    if args.json:
        items = [dict(file=file, predictions=[vars(prediction) for prediction in found]) for file, found in results]
        print(json.dumps(dict(model=name, results=items, **left_out(failed, skipped)), indent=2))
    return report_left_out(failed, skipped)


def show_digits(name: str, rows: list[tuple[str, Any]], as_json: bool) -> None:
    """Prints predictions of the bundled digits beside the truth."""
    if as_json:
        items = [dict(truth=truth, predictions=[vars(prediction) for prediction in found]) for truth, found in rows]
        print(json.dumps(dict(model=name, results=items, failed=[], skipped=[]), indent=2))
        return
    print(f'{name} on handwritten digits that it was not trained on\n')
    print('truth   predicted')
    for digit in sorted({truth for truth, _ in rows}):
        cells = [f'{found[0].label} ({found[0].probability:4.0%})' for truth, found in rows if truth == digit]
        print(f'  {digit}     {"   ".join(cells)}')
    right = sum(found[0].label in (truth, f'class {truth}') for truth, found in rows)  # perhaps classes have no names
    print(f'\n{right} of {len(rows)} are right. For a photo of yours: timm-res2net predict PHOTO.jpg --model {PHOTO}')
