"""Every format is read exactly, and no code in a file runs."""

import builtins
import io
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from formats import FORMATS, SMALL, WRITTEN, field, mindspore_value, save_checkpoint, tarred, torch_file, zipped
from safetensors.torch import save
from support import tiny
from torch import Tensor, nn

from timm_res2net import CheckpointError, load_checkpoint, load_model
from timm_res2net.weights import readers
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.dialects import DIALECTS
from timm_res2net.weights.readers import RawFile, read_file


def write(folder: Path, content: bytes) -> Path:
    (folder / 'file').write_bytes(content)
    return folder / 'file'


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor] = SMALL) -> None:
    torch.testing.assert_close(dict(sorted(found.items())), dict(sorted(expected.items())), rtol=0, atol=0)


@pytest.mark.parametrize('kind', FORMATS)
def test_every_format_returns_the_written_tensors(kind: str, tmp_path: Path) -> None:
    assert_same(read_checkpoint(write(tmp_path, WRITTEN[kind])).state)


def test_compressed_torch_archive_is_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(torch_file(SMALL))) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    file = write(tmp_path, zipped(members, zipfile.ZIP_DEFLATED))
    assert_same(read_file(file).tensors)


def test_arrays_of_any_memory_order_and_rank_are_read(tmp_path: Path) -> None:
    arrays = {
        'fortran': np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        'scalar': np.array(3, 'int64'),
        'empty': np.ones((0, 3), 'float16'),
        'sliced': np.arange(10, dtype='int32')[::3],
    }
    found = read_file(write(tmp_path, pickle.dumps(arrays))).tensors
    assert_same(found, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def test_views_of_one_storage_and_every_dtype_are_read(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    views = {'transposed': base.t(), 'row': base[2], 'expanded': base[:1].expand(5, 6), 'last': base[3, 5]}
    dtypes = {name: torch.ones(3).to(dtype) for name, dtype in readers.DTYPES.items()}
    for is_zip in (True, False):
        content = torch_file({**views, **dtypes}, _use_new_zipfile_serialization=is_zip)
        assert_same(read_file(write(tmp_path, content)).tensors, {**views, **dtypes})


def test_mindspore_checksum_is_skipped(tmp_path: Path) -> None:
    content = WRITTEN['mindspore'] + b'crc_num' + (1234).to_bytes(10, 'big')
    assert_same(read_checkpoint(write(tmp_path, content)).state)


def test_file_can_be_deleted_or_overwritten_after_reading(tmp_path: Path) -> None:
    for kind in ('safetensors', 'torch', 'oneflow'):
        file = write(tmp_path, WRITTEN[kind])
        state = read_checkpoint(file).state
        file.write_bytes(b'\xff' * len(WRITTEN[kind]))
        os.truncate(file, 100)
        assert_same(state)


# Damaged files


ONE_FLOAT = 'shape {\n  dim: 1\n}\ndata_type: kFloat\n'


def longer_storage(legacy: bool) -> bytes:
    """Returns a file of torch whose storage has a number more than its description says."""
    content = torch_file({'a': torch.ones(3)}, _use_new_zipfile_serialization=not legacy)
    if legacy:
        return content[:-20] + struct.pack('<q4f', 4, 1, 1, 1, 1)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    return zipped((name, content + bytes(4 * name.endswith('data/0'))) for name, content in members)


def oneflow_tensor(meta: str) -> bytes:
    return zipped([('net/snapshot_done', ''), ('net/w/meta', meta), ('net/w/out', bytes(4))])


def paddle_sizes(*fields: bytes) -> bytes:
    description = b''.join(fields)
    return tarred([('w', struct.pack('<IQIi', 0, 0, 0, len(description)) + description + bytes(24))])


REFUSED: dict[str, tuple[bytes, str]] = {
    'text': (b'some text', "not a weights file of a known format: it begins with b'some tex'"),
    'HDF5': (b'\x89HDF\r\n\x1a\n', 'an HDF5 file from Keras'),
    'ONNX': (b'\x08\x07\x12\x04test', 'an ONNX model.* Pass the weights it was made from'),
    'TFLite': (b'\x1c\0\0\0TFL3', 'a TFLite model. Pass the weights it was made from'),
    'TensorRT': (b'ptrt' + bytes(99), 'a TensorRT engine. Pass the weights it was made from'),
    'pdiparams': (bytes(100), r'PaddlePaddle file of inference parameters \(\.pdiparams\).* Pass the \.pdparams'),
    'pdmodel': (field(1, field(1, 0)), r'PaddlePaddle inference program \(\.pdmodel\)\. Pass the \.pdparams'),
    'numpy archive': (zipped([('a.npy', '')]), 'an archive of numpy arrays'),
    'another zip': (b'PK\x03\x04' + bytes(100), 'not a zip file|BadZipFile'),
    'a list': (pickle.dumps([1, 2]), 'holds a list, not tensors by name'),
    'array of text': (pickle.dumps({'a': np.array(['text'])}), r'no Res2Net'),
    'long storage': (longer_storage(legacy=False), 'a storage of 3 numbers has 16 bytes'),
    'long legacy storage': (longer_storage(legacy=True), 'a storage should have 3 numbers, but has 4'),
    'large OneFlow shape': (oneflow_tensor(ONE_FLOAT.replace('1', '1' + 11 * '0')), 'has 4 bytes'),
    'negative OneFlow shape': (oneflow_tensor(ONE_FLOAT.replace('1', '-1')), 'w/meta is not the type and shape'),
    'unknown OneFlow type': (oneflow_tensor(ONE_FLOAT.replace('kFloat', 'kOFRecord')), 'no Res2Net'),
    'large Paddle shape': (paddle_sizes(field(1, 5), field(2, 1 << 40)), 'has 24 bytes'),
    'negative Paddle shape': (paddle_sizes(field(1, 5), field(2, (1 << 64) - 6)), 'has 24 bytes'),
    'unknown Paddle type': (paddle_sizes(field(1, 99), field(2, 6)), 'no Res2Net'),
    'MindSpore shape': (
        field(1, field(1, b'name') + field(2, field(1, 7) + field(2, b'Float32') + field(3, bytes(24)))),
        r'shape \[7\] has 24 bytes',
    ),
    'link in a tar archive': (tarred([('fc', b'')], tarfile.SYMTYPE), "its member 'fc' is not a regular file"),
}


@pytest.mark.parametrize(('content', 'message'), REFUSED.values(), ids=[*REFUSED])
def test_file_without_weights_is_refused_in_one_line_with_its_path_and_reason(
    content: bytes, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(write(tmp_path, content))
    assert '\n' not in str(error.value)
    assert str(tmp_path / 'file') in str(error.value)


def test_big_endian_array_is_unsupported(tmp_path: Path) -> None:
    found = read_file(write(tmp_path, pickle.dumps({'a': np.ones(2, '>f4'), 'b': np.ones(2, '<f4')})))
    assert ([*found.unsupported], [*found.tensors]) == (['a'], ['b'])


@pytest.mark.filterwarnings('ignore:.*jit')
@pytest.mark.parametrize(
    ('save', 'message'),
    [
        (lambda file: torch.jit.script(nn.ReLU()).save(file), r'TorchScript.* torch\.jit\.load\(FILE\)'),
        pytest.param(
            lambda file: torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(1),)), file),
            r'torch\.export program.* torch\.export\.load\(FILE\)',
            marks=pytest.mark.slow,
        ),
    ],
    ids=['TorchScript', 'torch.export'],
)
def test_program_is_refused_with_advice(save: Any, message: str, tmp_path: Path) -> None:
    save(f'{tmp_path}/model.pt2')
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / 'model.pt2')


@pytest.mark.parametrize(
    ('path', 'message'),
    [
        ('absent.pth', 'No such file'),
        ('', 'config.json of .*: No such file'),
        ('pipe', 'not a regular file'),
        ('/proc/self/mem', 'Input/output error|damaged|known format'),
        ('a\0b', 'a\\\\x00b: .*null'),
    ],
)
@pytest.mark.skipif(sys.platform != 'linux', reason='needs files that only Linux has')
def test_path_that_cannot_be_read_is_a_checkpoint_error_at_once(path: str, message: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / 'pipe')
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(str(tmp_path / path) if path != 'a\0b' else path)


# Pickles


class Calls:
    """Pickles as a call of a function."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


class Settings:
    """Stands for an object of a training script."""


class Net(nn.Module):
    """A module with a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny('paddle')


CALLS = [
    Calls(os.system, 'touch ran'),
    Calls(builtins.eval, "open('ran', 'w')"),
    Calls(builtins.exec, "open('ran', 'w')"),
    [Calls(Calls, os.mkdir, 'ran')],
    Calls(builtins.getattr, Calls(__import__, 'os'), 'system'),
    Calls(os.mkdir, 'ran'),
    np.array([Calls(os.mkdir, 'ran')], dtype=object),
]
OBJECTS = [Settings(), Path('x'), defaultdict(list), Counter('ab'), {1, 2}, OrderedDict(a=[torch.ones(2)])]


@pytest.mark.parametrize('kind', ['pickle', 'torch'])
def test_calls_and_objects_next_to_the_weights_run_nothing_and_are_ignored(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    extra: dict[str, Any] = {f'extra{i}': each for i, each in enumerate([*CALLS, *OBJECTS])}
    if kind == 'pickle':
        content = pickle.dumps({**extra, **{name: tensor.numpy() for name, tensor in SMALL.items()}})
    else:
        content = torch_file({**extra, **SMALL})
    assert_same(read_checkpoint(write(tmp_path, content)).state)
    assert os.listdir() == ['file']


@pytest.mark.parametrize(
    'content',
    [
        lambda: nn.DataParallel(tiny('paddle')),
        lambda: {'epoch': 3, 'model': Net(), 'ema': None},
        lambda: {'cfg': Settings(), 'state_dict': defaultdict(list, Net().state_dict())},
    ],
)
@pytest.mark.filterwarnings("ignore:Couldn't retrieve source")
def test_pickled_whole_models_are_read(content: Callable[[], Any], tmp_path: Path) -> None:
    for is_zip in (True, False):
        file = save_checkpoint(content(), tmp_path, _use_new_zipfile_serialization=is_zip)
        assert_same(read_checkpoint(file).state)


# MindSpore's optimizers and ports

THEIRS = {ours: theirs for theirs, ours in DIALECTS['mindspore'].suffixes.items()}


def test_mindspore_optimizer_state_is_dropped(references: Callable[[str], Path], tmp_path: Path) -> None:
    file = references('mindspore') / 'res2net.ckpt'
    weights = [name for name in read_file(file).tensors if '.moving_' not in name]
    twins = [mindspore_value(f'{part}.{name}', torch.ones(1)) for part in ('moment1', 'moment2') for name in weights]
    extra = {'learning_rate': torch.ones(4), 'is_best': torch.tensor(True), 'recipe': 'text'}
    content = [*twins, *(mindspore_value(name, value) for name, value in extra.items())]
    checkpoint = read_checkpoint(write(tmp_path, file.read_bytes() + b''.join(content)))
    assert_same(checkpoint.state, read_checkpoint(file).state)
    assert len(checkpoint.dropped) == 2 * len(weights) + 2  # 'recipe' is text, not a tensor


@pytest.mark.parametrize('stem', ['conv1.', 'conv1_'])
def test_mindspore_port_with_different_padding_loads_only_with_explicit_first_block(stem: str, tmp_path: Path) -> None:
    state = {}
    for name, tensor in SMALL.items():
        module, _, part = name.rpartition('.')
        is_norm = f'{module}.running_mean' in SMALL and part in THEIRS
        state[f'{module}.{THEIRS[part]}' if is_norm else name] = tensor
    renamed = {re.sub(r'^conv1\.(?=\d)', stem, name): tensor for name, tensor in state.items()}
    file = write(tmp_path, FORMATS['mindspore'](renamed))
    with pytest.raises(CheckpointError, match=r"pad strided .* at the end only.* pass first_block='official'"):
        load_checkpoint(tiny('official'), file)
    model = tiny('official')
    load_checkpoint(model, file, first_block='official')
    assert_same(model.state_dict())


# The sandboxed process


def reply(entry: list[Any], storage: list[Any], more: bytes = b'') -> bytes:
    """Returns a sandbox's answer with one tensor, followed by more bytes."""
    answer = {'tensors': {'a': entry}, 'unsupported': {}, 'storages': [storage], 'values': {}}
    return json.dumps(answer).encode() + b'\n' + more


LIES: dict[str, bytes] = {
    'not JSON': b'nonsense\n',
    'a long line': b'x' * 9_000_000,
    'half the bytes': reply(['float32', 0, [2], [1], 0], [None, 8], b'abcd'),
    'more bytes': reply(['float32', 0, [1], [1], 0], [None, 4], b'abcdefgh'),
    'start beyond the file': reply(['float32', 0, [1], [1], 0], [1000, 4]),
    'negative start': reply(['float32', 0, [1], [1], 0], [-4, 4]),
    'negative size': reply(['float32', 0, [1], [1], 0], [0, -4]),
    'fractional size': reply(['float32', 0, [1], [1], 0], [0, 4.0]),
    'size of 1 TB': reply(['float32', 0, [1], [1], 0], [None, 1 << 40]),
    'fewer numbers than bytes': reply(['float16', 0, [2], None, 0], [0, 8]),
    'view beyond its storage': reply(['float32', 0, [2], [1], 0], [0, 4]),
    'stride beyond its storage': reply(['float32', 0, [2], [3], 0], [0, 8]),
    'offset beyond its storage': reply(['float32', 0, [1], [1], 1], [0, 4]),
    'negative offset': reply(['float32', 0, [1], [1], -1], [0, 8]),
    'negative stride': reply(['float32', 0, [2], [-1], 1], [0, 8]),
    'expanded to 4 TB': reply(['float32', 0, [1 << 20, 1 << 20], [0, 0], 0], [0, 4]),
    'true for 1': reply(['float32', 0, [True], [1], 0], [0, 4]),
    'unknown type': reply(['float99', 0, [1], [1], 0], [0, 4]),
    'no such storage': reply(['float32', 7, [1], [1], 0], [0, 4]),
    'negative storage': reply(['float32', -1, [1], [1], 0], [0, 4]),
    'too few strides': reply(['float32', 0, [1, 1], [1], 0], [0, 4]),
    '100 dimensions': reply(['float32', 0, [1] * 100, [1] * 100, 0], [0, 4]),
    'empty of impossible shape': reply(['float32', 0, [0, 1 << 61, 1 << 61], [0, 0, 0], 0], [0, 4]),
}


@pytest.mark.parametrize('output', LIES.values(), ids=[*LIES])
def test_sandbox_that_lies_leads_to_a_checkpoint_error(
    output: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(file: io.FileIO) -> RawFile:
        return readers.read_answer(SimpleNamespace(wait=lambda: 0), io.BytesIO(output), file, 100)

    monkeypatch.setattr(readers, 'read_sandboxed', read)
    with pytest.raises(CheckpointError) as error:
        read_file(write(tmp_path, bytes(100)))
    assert '\n' not in str(error.value)
    assert len(str(error.value)) < 500


def fake_sandbox(folder: Path, code: str) -> str:
    (folder / 'fake.py').write_text(f'import os, sys, time\n{code}')
    return str(folder / 'fake.py')


@pytest.mark.parametrize(
    'code',
    [
        'time.sleep(60)',
        'while True: sys.stdout.write("x" * 65536)',
        f'sys.stdout.write({reply(["float32", 0, [1], [1], 0], [0, 4]).decode()!r})\nsys.stdout.flush()\n'
        'os.kill(os.getpid(), 9)',
    ],
    ids=['hangs', 'writes forever', 'is killed after its answer'],
)
def test_sandbox_that_does_not_end_by_itself_leads_to_a_checkpoint_error(
    code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(readers, 'SANDBOX', fake_sandbox(tmp_path, code))
    monkeypatch.setattr(readers, 'TIMEOUT', 0.5)
    with pytest.raises(CheckpointError, match='takes more time or memory'):
        read_file(write(tmp_path, bytes(100)))


def test_sandbox_that_cannot_be_started_is_a_checkpoint_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, 'executable', str(tmp_path / 'absent'))
    with pytest.raises(CheckpointError, match=r'cannot start the process.*No such file or directory\. Try again'):
        read_file(write(tmp_path, WRITTEN['torch']))


def test_interrupt_kills_the_sandbox(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    def interrupt(process: subprocess.Popen[bytes], *args: Any) -> None:
        started.append(process)
        raise KeyboardInterrupt

    monkeypatch.setattr(readers, 'SANDBOX', fake_sandbox(tmp_path, 'time.sleep(60)'))
    monkeypatch.setattr(readers, 'read_answer', interrupt)
    before, start = threading.active_count(), time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        read_file(write(tmp_path, bytes(100)))
    assert started[0].returncode == -9
    assert time.monotonic() - start < 10
    time.sleep(0.1)
    assert threading.active_count() <= before


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs POSIX')
def test_file_that_shrinks_between_parse_and_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, read = write(tmp_path, WRITTEN['torch']), readers.read_answer

    def truncate_and_read(process: Any, *args: Any) -> Any:
        process.wait()
        os.truncate(file, 3000)
        return read(process, *args)

    monkeypatch.setattr(readers, 'read_answer', truncate_and_read)
    with pytest.raises(CheckpointError, match='ends too early'):
        read_file(file)


def test_names_and_messages_are_printable_and_bounded(tmp_path: Path) -> None:
    terminal = '\x1b]0;owned\x07\x1b[2J\u202e\n'
    contents = [
        torch_file({terminal + 'layer1.0.conv2.weight': torch.ones(1)}),
        torch_file({**SMALL, 'bn1.weight': torch.ones(3), terminal + 'x': torch.ones(1)}),
        torch_file({f'{terminal}{i}.{name}': value + i for name, value in SMALL.items() for i in (1, 2)}),
        b'\x80\x04\x8c\x07builtins\x8c' + bytes([len(terminal.encode())]) + terminal.encode() + b'\x93.',
        tarred([(terminal, b'')], tarfile.SYMTYPE),
        tarred([(terminal, b'abc')]),
        save({'a': torch.ones(1)}).replace(b'F32', b'\\n2'),
        mindspore_value(terminal, torch.ones(1)),
        torch_file({f'x{i}' + 'y' * 400: torch.ones(1) for i in range(100)}),
        torch_file(
            {f'{i}.{name}': torch.ones(1) for i in range(99) for name in ('layer1.0.convs.0.weight', 'conv1.weight')}
        ),
    ]
    for content in contents:
        with pytest.raises(CheckpointError) as error:
            load_model(write(tmp_path, content))
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 2100
