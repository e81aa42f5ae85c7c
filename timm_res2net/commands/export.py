"""Exports to ONNX (.onnx), OpenVINO (.xml, .bin) or torch (.pt2). Compares the outputs of the file and the model."""

import argparse

from ..deploy.backends import PRECISIONS
from ..deploy.export import export
from ..recipes.arguments import positive
from .options import add_options
from .output import describe_training, print
from .sources import make_source


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('source', metavar='SOURCE', help='weights file, folder that convert wrote, or model name')
    command.add_argument('out', metavar='OUT', help='file to write; its suffix chooses the format')
    command.add_argument('--model', metavar='NAME', help='model that the file fits (default: detected)')
    add_options(command, '--weights-from')
    command.add_argument('--precision', choices=PRECISIONS, default='float32', help='data type (default: float32)')
    command.add_argument('--images', metavar='FOLDER', help='images to calibrate int8 and compare outputs with')
    command.add_argument('--batch', type=positive, metavar='N', help='fixed batch size (default: any)')
    command.add_argument('--size', type=positive, metavar='PX', help="height and width (default: the model's)")
    command.add_argument('--dynamic', choices=['size'], help='accept any height and width')
    command.add_argument('--features', action='store_true', help='export the feature maps instead of the classifier')
    command.add_argument('--opset', type=positive, metavar='N', help='ONNX opset version (default: 20)')
    command.add_argument('--symmetric', action='store_true', help='signed int8 without zero points, for TensorRT')


def run(args: argparse.Namespace) -> None:
    model, checkpoint = make_source(args, **(dict(features_only=True) if args.features else {}))
    done = export(
        model,
        args.out,
        precision=args.precision,
        images=args.images,
        batch=args.batch,
        size=args.size,
        dynamic_size=args.dynamic == 'size',
        opset=args.opset,
        symmetric=args.symmetric,
    )
    print(f'wrote {done.file}, {done.bytes / 1e6:.2f} MB: {done.path}')
    compared = f'{done.images} {"images" if args.images else "random images"}'
    print(f'compared with the model on {compared}, using the runtime of the file:')
    print(f'  largest difference {done.largest_difference:.2e} of the largest output')
    print(f'  mean difference    {done.mean_difference:.2e} (root mean square, relative)')
    if done.agreement is not None:
        print(f'  predicted class    the same for {done.agreement:.2%}')
    if checkpoint is not None:
        lines = describe_training(model.pretrained_cfg, checkpoint.num_classes, checkpoint)
        print('\n'.join(lines[:1] if args.features else lines))
