"""Runs a Python program that uses timm models, with the family registered:

    python -m timm_res2net.run validate.py --model res2net50d ...
    python -m timm_res2net.run -m some.module ...
    python -m timm_res2net.run some-console-script ...
    torchrun --nproc-per-node 2 -m timm_res2net.run train.py ...

Python processes that the program starts do not inherit this. Start each of them with `-m timm_res2net.run`, or register
the family in the whole environment with `timm-res2net autoload --on`.
"""

import importlib.util
import os
import runpy
import shutil
import sys

import timm_res2net  # noqa: F401 - registers the models


def main(argv: list[str] | None = None) -> None:
    """Runs the program that the first arguments name as `__main__`, with the other arguments in `sys.argv`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    if argv in ([], ['-m']):
        sys.exit(__doc__)
    if argv[0] == '-m':
        sys.argv, sys.path[0] = argv[1:], os.getcwd()
        if not can_run(argv[1]):
            sys.exit(f'timm_res2net.run: no module {argv[1]!r}. Install it, or change to its folder')
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
        return
    script = find_script(argv[0])
    if script is None:
        sys.exit(f'timm_res2net.run: no Python script {argv[0]!r}. Name a file, a command on PATH, or a module with -m')
    sys.argv = [script, *argv[1:]]
    sys.path[0] = os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name='__main__')


def find_script(name: str) -> str | None:
    """Returns the path of a script, of a folder with a `__main__.py`, or of a Python script on PATH."""
    if os.path.isfile(name) or os.path.isfile(os.path.join(name, '__main__.py')):
        return name
    command = shutil.which(name)
    if command is None:
        return None
    with open(command, 'rb') as file:
        start = file.read(300)
    return command if start.startswith(b'#!') and b'python' in start else None


def can_run(module: str) -> bool:
    """Returns whether a module of this name exists, or a package with a `__main__`."""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f'{module}.__main__')
    except (ImportError, ValueError):  # no parent package, or the names '' and '.'
        return False
    return found is not None


if __name__ == '__main__':
    main()
