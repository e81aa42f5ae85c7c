"""What the command lines share: types of arguments, and how an error ends them."""

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..weights.errors import first_line

__all__ = ['device', 'positive', 'reported']


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


@contextmanager
def reported(parser: argparse.ArgumentParser) -> Iterator[None]:
    """Ends the program with status 2 and one line for an error that a user can mend."""
    try:
        yield
    except ImportError as error:
        parser.error(f'{first_line(error)}; pip install "timm_res2net[recipes]"')
    except (ValueError, TypeError, KeyError, OSError, RuntimeError) as error:
        text = str(error).strip()
        # A DataLoader puts the traceback of the process that reads before what is wrong.
        parser.error(text.splitlines()[-1] if text.startswith('Caught ') else first_line(error))
