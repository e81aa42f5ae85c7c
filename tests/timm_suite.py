"""Runs timm's own tests of models on every model of this package, outside the ordinary test run (about ten minutes).

    python tests/timm_suite.py [PYTEST_ARGUMENT ...]

The tests come from the source distribution of the installed version of timm. Those that download
weights are left out, and so are those of other models.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import timm

import timm_res2net  # noqa: F401 - registers the models
from timm_res2net.models.variants import ARCHS


def main() -> int:
    """Downloads timm's tests and runs them with this file as a plugin of pytest."""
    with tempfile.TemporaryDirectory() as folder:
        release = f'timm=={version("timm")}'
        download = [sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--no-binary', 'timm', '-d', folder]
        subprocess.run([*download, release], check=True)
        (archive,) = Path(folder).glob('timm-*.tar.gz')
        shutil.unpack_archive(archive, folder)
        (tests,) = Path(folder).glob('timm-*/tests')
        pytest = [sys.executable, '-m', 'pytest', '-p', 'timm_suite', '-q', '--disable-warnings', '-k', 'not inference']
        # With a rootdir that contains timm's source, its tests would import that instead of the installed package.
        command = [*pytest, '--rootdir', str(tests), '-c', '/dev/null', str(tests / 'test_models.py'), *sys.argv[1:]]
        environment = {**os.environ, 'PYTHONPATH': str(Path(__file__).parent)}
        return subprocess.run(command, cwd=folder, env=environment).returncode


def only_ours(filter: str = '', *args: object, **kwargs: object) -> list[str]:
    """Replaces `timm.list_models` while timm's tests are collected; ignores the argument `module`."""
    kwargs.pop('module', None)
    known = list_models(filter, **kwargs)
    return [name for name in known if name.partition('.')[0] in ARCHS]


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Leaves out tests of models that are not in this package, and tests that download weights."""
    ours = []
    for item in items:
        params = getattr(item, 'callspec', None) and item.callspec.params
        if params and str(params.get('model_name')).partition('.')[0] in ARCHS and 'pretrained' not in item.name:
            ours.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in ours])
    items[:] = ours


if __name__ == '__main__':
    sys.exit(main())
list_models = timm.list_models
timm.list_models = only_ours  # type: ignore[assignment]
