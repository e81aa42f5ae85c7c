"""Prints the sizes of the feature maps of an image, and draws them."""

import argparse
from typing import Any

from ..vision.figures import plot_pyramid, require_drawable
from ..vision.predict import feature_pyramid, pretrained_model
from .options import add_options, add_weights
from .output import print
from .sources import PHOTO, read_image_argument, read_weights


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('image', metavar='IMAGE', help='image file')
    add_weights(command, PHOTO)
    add_options(command, '--max-pixels')
    command.add_argument('--out', metavar='PNG', help='write a picture of the maps to this file')


def run(args: argparse.Namespace) -> None:
    if args.out is not None:
        require_drawable(args.out)
    image = read_image_argument(args)
    name = args.model or (None if args.weights else PHOTO)
    model = pretrained_model(name, read_weights(args, args.weights, exported=False), features_only=True)
    shown, features = feature_pyramid(model, image)
    info: Any = model.feature_info
    print(f'{args.weights or name} on {args.image}, resized to {shown.shape[2]} x {shown.shape[1]}\n')
    print('module    stride  channels  width x height')
    for module, stride, feature in zip(info.module_name(), info.reduction(), features):
        channels, height, width = feature.shape
        print(f'{module:8}  {stride:6}  {channels:8}  {width} x {height}')
    if args.out is not None:
        plot_pyramid(shown, features, info.reduction(), args.out)
        print(f'\nwrote {args.out}')
