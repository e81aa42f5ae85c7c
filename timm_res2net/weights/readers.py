"""Reads tensors from untrusted files without running any code that they contain.

The format is detected by a file's first bytes, not by its name: safetensors, torch's archives (today's and those
before 1.6), pickles of numpy arrays (Paddle's .pdparams, detectron2's and Jittor's .pkl, OneFlow's files), Paddle's
archives of one file for each variable, zipped folders of OneFlow, and MindSpore's .ckpt. Memory stays within a small
multiple of the file's size.
"""

import argparse
import io
import math
import os
import pickle
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors import safe_open
from torch import Tensor

from .errors import CheckpointError, first_line
from .files import PathLike

__all__ = ['Contents', 'read']

MAX_EXPANSION = 4  # times the file's size; a file that claims to hold more is refused

DTYPES = {  # by numpy's code
    'f2': torch.float16,
    'f4': torch.float32,
    'f8': torch.float64,
    'i1': torch.int8,
    'i2': torch.int16,
    'i4': torch.int32,
    'i8': torch.int64,
    'u1': torch.uint8,
    'b1': torch.bool,
    'bf16': torch.bfloat16,  # ours: numpy has none
}


@dataclass(frozen=True)
class Contents:
    """What a file holds: nested dicts with tensors, and whatever else there is, as values; and its own metadata."""

    nested: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: PathLike) -> Contents:
    """Reads a file of weights.

    Raises:
        CheckpointError: If it can't be read, or its pickle wants more than tensors: the message says what.
    """
    try:
        with open(path, 'rb') as file:
            head = file.read(512)
    except OSError as error:
        raise CheckpointError(f'{path} can not be opened: {error.strerror or error}') from error
    kind, reader = detect_format(head, path)
    try:
        return reader(str(path))
    except CheckpointError as error:
        raise CheckpointError(f'{path} is refused: {error}') from error
    except Exception as error:  # a decoder of damaged data can raise nearly anything
        raise CheckpointError(
            f'{path} begins as {kind} but can not be read: {first_line(error)}. It is cut or damaged; fetch it again'
        ) from error


def detect_format(head: bytes, path: PathLike) -> tuple[str, Callable[[str], Contents]]:
    """Returns a file's format and the function that reads it, by its first bytes."""
    if head[8:9] == b'{':
        return 'safetensors', read_safetensors
    if head.startswith(b'PK\x03\x04'):
        return 'an archive of torch or OneFlow', read_zip
    if head.startswith(b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19'):
        return 'an archive of torch', read_torch
    if head.startswith(b'\x80'):
        return 'a pickle', read_pickle
    if head[257:262] == b'ustar':
        return 'a tape archive', read_paddle_archive
    if head.startswith(b'\x0a'):
        return "MindSpore's checkpoint", read_mindspore
    if head.startswith(b'\x89HDF'):
        raise CheckpointError(f"{path} is an HDF5 file, as Keras writes; the Res2Nets for Keras are timm's, take those")
    raise CheckpointError(
        f'{path} is no file of weights that can be read: it begins with {head[:8]!r}. '
        'Give safetensors, .pth, .pdparams, .pkl, .ckpt of MindSpore, .tar of Paddle, or .zip of OneFlow'
    )


def tensor(raw: Any, dtype: str, shape: Any) -> Tensor:
    """Makes a tensor of a copy of little-endian bytes.

    Args:
        raw: The bytes.
        dtype: Key of `DTYPES`.
        shape: A sequence of sizes.

    Raises:
        CheckpointError: If type, shape and number of bytes don't agree.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f'it holds values of type {dtype}, which are no weights')
    sizes = [int(size) for size in shape]
    wanted = math.prod(sizes) * DTYPES[dtype].itemsize
    if min(sizes, default=0) < 0 or len(raw) != wanted:
        raise CheckpointError(f'it holds {len(raw)} bytes for a tensor of shape {sizes} and type {dtype}')
    if wanted == 0:
        return torch.empty(sizes, dtype=DTYPES[dtype])
    return torch.frombuffer(bytearray(raw), dtype=DTYPES[dtype]).reshape(sizes)


def read_safetensors(path: str) -> Contents:
    """Reads a file of safetensors."""
    with safe_open(path, 'pt') as file:
        return Contents({name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {})  # noqa: SIM118


def read_zip(path: str) -> Contents:
    """Reads a file of `torch.save`, or a zipped folder of OneFlow."""
    with zipfile.ZipFile(path) as archive:
        require_weights(archive, os.path.getsize(path))
        for name in archive.namelist():
            folder, _, last = name.rpartition('/')
            if last in ('pickled_data', 'snapshot_done'):
                return read_oneflow(archive, f'{folder}/' if folder else '')
    return read_torch(path)


# torch


class Ignored:
    """Stands in for what files hold beside the weights: mmengine's training statistics, OneFlow's types."""

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None: ...


IGNORED_GLOBALS = [
    'mmengine.logging.history_buffer.HistoryBuffer',
    'builtins.getattr',
    'numpy.core.multiarray._reconstruct',
    'numpy._core.multiarray._reconstruct',
    'numpy.core.multiarray.scalar',
    'numpy._core.multiarray.scalar',
    'numpy.ndarray',
    'numpy.dtype',
]


def read_torch(path: str) -> Contents:
    """Reads a file of `torch.save`: tensors, plain containers and training options, nothing else."""
    size = os.path.getsize(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace, *((Ignored, name) for name in IGNORED_GLOBALS)]):
            found = torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError as error:
        wanted = re.search(r'(?:GLOBAL|function|class|instances of type) ([\w.]+)', str(error))
        if wanted is None:
            raise
        weights = "torch.load(FILE, weights_only=False)['state_dict']"
        if is_module(wanted[1]):
            weights = 'torch.load(FILE, weights_only=False).state_dict()'
        raise CheckpointError(
            f'it wants {wanted[1]}, and a file of weights needs only tensors. If you trust it, save it again without: '
            f"torch.save({{'state_dict': {weights}}}, NEW_FILE)"
        ) from error
    nested = to_dicts(found)
    claimed = sum(leaf.numel() * leaf.element_size() for leaf in leaves(nested) if isinstance(leaf, Tensor))
    if claimed > MAX_EXPANSION * size:
        raise CheckpointError(f'its {size:,} bytes claim to be tensors of {claimed:,}')
    return Contents(nested)


# Archives that begin as those of `torch.save` do, by the end of the name of a file that each has.
OTHER_ARCHIVES = {
    '/constants.pkl': 'TorchScript, a program: torch.jit.load(FILE).state_dict() has its weights',
    '/models/model.json': 'torch.export, a program: torch.export.load(FILE).state_dict has its weights',
    '.npy': 'numpy arrays: torch.save a dict of tensors of them',
}


def require_weights(archive: zipfile.ZipFile, size: int) -> None:
    """Raises a CheckpointError for an archive of something else, or that unpacks to far more than its size."""
    for info in archive.infolist():
        for end, kind in OTHER_ARCHIVES.items():
            if info.filename.endswith(end):
                raise CheckpointError(f'it is an archive of {kind}')
    claimed = sum(info.file_size for info in archive.infolist())
    if claimed > MAX_EXPANSION * size:
        raise CheckpointError(f'its {size:,} bytes unpack to {claimed:,}, which no file of weights does')


def is_module(name: str) -> bool:
    """Whether a class that a pickle wants looks like a module's, so that the file holds a whole model."""
    return name.startswith('torch.nn.modules.') or '.models.' in name


def leaves(nested: dict[str, Any]) -> Iterator[Any]:
    """All values of nested dicts."""
    for value in nested.values():
        if isinstance(value, dict):
            yield from leaves(value)
        else:
            yield value


# Pickles of numpy arrays


class ArrayType:
    """Stands in for `numpy.dtype`: type code, then byte order."""

    def __init__(self, code: str, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        if state[1] not in ('<', '|', '='):
            raise CheckpointError(f'it holds numbers of byte order {state[1]!r}, which no machine for training has')


class Array:
    """Stands in for an array of numpy. It accepts only bytes of the size that its shape implies."""

    def __init__(self, charge: Callable[[int], None]) -> None:
        self.charge = charge
        self.value: Tensor | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, ArrayType) or not isinstance(raw, bytes | str):
            raise CheckpointError('it holds an array of Python objects, which are no weights')
        raw = raw.encode('latin1') if isinstance(raw, str) else raw
        self.charge(len(raw))
        value = tensor(raw, dtype.code, shape[::-1] if fortran else shape)
        self.value = value.permute(*reversed(range(value.ndim))) if fortran else value


class Variable:
    """Stands in for a tensor of OneFlow, that holds an array or the name of the folder with its bytes."""

    array: Array | None = None
    folder: str | None = None

    def __setstate__(self, state: Any) -> None:
        array, folder = state.get('data'), state.get('path')
        self.array = array if isinstance(array, Array) else None
        self.folder = folder if isinstance(folder, str) else None


class ArrayUnpickler(pickle._Unpickler):
    """Builds arrays and plain containers, by an allowlist.

    It derives from Python's own implementation, because that in C allocates memory for any memo index in a file.
    No function that a pickle names is ever called: the allowlist maps names to the methods below.
    """

    stack: list[Any]  # these three are of the base class
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    dispatch: ClassVar[dict[int, Any]] = dict(pickle._Unpickler.dispatch)

    def __init__(self, file: Any, size: int) -> None:
        super().__init__(file, encoding='latin1')
        self.budget = MAX_EXPANSION * size  # bytes that may still be made; a pickle can use one string many times

    def find_class(self, module: str, name: str) -> Any:
        allowed = {
            'multiarray._reconstruct': self.array,
            'numeric._frombuffer': self.array_of_buffer,
            'ndarray': 'ndarray',  # only an argument of _reconstruct
            'dtype': ArrayType,
            'collections.OrderedDict': self.ordered_dict,
            'oneflow.Tensor': Variable,
            'oneflow.nn.Parameter': Variable,
            'oneflow._oneflow_internal.dtype': Ignored,
            '_codecs.encode': self.encode,
            'builtins.tuple': self.tuple,
            '__builtin__.tuple': self.tuple,
        }
        full = f'{module}.{name}'
        found = allowed.get(re.sub(r'^numpy\.(_?core\.)?', '', full) if module.startswith('numpy') else full)
        if found is None:
            raise CheckpointError(f'it wants {full}, and a file of weights needs only arrays')
        return found

    def load_build(self) -> None:
        """Sets the state of a stand-in, and of nothing else; attributes of a dict of tensors are left out."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, dict):
            return
        if not isinstance(target, Array | ArrayType | Variable | Ignored):
            raise CheckpointError(
                f'it wants to change a {type(target).__name__}, and a file of weights needs only arrays'
            )
        target.__setstate__(state)

    dispatch[pickle.BUILD[0]] = load_build

    def load_bytearray8(self) -> None:
        """Reads a byte array after its size was charged: Python's implementation allocates whatever a file claims."""
        (size,) = struct.unpack('<Q', self.read(8))
        self.charge(size)
        self.append(bytearray(self.read(size)))

    dispatch[pickle.BYTEARRAY8[0]] = load_bytearray8

    def charge(self, size: int) -> None:
        """Takes bytes off the budget; CheckpointError if it is used up."""
        self.budget -= size
        if self.budget < 0:
            raise CheckpointError('it unpacks to much more than its size, which no file of weights does')

    def array(self, *args: Any) -> Array:
        return Array(self.charge)

    def array_of_buffer(self, raw: Any, dtype: ArrayType, shape: Any, order: str) -> Array:
        found = self.array()
        found.__setstate__((1, shape, dtype, order == 'F', bytes(raw)))
        return found

    def ordered_dict(self, items: Any = ()) -> dict[Any, Any]:
        self.charge(100 * len(items))
        return dict(items)

    def encode(self, text: str, encoding: str) -> bytes:
        self.charge(len(text))
        return text.encode('latin1')

    def tuple(self, items: Any) -> Any:
        self.charge(100 * len(items))
        return (*items,)


def read_pickle(path: str) -> Contents:
    """Reads a pickle of numpy arrays."""
    data = Path(path).read_bytes()
    found = to_dicts(ArrayUnpickler(io.BytesIO(data), len(data)).load())
    if any(isinstance(leaf, Variable) for leaf in leaves(found)):
        raise CheckpointError(
            "it names OneFlow's tensors, which are in folders beside it. Pack the folder that it is in, and give that: "
            'python -m zipfile -c FILE.zip FOLDER'
        )
    return Contents(found['data'] if '__oneflow__' in found and isinstance(found.get('data'), dict) else found)


def to_dicts(value: Any, depth: int = 4) -> dict[str, Any]:
    """Copies nested dicts with strings for keys, and makes tensors of arrays and what holds them.

    These are Paddle's pairs (name, array) and OneFlow's variables.
    """
    if not isinstance(value, dict):
        raise CheckpointError(f'it holds a {type(value).__name__} where names with tensors are expected')
    found: dict[str, Any] = {}
    for name, item in value.items():
        if isinstance(item, tuple) and len(item) == 2 and isinstance(item[1], Array):
            item = item[1]
        elif isinstance(item, Variable):
            item = item.array or item
        if isinstance(item, dict) and depth:
            item = to_dicts(item, depth - 1)
        found[str(name)] = item.value if isinstance(item, Array) else item
    return found


# Protocol buffers, and the two formats that use them


def varint(data: memoryview, offset: int) -> tuple[int, int]:
    """Reads a number of variable length; returns it and the offset of its end."""
    value = shift = 0
    while True:
        byte = data[offset]
        value |= (byte & 127) << shift
        offset, shift = offset + 1, shift + 7
        if byte < 128:
            return value, offset
        if shift > 63:
            raise CheckpointError('it is damaged: a number has no end')


def fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Reads a message of protocol buffers: the number of each field, and an integer or the field's bytes."""
    offset = 0
    while offset < len(data):
        key, offset = varint(data, offset)
        kind = key & 7
        if kind == 0:
            value, offset = varint(data, offset)
            yield key >> 3, value
            continue
        if kind == 2:
            size, offset = varint(data, offset)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise CheckpointError(f'it is damaged: there are no fields of kind {kind}')
        if offset + size > len(data):
            raise CheckpointError('it is cut: a field ends beyond the end of the file')
        yield key >> 3, data[offset : offset + size]
        offset += size


def read_mindspore(path: str) -> Contents:
    """Reads MindSpore's checkpoint: Checkpoint {1: Value {1: name, 2: Tensor {1: sizes, 2: type, 3: bytes}}}."""
    types = {
        **{'Float32': 'f4', 'Float16': 'f2', 'Float64': 'f8', 'BFloat16': 'bf16', 'Bool': 'b1', 'UInt8': 'u1'},
        **{'Int8': 'i1', 'Int16': 'i2', 'Int32': 'i4', 'Int64': 'i8'},
    }
    data = memoryview(Path(path).read_bytes())
    if bytes(data[-17:-10]) == b'crc_num':  # a check sum that some versions append
        data = data[:-17]
    tensors: dict[str, Any] = {}
    for number, value in fields(data):
        name, sizes, dtype, raw = '', [], '', memoryview(b'')
        for part, content in fields(value) if number == 1 else ():
            if part == 1:
                name = bytes(content).decode()
            for key, item in fields(content) if part == 2 else ():
                if key == 1:
                    sizes.append(item)
                elif key == 2:
                    dtype = bytes(item).decode()
                elif key == 3:
                    raw = item
        if not name or name in tensors:
            raise CheckpointError(f'it is damaged: the name {name!r} is empty or there twice')
        if dtype != 'str':  # a text that a training script appended
            tensors[name] = tensor(raw, types.get(dtype, dtype), sizes)
    return Contents(tensors)


def read_paddle_archive(path: str) -> Contents:
    """Reads a tape archive with a file for each variable, as Paddle saved before version 2."""
    types = {2: 'i4', 3: 'i8', 4: 'f2', 5: 'f4', 6: 'f8', 22: 'bf16'}
    tensors: dict[str, Any] = {}
    with tarfile.open(path, 'r:') as archive:
        for member in archive:
            if member.isdir():
                continue
            name = Path(member.name).name
            file = archive.extractfile(member) if member.isreg() and not member.issparse() else None
            if file is None or name in tensors:
                raise CheckpointError(f'{member.name} in it is no plain file, or there twice')
            data = memoryview(file.read())
            _, levels = struct.unpack_from('<IQ', data)
            offset = 12
            for _ in range(levels):  # positions of sequences in a batch, which weights don't have
                offset += 8 + struct.unpack_from('<Q', data, offset)[0]
            _, size = struct.unpack_from('<Ii', data, offset)
            sizes, dtype = [], 0
            for number, value in fields(data[offset + 8 : offset + 8 + size]):
                if number == 1:
                    dtype = value
                elif number == 2:
                    sizes.append(value)
            tensors[name] = tensor(data[offset + 8 + size :], types.get(dtype, str(dtype)), sizes)
    if not tensors:
        raise CheckpointError('there is nothing in it')
    return Contents(tensors)


# OneFlow


def read_oneflow(archive: zipfile.ZipFile, folder: str) -> Contents:
    """Reads a zipped folder that OneFlow saved before 1.0, as flowvision publishes it.

    It has a folder for each tensor, with its bytes in `out`, and type and shape as text in `meta`. Since OneFlow 0.6
    the folders are numbered and a pickle has the names of the tensors; before, the folders are named like the tensors.

    Args:
        archive: An archive whose members are not larger than the reader allows.
        folder: The folder in it, with '/' at its end.
    """
    types = {
        **{'kFloat': 'f4', 'kFloat16': 'f2', 'kBFloat16': 'bf16', 'kDouble': 'f8', 'kBool': 'b1', 'kUInt8': 'u1'},
        **{'kInt8': 'i1', 'kInt16': 'i2', 'kInt32': 'i4', 'kInt64': 'i8'},
    }

    @cache  # a pickle can name one folder many times
    def load(name: str) -> Tensor:
        meta = archive.read(f'{folder}{name}/meta').decode()
        found = re.fullmatch(r'shape \{\s*((?:dim: [0-9]{1,18}\s+)*)\}\s*data_type: (\w+)\s*', meta)
        if found is None:
            raise CheckpointError(f'it is damaged: {name}/meta is not the type and shape of a tensor')
        raw, (sizes, dtype) = archive.read(f'{folder}{name}/out'), found.groups()
        return tensor(raw, types.get(dtype, dtype), re.findall('[0-9]+', sizes))

    def load_variables(nested: dict[str, Any]) -> dict[str, Any]:
        loaded = {name: load(item.folder) if isinstance(item, Variable) else item for name, item in nested.items()}
        return {name: load_variables(item) if isinstance(item, dict) else item for name, item in loaded.items()}

    names = archive.namelist()
    if f'{folder}pickled_data' not in names:
        folders = [name.removeprefix(folder).removesuffix('/meta') for name in names if name.startswith(folder)]
        return Contents({name: load(name) for name in folders if f'{folder}{name}/meta' in names})
    data = archive.read(f'{folder}pickled_data')
    found = to_dicts(ArrayUnpickler(io.BytesIO(data), len(data)).load())
    return Contents(load_variables(found['data']))
