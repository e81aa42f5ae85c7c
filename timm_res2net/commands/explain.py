"""`timm-res2net explain`: draws what a network looks at."""

import argparse

from ..deploy.images import bundled_digits
from ..models.classifier import model_name
from ..models.variants import ARCHS, EMBEDDED
from ..recipes.arguments import positive
from ..vision.explain import explain
from ..vision.figures import plot_explanation, require_drawable
from ..vision.predict import pretrained_model
from .options import Commands, add_labels
from .output import print
from .sources import PHOTO, make_classifier, read_named_image, read_parameters

__all__ = ['add_explain']

EXAMPLE = 20  # of the bundled digits, a 3


def add_explain(commands: Commands) -> None:
    """Adds the arguments of `explain`."""
    command = commands.add_parser(
        'explain',
        help='draw what the network looks at',
        description='Draws an image, its class activation map, and the effective receptive fields of a block.',
    )
    command.add_argument('image', nargs='?', metavar='IMAGE', help='a file; a bundled digit without')
    command.add_argument(
        '--model', metavar='NAME', help=f'default: {PHOTO}, {EMBEDDED} for the bundled digit, or what FILE fits'
    )
    command.add_argument('--weights', metavar='FILE', help='a file of weights instead of published ones')
    add_labels(command)
    command.add_argument('--stage', type=positive, default=2, metavar='N', help='whose block to look at (default: 2)')
    command.add_argument('--out', default='explain.png', metavar='PNG', help='the picture (default: explain.png)')
    command.set_defaults(run=run_explain)


def run_explain(args: argparse.Namespace) -> int:
    """Draws what a network looks at, and says what is in the picture."""
    require_drawable(args.out)
    image = read_named_image(args.image) if args.image else bundled_digits()[EXAMPLE][0]
    name = args.model or (None if args.weights else PHOTO if args.image else EMBEDDED)
    weights = read_parameters(args.weights)
    model = make_classifier(name, weights, args.labels)
    arch = ARCHS.get(model_name(model))
    try:
        dense = pretrained_model(name, weights, **arch.trunk.densest) if arch else None
    except ValueError:  # a geometry of its own, which leaves the map at the resolution that it has
        dense = None
    explanation = explain(model, image, args.stage, dense)
    plot_explanation(explanation, args.out)
    for prediction in explanation.predictions:
        print(f'{prediction.probability:7.2%}  {prediction.label}')
    radii = ', '.join(f'{radius:.1f}' for radius in explanation.radii)
    print(f'{explanation.block}: radius of each split {radii} pixels of the image')
    print(f'\ndrawn to {args.out}')
    return 0
