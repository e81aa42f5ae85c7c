"""Registers the family wherever timm is imported. Off by default; turn it off before you uninstall the package.

A .pth file in site-packages registers the family as soon as a Python process imports timm, so that tools that take timm
model names know the family although they do not import timm_res2net.
"""

import argparse
import sysconfig
from pathlib import Path

from .._files import atomic_write_text
from .output import print

HOOK = Path(__file__).parents[1] / '_autoload.py'
# Python executes this line at startup. Once the package is uninstalled it does nothing.
LINE = 'import os; os.path.isfile({hook!r}) and exec(open({hook!r}, encoding="utf-8").read(), {{}})\n'


def add_arguments(command: argparse.ArgumentParser) -> None:
    choice = command.add_mutually_exclusive_group(required=True)
    for name, help in (('on', 'install the .pth file'), ('off', 'remove it'), ('status', 'print if it is installed')):
        choice.add_argument(f'--{name}', dest='action', action='store_const', const=name, help=help)


def run(args: argparse.Namespace) -> None:
    file = Path(sysconfig.get_path('purelib'), 'timm_res2net_autoload.pth')
    if args.action == 'on':
        atomic_write_text(file, LINE.format(hook=str(HOOK)))
    elif args.action == 'off':
        file.unlink(missing_ok=True)
    print(f'autoload is {"on" if file.exists() else "off"}: {file}')
