"""Downloads a model from the Hugging Face Hub. Verifies the checksums of its files."""

import argparse
import hashlib

from .._files import write_files
from ..hub.pull import fetch_model
from ..weights.config import CONFIG_FILE, WEIGHTS_FILE
from ..weights.loading import load_folder
from .output import load_call, print


def add_arguments(command: argparse.ArgumentParser) -> None:
    command.add_argument('repo', metavar='USER/NAME', help='repository to download')
    command.add_argument('--revision', metavar='R', help='branch, tag or commit (default: main)')
    command.add_argument('--out', metavar='DIR', help='also copy the files to this folder (default: only to the cache)')


def run(args: argparse.Namespace) -> None:
    folder = fetch_model(args.repo, args.revision)
    files = {name: (folder / name).read_bytes() for name in (WEIGHTS_FILE, CONFIG_FILE)}
    load_folder(folder, source=args.repo)
    if args.out:
        write_files(args.out, files)
    for name, content in files.items():
        print(f'{hashlib.sha256(content).hexdigest()}  {name}')
    print(f'\nverified {args.repo} at {folder.name}; load it with\n  {load_call(args.out or folder)}')
