"""`timm_res2net.run` runs programs that do not import this package, with its models registered."""

import re
import sys
from pathlib import Path

import pytest
from support import torchrun

from timm_res2net.run import main

PRINT = "import sys, timm; print(sys.argv[1:], __name__, timm.is_model('res2net50_vd_26w_4s'), sys.path[0])"
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def interpreter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Changes to an empty folder, and restores the arguments and the path that `main` sets for its own process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, 'argv', [*sys.argv])
    monkeypatch.setattr(sys, 'path', [*sys.path])


def test_run_script_is_main_with_its_arguments_and_folder(tmp_path: Path, capsys: Capture) -> None:
    Path('here').mkdir()
    Path('here/script.py').write_text(PRINT)
    main(['here/script.py', '--flag', 'a b'])
    assert capsys.readouterr().out.strip() == f"['--flag', 'a b'] __main__ True {tmp_path}/here"


def test_run_module_is_main_in_current_folder_and_returns_exit_status(tmp_path: Path, capsys: Capture) -> None:
    Path('program.py').write_text(f'{PRINT}; sys.exit(3)')
    with pytest.raises(SystemExit, match='3'):
        main(['-m', 'program', '-x'])
    assert capsys.readouterr().out.strip() == f"['-x'] __main__ True {tmp_path}"


def test_run_command_on_path_is_main(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture) -> None:
    Path('bin').mkdir()
    Path('bin/some-tool').write_text(f'#!{sys.executable}\n{PRINT}')
    Path('bin/some-tool').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    main(['some-tool', '-x'])
    assert capsys.readouterr().out.strip() == f"['-x'] __main__ True {tmp_path}/bin"


@pytest.mark.slow
def test_run_under_torchrun_registers_models_in_every_process() -> None:
    line = "os.environ['RANK'] + ' ' + str(timm.is_model('res2net50_vd_26w_4s'))"
    # Each process writes its line in one call, because they share a pipe.
    Path('script.py').write_text(f'import os, timm; os.write(1, ({line} + os.linesep).encode())')
    done = torchrun('-m', 'timm_res2net.run', 'script.py')
    assert sorted(done.stdout.splitlines()) == ['0 True', '1 True'], done.stderr


def test_run_prints_usage_for_help_and_exits_with_it_without_a_program(capsys: Capture) -> None:
    main(['--help'])
    usage = capsys.readouterr().out.strip()
    assert 'timm_res2net.run validate.py' in usage
    for arguments, message in (([], usage), (['-m'], usage), (['absent.py'], "no script 'absent.py'")):
        with pytest.raises(SystemExit, match=re.escape(message)):
            main(arguments)
