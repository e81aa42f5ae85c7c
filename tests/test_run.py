"""Programs that know nothing of this package have the family, and so do the processes that they start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import torchrun

from timm_res2net.run import main

PRINT = "import sys, timm; print(sys.argv[1:], __name__, timm.is_model('res2net50_vd_26w_4s'), sys.path[0])"


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, '-m', 'timm_res2net.run', *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env={**os.environ, **environment})


def test_a_script_runs_as_main_with_its_arguments_and_folder(tmp_path: Path) -> None:
    script = tmp_path / 'here' / 'script.py'
    script.parent.mkdir()
    script.write_text(PRINT)
    done = run(str(script), '--flag', 'a b')
    assert done.stdout.strip() == f"['--flag', 'a b'] __main__ True {script.parent}", done.stderr


def test_a_module_runs_as_main_from_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / 'program.py').write_text(PRINT)
    done = run('-m', 'program', '-x', cwd=tmp_path)
    assert done.stdout.strip() == f"['-x'] __main__ True {tmp_path}", done.stderr


def test_every_process_of_torchrun_has_the_family(tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    line = "os.environ['RANK'] + ' ' + str(timm.is_model('res2net50_vd_26w_4s'))"
    script.write_text(f'import os, timm; os.write(1, ({line} + os.linesep).encode())')  # at one go: they share a pipe
    done = torchrun('-m', 'timm_res2net.run', str(script))
    assert sorted(done.stdout.splitlines()) == ['0 True', '1 True'], done.stderr


def test_the_exit_status_is_that_of_the_script(tmp_path: Path) -> None:
    (tmp_path / 'script.py').write_text('raise SystemExit(3)')
    assert run(str(tmp_path / 'script.py')).returncode == 3


@pytest.mark.parametrize('method', ['subprocess', 'spawn', 'fork'])
def test_child_processes_have_the_family(method: str, tmp_path: Path) -> None:
    script = tmp_path / 'script.py'
    child = "import timm; print(timm.is_model('res2net50_vd_26w_4s'))"
    if method == 'subprocess':
        script.write_text(f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", {child!r}], check=True)\n')
    else:
        script.write_text(f"""if True:
            import multiprocessing
            def work(): exec({child!r})
            if __name__ == '__main__':
                process = multiprocessing.get_context({method!r}).Process(target=work)
                process.start()
                process.join()
        """)
    done = run(str(script))
    assert done.stdout.split() == ['True'], done.stderr


def test_children_keep_the_customisation_that_they_had_and_start_without_timm(tmp_path: Path) -> None:
    (tmp_path / 'sitecustomize.py').write_text("print('mine')")
    script = tmp_path / 'script.py'
    child = "import sys; print('timm' in sys.modules, 'torch' in sys.modules)"
    script.write_text(f'import subprocess, sys\nsubprocess.run([sys.executable, "-c", {child!r}], check=True)\n')
    done = run(str(script), PYTHONPATH=str(tmp_path))
    assert done.stdout.split() == ['mine', 'mine', 'False', 'False'], done.stderr  # this process, then its child


@pytest.mark.parametrize('arguments', [[], ['-m'], ['no_such_script.py']])
def test_without_a_program_it_is_said_how_to_name_one(arguments: list[str]) -> None:
    with pytest.raises(SystemExit, match=r'timm_res2net.run validate\.py|there is no no_such_script\.py'):
        main(arguments)


def test_the_usage_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    main(['--help'])
    assert 'timm_res2net.run validate.py' in capsys.readouterr().out
