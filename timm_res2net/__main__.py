"""The command line: `timm-res2net`, or `python -m timm_res2net`."""

import argparse
import os
import sys
from importlib import import_module

import torch
from huggingface_hub.errors import HfHubHTTPError

from ._errors import UnknownModelError
from .commands.output import print
from .version import __version__

COMMANDS = {  # one line of help, and arguments to show as an example, of each module in commands/
    'predict': ('classify images', 'photo.jpg --model res2net50d'),
    'validate': ('measure accuracy on a folder of images', 'photos/val --weights model_best.pth.tar'),
    'list': ('list models and weights', "'*50*' --pretrained --sort top1"),
    'features': ('show feature maps', 'photo.jpg --model res2net50d --out features.png'),
    'explain': ('draw where a network looks', 'photo.jpg --model res2net50d --out explain.png'),
    'convert': (
        'convert weights files of other code bases for timm, or back',
        'res2net50_v1b_26w_4s.pth --out res2net50d',
    ),
    'export': ('write a file that runs without this package', 'res2net50d.in1k net.onnx --images photos/val'),
    'push': ('upload a model to the Hub', 'model_best.pth.tar user/net --dataset user/photos --license apache-2.0'),
    'pull': ('download a model from the Hub', 'user/net --out net'),
    'bench': ("measure models side by side with timm's own", '--models res2net50_26w_4s --batch 1 8'),
    'recipe': ("show configurations for timm's train script", 'imagenet --out imagenet.yaml'),
    'card': ('print a model card', 'res2net50d.in1k'),
    'autoload': ('register the family wherever timm is imported', '--on'),
}


def parser(only: str | None = None) -> argparse.ArgumentParser:
    """Makes the parser; with `only`, it imports the module of that command alone and knows no arguments of others."""
    main = argparse.ArgumentParser(prog='timm-res2net', description='The Res2Net family for timm.')
    main.add_argument('--version', action='version', version=f'timm_res2net {__version__}')
    commands = main.add_subparsers(dest='command', metavar='COMMAND')
    for name, (help, example) in COMMANDS.items():
        command = commands.add_parser(name, help=help, epilog=f'example: timm-res2net {name} {example}')
        if only in (None, name):
            module = import_module(f'.commands.{name}', __package__)
            command.description = module.__doc__
            module.add_arguments(command)
            command.set_defaults(run=module.run, error=command.error)  # run calls error for impossible combinations
    return main


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns 0, or 1 if something failed, or 2 for wrong arguments."""
    if sys.stderr is None:
        sys.stderr = open(os.devnull, 'w')  # noqa: SIM115 - tqdm writes to it until the end
    if sys.stdout is None:
        print('timm-res2net: standard output is closed', file=sys.stderr)
        return 1
    argv = sys.argv[1:] if argv is None else argv
    try:
        try:
            args = parser(only=argv[0] if argv else '').parse_args(argv or ['--help'])
            return args.run(args)
        finally:
            sys.stdout.flush()  # here, where a closed pipe is handled, not at the end of the interpreter
    except BrokenPipeError:  # the reader has stopped reading, as in `timm-res2net list | head -3`
        discard_output()
        return 0
    except (ValueError, TypeError, OSError, ImportError, HfHubHTTPError, torch.OutOfMemoryError) as error:
        try:
            sys.stdout.flush()
        except OSError:  # a full disk, which the interpreter would report again at its end
            discard_output()
        print(f'timm-res2net: {" ".join(str(error).split())}', file=sys.stderr)
        return 2 if isinstance(error, UnknownModelError) else 1
    except KeyboardInterrupt:
        print('timm-res2net: interrupted', file=sys.stderr)
        return 130


def discard_output() -> None:
    """Redirects stdout to /dev/null once it can no longer be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == '__main__':
    sys.exit(main())
