"""Runs a script or a module that makes timm models, with the family registered:

    python -m timm_res2net.run validate.py --model res2net50d ...
    python -m timm_res2net.run -m some.program ...
    torchrun --nproc-per-node 2 -m timm_res2net.run train.py ...

Python processes that the program starts don't inherit this: start each of them by `-m timm_res2net.run`, too.
"""

import importlib.util
import os
import runpy
import sys

import timm_res2net  # noqa: F401 - registers the models


def main(argv: list[str] | None = None) -> None:
    """Runs the script or module that the arguments name as `__main__`, with the rest of them in `sys.argv`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    if argv in ([], ['-m']):
        sys.exit(__doc__)
    if argv[0] == '-m':
        sys.argv = argv[1:]
        sys.path[0] = os.getcwd()
        if not can_run(argv[1]):
            sys.exit(f'timm_res2net.run: there is no module {argv[1]} to run; install it, or go to its folder')
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
        return
    if not os.path.isfile(argv[0]) and not os.path.isfile(os.path.join(argv[0], '__main__.py')):
        sys.exit(f'timm_res2net.run: there is no {argv[0]}; name a script, or a module by -m')
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')


def can_run(module: str) -> bool:
    """Whether there is a module of this name, or a package with a `__main__`."""
    try:
        found = importlib.util.find_spec(module)
        if found is not None and found.submodule_search_locations is not None:
            found = importlib.util.find_spec(f'{module}.__main__')
    except (ImportError, ValueError):  # of a package above it, or '' and '.'
        return False
    return found is not None


if __name__ == '__main__':
    main()
