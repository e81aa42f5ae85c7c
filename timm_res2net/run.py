"""Runs a script or a module with the family registered, for programs that know nothing of it:

    python -m timm_res2net.run validate.py --model res2net50d ...
    python -m timm_res2net.run -m some.program ...
    torchrun --nproc-per-node 2 -m timm_res2net.run train.py ...

Python processes that the program starts have it registered, too, as soon as they import timm.
"""

import os
import runpy
import sys
from pathlib import Path

import timm_res2net  # noqa: F401 - registers the models

CHILDREN = Path(__file__).parent / 'children'


def main(argv: list[str] | None = None) -> None:
    """Runs what the arguments name as `__main__`, with the rest of them in `sys.argv`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (['-h'], ['--help']):
        print(__doc__)
        return
    if argv in ([], ['-m']):
        sys.exit(__doc__)
    if argv[0] != '-m' and not os.path.exists(argv[0]):
        sys.exit(f'timm_res2net.run: there is no {argv[0]}; name a script, or a module by -m')
    paths = [str(CHILDREN), *filter(None, [os.environ.get('PYTHONPATH')])]
    os.environ['PYTHONPATH'] = os.pathsep.join(paths)
    if argv[0] == '-m':
        sys.argv = argv[1:]
        sys.path[0] = os.getcwd()
        runpy.run_module(argv[1], run_name='__main__', alter_sys=True)
        return
    sys.argv = argv
    sys.path[0] = os.path.dirname(os.path.abspath(argv[0]))
    runpy.run_path(argv[0], run_name='__main__')


if __name__ == '__main__':
    main()
