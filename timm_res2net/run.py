"""Runs a Python program that uses timm models, with the family registered:

    python -m timm_res2net.run validate.py --model res2net50d ...
    python -m timm_res2net.run -m some.module ...
    python -m timm_res2net.run some-console-script ...
    torchrun --nproc-per-node 2 -m timm_res2net.run train.py ...

Python processes that the program starts do not inherit the registration. Start each of them with
`-m timm_res2net.run`, or register the family in the whole environment with `timm-res2net autoload --on`.
"""

import os
import runpy
import shutil
import sys

import timm_res2net  # noqa: F401 - registers the models


def main(argv: list[str] | None = None) -> None:
    """Runs the program named by the first arguments as `__main__`, with the remaining arguments in `sys.argv`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    if argv in ([], ['-m']):
        sys.exit(__doc__)
    if argv[0] == '-m':
        sys.argv, sys.path[0] = argv[1:], os.getcwd()
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
        return
    script = argv[0] if os.path.exists(argv[0]) else shutil.which(argv[0])
    if script is None:
        sys.exit(f'timm_res2net.run: no script {argv[0]!r}. Name a file, a command on PATH, or a module with -m')
    sys.argv, sys.path[0] = [script, *argv[1:]], os.path.dirname(os.path.abspath(script))
    runpy.run_path(script, run_name='__main__')


if __name__ == '__main__':
    main()
