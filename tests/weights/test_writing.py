"""Files are written completely or not at all, whatever happens to the disk and the process."""

import multiprocessing
import os
import re
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import tiny

from timm_res2net import export_checkpoint
from timm_res2net._errors import first_line
from timm_res2net._files import atomic_write, atomic_write_text, make_folder, require_writable, write_files
from timm_res2net.weights.config import CONFIG_FILE, WEIGHTS_FILE
from timm_res2net.weights.convert import convert, folder_for

resource = pytest.importorskip('resource')
pytestmark = [
    pytest.mark.skipif(sys.platform == 'win32', reason='Windows has no such permissions, limits and locks'),
    pytest.mark.filterwarnings('ignore:.*fork'),  # by Python 3.12, in a process with threads
]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / 'in').mkdir()
    torch.save(tiny().state_dict(), tmp_path / 'in' / 'net.pth')
    return tmp_path / 'in' / 'net.pth'


@pytest.fixture
def umask() -> Iterator[Callable[[int], int]]:
    before = os.umask(0)
    os.umask(before)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_new_files_and_folders_have_the_permissions_of_the_umask(file: Path, umask: Any) -> None:
    umask(0o027)
    out = convert(file, file.parent / 'out').folder
    export_checkpoint(tiny(), file.parent / 'new.pth', 'official')
    assert mode(out) == 0o750
    for path in (out / WEIGHTS_FILE, out / CONFIG_FILE, file.parent / 'new.pth'):
        assert mode(path) == 0o640


def test_content_is_synced_to_disk_before_it_gets_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def recording(function: Callable[..., Any], name: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            events.append(f'{function.__name__} {name(args[0])}')
            return function(*args)

        return call

    monkeypatch.setattr(
        os, 'fsync', recording(os.fsync, lambda handle: Path(os.readlink(f'/proc/self/fd/{handle}')).name)
    )
    monkeypatch.setattr(os, 'replace', recording(os.replace, lambda path: Path(path).name))
    monkeypatch.setattr(os, 'rename', recording(os.rename, lambda path: Path(path).name))
    atomic_write_text(file.parent / 'a', 'text')
    assert events == ['fsync a', 'replace a', 'fsync in']
    events.clear()
    convert(file, file.parent / 'out')
    assert events == ['fsync config.json', 'fsync model.safetensors', 'fsync out', 'rename out', 'fsync in']


def test_new_folder_that_another_process_makes_first_keeps_its_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def make_it_first(complete: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / 'a').write_text('theirs')
        os.replace(complete, folder)

    monkeypatch.setattr(os, 'rename', make_it_first)
    with pytest.raises(OSError, match=r'cannot write .*out: Directory not empty'):
        write_files(tmp_path / 'out', {'a': b'ours', 'b': b'ours'})
    assert [path.name for path in tmp_path.rglob('*')] == ['out', 'a']
    assert (tmp_path / 'out' / 'a').read_text() == 'theirs'


def run(work: Callable[..., object], *args: Any) -> int | None:
    """Runs a function in another process; returns the exit status."""
    process = multiprocessing.get_context('fork').Process(target=work, args=args)
    process.start()
    process.join(60)
    return process.exitcode


def limited(size: int, work: Callable[[], object]) -> None:
    """Limits the size of files and calls `work`; exits with 0 if this raises a one-line OSError with the reason."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        work()
    except OSError as error:
        os._exit(0 if re.search('cannot write .*: .*File too large[^\n]{0,20}$', str(error)) else 3)
    os._exit(2)


@pytest.mark.parametrize('size', [0, 30_000])
@pytest.mark.parametrize('write', [convert, lambda file, out: export_checkpoint(tiny(), out, 'official')])
def test_full_disk_is_an_os_error_and_leaves_nothing(
    write: Callable[[Path, Path], object], size: int, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, 'tempdir', str(file.parent))
    assert run(limited, size, partial(write, file, file.parent / 'out')) == 0
    assert os.listdir(file.parent) == ['net.pth']


def test_write_files_replaces_all_or_none_and_keeps_permissions(tmp_path: Path) -> None:
    for name in ('a', 'b'):
        (tmp_path / name).write_bytes(b'old')
        (tmp_path / name).chmod(0o600)
    assert run(limited, 10, lambda: write_files(tmp_path, {'a': b'new', 'b': b'new' * 10})) == 0
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {'a': b'old', 'b': b'old'}
    write_files(tmp_path, {'a': b'new', 'b': b'newer'})
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {'a': b'new', 'b': b'newer'}
    assert mode(tmp_path / 'a') == 0o600


def test_write_files_onto_a_folder_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(b'old')
    (tmp_path / 'b').mkdir()
    with pytest.raises(OSError, match=r'cannot write .*: it is a folder'):
        write_files(tmp_path, {'a': b'new', 'b': b'new'})
    assert (tmp_path / 'a').read_bytes() == b'old'
    assert sorted(os.listdir(tmp_path)) == ['a', 'b']


def test_atomic_write_follows_links(tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'link').symlink_to('../target')
    for text in ('first', 'second'):  # a link to nothing, and one to a file
        atomic_write_text(tmp_path / 'out' / 'link', text)
        assert (tmp_path / 'target').read_text() == text
    assert (tmp_path / 'out' / 'link').is_symlink()


def test_convert_killed_before_the_first_rename_can_be_repeated(file: Path) -> None:
    out = file.parent / 'out'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')

    def work() -> None:
        os.replace = lambda *args: os.kill(os.getpid(), signal.SIGKILL)
        convert(file, out)

    assert run(work) == -signal.SIGKILL
    assert not {WEIGHTS_FILE, CONFIG_FILE} & {*os.listdir(out)}
    convert(file, out)
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), tiny().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('name', [WEIGHTS_FILE, CONFIG_FILE])
def test_convert_into_a_folder_with_a_foreign_file_is_refused(name: str, file: Path) -> None:
    out = file.parent / 'out'
    out.mkdir()
    (out / name).write_text('{"timm_res2net": 3}')
    with pytest.raises(ValueError, match='already'):
        convert(file, out)
    assert os.listdir(out) == [name]


def test_convert_names_the_folder_after_the_file() -> None:
    names = {'.hidden.pth': 'hidden', 'net.v2.pth': 'net.v2', '.net': 'net', 'a/last.pth.tar': 'last'}
    assert {name: str(folder_for(name)) for name in names} == names
    with pytest.raises(ValueError, match=r"cannot name a folder after '\.\.pth'"):
        folder_for('..pth')


@pytest.mark.parametrize('problem', [OSError, ValueError])
def test_atomic_write_failure_keeps_the_old_file_and_the_type(problem: type[Exception], tmp_path: Path) -> None:
    def fail(path: str) -> None:
        Path(path).write_text('half')
        raise problem('no such format')

    (tmp_path / 'file').write_text('old')
    with pytest.raises(problem, match=r'cannot write .*file: no such format'):
        atomic_write(tmp_path / 'file', fail)
    assert [path.read_text() for path in tmp_path.iterdir()] == ['old']


def test_atomic_write_into_absent_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'cannot write file: no folder .*absent'):
        atomic_write_text(tmp_path / 'absent' / 'file', 'text')


@pytest.mark.parametrize('name', ['pipe', 'folder', 'loop', ''])
def test_atomic_write_onto_anything_but_a_file_raises_and_leaves_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo('pipe')
    Path('folder').mkdir()
    Path('loop').symlink_to('loop')
    before = {path: path.lstat().st_mode for path in tmp_path.iterdir()}
    for write in (require_writable, lambda out: atomic_write_text(out, 'text')):
        with pytest.raises(OSError, match=r'cannot write .*: it is (not a regular file|a folder)'):
            write(name)
    assert {path: path.lstat().st_mode for path in tmp_path.iterdir()} == before


def test_make_folder_onto_file_raises_with_its_name(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match=r'cannot create folder .*file: File exists'):
        make_folder(tmp_path / 'file')


def test_first_line_of_error_is_one_line() -> None:
    assert first_line(EOFError()) == 'EOFError'
    assert first_line(ValueError('first.\nsecond')) == 'first'
    assert first_line(ValueError('it raised:\n  the cause.\nmore')) == 'it raised: the cause'
