"""The command line: `timm-res2net` or `python -m timm_res2net`. Two functions a command: its arguments, its work."""

import argparse
import difflib
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatch
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TextIO, TypeAlias

import torch
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from timm.data import infer_imagenet_subset
from torch import nn
from tqdm import tqdm

from .deploy.bench import MODELS, OPPONENTS, Result, bench, environment, growth
from .deploy.export import PRECISIONS, export
from .deploy.optimize import DTYPES
from .hub.cards import card, problems_of
from .hub.catalogue import catalogue
from .hub.client import problems_on_hub
from .hub.pull import download_model
from .hub.push import push
from .models.classifier import class_names, model_name, registered_cfg
from .models.function import FIRST_BLOCKS, STYLES, Function
from .models.variants import ARCHS, EMBEDDED, WEIGHTS
from .recipes.arguments import device, positive
from .version import __version__
from .vision.explain import explain
from .vision.figures import (
    plot_bench,
    plot_catalogue,
    plot_confusion,
    plot_explanation,
    plot_growth,
    plot_pyramid,
    require_drawable,
)
from .vision.images import bundled_digits, find_images, read_image
from .vision.predict import feature_pyramid, is_exported, name_classes, predict, pretrained_model
from .vision.validate import labelled_images, validate
from .weights.checkpoints import Checkpoint, read_checkpoint
from .weights.config import load_folder
from .weights.convert import Conversion, convert, export_checkpoint
from .weights.dialects import DIALECTS, EXPORTS
from .weights.errors import UnknownModelError, printable
from .weights.files import atomic_write_text, make_folder, read_text, require_writable, sha256, write_files
from .weights.folder import CONFIG_FILE, WEIGHTS_FILE
from .weights.loading import format_create_model, load_model
from .weights.recorded import IMAGES, Training, read_labels

# What add_subparsers returns; argparse has no public name for it.
Commands: TypeAlias = 'argparse._SubParsersAction[argparse.ArgumentParser]'

DTYPE_NAMES = {str(dtype).removeprefix('torch.'): dtype for dtype in DTYPES}
PHOTO = 'res2net50d.in1k'
RECIPES = Path(__file__).parent / 'recipes'
SORT_KEYS: dict[str, Callable[[dict[str, Any]], Any]] = {
    'params': lambda entry: entry['params'],
    'gmacs': lambda entry: entry['gmacs'],
    'top1': lambda entry: (entry['top1_on'] != 'imagenet-1k', -(entry['top1'] or 0)),  # digits are another task
}
EXAMPLE = 20  # of the bundled digits, a 3


def print(*values: object, end: str = '\n', file: TextIO | None = None) -> None:
    """Prints beside any progress bar; what a terminal would obey in a name from a file or the Hub is escaped."""
    lines = ' '.join(map(str, values)).split('\n')
    tqdm.write('\n'.join(printable(line, len(line)) for line in lines), file=file, end=end)


def parser() -> argparse.ArgumentParser:
    """Describes all commands."""
    main = argparse.ArgumentParser(prog='timm-res2net', description='The Res2Net family for timm.')
    main.add_argument('--version', action='version', version=f'timm_res2net {__version__}')
    main.set_defaults(run=show_help)
    commands = main.add_subparsers(dest='command', metavar='COMMAND')
    for add in (
        *(add_predict, add_validate, add_list, add_features, add_explain, add_convert, add_export),
        *(add_push, add_pull, add_bench, add_recipe, add_card),
    ):
        add(commands)
    return main


def show_help(args: argparse.Namespace) -> int:
    """Shows what commands there are."""
    parser().print_help()
    return 0


def refuse(args: argparse.Namespace, why: str, *options: str) -> None:
    """Ends the program, as for any other wrong call, if options are given that would have no effect."""
    if given := [option for option in options if getattr(args, option.removeprefix('--').lower())]:
        parser().error(f'{" and ".join(given)} would have no effect: {why}')


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
    command.add_argument('--device', type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)')
    command.add_argument('--batch-size', type=positive, default=16, metavar='N', help='images at once (default: 16)')
    command.add_argument('--json', action='store_true', help='machine-readable output')
    command.set_defaults(run=run_predict)


def add_labels(command: argparse.ArgumentParser) -> None:
    """Adds the argument that names classes."""
    command.add_argument(
        '--labels', metavar='PATH', help='names of the classes: a text file, a line each, or the folder of the data'
    )


def run_predict(args: argparse.Namespace) -> int:
    """Classifies images; 1 if one of them could not be."""
    bundled = not args.images
    default = None if args.weights else EMBEDDED if bundled else PHOTO
    model = make_classifier(args.model or default, read_weights(args.weights), args.labels, args.device)
    name = args.model or default or model_name(model)
    options = dict(topk=args.topk, batch_size=args.batch_size)
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


def left_out(failed: Sequence[tuple[str, str]], skipped: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Files that were not looked at, for JSON."""
    return dict(
        failed=[dict(file=file, error=error) for file, error in failed],
        skipped=[dict(file=file, reason=reason) for file, reason in skipped],
    )


def report_left_out(failed: Sequence[tuple[str, str]], skipped: Sequence[tuple[str, str]]) -> int:
    """Names files that were not looked at, with the reasons; 1 if one of them should have been."""
    for reason in dict.fromkeys(reason for _, reason in skipped):
        names = [file for file, why in skipped if why == reason]
        print(f'timm-res2net: skipped, {reason}: {summarize_names(names)}', file=sys.stderr)
    for file, error in failed:
        print(f'timm-res2net: {file}: {error}', file=sys.stderr)
    return 1 if failed else 0


def read_weights(file: str | None) -> Checkpoint | str | None:
    """What --weights names: a checkpoint, or an exported model, which stays the name of a file."""
    return file if file is None or is_exported(file) else read_checkpoint(file)


def make_classifier(
    name: str | None, weights: Checkpoint | str | None, labels: str | None = None, device: torch.device | str = 'cpu'
) -> nn.Module:
    """Makes the model of --model, --weights and --labels, and says what a file tells of its images and classes."""
    names = read_labels(labels) if labels is not None else None
    model: Any = pretrained_model(name, weights, device)
    file, cfg = weights, model.pretrained_cfg
    if isinstance(weights, Checkpoint):
        file, training = weights.file, weights.training
    else:  # an exported model tells all that it uses
        training = Training(dict(cfg), tuple(cfg.get('label_names') or ()), str(file))
    if not model.num_classes:
        raise ValueError(f'{file or name} has no classifier to predict classes with; give weights that have one')
    if names is not None:
        name_classes(model, names)
    if file is not None:
        lines = [f'weights      {file}', *describe_training(training, cfg, model.num_classes)]
        print('\n'.join(lines), file=sys.stderr)
    return model


def add_validate(commands: Commands) -> None:
    """Adds the arguments of `validate`."""
    command = commands.add_parser(
        'validate',
        help='measure accuracy on a folder of images',
        description='Measures top-1 and top-5 on images in a folder for each class, or listed in a file. With several '
        'files of weights, such as a model and its export to 8 bits, their results stand side by side.',
        usage='timm-res2net validate FOLDER [--model NAME] [--weights FILE ...] [OPTION ...]',  # FOLDER before FILE ...
    )
    command.add_argument('folder', metavar='FOLDER', help='a folder for each class, or all images')
    command.add_argument('--model', metavar='NAME', help=f'default: {PHOTO}, or what each FILE fits')
    command.add_argument('--weights', nargs='+', metavar='FILE', help='files of weights, or exported models')
    command.add_argument('--truth', metavar='FILE', help='a line for each image: path, space, name or number of class')
    add_labels(command)
    command.add_argument('--confusion', metavar='PNG', help='draw which classes the last one takes for which')
    command.add_argument('--compile', action='store_true', help='compile first, for thousands of images')
    command.add_argument('--device', type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)')
    command.add_argument('--batch-size', type=positive, default=16, metavar='N', help='images at once (default: 16)')
    command.add_argument('--json', action='store_true', help='machine-readable output')
    command.set_defaults(run=run_validate)


def run_validate(args: argparse.Namespace) -> int:
    """Prints the accuracy of models on a folder; 1 if an image could not be read, or a class has none."""
    if args.confusion is not None:
        require_drawable(args.confusion)
    if args.weights and all(map(is_exported, args.weights)):
        refuse(args, 'exported models run as they are', '--compile')
    default = None if args.weights else PHOTO
    rows: list[Sequence[str]] = [('model', 'images', 'top-1', 'top-5')]
    items, failed = [], []
    for weights in args.weights or [None]:
        model = make_classifier(args.model or default, read_weights(weights), args.labels, args.device)
        name = str(weights or args.model or default)
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


def add_list(commands: Commands) -> None:
    """Adds the arguments of `list`."""
    command = commands.add_parser('list', help='show the family', description='Show the family.')
    command.add_argument('pattern', nargs='?', default='*', metavar='PATTERN', help="such as '*50*'")
    command.add_argument('--pretrained', action='store_true', help='only what has weights')
    command.add_argument('--max-params', type=positive_number, metavar='M', help='at most so many millions')
    command.add_argument('--sort', choices=SORT_KEYS, help='smallest first, or the most accurate')
    command.add_argument('--json', action='store_true', help='machine-readable output')
    command.add_argument('--plot', metavar='PNG', help='draw accuracy on ImageNet over cost to this file')
    command.set_defaults(run=run_list)


def positive_number(text: str) -> float:
    """An argument that is a number above zero."""
    if not float(text) > 0:
        raise argparse.ArgumentTypeError(f'{text} is not above zero')
    return float(text)


def run_list(args: argparse.Namespace) -> int:
    """Prints a line for each architecture or set of weights whose name matches."""
    if args.plot:
        require_drawable(args.plot)
    found = [
        entry for entry in family() if fnmatch(entry['name'], args.pattern) or fnmatch(entry['arch'], args.pattern)
    ]
    found = [entry for entry in found if entry['weights'] or not args.pretrained]
    found = [entry for entry in found if args.max_params is None or entry['params'] <= args.max_params * 1e6]
    if args.sort:
        found.sort(key=SORT_KEYS[args.sort])
    if not found:
        what = (
            args.pattern if args.max_params is None else f'{args.pattern} with at most {args.max_params:g} M parameters'
        )
        print(f'timm-res2net: no model of the family matches {what}', file=sys.stderr)
        return 1
    if args.plot:
        plot_catalogue([entry for entry in found if entry['top1_on'] == 'imagenet-1k'], args.plot)
        print(f'drawn to {args.plot}\n', file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(found, indent=2))
        return 0
    rows = [('name', 'params', 'GMACs', 'top-1', 'licence', 'weights')]
    for entry in found:
        top1 = '-' if entry['top1'] is None else f'{entry["top1"]:.2f} %'
        cost = f'{entry["params"] / 1e6:.2f} M', f'{entry["gmacs"]:.3f}'
        rows.append((entry['name'], *cost, top1, entry['licence'] or '-', entry['weights'] or '-'))
    print_table(rows, left=(0, 4, 5))
    print('\nGMACs at 224 x 224, of the 29-layer networks for CIFAR at 32 x 32.')
    print('Top-1 on ImageNet-1k at 224 x 224, of digits on their held-out third.')
    return 0


def family() -> list[dict[str, Any]]:
    """All sets of weights, and the architectures without any."""
    entries = []
    for arch, variant in ARCHS.items():
        for name in [key for key in WEIGHTS if key.split('.')[0] == arch] or [arch]:
            weights, cfg = WEIGHTS.get(name), registered_cfg(name)
            entry = dict(name=name, arch=arch, params=variant.params, gmacs=variant.gmacs)
            entry.update(top1=None, top1_on=None, licence=None, weights=None)
            if weights is not None:
                where = 'in this package' if cfg.file else str(cfg.url or f'hf-hub:{cfg.hf_hub_id}')
                data = 'digits' if weights.top5 is None else 'imagenet-1k'
                entry.update(top1=weights.top1, top1_on=data, licence=str(cfg.license), weights=where)
            entries.append(entry)
    return entries


def add_features(commands: Commands) -> None:
    """Adds the arguments of `features`."""
    command = commands.add_parser(
        'features', help='show feature maps', description="Prints sizes of an image's feature maps, and draws them."
    )
    command.add_argument('image', metavar='IMAGE', help='a file')
    command.add_argument('--model', default=PHOTO, metavar='NAME', help=f'default: {PHOTO}')
    command.add_argument('--out', metavar='PNG', help='draw them to this file')
    command.set_defaults(run=run_features)


def run_features(args: argparse.Namespace) -> int:
    """Prints the shapes of an image's feature maps and draws them."""
    if args.out is not None:
        require_drawable(args.out)
    image = read_named_image(args.image)
    model = pretrained_model(args.model, features_only=True)
    shown, features = feature_pyramid(model, image)
    info: Any = model.feature_info
    print(f'{args.model} on {args.image}, shown as {shown.shape[2]} x {shown.shape[1]}\n')
    print('module    stride  channels  width x height')
    for module, stride, feature in zip(info.module_name(), info.reduction(), features):
        channels, height, width = feature.shape
        print(f'{module:8}  {stride:6}  {channels:8}  {width} x {height}')
    if args.out is not None:
        plot_pyramid(shown, features, info.reduction(), args.out)
        print(f'\ndrawn to {args.out}')
    return 0


def read_named_image(path: str) -> Image.Image:
    """Reads an image; the ValueError for one that can't be read names it."""
    try:
        return read_image(path)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from error


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
    weights = read_weights(args.weights)
    if isinstance(weights, str):
        raise ValueError(f'{weights} is an exported model, in which nothing can be looked at; give what it was made of')
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


def add_convert(commands: Commands) -> None:
    """Adds the arguments of `convert`."""
    command = commands.add_parser(
        'convert',
        help="bring other people's weights to timm, or back",
        description='Converts a file of weights, of any known code base, to a folder for timm. Prints whose names the '
        'file has, which model it fits, how sure that is, and what was changed.',
    )
    command.add_argument('file', metavar='FILE', help='of a code base that --list-dialects names, in any format')
    command.add_argument('--model', metavar='NAME', help='the model that it fits (default: found out)')
    command.add_argument(
        '--out', metavar='DIR', help='what to write, a file with --to (default: named after FILE, here)'
    )
    command.add_argument('--dialect', choices=DIALECTS, help='whose names it has (default: recognised)')
    add_function(command)
    add_labels(command)
    command.add_argument('--prefix', help='what precedes the names, in a file with several networks')
    command.add_argument('--to', choices=EXPORTS, help='write a file for this code instead of a folder for timm')
    command.add_argument('--dry-run', action='store_true', help='write nothing')
    command.add_argument('--list-dialects', action=ListDialects, nargs=0, help='show whose files can be read')
    command.set_defaults(run=run_convert)


def add_function(command: argparse.ArgumentParser) -> None:
    """Adds the arguments that say what a file's network computes."""
    found = '(default: found out)'
    command.add_argument('--first-block', choices=FIRST_BLOCKS, help=f'what its first blocks compute {found}')
    command.add_argument('--style', choices=STYLES, help=f'where its strides are {found}')
    command.add_argument('--strides', type=int, nargs=4, metavar='N', help=f'stride of each stage {found}')
    command.add_argument(
        '--dilations',
        type=dilation,
        nargs=4,
        metavar='N',
        help='dilation of each stage, or of its blocks as in 4,8,16',
    )
    command.add_argument('--stem-ceil-mode', action='store_true', default=None, help='its max-pool rounds sizes up')


def dilation(text: str) -> int | tuple[int, ...]:
    """Reads the dilation of a stage, or those of its blocks."""
    each = tuple(int(number) for number in text.split(','))
    return each if len(each) > 1 else each[0]


def stated_function(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments of `add_function` say of a file's network."""
    return {name: value for name in vars(Function()) if (value := getattr(args, name, None)) is not None}


def run_convert(args: argparse.Namespace) -> int:
    """Converts a file of weights to a folder for timm, or to a file for other code."""
    options = dict(model=args.model, dialect=args.dialect, prefix=args.prefix, **stated_function(args))
    options['labels'] = read_labels(args.labels) if args.labels is not None else None
    done = convert(args.file, args.out, dry_run=args.dry_run or args.to is not None, **options)
    show_conversion(done)
    if args.dry_run:
        print('\nnothing was written')
    elif args.to is None:
        print(f'\nwrote {done.folder}; load it by\n  {load_call(done.folder)}')
    else:
        out = f'{done.folder}{".pdparams" if args.to == "paddleclas" else ".pth"}' if args.out is None else args.out
        if os.path.exists(out):
            raise ValueError(f'there is a {out} already; name another file by --out, or move it away')
        export_checkpoint(load_model(done.checkpoint, done.name, **done.args), out, args.to)
        print(f'\nwrote {out}\n  sha256 {sha256(out)}')
    return 0


def add_export(commands: Commands) -> None:
    """Adds the arguments of `export`."""
    command = commands.add_parser(
        'export',
        help='write a file that runs without this package',
        description='Exports a model to ONNX (.onnx), OpenVINO (.xml and .bin) or torch (.pt2), loads the file by its '
        'own runtime, and compares it with the model before it appears.',
    )
    command.add_argument('source', metavar='SOURCE', help='a name, a file of weights, or a folder that convert made')
    command.add_argument('out', metavar='OUT', help='what to write; the suffix says the format')
    command.add_argument('--model', metavar='NAME', help='the model that the file fits (default: found out)')
    choices = dict.fromkeys(chain.from_iterable(PRECISIONS.values()))  # in their order, each once
    command.add_argument('--precision', choices=choices, default='float32', help='default: float32')
    command.add_argument('--images', metavar='FOLDER', help='images to calibrate int8 with, and to compare with')
    command.add_argument('--batch', type=positive, metavar='N', help='the only batch size (default: any)')
    command.add_argument('--size', type=positive, metavar='PX', help="height and width (default: the model's)")
    command.add_argument('--features', action='store_true', help='export the feature maps instead of the classifier')
    command.add_argument('--compile', action='store_true', help='compile .pt2 to machine code of this machine')
    command.set_defaults(run=run_export)


def run_export(args: argparse.Namespace) -> int:
    """Exports a model, and prints how the file compares with it."""
    model, converted = make_source(args, **(dict(features_only=True) if args.features else {}))
    done = export(
        model,
        args.out,
        precision=args.precision,
        images=args.images,
        batch=args.batch,
        size=args.size,
        compile=args.compile,
    )
    print(f'wrote {done.file}, {done.bytes / 1e6:.2f} MB: {done.path}')
    compared = f'{done.images} {"images" if args.images else "random images"}'
    print(f'compared with the model on {compared}, by its own runtime:')
    print(f'  largest difference {done.largest_difference:.2e} of the largest output')
    print(f'  mean difference    {done.mean_difference:.2e} (root mean square, relative)')
    if done.agreement is not None:
        print(f'  likeliest class    the same for {done.agreement:.2%}')
    if converted is not None:
        lines = describe_training(converted.training, model.pretrained_cfg, converted.num_classes)
        print('\n'.join(lines[:1] if args.features else lines))
    return 0


def make_source(args: argparse.Namespace, **options: Any) -> tuple[Any, Checkpoint | None]:
    """Makes the model of SOURCE and --model: of a folder, of a file of weights, or of a name of published ones.

    Args:
        args: With `source` and `model`.
        **options: For `timm.create_model`.

    Returns:
        The model, and what a file tells of it.

    Raises:
        UnknownModelError: If SOURCE is none of these.
    """
    source = args.source
    is_folder = os.path.isdir(source)
    if os.path.lexists(source) and not is_folder:
        done = convert(source, dry_run=True, model=args.model)
        return load_model(done.checkpoint, done.name, **done.args, **options).eval(), done.checkpoint
    if not is_folder and ':' not in source and not any(source in (name, name.partition('.')[0]) for name in WEIGHTS):
        alike = difflib.get_close_matches(source, WEIGHTS)
        hint = f'did you mean {" or ".join(alike)}?' if alike else '`timm-res2net list --pretrained` shows the names'
        raise UnknownModelError(f'{source} is no file, no folder, and no name of published weights; {hint}')
    refuse(args, f'{source} says which model it is', '--model')
    return load_folder(source, **options) if is_folder else pretrained_model(source, **options), None


def load_call(folder: str | Path) -> str:
    """The Python code that loads a model from a folder."""
    return format_create_model(f'local-dir:{folder}', dict(pretrained=True))


def summarize_names(names: Sequence[str]) -> str:
    """The number of names, and the first ones."""
    more = ', ...' if len(names) > 3 else ''
    return f'{len(names)}' + (f': {", ".join(names[:3])}{more}' if names else '')


def show_conversion(done: Conversion) -> None:
    """Prints what a file was recognised as, how sure that is, and what became of its tensors."""
    checkpoint, record = done.checkpoint, done.config['timm_res2net']
    translation, function = checkpoint.translation, checkpoint.function or Function()
    under = f', under {translation.prefix}' if translation.prefix else ''
    print(f'{checkpoint.file}\n  sha256 {record["converted_from"]["sha256"]}\n')
    print(f'dialect      {translation.dialect}{under}: {DIALECTS[translation.dialect].whose}')
    if checkpoint.project:
        print(f'part of      {checkpoint.project}')
    shown = [name for name in vars(function) if name in ('first_block', *function.differing_fields(Function()))]
    print(f'computes     {function.as_keywords(shown)}')
    if checkpoint.assumed:
        print(f'assumed      {", ".join(checkpoint.assumed)}: the usual, the file does not tell')
    print(f'model        {format_create_model(done.name, done.args)}: certain, all tensors fit')
    cfg = {**done.config, **done.config['pretrained_cfg']}
    print('\n'.join(describe_training(checkpoint.training, cfg, checkpoint.num_classes)))
    for reason in sorted(set(translation.dropped.values())):
        names = [name for name, why in translation.dropped.items() if why == reason]
        print(f'dropped      {reason}: {summarize_names(names)}')
    print(f'filled in    {summarize_names(translation.filled)}')
    print(f'cast         {", ".join(f"{count} of {kind} to float32" for kind, count in translation.cast.items()) or 0}')
    if 'sha256' in record:
        print(f'\n{done.folder / WEIGHTS_FILE}\n  sha256 {record["sha256"]}')


def describe_training(training: Training, cfg: Mapping[str, Any], num_classes: int) -> list[str]:
    """Says how images are prepared and what classes are called, and whether a file tells that or it is assumed.

    Args:
        training: What the file tells.
        cfg: What is used: timm's configuration, with `label_names`.
        num_classes: Classes.
    """
    size = ' x '.join(map(str, cfg['input_size'][1:]))
    mean, std = (', '.join(f'{value:g}' for value in cfg[key]) for key in ('mean', 'std'))
    shown = f'{size}, {cfg["interpolation"]}, crop {cfg["crop_pct"]:g}, mean {mean}, std {std}'
    unsaid = [key for key in IMAGES if key not in training.images]
    how = 'as the file says' + (f', but for {", ".join(unsaid)}: assumed, the usual' if unsaid else '')
    if not training.images:
        how = 'assumed, the usual; the file does not tell'
    names = tuple(cfg.get('label_names') or ())
    named = ', without names'
    if names:
        source = f'named in {training.labels_from}' if training.labels == names else 'named as given'
        named = f', {source}: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}'
    elif infer_imagenet_subset({'num_classes': num_classes}):
        named = ", named as ImageNet's: assumed, there are as many"
    return [f'images       {shown}: {how}', f'classes      {num_classes}{named}']


class ListDialects(argparse.Action):
    """Shows whose files can be read, what their networks' first blocks compute, and which can be written."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print('dialect           first block      export  whose')
        for name, dialect in DIALECTS.items():
            known = [each for each in (dialect.function, dialect.in_detector) if each is not None]
            blocks = ' or '.join(each.first_block for each in known) or 'not known'
            print(f'{name:16}  {blocks:17}  {"yes" if name in EXPORTS else "":4}  {dialect.whose}')
        parser.exit()


def add_push(commands: Commands) -> None:
    """Adds the arguments of `push`."""
    command = commands.add_parser(
        'push',
        help='upload a model to the Hub',
        description='Uploads a model to the Hugging Face Hub: safetensors, configuration and card, all verified.',
    )
    command.add_argument('source', metavar='SOURCE', help='a file of weights, a folder that convert made, or a name')
    command.add_argument('repo', metavar='USER/NAME', help='where to put it')
    command.add_argument('--model', metavar='NAME', help='the model that the file fits (default: found out)')
    command.add_argument('--tag', help='name of this set of weights')
    command.add_argument('--result', type=result, action='append', metavar='WHAT=PERCENT', help='such as accuracy=99.5')
    command.add_argument('--dataset', help='what it was trained and measured on, such as imagenet-1k')
    command.add_argument('--license', metavar='ID', help='such as apache-2.0')
    command.add_argument('--license-link', metavar='URL', help='of a licence that the Hub does not know')
    command.add_argument('--base-model', metavar='USER/NAME', help='what it was fine-tuned from')
    add_labels(command)
    command.add_argument('--recipe', metavar='TEXT', help='how it was trained')
    command.add_argument('--private', action='store_true', default=None, help='make the repository private')
    command.add_argument('--revision', metavar='BRANCH', help='made if it does not exist (default: main)')
    command.add_argument('--create-pr', action='store_true', help='propose it by a pull request')
    command.add_argument('--message', help='of the commit')
    command.add_argument('--overwrite-card', action='store_true', help='also a card that somebody wrote')
    command.add_argument('--dry-run', metavar='DIR', help='write a folder instead, and show what would be sent')
    add_timeout(command)
    command.set_defaults(run=run_push)


def run_push(args: argparse.Namespace) -> int:
    """Uploads a model, or writes what would be uploaded."""
    model, converted = make_source(args)
    labels = read_labels(args.labels) if args.labels is not None else None
    pushed = push(
        model,
        args.repo,
        tag=args.tag,
        results=dict(args.result) if args.result else None,
        dataset=args.dataset,
        license=(args.license or 'other', args.license_link) if args.license_link else args.license,
        base_model=args.base_model,
        labels=labels,
        recipe=args.recipe,
        private=args.private,
        revision=args.revision,
        create_pr=args.create_pr,
        commit_message=args.message,
        overwrite_card=args.overwrite_card,
        dry_run=args.dry_run,
        timeout=args.timeout,
    )
    for name, digest in pushed.hashes.items():
        print(f'{digest}  {name}')
    print(f'\nwrote {pushed.folder}; nothing was sent' if pushed.folder else f'\n{pushed.url}')
    if converted is not None:
        cfg = {**model.pretrained_cfg, **({'label_names': labels} if labels else {})}
        print('\n'.join(describe_training(converted.training, cfg, model.num_classes)))
    return 0


def result(text: str) -> tuple[str, float]:
    """An argument that is a name and a percentage."""
    name, _, value = text.partition('=')
    try:
        return name, float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f'{text!r} is no WHAT=PERCENT, such as accuracy=99.5') from None


def add_pull(commands: Commands) -> None:
    """Adds the arguments of `pull`."""
    command = commands.add_parser(
        'pull', help='download a model from the Hub', description='Downloads a model and checks every byte of it.'
    )
    command.add_argument('repo', metavar='USER/NAME', help='where it is')
    command.add_argument('--revision', metavar='R', help='branch, tag or commit (default: main)')
    command.add_argument('--out', metavar='DIR', help='copy it to this folder (default: only to the cache)')
    add_timeout(command)
    command.set_defaults(run=run_pull)


def run_pull(args: argparse.Namespace) -> int:
    """Downloads a model, and says where it is and which."""
    if args.out and os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f'{args.out} is a file; name a folder by --out')
    found = download_model(args.repo, args.revision, timeout=args.timeout)
    files = {name: found.files[name] for name in (WEIGHTS_FILE, CONFIG_FILE)}
    if args.out:
        write_files(args.out, found.files)
    for name, content in files.items():
        print(f'{hashlib.sha256(content).hexdigest()}  {name}')
    print(f'\n{args.repo} at {found.commit}, checked; load it by\n  {load_call(args.out or found.folder)}')
    return 0


def add_timeout(command: argparse.ArgumentParser) -> None:
    """Adds the argument that says how long the Hub is waited for."""
    command.add_argument(
        '--timeout', type=float, metavar='S', help='seconds to wait for the Hub (default: $TIMM_RES2NET_TIMEOUT or 120)'
    )


def add_bench(commands: Commands) -> None:
    """Adds the arguments of `bench`."""
    command = commands.add_parser(
        'bench',
        help="measure models beside timm's own",
        description="Measures models beside timm's own, in turns in one run: in inference as they are, fused and "
        'optimized, or in training. All ways have to compute the same before any is measured.',
    )
    command.add_argument('--models', nargs='+', metavar='NAME', help=f'default: {" ".join(MODELS)}')
    command.add_argument('--batch', nargs='+', type=positive, metavar='N', help='images (default: 8)')
    command.add_argument('--size', nargs='+', type=positive, metavar='PX', help='default: 224')
    command.add_argument('--dtype', nargs='+', choices=DTYPE_NAMES, help='default: float32 bfloat16')
    command.add_argument('--against', type=opponents, metavar='A,B', help=f'of {",".join(OPPONENTS)} (default: timm)')
    command.add_argument('--train', action='store_true', help='measure steps of training')
    command.add_argument(
        '--growth', action='store_true', help='measure how cost grows with scale, batch and image size'
    )
    command.add_argument('--rounds', type=positive, default=20, metavar='N', help='measurements of each (default: 20)')
    command.add_argument('--device', type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)')
    command.add_argument('--json', metavar='FILE', help='write all figures to this file')
    command.add_argument('--plot', metavar='PNG', help='draw them to this file')
    command.set_defaults(run=run_bench)


def run_bench(args: argparse.Namespace) -> int:
    """Prints how fast models are, writes and draws it."""
    if args.json is not None:
        require_writable(args.json)
    if args.plot is not None:
        require_drawable(args.plot)
    if args.growth:
        refuse(
            args, '--growth says what it measures', '--models', '--batch', '--size', '--dtype', '--against', '--train'
        )
        parts = growth(args.device, args.rounds)
    else:
        if args.train and set(args.against or ()) - {'timm', 'inductor'}:
            refuse(args, "training is compared with timm's own and with what inductor compiles", '--against')
        dtypes = [DTYPE_NAMES[name] for name in args.dtype or ()]
        options = dict(models=args.models, batches=args.batch, sizes=args.size, dtypes=dtypes, against=args.against)
        given: dict[str, Any] = {name: value for name, value in options.items() if value}
        results = bench(**given, train=args.train, device=args.device, rounds=args.rounds)
        parts = {'training' if args.train else 'inference': results}
    about = environment()
    print(', '.join(f'{name} {value}' for name, value in about.items()))
    for part, results in parts.items():
        print(f'\n{part}')
        show_results(results)
    if args.json is not None:
        document = dict(environment=about, **{part: [vars(each) for each in found] for part, found in parts.items()})
        atomic_write_text(args.json, json.dumps(document, indent=1) + '\n')
        print(f'\nwrote {args.json}')
    if args.plot is not None:
        plot_growth(parts, args.plot) if args.growth else plot_bench(results, args.plot)
        print(f'\ndrawn to {args.plot}')
    return 0


def show_results(results: Sequence[Result]) -> None:
    """Prints a line for each result."""
    head = 'model batch size way type ms +- images/s x-timm of-peak operators MB'
    rows = [tuple(head.split())]
    for each in results:
        numbers = f'{each.milliseconds:.1f}', f'{each.spread:.1f}', f'{each.images_per_second:.1f}'
        ratio = '-' if each.ratio is None else f'{each.ratio:.2f}'
        memory = '-' if each.peak_memory is None else f'{each.peak_memory / 1e6:.0f}'
        place = each.model, str(each.batch), str(each.size), each.way, each.dtype
        rows.append((*place, *numbers, ratio, f'{each.share_of_peak:.0%}', str(each.operators or '-'), memory))
    print_table(rows, left=(0, 3, 4))


def print_table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> None:
    """Prints rows in columns, of which some are aligned to the left and the others, with numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print('  '.join(cells).rstrip())


def opponents(text: str) -> tuple[str, ...]:
    """An argument that is names of what to measure against."""
    names = tuple(text.split(','))
    if unknown := set(names) - set(OPPONENTS):
        raise argparse.ArgumentTypeError(f'{", ".join(unknown)} is not of {", ".join(OPPONENTS)}')
    return names


def add_recipe(commands: Commands) -> None:
    """Adds the arguments of `recipe`."""
    command = commands.add_parser(
        'recipe',
        help="show configurations for timm's train script",
        description="Lists configurations for timm's train script, or prints or writes one: "
        'train.py --device-modules timm_res2net --config FILE --data-dir DIR',
    )
    command.add_argument('name', nargs='?', metavar='NAME', help='such as imagenet; all are listed without')
    command.add_argument('--out', metavar='FILE', help='write it to this file')
    command.set_defaults(run=run_recipe)


def run_recipe(args: argparse.Namespace) -> int:
    """Lists the recipes, or prints or writes one."""
    recipes = {path.stem: path.read_text() for path in sorted(RECIPES.glob('*.yaml'))}
    if args.name is None:
        refuse(args, 'name the recipe to write', '--out')
        for name, text in recipes.items():
            print(f'{name:{max(map(len, recipes))}}  {text.splitlines()[0].removeprefix("# ").rstrip(":")}')
        return 0
    args.name = args.name.removesuffix('.yaml')
    if args.name not in recipes:
        parser().error(f'there is no recipe {args.name}; there are {", ".join(recipes)}')
    if args.out is None:
        print(recipes[args.name], end='')
        return 0
    atomic_write_text(args.out, recipes[args.name])
    print(f'wrote {args.out}')
    return 0


def add_card(commands: Commands) -> None:
    """Adds the arguments of `card`."""
    command = commands.add_parser('card', help='show model cards', description='Shows the cards of published weights.')
    command.add_argument('name', nargs='?', metavar='NAME', help='such as res2net50d.in1k, or a file to validate')
    command.add_argument('--all', action='store_true', help='write all of them, and a README.md, to a folder')
    command.add_argument('--out', metavar='DIR', help='the folder (default: hub_cards)')
    command.add_argument('--validate', action='store_true', help='check it here and, if it can be reached, on the Hub')
    command.set_defaults(run=run_card)


def run_card(args: argparse.Namespace) -> int:
    """Prints a card, writes all, or checks one."""
    if args.all:
        refuse(args, '--all writes the cards of all published weights', 'NAME', '--validate')
        folder = 'hub_cards' if args.out is None else args.out
        make_folder(folder)
        for name in tqdm(WEIGHTS, unit='card', disable=None, leave=False):
            atomic_write_text(f'{folder}/{name}.md', card(name))
        atomic_write_text(f'{folder}/README.md', catalogue())
        print(f'wrote {len(WEIGHTS)} cards and README.md to {folder}')
        return 0
    refuse(args, 'cards are written by --all', '--out')
    if args.name is None:
        parser().error('name published weights, or say --all; `timm-res2net list --pretrained` shows them')
    try:
        text = read_text(args.name) if os.path.isfile(args.name) else card(args.name)
    except ValueError as error:
        if os.path.isfile(args.name):
            raise
        raise UnknownModelError(f'there is no file {args.name}, and {error}') from error
    if not args.validate:
        print(text, end='')
        return 0
    problems = problems_of(text) + problems_on_hub(text)
    for problem in problems:
        print(f'timm-res2net: {args.name}: {problem}', file=sys.stderr)
    if not problems:
        print(f'{args.name} is a good card')
    return 1 if problems else 0


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, or 1 if something failed, or 2 for a wrong call.
    """
    if sys.stderr is None:
        sys.stderr = open(os.devnull, 'w')  # noqa: SIM115 - tqdm writes to it until the end
    if sys.stdout is None:
        print('timm-res2net: standard output is closed', file=sys.stderr)
        return 1
    try:
        try:
            args = parser().parse_args(argv)
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, where a reader that has gone is expected, and not at the interpreter's end
    except BrokenPipeError:  # the reader has stopped reading, as in `timm-res2net list | head -3`
        discard_output()
        return 0
    except (ValueError, TypeError, OSError, ImportError, HfHubHTTPError, torch.OutOfMemoryError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, which the interpreter would meet again at its end
            discard_output()
        print(f'timm-res2net: {" ".join(str(error).split())}', file=sys.stderr)
        return 2 if isinstance(error, UnknownModelError) else 1
    except KeyboardInterrupt:
        print('timm-res2net: interrupted', file=sys.stderr)
        return 130


def discard_output() -> None:
    """Leads standard output to nowhere, where it can't be written any more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
    sys.exit(main())
