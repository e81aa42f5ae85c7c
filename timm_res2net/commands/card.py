"""Prints the model card of published weights."""

import argparse

from ..hub.cards import card
from .output import print


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('name', metavar='NAME', help='published weights, such as res2net50d.in1k')


def run(args: argparse.Namespace) -> None:
    print(card(args.name), end='')
