"""Writes are atomic: a file is complete or what it was before."""

from pathlib import Path

import pytest

from timm_res2net.weights.errors import first_line
from timm_res2net.weights.files import atomic_write, atomic_write_text, sha256


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


def test_sha256_of_abc_equals_digest_of_standard(tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(b'abc')
    assert sha256(tmp_path / 'file') == 'ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad'


def test_first_line_of_error_is_one_line() -> None:
    assert first_line(EOFError()) == 'EOFError'
    assert first_line(ValueError('first.\nsecond')) == 'first'
    assert first_line(ValueError('it raised:\n  the cause.\nmore')) == 'it raised: the cause'
