"""Files that attack: each is refused in time, within memory, and with one line of text."""

import argparse
import gc
import io
import json
import logging
import multiprocessing
import os
import pickle
import pickletools
import struct
import sys
import tarfile
import threading
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support import slow_but, tiny
from test_readers import SMALL, WRITTEN, field, mindspore_value, torch_file
from torch import Tensor
from torchvision.utils import save_image

from timm_res2net import CheckpointError, load_model
from timm_res2net.__main__ import main
from timm_res2net.deploy.images import read_image
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.convert import convert
from timm_res2net.weights.dialects import translate
from timm_res2net.weights.errors import printable
from timm_res2net.weights.loading import adapt_state_dict
from timm_res2net.weights.pickles import Array
from timm_res2net.weights.readers import read
from timm_res2net.weights.recorded import read_labels

FC = 'fc.weight'
pytestmark = pytest.mark.filterwarnings('ignore:.*fork')  # by Python 3.12, in a process with threads


def torch_zip(data: bytes, **storages: bytes) -> bytes:
    """A file of `torch.save` around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w') as archive:
        archive.writestr('archive/data.pkl', data)
        archive.writestr('archive/version', '3\n')
        for key, content in storages.items():
            archive.writestr(f'archive/data/{key}', content)
    return buffer.getvalue()


def text(value: str) -> bytes:
    encoded = value.encode()
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def in_dict(value: bytes, protocol: int = 2) -> bytes:
    """A pickle of a dict with one item."""
    return b'\x80' + bytes([protocol]) + b'}' + text('a') + value + b's.'


def as_key(value: bytes) -> bytes:
    """A pickle of a dict with one key."""
    return b'\x80\x02}' + value + b'Ns.'


def levels(number: int, width: int) -> bytes:
    """Opcodes of a dict whose values are one dict, whose values are one dict, and so on."""
    opcodes = b'}q\x00'
    for i in range(number):
        opcodes += b'0}(' + b''.join(text(str(k)) + b'h%c' % i for k in range(width)) + b'uq%c' % (i + 1)
    return opcodes


def with_sizes(sizes: bytes) -> bytes:
    """A pickle of a tensor of torch, with sizes and strides by opcodes."""
    storage = b'(' + text('storage') + b'ctorch\nFloatStorage\n' + text('0') + text('cpu') + b'K\x01tQ'
    return in_dict(b'ctorch._utils\n_rebuild_tensor_v2\n(' + storage + b'K\x00' + sizes + b'\x89}tR')


def tape(name: str, content: bytes, **attributes: str) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w', pax_headers=attributes) as archive:
        member = tarfile.TarInfo(name)
        member.size = len(content)
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def pax_of_digits() -> bytes:
    """A tape archive whose header of attributes is digits only: Python's reader takes quadratic time."""
    member = tarfile.TarInfo('x')
    member.size, member.type = 2_000_000, b'x'
    return member.tobuf(tarfile.USTAR_FORMAT) + b'1' * member.size + bytes(1024)


def header(entries: dict[str, Any], content: bytes = bytes(4)) -> bytes:
    raw = json.dumps(entries).encode()
    return struct.pack('<Q', len(raw)) + raw + content


def with_blocks(number: int) -> dict[str, Tensor]:
    """A network that takes seconds to make."""
    last = {name[8:]: tensor for name, tensor in SMALL.items() if name.startswith('layer2.1.')}
    return SMALL | {f'layer2.{i}{name}': last[name] for name in last for i in range(1, number)}


def without_keys(content: bytes) -> bytes:
    """A file of torch before 1.6 whose list of the storages that follow is empty: torch leaves them uninitialised."""
    file, ends = io.BytesIO(content), []
    for _ in range(5):
        for _opcode in pickletools.genops(file):
            pass
        ends.append(file.tell())
    return content[: ends[3]] + pickle.dumps([], 2) + content[ends[4] :]


ONE_NUMBER = b'shape {\n dim: 1\n}\ndata_type: kFloat\n'


def lying_zip(name: str, packed: int, **others: bytes) -> bytes:
    """An archive with a file of 120 MB, that says of it that it has four bytes."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, 'w') as archive:
        for other, content in others.items():
            archive.writestr(other, content)
        archive.writestr(name, bytes(120_000_000), packed)
    altered = bytearray(target.getvalue())
    entry = altered.rfind(b'PK\x01\x02')
    altered[entry + 24 : entry + 28] = struct.pack('<I', 4)
    return bytes(altered)


DOUBLING = b')' + b'q\x00h\x00\x86' * 60  # (t, t) of the tuple before, 60 times
NESTED = b')' + b'\x85' * 1_000_000
HUGE = b'\x8b' + struct.pack('<i', 200_000) + b'\x7f' * 200_000
LARGE = b'\x8a\x08' + struct.pack('<q', 1 << 62)
ATTACKS: dict[str, bytes] = {
    # memory
    'byte array of 2 GB': b'\x80\x05\x96' + struct.pack('<Q', 1 << 31) + b'.',
    'MindSpore, a number for a name': field(1, field(1, 1_500_000_000)),
    'MindSpore, a number for a tensor': field(1, field(2, 1_500_000_000)),
    'MindSpore, a number for all': field(1, 1_500_000_000),
    'byte array made by name': torch_zip(in_dict(b'c__builtin__\nbytearray\nJ\x00\x94\x35\x77\x85R')),
    'one storage 60 times': torch_file(
        {str(i): torch.ones(1000, dtype=torch.float16).expand(400, 1000) for i in range(60)}
    ),
    'uninitialised tensor': torch_zip(in_dict(b'ctorch\nFloatTensor\n(K\x14K\x03tR')),
    'lists': b'\x80\x04' + b']' * 2_000_000 + b'.',
    'sets': b'\x80\x04' + b'\x8f' * 2_000_000 + b'.',
    'dicts of references': in_dict(levels(6, 25)),
    'dicts of 40 levels that are shared': in_dict(levels(40, 2)),
    'the same as arguments': torch_zip(b'\x80\x02}' + text('args') + levels(40, 2) + b's.'),
    'a dict in itself': b'\x80\x02}q\x00' + text('a') + b'h\x00s.',
    'safetensors of lists': header({'a': [[] for _ in range(100_000)]}),
    'safetensors, a header of 1 TB': struct.pack('<Q', 1 << 40) + b'{}',
    'an archive that lies of sizes': lying_zip('archive/data.pkl', zipfile.ZIP_DEFLATED),
    'the same in bzip2': lying_zip('archive/data.pkl', zipfile.ZIP_BZIP2),
    'the same of a tensor of OneFlow': lying_zip(
        'a/out', zipfile.ZIP_BZIP2, snapshot_done=b'', **{'a/meta': ONE_NUMBER}
    ),
    'long names of many': in_dict(
        b'cnumpy.core.multiarray\n_reconstruct\n)Rq\x010'
        + (b'}' + text('\N{GRINNING FACE}' * 495)) * 12
        + b'}('
        + b''.join(b'M' + struct.pack('<H', i) + b'h\x01' for i in range(28_000))
        + b'u'
        + b's' * 12
    ),
    # depth
    'tuples as key': as_key(NESTED),
    'tuples in a set': b'\x80\x04\x8f(' + NESTED + b'\x90.',
    'tuples as type': b'\x80\x04cnumpy\ndtype\n' + NESTED + b'\x85R0}.',
    'tuples as type of an array': in_dict(
        b'cnumpy.core.multiarray\n_reconstruct\n)R(K\x01)cnumpy\ndtype\n' + NESTED + b'\x85R\x89C\x00tb', 4
    ),
    'tuples as key, torch': torch_zip(as_key(NESTED)),
    'dicts': b'\x80\x04' + (b'}' + text('a')) * 100_000 + b'N' + b's' * 100_000 + b'.',
    'JSON': struct.pack('<Q', 200_012) + b'{"a":' + b'[' * 100_000 + b']' * 100_000 + b'}      ',
    # time
    'doubling tuples as key': as_key(DOUBLING),
    'doubling tuples as key, torch': torch_zip(as_key(DOUBLING)),
    'doubling tuples as architecture': torch_zip(b'\x80\x02}' + text('arch') + DOUBLING + b's.'),
    'sizes that are one huge integer': torch_zip(
        with_sizes(b'(' + HUGE + b'q\x00' + b'h\x00' * 4000 + b'tq\x01h\x01'), **{'0': bytes(4)}
    ),
    'many large sizes': torch_zip(
        with_sizes(b'(' + LARGE + b'q\x00' + b'h\x00' * 100_000 + b'tq\x01h\x01'), **{'0': bytes(4)}
    ),
    'MindSpore, many large sizes': field(
        1, field(1, b'a') + field(2, field(1, (1 << 63) - 1) * 50_000 + field(2, b'Float32'))
    ),
    'a number of 5,000 digits': b'\x80\x02}' + text('a') + b'I' + b'9' * 5000 + b'\ns.',
    'keys of one hash': b'\x80\x02}('
    + b''.join(b'\x8a\x0a' + (i * ((1 << 61) - 1)).to_bytes(10, 'little') + b'N' for i in range(40_000))
    + b'u.',
    'PAX header of digits': pax_of_digits(),
    'PAX header behind the magic of torch': WRITTEN['torch before 1.6'][:14].ljust(512, b'\0') + pax_of_digits(),
    '400 blocks': torch_file(with_blocks(400)),
    # what is not there
    'no bytes for a storage': without_keys(WRITTEN['torch before 1.6']),
    'more than 64 dimensions': pickle.dumps({'a': np.ones(1, 'float32')}).replace(
        b'K\x01\x85', b'(' + b'K\x01' * 65 + b't'
    ),
}

SLOW = {
    *('tuples in a set', 'tuples as type', 'tuples as type of an array', 'tuples as key, torch', 'lists'),
    *('doubling tuples as key, torch', 'keys of one hash', 'sizes that are one huge integer'),
}


def memory_of_process(key: str) -> int:
    """Bytes, as Linux counts them: VmRSS now, VmHWM at most."""
    with open('/proc/self/status') as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))


def load_and_measure(connection: Any, load: Callable[[str], object]) -> None:
    """Loads the files whose paths come, and answers with bytes, seconds and outcome of each."""
    while True:
        path = connection.recv()
        with open('/proc/self/clear_refs', 'w') as file:
            file.write('5')  # forgets what was most
        before, start = memory_of_process('VmRSS'), time.thread_time()
        try:
            load(path)
            outcome = 'loaded'
        except CheckpointError as error:
            outcome = f'refused {error}' if str(error).isprintable() else f'not printable: {error}'
        except BaseException as error:
            outcome = f'raised {type(error).__name__}: {error}'
        seconds = time.thread_time() - start
        connection.send((memory_of_process('VmHWM') - before, seconds, outcome))


class Child:
    """A process that loads files one after the other."""

    def __init__(self, load: Callable[[str], object] = load_model) -> None:
        context = multiprocessing.get_context('fork')
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=load_and_measure, args=(theirs, load), daemon=True)
        self.process.start()
        theirs.close()

    def load(self, file: Path, seconds: float = 20) -> tuple[int, float, str]:
        """Bytes and seconds that loading took, and its outcome."""
        self.connection.send(str(file))
        assert self.connection.poll(seconds), f'{file} takes longer than {seconds} s'
        try:
            answer: tuple[int, float, str] = self.connection.recv()
        except EOFError:
            self.process.join()
            raise AssertionError(f'{file} ended the process: {self.process.exitcode}') from None
        return answer

    def end(self) -> None:
        self.process.kill()
        self.process.join()


@pytest.fixture(scope='module')
def child() -> Any:
    child = Child()
    yield child
    child.end()


@pytest.mark.skipif(sys.platform != 'linux', reason='reads memory in /proc')
@pytest.mark.parametrize('attack', slow_but([name for name in ATTACKS if name not in SLOW], ATTACKS))
def test_hostile_file_is_refused_in_2_seconds_within_10_times_its_size_and_100_mb(
    attack: str, child: Child, tmp_path: Path
) -> None:
    file = tmp_path / 'file'
    file.write_bytes(ATTACKS[attack])
    memory, seconds, outcome = child.load(file)
    assert outcome.startswith('refused')
    assert len(outcome) < 3000
    assert seconds < 2
    assert memory < 10 * len(ATTACKS[attack]) + 100e6


def with_entries(number: int) -> bytes:
    """An archive of torch whose directory lists its one file so many times."""
    content = torch_zip(pickle.dumps({}, 2))
    (offset,) = struct.unpack('<I', content[-6:-2])
    first = 46 + len('archive/data.pkl')
    directory = content[offset : offset + first] * number
    return content[:offset] + directory + content[-22:-10] + struct.pack('<II', len(directory), offset) + bytes(2)


@pytest.mark.skipif(sys.platform != 'linux', reason='reads memory in /proc')
def test_archive_of_a_million_files_is_refused_in_2_seconds(child: Child, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(with_entries(1_000_000))
    memory, seconds, outcome = child.load(tmp_path / 'file')
    assert outcome.startswith('refused')
    assert seconds < 2
    assert memory < 100e6


def changed(**tensors: Tensor) -> dict[str, Tensor]:
    return {**SMALL, **{name.replace('__', '.'): tensor for name, tensor in tensors.items()}}


@pytest.mark.parametrize('name', ['fc.weight', 'conv1.0.weight', 'layer4.0.convs.0.weight', 'layer1.0.bn1.bias'])
@pytest.mark.parametrize('shape', [(), (0,), (8,), (0, 3), (1, 1, 1, 1, 1), (1000, 0, 1, 1)])
def test_load_model_tensor_of_a_shape_that_no_weight_has_is_refused(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    (tmp_path / 'file').write_bytes(torch_file({**SMALL, name: torch.ones(shape)}))
    for load in (load_model, lambda file: load_model(file, 'test_res2net')):
        with pytest.raises(CheckpointError):
            load(tmp_path / 'file')


def test_load_model_of_a_network_without_a_stage_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(
        torch_file({name: SMALL[name] for name in SMALL if name != 'layer3.0.conv1.weight'})
    )
    with pytest.raises(CheckpointError, match='those of no model of this package'):
        load_model(tmp_path / 'file')


def test_load_model_named_model_of_stated_size_is_not_made_before_tensors_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'file').write_bytes(torch_file(changed(fc__weight=torch.ones(1_000_000, 1))))
    before = torch.nn.Linear.__init__
    made: list[int] = []

    def init(self: Any, inputs: int, outputs: int, **options: Any) -> None:
        made.append(outputs)
        assert options.get('device') == 'meta' or outputs < 1_000_000
        before(self, inputs, outputs, **options)

    monkeypatch.setattr(torch.nn.Linear, '__init__', init)
    with pytest.raises(CheckpointError, match='does not fit'):
        load_model(tmp_path / 'file', 'test_res2net')
    assert 1_000_000 in made


@pytest.mark.parametrize('value', [float('nan'), float('inf'), 1e300])
def test_weights_that_timm_has_read_are_checked_as_those_of_a_file(value: float) -> None:
    state = changed(fc__bias=torch.full((4,), value, dtype=torch.float64))
    with pytest.raises(CheckpointError, match=r'fc\.bias holds values that are NaN or infinite'):
        adapt_state_dict(state, tiny())
    with pytest.raises(CheckpointError, match=r'fc\.bias can be no weight: it is of torch\.complex64'):
        adapt_state_dict(changed(fc__bias=torch.ones(4, dtype=torch.complex64)), tiny())


def test_weights_stay_as_they_were_checked_when_the_file_changes(tmp_path: Path) -> None:
    file = tmp_path / 'model.safetensors'
    save_file(SMALL, file)
    mapped = load_file(file)
    adapted, checkpoint = adapt_state_dict(mapped, tiny()), read_checkpoint(file)
    with open(file, 'r+b') as opened:
        opened.seek(-4000, os.SEEK_END)
        opened.write(b'\xff' * 4000)
    assert not all(torch.isfinite(tensor).all() for tensor in mapped.values())  # or this shows nothing
    torch.testing.assert_close(dict(sorted(adapted.items())), dict(sorted(SMALL.items())), rtol=0, atol=0)
    os.truncate(file, 100)
    torch.testing.assert_close(dict(sorted(checkpoint.state.items())), dict(sorted(SMALL.items())), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no pipes with names')
@pytest.mark.parametrize('path', ['pipe', '/dev/zero', '/dev/tty', '/dev/stdin'])
def test_read_pipe_or_device_raises_at_once(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CheckpointError, match='can not be opened'):
        read(tmp_path / path)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no pipes with names')
@pytest.mark.parametrize('path', ['pipe', '/dev/zero'])
def test_pipe_or_device_for_an_image_or_names_of_classes_raises_at_once(path: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(ValueError, match='this image can not be read: It is no regular file'):
        read_image(tmp_path / path)
    with pytest.raises(ValueError, match='can not be opened: It is no regular file'):
        read_labels(str(tmp_path / path))


def test_read_path_with_nul_raises_checkpoint_error_that_shows_it_escaped() -> None:
    with pytest.raises(CheckpointError, match=r'a\\x00b can not be opened: embedded null'):
        read('a\0b')


def bomb() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({}, 2))
        archive.writestr('archive/data/0', bytes(50_000_000))
    return buffer.getvalue()


def with_zip64_locator(content: bytes) -> bytes:
    """Another directory of an archive's files, where only some readers look, that lists the whole archive.

    The usual one lists its first file only.
    """
    end = content[-22:]
    size, offset = struct.unpack('<II', end[12:20])
    directory = content[offset : offset + size]
    wide = struct.pack('<IQHHIIQQQQ', 0x06064B50, 44, 45, 45, 0, 0, 2, 2, size, offset)
    locator = struct.pack('<IIQI', 0x07064B50, 0, len(content) - 22, 1)
    first = 46 + sum(struct.unpack('<HHH', directory[28:34]))
    narrow = directory[:first]
    at = len(content) - 22 + len(wide)
    tail = struct.pack('<IHHHHIIH', 0x06054B50, 0, 0, 1, 1, len(narrow), at, 0)
    return content[:-22] + wide + narrow + locator + tail


@pytest.mark.parametrize('hide', [lambda content: content + bytes(66_500), with_zip64_locator], ids=['zeros', 'zip64'])
def test_read_zip_bomb_that_only_some_readers_see_is_refused_within_20_mb(
    hide: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    (tmp_path / 'bomb').write_bytes(hide(bomb()))
    tracemalloc.start()
    with pytest.raises(CheckpointError):
        translate(read(tmp_path / 'bomb').nested)
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


class Allowed:
    """A class that a user has told torch to allow."""


def test_reading_in_threads_leaves_the_allowlist_of_torch_alone(tmp_path: Path) -> None:
    content = torch_file({**SMALL, 'args': argparse.Namespace(lr=0.1), 'more': Allowed()})
    (tmp_path / 'file').write_bytes(content)
    failures: list[BaseException] = []

    def read_often() -> None:
        try:
            for _ in range(4):
                assert translate(read(tmp_path / 'file').nested).state.keys() == SMALL.keys()
        except BaseException as error:
            failures.append(error)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._weights_only_unpickler, '_marked_safe_globals_set', {Allowed, argparse.Namespace})
        threads = [threading.Thread(target=read_often) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert {*torch.serialization.get_safe_globals()} == {Allowed, argparse.Namespace}
    assert not failures
    with pytest.raises(CheckpointError, match=r'it wants test_hostile\.Allowed'):
        read(tmp_path / 'file')


TERMINAL = '\x1b]0;owned\x07\x1b[2J\u202e\n'


@pytest.mark.parametrize(
    'content',
    [
        torch_file({TERMINAL + 'layer1.0.conv2.weight': torch.ones(1)}),
        torch_file({**SMALL, FC: torch.ones(3, 3), TERMINAL + 'x': torch.ones(1)}),
        torch_file({f'{TERMINAL}{i}.{name}': value + i for name, value in SMALL.items() for i in (1, 2)}),
        b'\x80\x04\x8c\x07builtins\x8c' + bytes([len(TERMINAL.encode())]) + TERMINAL.encode() + b'\x93.',
        torch_zip(b'\x80\x02c' + TERMINAL.strip().encode() + b'\nname\n.'),
        tape(TERMINAL, b'').replace(b'0\x00ustar', b'2\x00ustar'),
        tape(TERMINAL, b'abc'),
        header({TERMINAL: {'dtype': 'F32', 'shape': [1], 'data_offsets': [0, 400]}}),
        header({'a': {'dtype': TERMINAL, 'shape': [1], 'data_offsets': [0, 4]}}),
        field(1, field(1, b'a') + field(2, field(1, 1) + field(2, TERMINAL.encode()) + field(3, bytes(4)))),
        mindspore_value(TERMINAL, torch.ones(1)) * 2,
        torch_file({'x' * 5_000_000 + 'layer1.0.convs.0.weight': torch.ones(1)}),
        torch_file({f'x{i}' + 'y' * 400: torch.ones(1) for i in range(100)}),
        torch_file({f'{i}.layer1.0.convs.0.weight': torch.ones(1) for i in range(2000)}),
        torch_file(
            {f'{i}.{name}': torch.ones(1) for i in range(200) for name in ('layer1.0.convs.0.weight', 'conv1.weight')}
        ),
    ],
)
def test_messages_have_no_terminal_escapes_and_at_most_2000_characters(content: bytes, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        load_model(tmp_path / 'file')
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 2100


def test_printable_escapes_control_characters_and_cuts_the_middle() -> None:
    assert printable('a\x1b[31m\n\u202e\udc80é') == 'a\\x1b[31m\\n\\u202e\\udc80é'
    assert printable('abcdefgh' * 100, 12) == 'abcdefgh ... fgh'


def test_load_model_reads_fields_of_other_pickle_protocols_than_torch_writes(tmp_path: Path) -> None:
    for protocol in range(2, 6):
        (tmp_path / 'file').write_bytes(torch_file(SMALL, pickle_protocol=protocol))
        torch.testing.assert_close(translate(read(tmp_path / 'file').nested).state, SMALL, rtol=0, atol=0)


def test_command_line_escapes_names_from_files_and_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / f'a{TERMINAL.strip()}b.pth'
    file.write_bytes(torch_file({'state_dict': SMALL, TERMINAL: torch.ones(1)}))
    folder = convert(file, tmp_path / 'out').folder
    config = json.loads((folder / 'config.json').read_text())
    config['pretrained_cfg']['label_names'] = [TERMINAL] * 4
    (folder / 'config.json').write_text(json.dumps(config))
    save_image(torch.rand(3, 32, 32), tmp_path / 'image.png')
    for command in (
        ['convert', str(file), '--dry-run'],
        ['predict', str(tmp_path / 'image.png'), '--model', f'local-dir:{folder}'],
        ['convert', str(tmp_path / TERMINAL)],
    ):
        main(command)
        printed = ''.join(capsys.readouterr())
        assert '\\x1b' in printed
        assert printed.replace('\n', '').isprintable()


def test_compressed_archive_of_torch_is_read(tmp_path: Path) -> None:
    content = torch_file({**SMALL, 'log': ['a text that is there again'] * 5 + ['x' * 50_000]})
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(tmp_path / 'file', 'w', zipfile.ZIP_DEFLATED) as compressed,
    ):
        for name in archive.namelist():
            compressed.writestr(name, archive.read(name))
    torch.testing.assert_close(translate(read(tmp_path / 'file').nested).state, SMALL, rtol=0, atol=0)


@pytest.mark.parametrize('kind', ['safetensors', 'torch', 'torch before 1.6', 'pdparams'])
def test_bytes_of_a_file_are_freed_with_its_tensors(kind: str, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(WRITTEN[kind])
    gc.collect()
    gc.disable()
    try:
        read(tmp_path / 'file')
        assert not [each for each in gc.get_objects() if type(each) is Array]
    finally:
        gc.enable()


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no pipes with names')
@pytest.mark.parametrize('data', ['pipe', '/dev/zero', 'absent' + TERMINAL])
def test_path_of_data_in_a_file_is_not_opened_unless_it_is_a_folder(
    data: str, child: Child, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    os.mkfifo(tmp_path / 'pipe')
    args = argparse.Namespace(data_dir=str(tmp_path / data), model='test_res2net')
    (tmp_path / 'file').write_bytes(torch_file({'state_dict': SMALL, 'arch': 'test_res2net', 'args': args}))
    with caplog.at_level(logging.INFO):
        memory, _, outcome = child.load(tmp_path / 'file')
        assert outcome == 'loaded'
        assert memory < 100e6
        read_checkpoint(tmp_path / 'file')
    assert 'is no folder here' in caplog.text
    assert all(message.isprintable() for message in caplog.messages)
