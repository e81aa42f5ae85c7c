"""The command line, `timm-res2net` or `python -m timm_res2net`: what commands there are, and how an error ends them."""

import argparse
import os
import sys

import torch
from huggingface_hub.errors import HfHubHTTPError

from .commands.bench import add_bench
from .commands.card import add_card
from .commands.convert import add_convert
from .commands.explain import add_explain
from .commands.export import add_export
from .commands.features import add_features
from .commands.list import add_list
from .commands.output import print
from .commands.predict import add_predict
from .commands.pull import add_pull
from .commands.push import add_push
from .commands.recipe import add_recipe
from .commands.validate import add_validate
from .version import __version__
from .weights.errors import UnknownModelError


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
    for command in commands.choices.values():
        command.set_defaults(error=command.error)  # for arguments that are wrong together
    return main


def show_help(args: argparse.Namespace) -> int:
    """Shows what commands there are."""
    parser().print_help()
    return 0


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
