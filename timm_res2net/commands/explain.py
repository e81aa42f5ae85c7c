"""Draws where a network looks: a class activation map, and the effective receptive fields of a block."""

import argparse

from .._images import bundled_digits
from ..models.classifier import model_name
from ..models.variants import ARCHS, EMBEDDED
from ..recipes.arguments import positive
from ..vision.explain import explain
from ..vision.figures import plot_explanation, require_drawable
from ..vision.predict import pretrained_model
from .options import add_options, add_weights
from .output import print, print_predictions
from .sources import PHOTO, make_classifier, read_image_argument, read_weights

EXAMPLE = 20  # index of a 3 among the bundled digits


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('image', nargs='?', metavar='IMAGE', help='image file (default: a bundled digit)')
    add_weights(command, f'{PHOTO}, {EMBEDDED} for the bundled digit')
    add_options(command, '--labels', '--class-order', '--multi-label', '--max-pixels')
    command.add_argument('--stage', type=positive, default=2, metavar='N', help='stage of the drawn block (default: 2)')
    command.add_argument('--out', default='explain.png', metavar='PNG', help='file to write (default: explain.png)')


def run(args: argparse.Namespace) -> None:
    require_drawable(args.out)
    image = read_image_argument(args) if args.image else bundled_digits()[EXAMPLE][0]
    name = args.model or (None if args.weights else PHOTO if args.image else EMBEDDED)
    weights = read_weights(args, args.weights, exported=False)
    model = make_classifier(args, name, weights)
    arch = ARCHS.get(model_name(model))
    try:
        dense = pretrained_model(name, weights, **arch.trunk.densest) if arch else None
    except ValueError:  # these weights cannot be dilated further; the map keeps its resolution
        dense = None
    explanation = explain(model, image, args.stage, dense, args.multi_label)
    plot_explanation(explanation, args.out)
    print_predictions(explanation.predictions)
    radii = ', '.join(f'{radius:.1f}' for radius in explanation.radii)
    print(f'{explanation.block}: radius of each split in pixels: {radii}\n\nwrote {args.out}')
