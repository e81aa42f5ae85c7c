"""What is written is whole or not there, whatever happens to the disk and the process."""

import multiprocessing
import os
import re
import signal
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import tiny

from timm_res2net import CheckpointError, export_checkpoint, push
from timm_res2net.weights.config import load_folder
from timm_res2net.weights.convert import convert
from timm_res2net.weights.files import PREFIX, atomic_write_text, lock, temporary_folder, write_files
from timm_res2net.weights.folder import CONFIG_FILE, WEIGHTS_FILE

resource = pytest.importorskip('resource')
pytestmark = [
    pytest.mark.skipif(sys.platform == 'win32', reason='has no such permissions, limits and locks'),
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


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_new_files_and_folders_have_the_permissions_of_the_umask(mask: int, file: Path, umask: Any) -> None:
    umask(mask)
    out = convert(file, file.parent / 'out').folder
    export_checkpoint(tiny(), file.parent / 'new.pth', 'official')
    assert mode(out) == 0o777 & ~mask
    for path in (out / WEIGHTS_FILE, out / CONFIG_FILE, file.parent / 'new.pth'):
        assert mode(path) == 0o666 & ~mask


def test_replaced_file_keeps_its_permissions(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('old')
    (tmp_path / 'file').chmod(0o600)
    atomic_write_text(tmp_path / 'file', 'new')
    assert mode(tmp_path / 'file') == 0o600


def test_all_is_on_the_disk_before_it_gets_its_name(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert events == ['fsync model.safetensors', 'fsync config.json', 'fsync complete', 'rename complete', 'fsync in']


def limited(size: int, work: Callable[[], object]) -> None:
    """Ends the process with 0 if files that may not grow beyond a size lead to an OSError of one line that says so."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    try:
        work()
    except OSError as error:
        os._exit(0 if re.search('can not be written.*: .*File too large[^\n]{0,20}$', str(error)) else 3)
    os._exit(2)


WRITERS: dict[str, Callable[[Path, Path], object]] = {
    'convert': convert,
    'export': lambda file, out: export_checkpoint(tiny(), out, 'official'),
    'push': lambda file, out: push(tiny(), 'user/net', dry_run=out),
    'load': lambda file, out: load_folder(file.parent.parent / 'model'),
    'files': lambda file, out: write_files(out, {CONFIG_FILE: b'{}', WEIGHTS_FILE: bytes(40_000)}),
}


@pytest.mark.parametrize('size', [0, 10_000, 30_000])
@pytest.mark.parametrize('writer', WRITERS)
def test_full_disk_is_an_os_error_and_leaves_nothing(
    writer: str, size: int, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    convert(file, tmp_path / 'model')
    monkeypatch.setattr(tempfile, 'tempdir', str(file.parent))
    work = partial(WRITERS[writer], file, file.parent / 'out')
    process = multiprocessing.get_context('fork').Process(target=limited, args=(size, work))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert os.listdir(file.parent) == ['net.pth']


def test_write_files_replaces_all_or_none_and_keeps_permissions(tmp_path: Path) -> None:
    for name in ('a', 'b'):
        (tmp_path / name).write_bytes(b'old')
        (tmp_path / name).chmod(0o600)
    process = multiprocessing.get_context('fork').Process(
        target=limited, args=(10, lambda: write_files(tmp_path, {'a': b'new', 'b': b'new' * 10}))
    )
    process.start()
    process.join(60)
    assert process.exitcode == 0
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {'a': b'old', 'b': b'old'}
    write_files(tmp_path, {'a': b'new', 'b': b'newer'})
    assert {name: (tmp_path / name).read_bytes() for name in os.listdir(tmp_path)} == {'a': b'new', 'b': b'newer'}
    assert mode(tmp_path / 'a') == 0o600


@pytest.mark.parametrize('make', [os.mkfifo, os.mkdir, lambda path: os.symlink('absent/file', path)])
def test_write_files_onto_what_is_no_file_writes_none(make: Callable[[Path], object], tmp_path: Path) -> None:
    (tmp_path / 'a').write_bytes(b'old')
    make(tmp_path / 'b')
    before = (tmp_path / 'b').lstat()
    with pytest.raises(OSError, match=r'/b can not be written: it is|there is no folder .*absent to write file to'):
        write_files(tmp_path, {'a': b'new', 'b': b'new'})
    assert (tmp_path / 'a').read_bytes() == b'old'
    assert (tmp_path / 'b').lstat() == before
    assert sorted(os.listdir(tmp_path)) == ['a', 'b']


def test_write_files_follows_links(tmp_path: Path) -> None:
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'a').symlink_to('../target')
    for content in (b'first', b'second'):  # a link to nothing, and one to a file
        write_files(tmp_path / 'out', {'a': content, 'b': content})
        assert (tmp_path / 'target').read_bytes() == (tmp_path / 'out' / 'b').read_bytes() == content
    assert (tmp_path / 'out' / 'a').is_symlink()


@pytest.mark.parametrize('renames', [0, 1])
def test_convert_killed_at_a_rename_into_a_folder_is_done_by_the_next_convert_and_leaves_nothing(
    renames: int, file: Path
) -> None:
    out = file.parent / 'out'
    out.mkdir()
    (out / 'notes.txt').write_text('mine')

    def work() -> None:
        calls: list[Any] = []
        replace = os.replace

        def counted(*args: Any) -> None:
            if len(calls) == renames:
                os.kill(os.getpid(), signal.SIGKILL)
            calls.append(args)
            replace(*args)

        os.replace = counted  # type: ignore[assignment]
        convert(file, out)

    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    assert len(os.listdir(out)) == 1 + renames
    assert [name for name in os.listdir(file.parent) if name.startswith(PREFIX)] != []
    convert(file, out)
    assert sorted(os.listdir(out)) == [CONFIG_FILE, WEIGHTS_FILE, 'notes.txt']
    assert sorted(os.listdir(file.parent)) == ['net.pth', 'out']
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), tiny().state_dict(), rtol=0, atol=0)


def test_temporary_folder_of_a_killed_process_is_removed_and_that_of_another_is_not(tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    ready = context.SimpleQueue()

    def work() -> None:
        with temporary_folder(tmp_path) as folder:
            ready.put(folder)
            time.sleep(60)

    processes = [context.Process(target=work) for _ in range(2)]
    folders = []
    for process in processes:
        process.start()
        folders.append(ready.get())
    processes[0].kill()
    processes[0].join()
    assert sorted(tmp_path.iterdir()) == sorted(folders)
    with temporary_folder(tmp_path):
        assert not folders[0].exists()
        assert folders[1].exists()
    processes[1].kill()
    processes[1].join()


def test_temporary_folder_that_another_process_takes_for_left_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: dict[str, int] = {}
    make = tempfile.mkdtemp

    def take_the_first(**options: Any) -> str:
        folder = make(**options)
        if not taken:
            taken[folder] = lock(Path(folder))  # by which the other begins to remove it
        return folder

    monkeypatch.setattr(tempfile, 'mkdtemp', take_the_first)
    with temporary_folder(tmp_path) as folder:
        assert str(folder) not in taken
        assert folder.exists()
    os.close(*taken.values())
    assert os.listdir(tmp_path) == []


def test_what_others_put_where_temporary_folders_are_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'file').touch()
    (tmp_path / f'{PREFIX}link').symlink_to(tmp_path / 'mine')
    os.mkfifo(tmp_path / f'{PREFIX}pipe')  # which is never opened, as that would wait
    with temporary_folder(tmp_path):
        pass
    assert os.listdir(tmp_path / 'mine') == ['file']
    assert sorted(os.listdir(tmp_path)) == [f'{PREFIX}link', f'{PREFIX}pipe', 'mine']


@pytest.mark.parametrize('name', [WEIGHTS_FILE, CONFIG_FILE])
def test_convert_into_a_folder_with_a_file_of_others_is_refused(name: str, file: Path) -> None:
    out = file.parent / 'out'
    out.mkdir()
    (out / name).write_text('{"timm_res2net": 3}')
    with pytest.raises(ValueError, match='already'):
        convert(file, out)
    assert os.listdir(out) == [name]


@pytest.mark.parametrize('exists', [False, True])
def test_one_of_six_converts_to_one_folder_succeeds(exists: bool, file: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context('fork')
    barrier, outcomes = context.Barrier(6), context.SimpleQueue()
    out = file.parent / 'out'
    if exists:
        out.mkdir()
        (out / 'notes.txt').write_text('mine')

    def work(number: int) -> None:
        mine = tmp_path / f'{number}.pth'
        torch.save({**tiny().state_dict(), 'fc.bias': torch.full((4,), float(number))}, mine)
        folder = sys.modules['timm_res2net.weights.folder']
        move = folder.move_model
        folder.move_model = lambda *args: (barrier.wait(30), move(*args))  # type: ignore[attr-defined]
        try:
            convert(mine, out)
            outcomes.put(number)
        except ValueError as error:
            outcomes.put(None if 'already' in str(error) else str(error))

    processes = [context.Process(target=work, args=(number,)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    found = [outcomes.get() for _ in processes]
    (winner,) = [each for each in found if each is not None]
    loaded = timm.create_model(f'local-dir:{out}', pretrained=True)
    assert loaded.fc.bias.tolist() == [winner] * 4
    assert not [name for name in os.listdir(file.parent) if name.startswith(PREFIX)]


def test_convert_names_the_folder_after_the_file(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(file.parent)
    for name, folder in (('.hidden.pth', 'hidden'), ('net.v2.pth', 'net.v2'), ('.net', 'net')):
        os.replace('net.pth', name)
        assert convert(name, dry_run=True).folder == Path(folder)
        os.replace(name, 'net.pth')
    os.replace('net.pth', '..pth')
    with pytest.raises(ValueError, match=r'\.\.pth has no name'):
        convert('..pth')
    assert os.listdir() == ['..pth']
    with pytest.raises(CheckpointError):
        convert('absent.pth')
