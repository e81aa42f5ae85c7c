"""`timm-res2net pull`: downloads a model from the Hub."""

import argparse
import hashlib
import os

from ..hub.pull import download_model
from ..weights.files import write_files
from ..weights.folder import CONFIG_FILE, WEIGHTS_FILE
from .options import Commands, add_timeout
from .output import load_call, print

__all__ = ['add_pull']


def add_pull(commands: Commands) -> None:
    """Adds the arguments of `pull`."""
    command = commands.add_parser(
        'pull', help='download a model from the Hub', description='Downloads a model and checks every byte of it.'
    )
    command.add_argument('repo', metavar='USER/NAME', help='where it is')
    command.add_argument('--revision', metavar='R', help='branch, tag or commit (default: main)')
    command.add_argument('--out', metavar='DIR', help='copy it to this folder (default: only to the cache)')
    add_timeout(command)
    command.set_defaults(run=run_pull)


def run_pull(args: argparse.Namespace) -> int:
    """Downloads a model, and says where it is and which."""
    if args.out and os.path.lexists(args.out) and not os.path.isdir(args.out):
        raise ValueError(f'{args.out} is a file; name a folder by --out')
    found = download_model(args.repo, args.revision, timeout=args.timeout)
    files = {name: found.files[name] for name in (WEIGHTS_FILE, CONFIG_FILE)}
    if args.out:
        write_files(args.out, found.files)
    for name, content in files.items():
        print(f'{hashlib.sha256(content).hexdigest()}  {name}')
    print(f'\n{args.repo} at {found.commit}, checked; load it by\n  {load_call(args.out or found.folder)}')
    return 0
