"""The command line: `timm-res2net`, or `python -m timm_res2net`."""

import argparse
import os
import sys
from importlib import import_module
from typing import Any

import torch

from ._errors import UnknownModelError
from .commands.output import print
from .version import __version__

COMMANDS = {  # modules in commands/, with an example of each
    'predict': 'photo.jpg --model res2net50d',
    'validate': 'photos/val --weights model_best.pth.tar',
    'list': "'*50*' --pretrained --sort top1",
    'features': 'photo.jpg --model res2net50d --out features.png',
    'explain': 'photo.jpg --model res2net50d --out explain.png',
    'convert': 'res2net50_v1b_26w_4s.pth --out res2net50d',
    'export': 'res2net50d.in1k net.onnx --images photos/val',
    'push': 'model_best.pth.tar user/net --dataset user/photos --license apache-2.0',
    'pull': 'user/net --out net',
    'bench': '--models res2net50_26w_4s --batch 1 8',
    'recipe': 'imagenet --out imagenet.yaml',
    'card': 'res2net50d.in1k',
    'autoload': '--on',
}


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='timm-res2net', description='The Res2Net family for timm.')
    parser.add_argument('--version', action='version', version=f'timm_res2net {__version__}')
    commands = parser.add_subparsers(dest='command', metavar='COMMAND')
    for name, example in COMMANDS.items():
        module: Any = import_module(f'.commands.{name}', __package__)
        summary = module.__doc__.partition('. ')[0].rstrip('.')
        epilog = f'example: timm-res2net {name} {example}'
        command = commands.add_parser(name, help=summary, description=module.__doc__, epilog=epilog)
        module.add_arguments(command)
        command.set_defaults(run=module.run, error=command.error)  # run calls error for options that exclude each other
    return parser


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0 on success, 1 if something failed, 2 for invalid arguments, 130 for Ctrl-C."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = make_parser().parse_args(argv or ['--help'])
            return args.run(args) or 0
        finally:
            sys.stdout.flush()  # here, because a closed pipe cannot be handled when the interpreter exits
    except BrokenPipeError:  # the reader has stopped reading, as in `timm-res2net list | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes stdout again at exit
        return 0
    except (ValueError, TypeError, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f'timm-res2net: {" ".join(str(error).split())}', file=sys.stderr)
        return 2 if isinstance(error, UnknownModelError) else 1
    except KeyboardInterrupt:
        print('timm-res2net: interrupted', file=sys.stderr)
        return 130


if __name__ == '__main__':
    sys.exit(main())
