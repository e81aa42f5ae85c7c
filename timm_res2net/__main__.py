"""The command line: `timm-res2net` or `python -m timm_res2net`."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from fnmatch import fnmatch
from typing import Any

import timm
import torch
from tqdm import tqdm

from .blocks import FIRST_BLOCKS
from .checkpoints import Conversion, call, convert, export_checkpoint, load_checkpoint
from .dialects import DIALECTS, EXPORTS
from .files import first_line, sha256
from .predict import (
    UnknownModelError,
    find_images,
    load_model,
    plot_pyramid,
    predict,
    pyramid,
    read_image,
    sheet,
)
from .res2net import ARCHS, WEIGHTS

EMBEDDED = 'test_res2net.digits'
PHOTO = 'res2net50d.in1k'


def positive(text: str) -> int:
    """An argument that is an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not above zero')
    return value


def device(text: str) -> torch.device:
    """An argument that is a device of this machine."""
    try:
        torch.empty(0, device=text)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f'{text} can not be used here: {first_line(error)}') from None
    return torch.device(text)


class ListDialects(argparse.Action):
    """Shows whose files can be read, what their networks' first blocks compute, and which can be written."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print('dialect           first block      export  whose')
        for name, dialect in DIALECTS.items():
            blocks = ' or '.join(filter(None, (dialect.first_block, dialect.in_detector))) or 'not known'
            print(f'{name:16}  {blocks:17}  {"yes" if name in EXPORTS else "":4}  {dialect.whose}')
        parser.exit()


def parser() -> argparse.ArgumentParser:
    """Describes the commands."""
    main = argparse.ArgumentParser(prog='timm-res2net', description='The Res2Net family for timm.')
    commands = main.add_subparsers(dest='command', required=True, metavar='COMMAND')

    command = commands.add_parser('predict', help='classify images', description='Classify images.')
    command.add_argument(
        'images', nargs='*', metavar='IMAGE', help='files, folders or globs; bundled digits without any'
    )
    command.add_argument('--model', metavar='NAME', help=f'default: {PHOTO}; {EMBEDDED} for the bundled digits')
    command.add_argument('--weights', metavar='FILE', help='a file of weights instead of published ones')
    command.add_argument('--topk', type=positive, default=5, metavar='K', help='classes to show (default: 5)')
    command.add_argument('--device', type=device, default='cpu', metavar='D', help='such as cuda (default: cpu)')
    command.add_argument('--batch-size', type=positive, default=16, metavar='N', help='images at once (default: 16)')
    command.add_argument('--json', action='store_true', help='machine-readable output')
    command.set_defaults(run=run_predict)

    command = commands.add_parser('list', help='show the family', description='Show the family.')
    command.add_argument('pattern', nargs='?', default='*', metavar='PATTERN', help="such as '*50*'")
    command.add_argument('--pretrained', action='store_true', help='only what has weights')
    command.set_defaults(run=run_list)

    command = commands.add_parser(
        'features', help='show feature maps', description='Show the feature maps of an image.'
    )
    command.add_argument('image', metavar='IMAGE', help='a file')
    command.add_argument('--model', default=PHOTO, metavar='NAME', help=f'default: {PHOTO}')
    command.add_argument('--out', metavar='PNG', help='draw them to this file')
    command.set_defaults(run=run_features)

    command = commands.add_parser(
        'convert',
        help="bring other people's weights to timm, or back",
        description='Makes a folder that timm loads of a file of weights, whoever wrote it. Tells whose names the file '
        'has, which model it fits, how sure that is, and what was changed.',
    )
    command.add_argument('file', metavar='FILE', help='.safetensors, .pth, .pdparams, .pkl, .ckpt or .tar')
    command.add_argument('--model', metavar='NAME', help='the model that it fits (default: found out)')
    command.add_argument('--out', metavar='DIR', help='what to write (default: named after FILE, in this folder)')
    command.add_argument('--dialect', choices=DIALECTS, help='whose names it has (default: recognised)')
    command.add_argument(
        '--first-block', choices=FIRST_BLOCKS, help='what its first blocks compute (default: found out)'
    )
    command.add_argument('--prefix', help='what precedes the names, in a file with several networks')
    command.add_argument('--to', choices=EXPORTS, help='write a file for this code instead of a folder for timm')
    command.add_argument('--dry-run', action='store_true', help='write nothing')
    command.add_argument('--list-dialects', action=ListDialects, nargs=0, help='show whose files can be read')
    command.set_defaults(run=run_convert)
    return main


def run_predict(args: argparse.Namespace) -> int:
    """Classifies images; 1 if one of them could not be."""
    bundled = not args.images
    name = args.model or (EMBEDDED if bundled else PHOTO)
    model = load_model(name, args.weights, args.device)
    options = dict(topk=args.topk, batch_size=args.batch_size)
    if bundled:
        digits = sheet()
        predictions = predict(model, [image for image, _ in digits], read=lambda image: image, **options)
        rows = [(truth, found) for (_, truth), found in zip(digits, predictions) if not isinstance(found, ValueError)]
        show_sheet(name, rows, args.json)
        return 0

    files, failed = find_images(args.images)
    results = []
    bar = tqdm(predict(model, files, **options), total=len(files), unit='image', disable=None, leave=False)
    for file, found in zip(files, bar):
        if isinstance(found, ValueError):
            failed.append((str(file), str(found)))
        else:
            results.append((str(file), found))
            if not args.json:
                tqdm.write(f'{file}')
                for prediction in found:
                    tqdm.write(f'  {prediction.probability:7.2%}  {prediction.label}')
    if args.json:
        items = [dict(file=file, predictions=[vars(prediction) for prediction in found]) for file, found in results]
        errors = [dict(file=file, error=error) for file, error in failed]
        print(json.dumps(dict(model=name, results=items, failed=errors), indent=2))
    for name, error in failed:
        print(f'timm-res2net: {name}: {error}', file=sys.stderr)
    return 1 if failed else 0


def show_sheet(name: str, rows: list[tuple[str, Any]], as_json: bool) -> None:
    """Prints predictions of the bundled digits beside the truth."""
    if as_json:
        items = [dict(truth=truth, predictions=[vars(prediction) for prediction in found]) for truth, found in rows]
        print(json.dumps(dict(model=name, results=items, failed=[]), indent=2))
        return
    print(f'{name} on handwritten digits that it was not trained on\n')
    print('truth   predicted')
    for digit in sorted({truth for truth, _ in rows}):
        cells = [f'{found[0].label} ({found[0].probability:4.0%})' for truth, found in rows if truth == digit]
        print(f'  {digit}     {"   ".join(cells)}')
    right = sum(found[0].label == truth for truth, found in rows)
    print(f'\n{right} of {len(rows)} are right. For a photo of yours: timm-res2net predict PHOTO.jpg --model {PHOTO}')


def run_list(args: argparse.Namespace) -> int:
    """Prints a line for each architecture or set of weights whose name matches."""
    tagged = {name: [key for key in WEIGHTS if key.split('.')[0] == name] or [name] for name in ARCHS}
    rows = [('name', 'params', 'GMACs', 'top-1', 'licence', 'weights')]
    for name, arch in ARCHS.items():
        for key in tagged[name]:
            weights = WEIGHTS.get(key)
            wanted = fnmatch(key, args.pattern) or fnmatch(name, args.pattern)
            if not wanted or (args.pretrained and weights is None):
                continue
            cost = f'{arch.params / 1e6:.2f} M', f'{arch.gmacs:.3f}'
            if weights is None:
                rows.append((key, *cost, '-', '-', '-'))
            else:
                cfg = timm.get_pretrained_cfg(key)
                where = 'in this package' if cfg.file else cfg.url or f'hf-hub:{cfg.hf_hub_id}'
                rows.append((key, *cost, f'{weights.top1:.2f} %', cfg.license, where))
    if len(rows) == 1:
        print(f'timm-res2net: no model of the family matches {args.pattern}', file=sys.stderr)
        return 1
    widths = [max(map(len, column)) for column in zip(*rows)]
    for name, *numbers, licence, where in rows:
        cells = [cell.rjust(width) for cell, width in zip(numbers, widths[1:])]
        print('  '.join([name.ljust(widths[0]), *cells, licence.ljust(widths[4]), where]).rstrip())
    print('\nGMACs at 224 x 224, of the 29-layer networks for CIFAR at 32 x 32.')
    print('Top-1 on ImageNet-1k at 224 x 224, of digits on their held-out third.')
    return 0


def run_features(args: argparse.Namespace) -> int:
    """Prints the shapes of an image's feature maps and draws them."""
    image = read_image(args.image)
    model = load_model(args.model, features_only=True)
    shown, features = pyramid(model, image)
    info: Any = model.feature_info
    print(f'{args.model} on {args.image}, shown as {shown.shape[2]} x {shown.shape[1]}\n')
    print('module    stride  channels  width x height')
    for module, stride, feature in zip(info.module_name(), info.reduction(), features):
        channels, height, width = feature.shape
        print(f'{module:8}  {stride:6}  {channels:8}  {width} x {height}')
    if args.out:
        plot_pyramid(shown, features, info.reduction(), args.out)
        print(f'\ndrawn to {args.out}')
    return 0


def run_convert(args: argparse.Namespace) -> int:
    """Converts a file of weights to a folder for timm, or to a file for other code."""
    options = dict(model=args.model, dialect=args.dialect, first_block=args.first_block, prefix=args.prefix)
    done = convert(args.file, args.out, dry_run=args.dry_run or args.to is not None, **options)
    show_conversion(done)
    if args.dry_run:
        print('\nnothing was written')
    elif args.to is None:
        print(f'\nwrote {done.folder}; load it by\n  {call(f"local-dir:{done.folder}", dict(pretrained=True))}')
    else:
        out = args.out or f'{done.folder}{".pdparams" if args.to == "paddleclas" else ".pth"}'
        if os.path.exists(out):
            raise ValueError(f'there is a {out} already; name another file by --out, or move it away')
        model = timm.create_model(done.name, num_classes=done.checkpoint.num_classes, **done.args)
        load_checkpoint(model, done.checkpoint)
        export_checkpoint(model, out, args.to)
        print(f'\nwrote {out}\n  sha256 {sha256(out)}')
    return 0


def listed(names: Sequence[str]) -> str:
    """Counts names and tells the first ones."""
    more = ', ...' if len(names) > 3 else ''
    return f'{len(names)}' + (f': {", ".join(names[:3])}{more}' if names else '')


def show_conversion(done: Conversion) -> None:
    """Prints what a file was recognised as, how sure that is, and what became of its tensors."""
    checkpoint, record = done.checkpoint, done.config['timm_res2net']
    translation = checkpoint.translation
    under = f', under {translation.prefix}' if translation.prefix else ''
    sure = 'certain' if checkpoint.certain else 'not certain, but usual for such a file; --first-block overrides it'
    print(f'{checkpoint.file}\n  sha256 {record["converted_from"]["sha256"]}\n')
    print(f'dialect      {translation.dialect}{under}: {DIALECTS[translation.dialect].whose}')
    print(f'first block  {checkpoint.first_block}: {sure}')
    print(f'model        {call(done.name, done.args)}: certain, all tensors fit')
    print(f'dropped      {listed(translation.dropped)}')
    print(f'filled in    {listed(translation.filled)}')
    print(f'cast         {", ".join(f"{count} of {kind} to float32" for kind, count in translation.cast.items()) or 0}')
    if 'sha256' in record:
        print(f'\n{done.folder / "model.safetensors"}\n  sha256 {record["sha256"]}')


def main(argv: list[str] | None = None) -> int:
    """Runs a command.

    Returns:
        0, or 1 if something failed, or 2 for a wrong call.
    """
    args = parser().parse_args(argv)
    try:
        status = args.run(args)
        sys.stdout.flush()  # here, where a reader that has gone is expected, and not at the interpreter's end
        return status
    except ValueError as error:
        print(f'timm-res2net: {error}', file=sys.stderr)
        return 2 if isinstance(error, UnknownModelError) else 1
    except BrokenPipeError:  # the reader has seen enough, as in `timm-res2net list | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130


if __name__ == '__main__':
    sys.exit(main())
