"""Writes are atomic: a file is complete or what it was before."""

import os
from pathlib import Path

import pytest

from timm_res2net.weights.errors import first_line
from timm_res2net.weights.files import atomic_write, atomic_write_text, make_folder, require_writable, sha256


def test_atomic_write_failure_keeps_old_file(tmp_path: Path) -> None:
    def fail(path: str) -> None:
        Path(path).write_text('half')
        raise OSError('No space left on device')

    (tmp_path / 'file').write_text('old')
    with pytest.raises(OSError, match='file can not be written: No space left on device'):
        atomic_write(tmp_path / 'file', fail)
    assert (tmp_path / 'file').read_text() == 'old'
    assert len(list(tmp_path.iterdir())) == 1


def test_atomic_write_error_of_the_writer_keeps_its_type(tmp_path: Path) -> None:
    def fail(path: str) -> None:
        raise ValueError('no such format')

    with pytest.raises(ValueError, match='file can not be written: no such format'):
        atomic_write(tmp_path / 'file', fail)
    assert list(tmp_path.iterdir()) == []


def test_atomic_write_into_absent_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r'there is no folder .*absent to write file to'):
        atomic_write_text(tmp_path / 'absent' / 'file', 'text')


def test_atomic_write_text_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('old')
    atomic_write_text(tmp_path / 'file', 'new')
    assert (tmp_path / 'file').read_text() == 'new'
    assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_atomic_write_follows_links(tmp_path: Path) -> None:
    (tmp_path / 'link').symlink_to('file')
    for text in ('first', 'second'):  # a link to nothing, and one to a file
        atomic_write_text(tmp_path / 'link', text)
        assert (tmp_path / 'file').read_text() == text
    assert (tmp_path / 'link').is_symlink()


@pytest.mark.parametrize('name', ['pipe', 'folder', 'loop', ''])
def test_atomic_write_onto_what_is_no_file_raises_and_leaves_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo('pipe')
    Path('folder').mkdir()
    Path('loop').symlink_to('loop')
    before = {path: path.lstat().st_mode for path in tmp_path.iterdir()}
    for write in (require_writable, lambda out: atomic_write_text(out, 'text')):
        with pytest.raises(OSError, match=r'can not be written: it is (no regular file|a folder)'):
            write(name)
    assert {path: path.lstat().st_mode for path in tmp_path.iterdir()} == before


def test_require_writable_writes_nothing(tmp_path: Path) -> None:
    require_writable(tmp_path / 'file')
    assert list(tmp_path.iterdir()) == []


def test_make_folder_onto_file_raises_with_its_name(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='file is no folder and can not be made one: File exists'):
        make_folder(tmp_path / 'file')


def test_sha256_of_abc_equals_digest_of_standard(tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(b'abc')
    assert sha256(tmp_path / 'file') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


def test_first_line_of_error_is_one_line() -> None:
    assert first_line(EOFError()) == 'EOFError'
    assert first_line(ValueError('first.\nsecond')) == 'first'
    assert first_line(ValueError('it raised:\n  the cause.\nmore')) == 'it raised: the cause'
