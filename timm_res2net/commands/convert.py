"""`timm-res2net convert`: brings other people's weights to timm, or back."""

import argparse
import os
from typing import Any

from ..models.function import FIRST_BLOCKS, STYLES, Function
from ..weights.convert import Conversion, convert, export_checkpoint
from ..weights.dialects import DIALECTS, EXPORTS
from ..weights.files import sha256
from ..weights.folder import WEIGHTS_FILE
from ..weights.loading import format_create_model, load_model
from ..weights.recorded import read_labels
from .options import Commands, add_labels
from .output import describe_training, load_call, print, summarize_names

__all__ = ['add_convert']


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


class ListDialects(argparse.Action):
    """Shows whose files can be read, what their networks' first blocks compute, and which can be written."""

    def __call__(self, parser: argparse.ArgumentParser, *args: Any) -> None:
        print('dialect           first block      export  whose')
        for name, dialect in DIALECTS.items():
            known = [each for each in (dialect.function, dialect.in_detector) if each is not None]
            blocks = ' or '.join(each.first_block for each in known) or 'not known'
            print(f'{name:16}  {blocks:17}  {"yes" if name in EXPORTS else "":4}  {dialect.whose}')
        parser.exit()
