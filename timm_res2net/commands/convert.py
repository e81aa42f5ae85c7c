"""Converts weights from other code bases to timm, or back. Prints what it recognized and changed."""

import argparse
import os
from typing import Any

from .._files import sha256
from ..models.spec import FIRST_BLOCKS, STYLES, NetworkSpec
from ..weights.config import RECORD, WEIGHTS_FILE
from ..weights.convert import Conversion, convert, export_checkpoint
from ..weights.dialects import DIALECTS, EXPORTS
from ..weights.loading import load_model
from ..weights.matching import format_create_model
from .options import add_options
from .output import describe_training, first_names, load_call, print, print_table
from .sources import read_label_names


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('file', metavar='FILE', help='weights file from a code base that --list-dialects shows')
    command.add_argument('--model', metavar='NAME', help='model that the file fits (default: detected)')
    command.add_argument('--out', metavar='DIR', help='folder to write, or file with --to (default: named after FILE)')
    command.add_argument('--dialect', choices=DIALECTS, help='code base whose tensor names it has (default: detected)')
    command.add_argument('--prefix', help='prefix of the tensor names, for a file with several networks')
    add_options(command, '--labels', '--class-order', '--weights-from')
    command.add_argument('--to', choices=EXPORTS, help='write a file for this code base instead of a folder for timm')
    command.add_argument('--dry-run', action='store_true', help='write nothing')
    command.add_argument('--list-dialects', action=ListDialects, nargs=0, help='list the known code bases')
    command.add_argument('--first-block', choices=FIRST_BLOCKS, help='kind of the first blocks (default: detected)')
    command.add_argument('--style', choices=STYLES, help='position of the stride in a block (default: detected)')
    command.add_argument('--strides', type=int, nargs=4, metavar='N', help='stride of each stage (default: detected)')
    command.add_argument(
        '--dilations', type=dilation, nargs=4, metavar='N', help='dilation of each stage or of its blocks (like 4,8,16)'
    )
    command.add_argument('--stem-ceil-mode', action='store_true', default=None, help='its first pool rounds sizes up')


def dilation(text: str) -> int | tuple[int, ...]:
    """Parses the dilation of a stage, or the dilations of its blocks."""
    each = tuple(int(number) for number in text.split(','))
    return each if len(each) > 1 else each[0]


def run(args: argparse.Namespace) -> None:
    done = convert(
        args.file,
        args.out,
        model=args.model,
        dialect=args.dialect,
        prefix=args.prefix,
        weights_from=args.weights_from,
        labels=read_label_names(args),
        dry_run=args.dry_run or args.to is not None,
        **{name: value for name in vars(NetworkSpec()) if (value := getattr(args, name, None)) is not None},
    )
    show_conversion(done)
    if args.dry_run:
        print('\nnothing was written')
    elif args.to is None:
        print(f'\nwrote {done.folder}; load it with\n  {load_call(done.folder)}')
    else:
        write_for(args.to, done, args.out)


def write_for(target: str, done: Conversion, out: str | None) -> None:
    """Writes the file for another code base. For mmdet, whose networks are backbones, leaves out the classifier."""
    path = out or f'{done.folder}{".pdparams" if target == "paddleclas" else ".pth"}'
    if os.path.lexists(path):
        raise ValueError(f'{path} already exists. Choose another file with --out, or move this one away')
    args = {**done.args, 'num_classes': 0} if target == 'mmdet' else done.args
    export_checkpoint(load_model(done.checkpoint, done.name, **args), path, target)
    if target == 'mmdet' and done.checkpoint.num_classes:
        print('left out     the classifier: mmdet only has backbones')
    print(f'\nwrote {path}\n  sha256 {sha256(path)}')


def show_conversion(done: Conversion) -> None:
    """Prints what a file was recognized as, and what happened to its tensors."""
    checkpoint, record = done.checkpoint, done.config[RECORD]
    spec = checkpoint.spec or NetworkSpec()
    under = f', prefix {checkpoint.prefix}' if checkpoint.prefix else ''
    print(f'{checkpoint.file}\n  sha256 {record["converted_from"]["sha256"]}\n')
    print(f'dialect      {checkpoint.dialect}{under}: {DIALECTS[checkpoint.dialect].description}')
    if checkpoint.project:
        print(f'part of      {checkpoint.project}')
    shown = [name for name in vars(spec) if name in ('first_block', *spec.differing_fields(NetworkSpec()))]
    print(f'computes     {spec.as_keywords(shown)}')
    print(f'model        {format_create_model(done.name, done.args)}: certain, all tensors fit')
    cfg = {**done.config, **done.config['pretrained_cfg']}
    print('\n'.join(describe_training(cfg, checkpoint.num_classes, checkpoint)))
    for reason in sorted(set(checkpoint.dropped.values())):
        names = [name for name, why in checkpoint.dropped.items() if why == reason]
        print(f'dropped      {len(names)} ({reason}): {first_names(names)}')
    if checkpoint.filled:
        print(f'filled in    {len(checkpoint.filled)}: {first_names(checkpoint.filled)}')
    for kind, count in checkpoint.cast.items():
        print(f'cast         {count} from {kind} to float32')
    if 'sha256' in record:
        print(f'\n{done.folder / WEIGHTS_FILE}\n  sha256 {record["sha256"]}')


class ListDialects(argparse.Action):
    """Prints the known code bases, the first blocks of their networks, and whether `--to` can write their files."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        rows = [('dialect', 'first block', 'export', 'code base')]
        for name, dialect in DIALECTS.items():
            known = [each for each in (dialect.spec, dialect.detector_spec) if each is not None]
            blocks = ' or '.join(each.first_block for each in known) or 'unknown'
            rows.append((name, blocks, 'yes' if name in EXPORTS else '', dialect.description))
        print_table(rows, left=range(4))
        parser.exit()
