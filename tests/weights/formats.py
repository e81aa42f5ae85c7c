"""Writes a small network in every supported format. No installed library can write most of these formats.

Tensors keep timm's names, except in `.pdparams`; `tests/data` has files with other names.
"""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from support import tiny
from torch import Tensor

from timm_res2net.weights.renaming import rename_for


def varint(value: int) -> bytes:
    out = b''
    while value > 127:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def field(number: int, value: bytes | int) -> bytes:
    """Encodes a protocol buffer field."""
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


def mindspore(state: dict[str, Tensor]) -> bytes:
    """Encodes a MindSpore checkpoint."""
    return b''.join(mindspore_value(name, tensor) for name, tensor in state.items() if tensor.is_floating_point())


def paddle_variable(tensor: Tensor) -> bytes:
    description = field(1, 5) + b''.join(field(2, size) for size in tensor.shape)
    return struct.pack('<IQIi', 0, 0, 0, len(description)) + description + tensor.numpy().tobytes()


def zipped(members: Iterable[tuple[str, bytes | str]], method: int = zipfile.ZIP_STORED) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, 'w', method) as archive:
        for name, content in members:
            archive.writestr(name, content)
    return buffer.getvalue()


def tarred(members: Iterable[tuple[str, bytes]], kind: bytes = tarfile.REGTYPE) -> bytes:
    """Returns a tar archive of files, or of links to /etc/passwd."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode='w') as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size, member.type, member.linkname = len(content), kind, '' if kind == b'0' else '/etc/passwd'
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def paddle_archive(state: dict[str, Tensor]) -> bytes:
    """Encodes a tar archive as PaddlePaddle did before version 2."""
    weights = {name: tensor for name, tensor in state.items() if tensor.is_floating_point()}
    return tarred((f'folder/{name}', paddle_variable(tensor)) for name, tensor in weights.items())


def torch_file(state: dict[str, Any], **options: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer, **options)
    return buffer.getvalue()


def paddle_pickle(state: dict[str, Tensor], pairs: bool = False, protocol: int = 4) -> bytes:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in rename_for('paddleclas', state).items()}
    if pairs:
        arrays = {name: (f'{name}_0', array) for name, array in arrays.items()}
    return pickle.dumps({**arrays, 'StructuredToParameterName@@': {'conv1.weight': 'conv1_weights'}}, protocol=protocol)


def pickled(text: str) -> bytes:
    encoded = text.encode()
    return b'X' + struct.pack('<I', len(encoded)) + encoded


def oneflow(state: dict[str, Tensor], legacy: bool = False) -> bytes:
    """Encodes a zipped folder as OneFlow 0.6 to 0.9 did, or (`legacy`) earlier versions."""
    members: dict[str, bytes | str] = {}
    variables = b''
    for i, (name, tensor) in enumerate(state.items()):
        folder = name if legacy else f'tensor_{i}'
        sizes = ''.join(f'  dim: {size}\n' for size in tensor.shape)
        dtype = 'kInt64' if tensor.dtype == torch.int64 else 'kFloat'
        members[f'net/{folder}/meta'] = f'shape {{\n{sizes}}}\ndata_type: {dtype}\n'
        members[f'net/{folder}/out'] = tensor.numpy().tobytes()
        variables += pickled(name) + b'coneflow.nn\nParameter\n)\x81}' + pickled('path') + pickled(folder) + b'sb'
    if legacy:
        members['net/snapshot_done'] = ''
    else:
        members['net/pickled_data'] = b'\x80\x04}' + pickled('data') + b'}(' + variables + b'us.'
    return zipped(members.items())


FORMATS: dict[str, Callable[[dict[str, Tensor]], bytes]] = {
    'safetensors': safetensors.torch.save,
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

SMALL = tiny('paddle').state_dict()
WRITTEN = {kind: write(SMALL) for kind, write in FORMATS.items()}


def save_checkpoint(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    """Saves to `weights.pth` in a folder with `torch.save`, and returns the path."""
    torch.save(state, folder / 'weights.pth', **options)
    return folder / 'weights.pth'


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prepends a prefix to every name."""
    return {prefix + name: tensor for name, tensor in state.items()}
