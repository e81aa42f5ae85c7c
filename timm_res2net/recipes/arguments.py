"""Shared by the command lines of the recipes: the parser, argument types, and one-line errors."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from .._errors import first_line, sanitize


def make_parser(description: str | None) -> argparse.ArgumentParser:
    """Makes a parser that keeps the line breaks of its description and rejects abbreviated options."""
    keep_lines = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=description, formatter_class=keep_lines, allow_abbrev=False)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f'{text} is not above zero')
    return int(text)


@contextmanager
def report_errors(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Turns errors into one line and exit status 2 (130 for Ctrl-C)."""
    try:
        yield
    except KeyboardInterrupt:
        parser.exit(130, f'{parser.prog}: interrupted\n')
    except (ImportError, ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        message = first_line(error)
        if message.startswith('Caught '):  # a DataLoader quotes its worker's traceback, which ends in TYPE: MESSAGE
            message = sanitize(str(error).strip().splitlines()[-1].partition(': ')[2], 500)
        if isinstance(error, ImportError):
            message += ". Install the recipes: pip install 'timm_res2net[recipes]'"
        sys.stdout.flush()
        parser.exit(2, f'{parser.prog}: error: {message}\n')
