"""`timm-res2net features`: shows feature maps."""

import argparse
from typing import Any

from ..vision.figures import plot_pyramid, require_drawable
from ..vision.predict import feature_pyramid, pretrained_model
from .options import Commands
from .output import print
from .sources import PHOTO, read_named_image, read_parameters

__all__ = ['add_features']


def add_features(commands: Commands) -> None:
    """Adds the arguments of `features`."""
    command = commands.add_parser(
        'features', help='show feature maps', description="Prints sizes of an image's feature maps, and draws them."
    )
    command.add_argument('image', metavar='IMAGE', help='a file')
    command.add_argument('--model', metavar='NAME', help=f'default: {PHOTO}, or what FILE fits')
    command.add_argument('--weights', metavar='FILE', help='a file of weights instead of published ones')
    command.add_argument('--out', metavar='PNG', help='draw them to this file')
    command.set_defaults(run=run_features)


def run_features(args: argparse.Namespace) -> int:
    """Prints the shapes of an image's feature maps and draws them."""
    if args.out is not None:
        require_drawable(args.out)
    image = read_named_image(args.image)
    name = args.model or (None if args.weights else PHOTO)
    model = pretrained_model(name, read_parameters(args.weights), features_only=True)
    shown, features = feature_pyramid(model, image)
    info: Any = model.feature_info
    print(f'{args.weights or name} on {args.image}, shown as {shown.shape[2]} x {shown.shape[1]}\n')
    print('module    stride  channels  width x height')
    for module, stride, feature in zip(info.module_name(), info.reduction(), features):
        channels, height, width = feature.shape
        print(f'{module:8}  {stride:6}  {channels:8}  {width} x {height}')
    if args.out is not None:
        plot_pyramid(shown, features, info.reduction(), args.out)
        print(f'\ndrawn to {args.out}')
    return 0
