"""Writers of every weights format, most of which no library here can write, and a small network in each."""

import io
import pickle
import struct
import tarfile
import zipfile
from collections.abc import Callable
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
    """A protocol buffer field."""
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
    """A MindSpore checkpoint with MindCV's names, or with the authors' module names."""
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
    """A tape archive in the dialect `paddle-archive`, for a deep stem and at most two blocks per stage."""
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


def paddle_pickle(state: dict[str, Tensor], pairs: bool = False, protocol: int = 4) -> bytes:
    arrays: dict[str, Any] = {name: tensor.numpy() for name, tensor in rename_for('paddleclas', state).items()}
    if pairs:
        arrays = {name: (f'{name}_0', array) for name, array in arrays.items()}
    return pickle.dumps({**arrays, 'StructuredToParameterName@@': {'conv1.weight': 'conv1_weights'}}, protocol=protocol)


def pickled(text: str) -> bytes:
    return b'X' + struct.pack('<I', len(text)) + text.encode()


def oneflow(state: dict[str, Tensor], legacy: bool = False) -> bytes:
    """A zipped folder of OneFlow 0.6 to 0.9, or of an earlier version."""
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
    """Saves with `torch.save` to `weights.pth` in a folder, and returns the path."""
    torch.save(state, folder / 'weights.pth', **options)
    return folder / 'weights.pth'


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Prepends a prefix to every name."""
    return {prefix + name: tensor for name, tensor in state.items()}
