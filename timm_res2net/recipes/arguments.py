"""Argument types that the command lines share."""

import argparse

__all__ = ['positive']


def positive(text: str) -> int:
    """An argument that is an integer above zero."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} is not above zero')
    return value
