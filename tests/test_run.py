"""`timm_res2net.run` runs programs that do not import this package, with its models registered."""

import re
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


def test_run_module_is_main_in_current_folder_and_returns_exit_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('program.py').write_text(f'{PRINT}; sys.exit(3)')
    with pytest.raises(SystemExit, match='3'):
        main(['-m', 'program', '-x'])
    assert capsys.readouterr().out.strip() == f"['-x'] __main__ True {tmp_path}"


def test_run_command_on_path_is_main(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tool = tmp_path / 'some-tool'
    tool.write_text(f'#!{sys.executable}\n{PRINT}')
    tool.chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path))
    main(['some-tool', '-x'])
    assert capsys.readouterr().out.strip() == f"['-x'] __main__ True {tmp_path}"


@pytest.mark.slow
def test_run_under_torchrun_registers_models_in_every_process(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    line = "os.environ['RANK'] + ' ' + str(timm.is_model('res2net50_vd_26w_4s'))"
    script.write_text(f'import os, timm; os.write(1, ({line} + os.linesep).encode())')  # at one go: they share a pipe
    done = torchrun('-m', 'timm_res2net.run', str(script))
    assert sorted(done.stdout.splitlines()) == ['0 True', '1 True'], done.stderr


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ([], 'timm_res2net.run validate.py'),
        (['-m'], 'timm_res2net.run validate.py'),
        (['no_such_script.py'], "no script 'no_such_script.py'"),
    ],
)
def test_run_without_a_program_exits_with_its_name(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=re.escape(message)):
        main(arguments)


def test_run_help_prints_usage(capsys: pytest.CaptureFixture[str]) -> None:
    main(['--help'])
    assert 'timm_res2net.run validate.py' in capsys.readouterr().out
