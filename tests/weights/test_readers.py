"""Every format is read, and no code in a file is executed."""

import builtins
import io
import os
import pickle
import struct
import sys
import tarfile
import tracemalloc
import types
import zipfile
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import tiny
from torch import Tensor, nn

from timm_res2net import CheckpointError, fuse, load_checkpoint
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.dialects import export, translate
from timm_res2net.weights.readers import read

# Writers of the formats that no library here writes


def varint(value: int) -> bytes:
    out = b''
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    """A field of a message of protocol buffers."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def mindspore_value(name: str, value: Tensor | str) -> bytes:
    if isinstance(value, str):
        content = field(2, b'str') + field(3, value.encode('utf-32-le'))
    else:
        dtype = b'Bool' if value.dtype == torch.bool else b'Float32'
        sizes = b''.join(field(1, size) for size in value.shape)
        content = sizes + field(2, dtype) + field(3, value.numpy().tobytes())
    return field(1, field(1, name.encode()) + field(2, content))


def mindspore(state: dict[str, Tensor], own_names: bool = True) -> bytes:
    """As MindCV writes it, or with the authors' names of modules."""
    names = {'weight': 'weight', 'bias': 'beta', 'running_mean': 'moving_mean', 'running_var': 'moving_variance'}
    data = b''
    for name, tensor in state.items():
        module, _, part = name.rpartition('.')
        norm = f'{module}.running_mean' in state
        if part == 'num_batches_tracked':
            continue
        part = 'gamma' if norm and part == 'weight' else names[part] if norm else part
        if own_names:
            module = module.replace('layer1.0.downsample.1', 'layer1.0.down_sample.0')
            module = module.replace('layer1.0.downsample.2', 'layer1.0.down_sample.1')
            module = module.replace('downsample', 'down_sample').replace('fc', 'classifier')
        data += mindspore_value(f'{module}.{part}', tensor)
    return data


def paddle_variable(tensor: Tensor) -> bytes:
    description = field(1, 5) + b''.join(field(2, size) for size in tensor.shape)
    return struct.pack('<IQIi', 0, 0, 0, len(description)) + description + tensor.numpy().tobytes()


def paddle_archive(state: dict[str, Tensor]) -> bytes:
    """Names as in the dialect `paddle-archive`, for a network with a deep stem and one or two blocks in a stage."""
    parts = {'running_mean': 'mean', 'running_var': 'variance', 'bias': 'offset', 'weight': 'scale'}
    stem = {'conv1.0': 'conv1_1', 'conv1.1': 'bnv1_1', 'conv1.3': 'conv1_2', 'conv1.4': 'bnv1_2', 'conv1.6': 'conv1_3'}
    stem |= {'bn1': 'bnv1_3', 'fc': 'fc'}
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, tensor in state.items():
            module, _, part = name.rpartition('.')
            if part == 'num_batches_tracked':
                continue
            if module in stem:
                module = stem[module]
            else:
                layer, block, inner = module.split('.', 2)
                inner = inner.replace('downsample.1', 'conv_branch1').replace('downsample.2', 'bn_branch1')
                inner = inner.replace('conv1', 'conv_branch2a').replace('bn1', 'bn_branch2a')
                inner = inner.replace('conv3', 'conv_branch2c').replace('bn3', 'bn_branch2c')
                for k in range(3):
                    inner = inner.replace(f'convs.{k}', f'conv_branch2b_{k + 1}')
                    inner = inner.replace(f'bns.{k}', f'bn_branch2b_{k + 1}')
                kind, inner = inner.split('_', 1)
                module = f'{"res" if kind == "conv" else "bn"}{int(layer[5:]) + 1}{"ab"[int(block)]}_{inner}'
            convolution = 'conv' in module or module.startswith('res') or module == 'fc'
            tensor = tensor.t().contiguous() if name == 'fc.weight' else tensor
            part = 'weights' if convolution and part == 'weight' else parts[part]
            data = paddle_variable(tensor)
            member = tarfile.TarInfo(f'folder/{module}_{part}')
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


def torch_file(state: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def safetensors_file(state: dict[str, Tensor]) -> bytes:
    from safetensors.torch import save

    return save(state)


def paddle_pickle(state: dict[str, Tensor], pairs: bool = False, protocol: int = 4) -> bytes:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in export(state, 'paddleclas').items()}
    if pairs:
        arrays = {name: (f'{name}_0', array) for name, array in arrays.items()}
    return pickle.dumps({**arrays, 'StructuredToParameterName@@': {'conv1.weight': 'conv1_weights'}}, protocol=protocol)


def pickled(text: str) -> bytes:
    return b'X' + struct.pack('<I', len(text)) + text.encode()


def oneflow(state: dict[str, Tensor], legacy: bool = False) -> bytes:
    """A zipped folder of OneFlow, as of 0.6 to 0.9 or before."""
    buffer = io.BytesIO()
    variables = b''
    with zipfile.ZipFile(buffer, 'w') as archive:
        for i, (name, tensor) in enumerate(state.items()):
            folder = name if legacy else f'tensor_{i}'
            sizes = ''.join(f'  dim: {size}\n' for size in tensor.shape)
            dtype = 'kInt64' if tensor.dtype == torch.int64 else 'kFloat'
            archive.writestr(f'net/{folder}/meta', f'shape {{\n{sizes}}}\ndata_type: {dtype}\n')
            archive.writestr(f'net/{folder}/out', tensor.numpy().tobytes())
            variables += pickled(name) + b'coneflow.nn\nParameter\n)\x81}' + pickled('path') + pickled(folder) + b'sb'
        if legacy:
            archive.writestr('net/snapshot_done', '')
        else:
            archive.writestr('net/pickled_data', b'\x80\x04}' + pickled('data') + b'}(' + variables + b'us.')
    return buffer.getvalue()


FORMATS: dict[str, Callable[[dict[str, Tensor]], bytes]] = {
    'safetensors': safetensors_file,
    'torch': torch_file,
    'torch before 1.6': lambda state: torch_file(state, _use_new_zipfile_serialization=False),
    'pdparams': paddle_pickle,
    'pdparams of pairs': lambda state: paddle_pickle(state, pairs=True),
    'pdparams of protocol 2': lambda state: paddle_pickle(state, protocol=2),
    'pickle of protocol 5': lambda state: pickle.dumps({name: tensor.numpy() for name, tensor in state.items()}, 5),
    'pickle of Jittor': lambda state: (
        pickle.dumps({name: state[name].numpy() for name in state}) + b'-' * 20 + b'HCAJSLHD'
    ),
    'mindspore': mindspore,
    'paddle archive': paddle_archive,
    'oneflow': oneflow,
    'oneflow before 0.6': partial(oneflow, legacy=True),
}
every_format = pytest.mark.parametrize('kind', FORMATS)


@every_format
def test_read_every_format_returns_written_tensors(kind: str, tmp_path: Path) -> None:
    state = tiny('paddle').state_dict()
    file = tmp_path / 'file'
    file.write_bytes(FORMATS[kind](state))
    torch.testing.assert_close(dict(sorted(translate(read(file).nested).state.items())), dict(sorted(state.items())))


SMALL = tiny('paddle').state_dict()
WRITTEN = {kind: write(SMALL) for kind, write in FORMATS.items()}
# A dozen examples in every run, and 40 in the slow tests.
number_of_examples = pytest.mark.parametrize('examples', [12, pytest.param(40, marks=pytest.mark.slow)])


def fuzz(check: Callable[[st.DataObject], None], examples: int) -> None:
    """Calls a function with random data, the same in every run."""
    settings(max_examples=examples, deadline=None, derandomize=True)(given(data=st.data())(check))()


def positions(content: bytes) -> st.SearchStrategy[int]:
    """Any position in a file, more often one near its beginning or end."""
    last = len(content) - 1
    return st.integers(0, 600) | st.integers(0, last) | st.integers(last - 599, last)


@every_format
@number_of_examples
def test_read_cut_file_returns_intact_tensors_or_raises(kind: str, examples: int, tmp_path: Path) -> None:
    content = WRITTEN[kind]

    def check(data: st.DataObject) -> None:
        (tmp_path / 'cut').write_bytes(content[: data.draw(positions(content))])
        try:
            translated = translate(read(tmp_path / 'cut').nested).state
        except CheckpointError:
            return
        if kind in ('mindspore', 'paddle archive'):  # with a part for each tensor: a cut can be between two
            assert translated.keys() <= SMALL.keys()
            torch.testing.assert_close(translated, {name: SMALL[name] for name in translated}, rtol=0, atol=0)
        else:
            torch.testing.assert_close(dict(sorted(translated.items())), dict(sorted(SMALL.items())), rtol=0, atol=0)

    fuzz(check, examples)


@every_format
@number_of_examples
def test_load_checkpoint_damaged_file_loads_or_raises_and_keeps_model(kind: str, examples: int, tmp_path: Path) -> None:
    flips = st.lists(st.tuples(positions(WRITTEN[kind]), st.integers(0, 7)), min_size=1, max_size=4)

    def check(data: st.DataObject) -> None:
        content = bytearray(WRITTEN[kind])
        for position, bit in data.draw(flips):
            content[position] ^= 1 << bit
        (tmp_path / 'damaged').write_bytes(content)
        model = tiny('paddle')
        try:
            load_checkpoint(model, tmp_path / 'damaged', first_block='paddle')
        except CheckpointError:
            torch.testing.assert_close(model.state_dict(), SMALL, rtol=0, atol=0)
        else:
            assert all(tensor.isfinite().all() for tensor in model.state_dict().values())
            same = [name for name, tensor in model.state_dict().items() if tensor.equal(SMALL[name])]
            assert len(same) >= len(SMALL) - 4  # a flipped bit that no check finds changes one value

    fuzz(check, examples)


# Pickles that call functions


class Wants:
    """Pickles as a call."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize(
    ('wanted', 'name'),
    [
        (Wants(os.system, 'touch ran'), 'system'),
        (Wants(builtins.eval, "open('ran', 'w')"), 'eval'),
        (Wants(builtins.exec, "open('ran', 'w')"), 'exec'),
        (Wants(os.mkdir, 'ran'), 'mkdir'),
        ([Wants(Wants, os.mkdir, 'ran')], 'Wants'),
        (Wants(builtins.getattr, Wants(__import__, 'os'), 'system'), 'getattr|__import__'),
        (np.array([Wants(os.mkdir, 'ran')], dtype=object), 'mkdir|objects'),
        (np.array([{}], dtype=object), 'objects'),
    ],
    ids=['system', 'eval', 'exec', 'mkdir', 'nested', 'getattr', 'object array', 'plain objects'],
)
@pytest.mark.parametrize('kind', ['pickle', 'torch', 'torch before 1.6'])
def test_read_pickle_with_calls_or_objects_raises_or_drops_them_and_runs_nothing(
    wanted: Any, name: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    state = {'layer1.0.convs.0.weight': np.ones(3, 'float32'), 'extra': wanted}
    if kind == 'pickle':
        Path('evil').write_bytes(pickle.dumps(state))
    else:
        Path('evil').write_bytes(torch_file({'extra': wanted}, _use_new_zipfile_serialization=kind == 'torch'))
    if kind == 'pickle' or name not in ('getattr|__import__', 'objects', 'mkdir|objects'):
        with pytest.raises(CheckpointError, match=name):
            read('evil')
    else:  # such parts of a training checkpoint are left out, or refused for their content
        try:
            contents = read('evil')
        except CheckpointError:
            pass
        else:
            assert not any(isinstance(value, Tensor) for value in contents.nested.values())
    assert os.listdir() == ['evil']


def test_read_allows_for_a_second_of_garbage_collection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({f'{i}': torch.ones(1) for i in range(200)}, tmp_path / 'file')
    clock = iter([0.0])
    monkeypatch.setattr('time.thread_time', lambda: next(clock, 1.0))
    assert len(read(tmp_path / 'file').nested) == 200
    clock = iter([0.0])
    monkeypatch.setattr('time.thread_time', lambda: next(clock, 2.0))
    with pytest.raises(CheckpointError, match='take longer to read'):
        read(tmp_path / 'file')


def test_read_pickle_that_changes_state_of_type_raises(tmp_path: Path) -> None:
    malicious = b'\x80\x04cnumpy\ndtype\n(N}V__init__\nNstb.'
    (tmp_path / 'evil').write_bytes(malicious)
    with pytest.raises(CheckpointError, match='wants to change a type'):
        read(tmp_path / 'evil')


def test_read_drops_history_buffer_of_mmengine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType('mmengine.logging.history_buffer')

    class HistoryBuffer:
        def __init__(self) -> None:
            self.log_history = np.arange(3.0)
            self.methods = OrderedDict(mean=self.mean)

        def mean(self) -> float:
            return 0.0

    HistoryBuffer.__module__, HistoryBuffer.__qualname__ = module.__name__, 'HistoryBuffer'
    module.HistoryBuffer = HistoryBuffer  # type: ignore[attr-defined]
    for name in ('mmengine', 'mmengine.logging', module.__name__):
        monkeypatch.setitem(sys.modules, name, module)
    content = torch_file({'state_dict': SMALL, 'message_hub': {'log_scalars': {'loss': HistoryBuffer()}}})
    (tmp_path / 'epoch_1.pth').write_bytes(content)
    monkeypatch.undo()
    assert translate(read(tmp_path / 'epoch_1.pth').nested).state.keys() == SMALL.keys()


# Decompression bombs, false sizes and invalid files


@pytest.mark.filterwarnings('ignore:.*jit')
@pytest.mark.parametrize(
    ('save', 'message'),
    [
        (lambda model, file: torch.jit.script(model).save(file), r'torch\.jit\.load\(FILE\)\.state_dict\(\) has its'),
        (
            lambda model, file: torch.export.save(torch.export.export(model, (torch.zeros(1, 3, 32, 32),)), file),
            r'torch\.export\.load\(FILE\)\.state_dict has its weights',
        ),
        (lambda model, file: np.savez(file, **model.state_dict()), 'numpy arrays: torch.save a dict'),
        (torch.save, r'wants timm_res2net\.models\.resnet\.Res2Net.*weights_only=False\)\.state_dict\(\)'),
        (lambda model, file: torch.save(fuse(model).state_dict(), file), 'of a fused model.*before `fuse`'),
    ],
    ids=['TorchScript', 'torch.export', 'numpy', 'whole model', 'fused'],
)
def test_read_checkpoint_of_a_program_or_whole_model_says_what_it_is_and_how_to_get_weights(
    save: Any, message: str, tmp_path: Path
) -> None:
    save(tiny(), f'{tmp_path}/model.pt2')
    (file,) = tmp_path.iterdir()
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(file)
    assert 'damaged' not in str(error.value)


class Net(nn.Module):
    """A class of somebody's own."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny()


class Settings:
    """What a training script saves beside weights."""


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize(
    'content',
    [
        Net,
        lambda: nn.DataParallel(tiny()),
        lambda: {'model': Net()},
        lambda: {'epoch': 3, 'model': Net(), 'ema': None},
        lambda: {'cfg': Settings(), 'state_dict': Net().state_dict()},
        lambda: {'state_dict': Net().state_dict(), 'cfg': Settings()},
        lambda: {'teacher': Net()},
        lambda: {'state_dict': Net()},
        lambda: {'model': Net().state_dict(), 'folder': Path('x')},
        lambda: {'model': defaultdict(list, Net().state_dict())},
    ],
)
def test_advice_for_what_is_not_only_tensors_makes_a_file_that_is_read(
    content: Callable[[], Any], zipped: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(content(), 'whole.pth', _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match='If you trust it') as error:
        read_checkpoint('whole.pth')
    advice = str(error.value).partition('imported: ')[2]
    exec(advice, {'torch': torch, 'FILE': 'whole.pth', 'NEW_FILE': 'new.pth'})
    found = read_checkpoint('new.pth').state
    torch.testing.assert_close(found, dict(tiny().state_dict()), rtol=0, atol=0)


# What else there is in a file of MindSpore


def test_load_checkpoint_mindspore_leaves_out_what_an_optimizer_saves(tmp_path: Path) -> None:
    (tmp_path / 'net.ckpt').write_bytes(WRITTEN['mindspore'])
    weights = {name: tensor for name, tensor in read(tmp_path / 'net.ckpt').nested.items() if '.moving_' not in name}
    twins = [mindspore_value(f'{part}.{name}', weights[name]) for part in ('moment1', 'moment2') for name in weights]
    appended: dict[str, Tensor | str] = {
        'learning_rate': torch.ones(4),
        'is_best': torch.tensor(True),
        'recipe': 'a name',
    }
    extra = [mindspore_value(name, value) for name, value in appended.items()]
    (tmp_path / 'training.ckpt').write_bytes(WRITTEN['mindspore'] + b''.join(twins + extra))
    model = tiny('official')
    checkpoint = load_checkpoint(model, tmp_path / 'training.ckpt')
    torch.testing.assert_close(model.state_dict(), SMALL, rtol=0, atol=0)
    assert len(checkpoint.translation.dropped) == 2 * len(weights) + 2  # a text is no tensor


def test_load_checkpoint_mindspore_port_of_another_padding_is_refused(tmp_path: Path) -> None:
    (tmp_path / 'net.ckpt').write_bytes(mindspore(SMALL, own_names=False))
    with pytest.raises(CheckpointError, match=r"pad strided .* at the end only\. If yours .* first_block='official'"):
        load_checkpoint(tiny('official'), tmp_path / 'net.ckpt')
    model = tiny('official')
    load_checkpoint(model, tmp_path / 'net.ckpt', first_block='official')
    torch.testing.assert_close(model.state_dict(), SMALL, rtol=0, atol=0)


def test_read_oneflow_pickle_without_its_folders_says_what_to_give(tmp_path: Path) -> None:
    with zipfile.ZipFile(io.BytesIO(WRITTEN['oneflow'])) as archive:
        (tmp_path / 'pickled_data').write_bytes(archive.read('net/pickled_data'))
    with pytest.raises(CheckpointError, match='Pack the folder that it is in'):
        read(tmp_path / 'pickled_data')


@pytest.mark.parametrize(
    ('meta', 'message'),
    [
        ('shape {\n  dim: 100000000000\n}\ndata_type: kFloat\n', r'4 bytes for a tensor of shape \[100000000000\]'),
        ('shape {\n  dim: -1\n}\ndata_type: kFloat\n', 'w/meta is not the type and shape'),
        ('shape {\n  dim: 1\n}\ndata_type: kOFRecord\n', 'kOFRecord, which are no weights'),
    ],
)
def test_read_oneflow_false_shape_or_type_raises(meta: str, message: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'bad.zip', 'w') as archive:
        archive.writestr('net/snapshot_done', '')
        archive.writestr('net/w/meta', meta)
        archive.writestr('net/w/out', bytes(4))
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / 'bad.zip')


def test_read_oneflow_folder_outside_the_archive_is_not_read(tmp_path: Path) -> None:
    (tmp_path / 'out').write_bytes(bytes(4))
    (tmp_path / 'meta').write_text('shape {\n  dim: 1\n}\ndata_type: kFloat\n')
    variable = b'coneflow\nTensor\n)\x81}' + pickled('path') + pickled(str(tmp_path)) + b'sb'
    with zipfile.ZipFile(tmp_path / 'bad.zip', 'w') as archive:
        archive.writestr('pickled_data', b'\x80\x04}' + pickled('data') + b'}' + pickled('w') + variable + b'ss.')
    with pytest.raises(CheckpointError, match='There is no item named'):
        read(tmp_path / 'bad.zip')


def test_read_zip_bomb_raises(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / 'bomb', 'w', zipfile.ZIP_DEFLATED) as archive:
        archive.writestr('archive/data.pkl', pickle.dumps({}))
        archive.writestr('archive/data/0', bytes(50_000_000))
    with pytest.raises(CheckpointError, match=r'its [\d,]+ bytes unpack to 50,0'):
        read(tmp_path / 'bomb')


def test_read_tensor_with_more_elements_than_storage_raises(tmp_path: Path) -> None:
    (tmp_path / 'bomb').write_bytes(torch_file({'layer1.0.convs.0.weight': torch.ones(1).expand(10**6, 10**6)}))
    with pytest.raises(CheckpointError, match='unpack to much more'):
        read(tmp_path / 'bomb')


def test_read_pickle_that_repeats_large_string_raises_within_50_mb(tmp_path: Path) -> None:
    text = b'X' + struct.pack('<I', 1_000_000) + b'a' * 1_000_000 + b'q\x00' + b'0'
    calls = b'c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R0' * 1000
    (tmp_path / 'bomb').write_bytes(b'\x80\x02' + text + calls + b'}.')
    tracemalloc.start()
    with pytest.raises(CheckpointError, match='unpack to much more'):
        read(tmp_path / 'bomb')
    assert tracemalloc.get_traced_memory()[1] < 50_000_000
    tracemalloc.stop()


@pytest.mark.parametrize(
    'opcodes',
    [
        b'}r\xff\xff\xff\x7f.',
        b'\x8e' + struct.pack('<Q', 1 << 40) + b'abc.',
        b'\x95' + struct.pack('<Q', 1 << 40) + b'}.',
        b'\x96' + struct.pack('<Q', 1 << 60) + b'abc.',
        b'\x96' + struct.pack('<Q', 1 << 31) + b'abc.',
    ],
    ids=['index of a memo', 'bytes', 'frame', 'byte array', 'byte array of 2 GB'],
)
def test_read_pickle_with_huge_size_field_allocates_less_than_10_mb(opcodes: bytes, tmp_path: Path) -> None:
    (tmp_path / 'evil').write_bytes(b'\x80\x05' + opcodes)
    tracemalloc.start()
    with suppress(CheckpointError):
        assert read(tmp_path / 'evil').nested == {}
    assert tracemalloc.get_traced_memory()[1] < 10_000_000
    tracemalloc.stop()


def test_read_tensor_of_wrong_byte_count_or_type_raises(tmp_path: Path) -> None:
    tensor = torch.ones(2, 3)
    for description in (field(1, 5) + field(2, 1 << 40), field(1, 5) + field(2, (1 << 64) - 6), field(1, 99)):
        data = struct.pack('<IQIi', 0, 0, 0, len(description)) + description + tensor.numpy().tobytes()
        with tarfile.open(tmp_path / 'bad', 'w') as archive:
            member = tarfile.TarInfo('variable')
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        with pytest.raises(CheckpointError, match=r'bytes for a tensor|not possible|are no weights'):
            read(tmp_path / 'bad')
    content = field(1, field(1, b'name') + field(2, field(1, 7) + field(2, b'Float32') + field(3, bytes(24))))
    (tmp_path / 'bad').write_bytes(content)
    with pytest.raises(CheckpointError, match=r'24 bytes for a tensor of shape \[7\]'):
        read(tmp_path / 'bad')


def test_read_archive_with_symbolic_link_raises(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / 'bad', 'w') as archive:
        member = tarfile.TarInfo('fc_weights')
        member.type, member.linkname = tarfile.SYMTYPE, '/etc/passwd'
        archive.addfile(member)
    with pytest.raises(CheckpointError, match='fc_weights in it is no plain file'):
        read(tmp_path / 'bad')


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is no file of weights'),
        (b'some text', "begins with b'some tex'"),
        (b'\x89HDF\r\n\x1a\n', 'Keras'),
        (pickle.dumps([1, 2]), 'holds a list'),
        (pickle.dumps({'a': np.array(['text'])}), 'of type U4, which are no weights'),
        (pickle.dumps({'a': np.ones(2, '>f4')}), 'byte order'),
    ],
)
def test_read_file_without_weights_raises_one_line_with_path(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read(tmp_path / 'file')
    assert '\n' not in str(error.value)
    assert str(tmp_path / 'file') in str(error.value)


def test_read_absent_file_or_directory_raises_checkpoint_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='can not be opened: No such file'):
        read(tmp_path / 'absent.pth')
    with pytest.raises(CheckpointError, match='can not be opened: Is a directory'):
        read(tmp_path)


def test_read_arrays_of_any_memory_order_and_number_of_dimensions(tmp_path: Path) -> None:
    arrays = {
        'fortran': np.asfortranarray(np.arange(24.0).reshape(2, 3, 4)),
        'scalar': np.array(3, 'int64'),
        'empty': np.ones((0, 3), 'float16'),
        'sliced': np.arange(10, dtype='int32')[::3],
    }
    (tmp_path / 'arrays.pkl').write_bytes(pickle.dumps(arrays))
    found = read(tmp_path / 'arrays.pkl').nested
    torch.testing.assert_close(found, {name: torch.from_numpy(array.copy()) for name, array in arrays.items()})


def test_read_safetensors_returns_metadata(tmp_path: Path) -> None:
    save_file({'a': torch.ones(2)}, tmp_path / 'file', {'first_block': 'paddle'})
    assert read(tmp_path / 'file').metadata == {'first_block': 'paddle'}


def test_read_mindspore_skips_checksum(tmp_path: Path) -> None:
    (tmp_path / 'file').write_bytes(mindspore(SMALL) + b'crc_num' + (1234).to_bytes(10, 'big'))
    assert len(read(tmp_path / 'file').nested) == len([name for name in SMALL if 'batches' not in name])
