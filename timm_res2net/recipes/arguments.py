"""What the command lines share: types of arguments, and how an error ends them."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from timm.utils import ParseKwargs

from ..weights.errors import first_line

__all__ = ['Keywords', 'device', 'make_parser', 'positive', 'reported']


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a recipe. It takes no abbreviations: --model is not --model-kwargs."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=keep_lines, allow_abbrev=False)


def positive(text: str) -> int:
    """An argument that is an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not above zero')
    return value


def device(text: str) -> torch.device:
    """An argument that is a device of this machine; for a process of torchrun 'cuda' is the GPU that is its own."""
    if text == 'cuda' and 'LOCAL_RANK' in os.environ:
        text = f'cuda:{os.environ["LOCAL_RANK"]}'
    try:
        torch.empty(0, device=text).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise argparse.ArgumentTypeError(f'{text} can not be used here: {first_line(error)}') from None
    return torch.device(text)


class Keywords(ParseKwargs):
    """An argument that is keywords, KEY=VALUE, which timm reads as Python's literals or texts."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        if wrong := [value for value in values if '=' not in value]:
            parser.error(f'argument {option}: {wrong[0]!r} is no KEY=VALUE')
        super().__call__(parser, namespace, values, option)  # type: ignore[no-untyped-call]


@contextmanager
def reported(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with one line: with status 2 for an error that a user can mend, 130 for Ctrl-C."""
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    except ImportError as error:
        parser.error(f'{first_line(error)}; pip install "timm_res2net[recipes]"')
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        text = str(error).strip()
        # A DataLoader puts the traceback of the process that reads before what is wrong.
        parser.error(text.splitlines()[-1] if text.startswith('Caught ') else first_line(error))
