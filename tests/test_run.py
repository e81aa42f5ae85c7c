"""`timm_res2net.run` runs programs that don't import this package, with its models registered."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from support import torchrun

from timm_res2net.run import main

PRINT = "import sys, timm; print(sys.argv[1:], __name__, timm.is_model('res2net50_vd_26w_4s'), sys.path[0])"


@pytest.fixture(autouse=True)
def restore_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets `main` change arguments and path, as it does for its own process."""
    monkeypatch.setattr(sys, 'argv', [*sys.argv])
    monkeypatch.setattr(sys, 'path', [*sys.path])


def test_run_script_is_main_with_its_arguments_and_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    script = tmp_path / 'here' / 'script.py'
    script.parent.mkdir()
    script.write_text(PRINT)
    main([str(script), '--flag', 'a b'])
    assert capsys.readouterr().out.strip() == f"['--flag', 'a b'] __main__ True {script.parent}"


def test_run_module_is_main_in_current_folder_and_returns_exit_status(tmp_path: Path) -> None:
    (tmp_path / 'program.py').write_text(f'{PRINT}; sys.exit(3)')
    command = [sys.executable, '-m', 'timm_res2net.run', '-m', 'program', '-x']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == (f"['-x'] __main__ True {tmp_path}", 3)


@pytest.mark.slow
def test_run_under_torchrun_registers_models_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    line = "os.environ['RANK'] + ' ' + str(timm.is_model('res2net50_vd_26w_4s'))"
    script.write_text(f'import os, timm; os.write(1, ({line} + os.linesep).encode())')  # at one go: they share a pipe
    done = torchrun('-m', 'timm_res2net.run', str(script))
    assert sorted(done.stdout.splitlines()) == ['0 True', '1 True'], done.stderr


@pytest.mark.parametrize('name', ['nomodule', 'nopackage.module', 'timm_res2net.weights', '', '.'])
def test_run_module_that_is_none_exits_with_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'argv', ['run'])
    monkeypatch.setattr(sys, 'path', [*sys.path])
    with pytest.raises(SystemExit, match=re.escape(f'timm_res2net.run: there is no module {name} to run')):
        main(['-m', name])


def test_run_folder_without_main_exits_with_its_name(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=f'there is no {tmp_path}; name a script'):
        main([str(tmp_path)])


@pytest.mark.parametrize('arguments', [[], ['-m'], ['no_such_script.py']])
def test_run_missing_program_exits_with_message(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r'timm_res2net.run validate\.py|there is no no_such_script\.py'):
        main(arguments)


def test_run_help_prints_usage(capsys: pytest.CaptureFixture[str]) -> None:
    main(['--help'])
    assert 'timm_res2net.run validate.py' in capsys.readouterr().out
