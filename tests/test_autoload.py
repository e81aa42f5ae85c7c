"""`timm-res2net autoload` registers the family wherever timm is imported, and leaves nothing behind."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

from timm_res2net.__main__ import main

TIMM = "print('timm')"
FAMILY = "import timm; print('family after', timm.__name__)"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A site-packages with stand-ins for timm and this package, which only print that they are imported."""
    for name, text in (('timm', TIMM), ('timm_res2net', FAMILY)):
        (tmp_path / name).mkdir()
        (tmp_path / name / '__init__.py').write_text(text)
    monkeypatch.setattr(sysconfig, 'get_path', lambda name: str(tmp_path))
    return tmp_path


def start(site: Path, code: str) -> list[str]:
    """Runs code in a Python process whose site-packages is `site`; returns the lines that it prints."""
    add = f'site.addsitedir({str(site)!r})'
    command = f'import site, sys; {add}; {add}; {code}'  # twice, as Python does in virtual environments
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    done = subprocess.run([sys.executable, '-I', '-S', '-c', command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_autoload_on_imports_the_family_right_after_timm_and_nothing_before(site: Path) -> None:
    assert start(site, 'import timm') == ['timm']
    assert main(['autoload', '--on']) == 0
    for code in ('import timm', 'import timm_res2net', 'import importlib.util as u; u.find_spec("timm"); import timm'):
        assert start(site, code) == ['timm', 'family after timm']
    loaded = 'print(*sorted({*sys.modules} & {"timm", "typing", "importlib.util", "timm_res2net"}))'
    assert start(site, loaded) == ['']


def test_autoload_off_leaves_nothing_behind(site: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {*site.iterdir()}
    for option, state in (('--status', 'off'), ('--on', 'on'), ('--status', 'on'), ('--off', 'off'), ('--off', 'off')):
        assert main(['autoload', option]) == 0
        assert capsys.readouterr().out == f'autoload is {state}: {site}/timm_res2net_autoload.pth\n'
    assert {*site.iterdir()} == before


def test_autoload_of_a_family_that_fails_to_import_leaves_timm_usable(site: Path) -> None:
    main(['autoload', '--on'])
    (site / 'timm_res2net' / '__init__.py').write_text("raise RuntimeError('too old')")
    warning = 'timm_res2net could not register its models: too old'
    assert start(site, 'import timm; print("works")') == ['timm', 'works', warning]


def test_autoload_of_an_uninstalled_package_does_nothing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('timm_res2net.commands.autoload.HOOK', site / 'gone.py')
    main(['autoload', '--on'])
    assert start(site, 'import timm') == ['timm']
