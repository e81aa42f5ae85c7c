"""Parses weights files of every format except safetensors, in a separate process with only the standard library.

    python -I -S sandbox.py < FILE > ANSWER

No name in a pickle is ever imported: an inert class below replaces it. Anything else that a hostile file can do
(exhaust memory or time, crash the interpreter) happens in this process, within limits that the operating system
enforces on POSIX, and only the parent's timer elsewhere. `readers.py` starts this script and checks its answer.

The answer is one line of JSON, followed by the bytes of all storages that cannot be located in the file:

    {"tensors":     {name: [dtype, index of the storage, shape, strides, or null if contiguous, offset]},
     "unsupported": {name: why the tensor under this name cannot be read},
     "storages":    [[start in the file, or null if the bytes follow this line, size]],
     "values":      {name: plain values next to the tensors}}

or {"refused": why the file cannot be read}. Sizes and starts are in bytes, strides and offsets in elements.
"""

import io
import json
import math
import os
import pickle
import re
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, BinaryIO

VALUES = 'arch', 'args', 'hyper_parameters', 'model_args', 'timm_res2net'  # of timm, Lightning and this package
MAX_ITEMS, MAX_DEPTH = 1000, 6  # in these values; further items and characters are left out

WIDTHS = dict(float16=2, float32=4, float64=8, bfloat16=2, int8=1, int16=2, int32=4, int64=8, uint8=1, bool=1)
ALIASES = {  # what numpy, torch's storages, MindSpore, Paddle and OneFlow call these types
    'float16': 'f2 Half Float16 4 kFloat16',
    'float32': 'f4 Float Float32 5 kFloat',
    'float64': 'f8 Double Float64 6 kDouble',
    'bfloat16': 'BFloat16 22 kBFloat16',
    'int8': 'i1 Char Int8 kInt8',
    'int16': 'i2 Short Int16 kInt16',
    'int32': 'i4 Int Int32 2 kInt32',
    'int64': 'i8 Long Int64 3 kInt64',
    'uint8': 'u1 Byte UInt8 Untyped Typed kUInt8',
    'bool': 'b1 Bool kBool',
}
DTYPES = {alias: name for name, aliases in ALIASES.items() for alias in (name, *aliases.split())}

DAMAGED = 'The file is truncated or damaged: download it again.'


class Refused(Exception):
    """Why a file cannot be read."""


class Inert(dict[Any, Any]):
    """Stands for any class or function that a pickle names; accepts everything and does nothing."""

    qualified_name = ''
    state: Any = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def ignore(self, *args: Any) -> None: ...

    append = extend = add = ignore
    __hash__ = object.__hash__  # type: ignore[assignment]
    __eq__ = object.__eq__


class Mapping(Inert):
    """Stands for an OrderedDict. Python 2 passes the items to its constructor."""

    def __init__(self, items: Any = ()) -> None:
        super().__init__()
        self.update(items)


class Storage:
    """Bytes that tensors share, either located in the file or in memory."""

    def __init__(self, dtype: Any = None, count: Any = None, data: Any = b'') -> None:
        self.dtype, self.count, self.data = dtype, count, data  # count: number of elements, if recorded
        self.start: int | None = None
        self.size = len(data)


class Tensor:
    """A view of a storage. The parent checks that it fits."""

    def __init__(self, dtype: Any, storage: Any, shape: Any, strides: Any = None, offset: Any = 0) -> None:
        self.dtype, self.storage, self.shape = dtype, storage, shape
        self.strides, self.offset = strides, offset

    def __setstate__(self, state: Any) -> None: ...


class DType:
    """Stands for `numpy.dtype`."""

    order = '|'

    def __init__(self, code: Any, *flags: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]


class Array(Tensor):
    """Stands for a numpy array."""

    def __init__(self, *args: Any) -> None:
        super().__init__(None, None, ())

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        data = raw.encode('latin1') if isinstance(raw, str) else raw  # str from Python 2
        strides = [math.prod(shape[:i]) for i in range(len(shape))] if fortran else None
        super().__init__(DTYPES.get(dtype.code) if dtype.order != '>' else None, Storage(data=data), shape, strides)


def array_from_buffer(raw: Any, dtype: Any, shape: Any, order: Any) -> Array:
    array = Array()
    array.__setstate__((1, shape, dtype, order == 'F', bytes(raw)))
    return array


def rebuild_tensor(storage: Any, offset: Any, shape: Any, strides: Any, *more: Any) -> Tensor:
    if not isinstance(storage, Storage):  # the tensor was pickled without `torch.save`
        return unsupported_tensor()
    dtype = more[2] if len(more) > 2 else None  # in `_rebuild_tensor_v3`; a dict of metadata in `_rebuild_tensor_v2`
    if isinstance(dtype, type):  # an unsupported one, such as float8
        dtype = getattr(dtype, 'qualified_name', '')
    return Tensor(dtype if isinstance(dtype, str) else storage.dtype, storage, shape, strides, offset)


def unsupported_tensor(*args: Any) -> Tensor:
    return Tensor(None, None, ())


BUILDERS: dict[str, Any] = {
    'numpy.multiarray._reconstruct': Array,
    'numpy.numeric._frombuffer': array_from_buffer,
    'numpy.dtype': DType,
    'collections.OrderedDict': Mapping,
    'builtins.tuple': tuple,
    'torch.Size': tuple,
    '_codecs.encode': lambda text, *encoding: text.encode('latin1'),
    'torch._utils._rebuild_tensor': rebuild_tensor,
    'torch._utils._rebuild_tensor_v2': rebuild_tensor,
    'torch._utils._rebuild_tensor_v3': rebuild_tensor,
    'torch._utils._rebuild_parameter': lambda tensor, *more: tensor,
    'torch._utils._rebuild_parameter_with_state': lambda tensor, *more: tensor,
    'torch._utils._rebuild_device_tensor_from_cpu_tensor': lambda tensor, *more: tensor,
    'torch._tensor._rebuild_from_type_v2': lambda make, kind, args, state: make(*args),
}


class Unpickler(pickle.Unpickler):
    """Builds tensors and plain containers; everything else is inert."""

    def __init__(self, file: Any, storages: dict[str, Storage]) -> None:
        super().__init__(file, encoding='latin1')
        self.storages = storages

    def find_class(self, module: str, name: str) -> Any:
        full = re.sub(r'^numpy\._?core\.', 'numpy.', f'{module}.{name}'.replace('__builtin__.', 'builtins.'))
        if module in ('torch', 'torch.storage') and name.endswith('Storage'):
            return DTYPES.get(name[:-7], name[:-7])
        if module == 'torch' and name in DTYPES:
            return name
        if full in BUILDERS:
            return BUILDERS[full]
        if full.startswith('torch._utils._rebuild_'):  # sparse, quantized, nested, meta
            return unsupported_tensor
        return type('Inert', (Inert,), {'qualified_name': full})

    def persistent_load(self, saved: Any) -> Any:
        if saved[0] != 'storage':  # a class with its source code, from torch before 1.6
            return saved[1]
        _, dtype, key, _, count, *views = saved
        if not isinstance(key, str) or not isinstance(dtype, str) or any(views):  # views are from torch before 0.4
            raise Refused(f'a storage has no type or key, or lies within another one. {DAMAGED}')
        return self.storages.setdefault(key, Storage(dtype, count))


# Formats: each reader returns the file's content


def read_zip(file: BinaryIO) -> Any:
    """Reads an archive from `torch.save`, or a zipped folder from OneFlow."""
    import zipfile

    with zipfile.ZipFile(file) as archive:
        names = archive.namelist()
        for name in names:
            for end, kind in OTHER_ARCHIVES.items():
                if name.endswith(end):
                    raise Refused(f'it is {kind}')
        for name in names:
            folder, slash, last = name.rpartition('/')
            if last in ('pickled_data', 'snapshot_done'):
                return read_oneflow(file, archive, folder + slash)
        folder = names[0].partition('/')[0]
        if f'{folder}/data.pkl' not in names:
            raise Refused('it is a zip archive, but not from torch or OneFlow. Pass the weights file itself')
        if f'{folder}/byteorder' in names and archive.read(f'{folder}/byteorder') != b'little':
            raise Refused('its numbers are big-endian. Save it again on a little-endian machine')
        storages: dict[str, Storage] = {}
        found = Unpickler(io.BytesIO(archive.read(f'{folder}/data.pkl')), storages).load()
        for key, storage in storages.items():
            locate_member(file, archive, f'{folder}/data/{key}', storage)
        return found


EXPORTED = 'a torch.export program. If you trust it, get its weights from torch.export.load(FILE).state_dict'
OTHER_ARCHIVES = {  # archives that begin like torch's, recognized by how a member's name ends
    '/constants.pkl': 'a TorchScript program. If you trust it, get its weights from torch.jit.load(FILE).state_dict()',
    '/models/model.json': EXPORTED,
    'serialized_exported_program.json': EXPORTED,  # since torch 2.6
    '.npy': 'an archive of numpy arrays. Save a dict of tensors with torch.save',
}


def locate_member(file: BinaryIO, archive: Any, name: str, storage: Storage) -> None:
    """Locates the bytes of an archive's member in the file, or unpacks them if they are compressed."""
    info = archive.getinfo(name)
    storage.size = info.file_size
    if storage.dtype in WIDTHS and storage.count * WIDTHS[storage.dtype] != storage.size:
        raise Refused(f'a storage of {storage.count:,} numbers has {storage.size:,} bytes. {DAMAGED}')
    if info.compress_type == 0:
        file.seek(info.header_offset + 26)
        lengths = struct.unpack('<HH', file.read(4))  # of name and padding
        storage.start = info.header_offset + 30 + sum(lengths)
    else:
        with archive.open(info) as member:
            storage.data = member.read(info.file_size)
        storage.size = len(storage.data)


def read_legacy(file: BinaryIO) -> Any:
    """Reads a file from `torch.save` before 1.6: five pickles, the last with the keys of the storages that follow."""
    storages: dict[str, Storage] = {}
    _magic, _version, system, found, keys = (Unpickler(file, storages).load() for _ in range(5))
    if system['little_endian'] is False:
        raise Refused('its numbers are big-endian. Save it again on a little-endian machine')
    for key in keys:
        storage = storages[key]
        (count,) = struct.unpack('<q', file.read(8))
        if count != storage.count:
            raise Refused(f'a storage should have {storage.count:,} numbers, but has {count:,}. {DAMAGED}')
        storage.start, storage.size = file.tell(), count * WIDTHS[storage.dtype]
        file.seek(storage.size, 1)
    return found


def read_pickle(file: BinaryIO) -> Any:
    """Reads a pickle of numpy arrays: PaddlePaddle's .pdparams, detectron2's and Jittor's .pkl, OneFlow's files."""
    return Unpickler(file, {}).load()


def read_fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Yields the fields of a protocol buffer message: each one's number, and its integer or bytes."""
    at = 0

    def read_varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        key = read_varint()
        kind = key & 7
        if kind == 0:
            yield key >> 3, read_varint()
            continue
        size = {1: 8, 5: 4}[kind] if kind != 2 else read_varint()
        if at + size > len(data):
            raise Refused(f'a field ends beyond the end of the file. {DAMAGED}')
        yield key >> 3, data[at : at + size]
        at += size


def read_mindspore(file: BinaryIO) -> Any:
    """Reads a MindSpore checkpoint: Checkpoint {1: Value {1: name, 2: Tensor {1: sizes, 2: type, 3: bytes}}}."""
    data = memoryview(file.read())
    if bytes(data[-17:-10]) == b'crc_num':  # a checksum that some versions append
        data = data[:-17]
    found: dict[str, Tensor] = {}
    for _, value in read_fields(data):
        if value[:1] == b'\x08':
            raise Refused('it is a PaddlePaddle inference program (.pdmodel). Pass the .pdparams file from training')
        parts = dict(read_fields(value))
        fields = [*read_fields(parts[2])]
        shape, by_number = [size for number, size in fields if number == 1], dict(fields)
        dtype = str(by_number[2], 'utf-8')
        if dtype != 'str':  # text that a training script appended
            tensor = Tensor(DTYPES.get(dtype), Storage(data=by_number.get(3, b'')), shape)
            found[str(parts[1], 'utf-8')] = tensor
    return found


def read_tar(file: BinaryIO) -> Any:
    """Reads a tar archive with one file per variable, as PaddlePaddle wrote before version 2."""
    import tarfile

    found: dict[str, Tensor] = {}
    with tarfile.open(fileobj=file, mode='r:') as archive:
        for member in archive:
            if member.isdir():
                continue
            opened = archive.extractfile(member) if member.isfile() else None
            if opened is None:
                raise Refused(f'its member {member.name[:100]!r} is not a regular file. Pass the archive from Paddle')
            name = os.path.basename(member.name)
            if name in found:
                raise Refused(f'its member {member.name[:100]!r} occurs twice. {DAMAGED}')
            found[name] = read_paddle_variable(memoryview(opened.read()))
    return found


def read_paddle_variable(data: memoryview) -> Tensor:
    """Reads a variable: version, sequence positions (empty for weights), size of the description, description, data."""
    at = 12
    for _ in range(struct.unpack_from('<Q', data, 4)[0]):
        at += 8 + struct.unpack_from('<Q', data, at)[0]
    _, size = struct.unpack_from('<Ii', data, at)
    fields = [*read_fields(data[at + 8 : at + 8 + size])]
    shape = [value for number, value in fields if number == 2]
    return Tensor(DTYPES.get(str(dict(fields)[1])), Storage(data=data[at + 8 + size :]), shape)


def read_oneflow(file: BinaryIO, archive: Any, folder: str) -> Any:
    """Reads a zipped folder from OneFlow before 1.0: one folder per tensor and, since 0.6, a pickle of names."""
    names = archive.namelist()

    def read_variable(path: str) -> Tensor:
        meta = re.fullmatch(
            r'shape \{\s*((?:dim: \d{1,18}\s+)*)\}\s*data_type: (\w+)\s*', archive.read(f'{folder}{path}/meta').decode()
        )
        if meta is None:
            raise Refused(f'{path[:100]}/meta is not the type and shape of a tensor. {DAMAGED}')
        storage = Storage()
        locate_member(file, archive, f'{folder}{path}/out', storage)
        return Tensor(DTYPES.get(meta[2]), storage, [int(each) for each in re.findall(r'\d+', meta[1])])

    if f'{folder}pickled_data' not in names:
        paths = [name[len(folder) : -5] for name in names if name.startswith(folder) and name.endswith('/meta')]
        return {path: read_variable(path) for path in paths}
    found = Unpickler(io.BytesIO(archive.read(f'{folder}pickled_data')), {}).load()['data']
    return {name: read_variable(value.state['path']) for name, value in found.items() if isinstance(value, Inert)}


FORMATS: tuple[tuple[int, bytes, Any], ...] = (  # position, magic bytes, and the reader or what the file is
    (0, b'PK\x03\x04', read_zip),
    (0, b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19', read_legacy),
    (0, b'\x80', read_pickle),
    (257, b'ustar', read_tar),
    (0, b'\x0a', read_mindspore),
    (0, b'\x89HDF', "an HDF5 file from Keras. The Res2Nets for Keras have timm's weights: use those"),
    (0, b'\x08', 'an ONNX model, or another protocol buffer. Pass the weights it was made from'),
    (4, b'TFL3', 'a TFLite model. Pass the weights it was made from'),
    (0, b'ptrt', 'a TensorRT engine. Pass the weights it was made from'),
    (0, b'ftrt', 'a TensorRT engine. Pass the weights it was made from'),
    (0, bytes(8), 'a PaddlePaddle file of inference parameters (.pdiparams), without names. Pass the .pdparams file'),
)


def read_file(file: BinaryIO) -> Any:
    """Reads a file in the format that its magic bytes indicate."""
    head = file.read(512)
    file.seek(0)
    for at, magic, reader in FORMATS:
        if head[at : at + len(magic)] == magic:
            if isinstance(reader, str):
                raise Refused(f'it is {reader}')
            return reader(file)
    raise Refused(
        f'it is not a weights file of a known format: it begins with {head[:8]!r}. Pass a .safetensors, .pth, '
        '.pdparams or .pkl file, a .ckpt from MindSpore, a .tar from PaddlePaddle, or a .zip from OneFlow'
    )


# Keys that are not part of a tensor's name, in pickled modules and in OneFlow's files.
TRANSPARENT = '_parameters', '_buffers', '_modules', 'data'


def find_tensors(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, Tensor]]:
    """Finds the tensors in nested dicts and pickled modules, with names joined by dots."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Array):  # PaddlePaddle's (name, array)
        value = value[1]
    if isinstance(value, Tensor):
        yield '.'.join(path), value
    if not isinstance(value, dict):
        return
    state = value.state if isinstance(value, Inert) and isinstance(value.state, dict) else {}
    for items in (value, state):
        for key, item in items.items():
            if isinstance(key, str | int):
                yield from find_tensors(item, path if key in TRANSPARENT else (*path, str(key)))


def to_plain(value: Any, depth: int = 0) -> Any:
    """Reduces a value to JSON: objects become dicts of their attributes or, like classes, names of types."""
    if depth == MAX_DEPTH:
        return None
    if isinstance(value, type) and issubclass(value, Inert):
        return f'<class {value.qualified_name}>'
    if isinstance(value, Inert):
        content = {**value, **(value.state if isinstance(value.state, dict) else {})}
        value = content if content or isinstance(value, Mapping) else f'<{value.qualified_name}>'
    if isinstance(value, dict):
        items = [(key, each) for key, each in value.items() if isinstance(key, str)]
        return {key: to_plain(each, depth + 1) for key, each in items[:MAX_ITEMS] if not isinstance(each, Tensor)}
    if isinstance(value, list | tuple):
        return [to_plain(each, depth + 1) for each in value[:MAX_ITEMS]]
    if isinstance(value, str):
        return value[:MAX_ITEMS]
    is_number = type(value) in (bool, float) or (type(value) is int and abs(value) < 1 << 63)
    return value if is_number else None


def answer(found: Any, out: BinaryIO) -> None:
    if not isinstance(found, dict):
        raise Refused(f'it holds a {type(found).__name__}, not tensors by name. Save a dict of tensors')
    tensors: dict[str, Any] = {}
    unsupported: dict[str, str] = {}
    places: dict[int, int] = {}
    storages: list[Storage] = []
    for name, tensor in find_tensors(found):
        storage = tensor.storage
        if storage is None:
            unsupported[name] = 'it is sparse, quantized, nested, without values or pickled without torch.save'
            continue
        if tensor.dtype not in WIDTHS:
            unsupported[name] = f'its type is {tensor.dtype[:40] if isinstance(tensor.dtype, str) else "unknown"}'
            continue
        if id(storage) not in places:
            places[id(storage)] = len(storages)
            storages.append(storage)
        strides = None if tensor.strides is None else [*tensor.strides]
        tensors[name] = [tensor.dtype, places[id(storage)], [*tensor.shape], strides, tensor.offset]
    values = {key: to_plain(found[key]) for key in VALUES if key in found and not isinstance(found[key], Tensor)}
    located = [[storage.start, storage.size] for storage in storages]
    header = dict(tensors=tensors, unsupported=unsupported, storages=located, values=values)
    out.write(json.dumps(header).encode() + b'\n')
    for storage in storages:
        if storage.start is None:
            out.write(storage.data)


def limit_resources(size: int) -> None:
    """Limits this process to 100 MB plus 4 times the file's size, and to a second of CPU plus one per 100 MB."""
    try:
        import resource
    except ImportError:  # on Windows
        return
    limits = ((resource.RLIMIT_AS, 100_000_000 + 4 * size), (resource.RLIMIT_CPU, 1 + size // 100_000_000))
    for kind, limit in (*limits, (resource.RLIMIT_CORE, 0)):
        with suppress(ValueError, OSError):  # macOS does not limit address space
            resource.setrlimit(kind, (limit, limit))


def main() -> None:
    """Parses the file on standard input, and writes the answer to standard output."""
    size = os.fstat(0).st_size
    limit_resources(size)
    out = sys.stdout.buffer
    try:
        answer(read_file(open(0, 'rb')), out)  # noqa: SIM115 - ends with the process
        return
    except Refused as error:
        reason = str(error)
    except (MemoryError, RecursionError):
        reason = f'its {size:,} bytes unpack to more, or nest deeper, than those of any weights file'
    except Exception as error:  # damaged data can raise nearly anything
        reason = f'{type(error).__name__}: {str(error)[:200]}. {DAMAGED}'
    out.write(json.dumps({'refused': reason[:1000]}).encode() + b'\n')
    out.flush()
    sys.exit(1)


if __name__ == '__main__':
    main()
