"""Reads tensors from untrusted files without running any code that they contain.

The format is detected by a file's first bytes, not by its name: safetensors, torch's archives (today's and those
before 1.6), pickles of numpy arrays (Paddle's .pdparams, detectron2's and Jittor's .pkl, OneFlow's files), Paddle's
archives of one file for each variable, zipped folders of OneFlow, and MindSpore's .ckpt.

Each reader finds out what a file says of its tensors. One function, `checked`, makes tensors of that, after it has
checked type, shape and size; all spend memory and time from one `Budget`. Tensors are copies: nothing stays mapped.
"""

import io
import json
import math
import os
import re
import struct
import zipfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import torch
from torch import Tensor

from .budget import Budget
from .errors import CheckpointError, first_line, printable
from .files import PathLike, open_regular
from .pickles import ATOMS, Array, ArrayUnpickler, Options, Storage, TorchUnpickler, Variable

__all__ = ['Contents', 'read']

MAX_EXPANSION = 4  # times the file's size; an archive that claims to hold more is refused
LONGEST_NAME = 500  # characters; of a tensor or a module
LONGEST_OPTION = 64  # entries of a sequence that is no tensor
LONGEST_HEADER = 4_000_000  # bytes of JSON
ENTRY = 16  # bytes of memory for each byte of an archive's directory: at least 46 for a file there make 700 in Python

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
NUMBERS = {*DTYPES.values()}


@dataclass(frozen=True)
class Contents:
    """What a file holds: nested dicts with tensors, and the plain values among them; and its own metadata."""

    nested: dict[str, Any]
    metadata: dict[str, str] = field(default_factory=dict)


def read(path: PathLike) -> Contents:
    """Reads a file of weights.

    Raises:
        CheckpointError: If it can't be read, or its pickle wants more than tensors: the message says what.
    """
    try:
        file = open_regular(path)
    except (OSError, ValueError) as error:  # ValueError of a path with a NUL
        raise CheckpointError(f'{path} can not be opened: {getattr(error, "strerror", None) or error}') from error
    with file:
        head = file.read(512)
        file.seek(0)
        kind, reader = detect_format(head, path)
        try:
            return reader(file, Budget(os.fstat(file.fileno()).st_size))
        except CheckpointError as error:
            raise CheckpointError(f'{path} is refused: {error}') from error
        except Exception as error:  # a decoder of damaged data can raise nearly anything
            raise CheckpointError(
                f'{path} begins as {kind} but can not be read: {first_line(error)}. It is cut or damaged; '
                'fetch it again'
            ) from error


def detect_format(head: bytes, path: PathLike) -> tuple[str, Callable[[BinaryIO, Budget], Contents]]:
    """Returns a file's format and the function that reads it, by its first bytes."""
    if head[8:9] == b'{':
        return 'safetensors', read_safetensors
    if head.startswith(b'PK\x03\x04'):
        return 'an archive of torch or OneFlow', read_zip
    if head.startswith(b'\x80\x02\x8a\x0a\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19'):
        return 'an archive of torch', read_legacy
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


# From what a file says to tensors


def checked(
    value: Any, budget: Budget, load: Callable[[str], Array] | None = None, depth: int = 0, length: int = 0
) -> Any:
    """Makes tensors of arrays in nested dicts, and keeps options; leaves out all else.

    Args:
        value: What a reader found: dicts, `Array` and what holds one (Paddle's pairs of name and array, OneFlow's
            variables), `Options`, sequences and plain values.
        budget: To spend from.
        load: Finds the array of a variable of OneFlow by the name of its folder.
        depth: Of the value.
        length: Characters of the names that lead to it, of which the name of a tensor will be made.

    Returns:
        A dict with texts as keys, a tensor, options without tensors, or None.

    Raises:
        CheckpointError: If it is nested too deep, too large, or a tensor's type, shape and size are not possible.
    """
    budget.spend(100 + 8 * length)  # up to 4 bytes for each, in this name and another one that is made of it
    budget.require_depth(depth)
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], Array):
        value = value[1]
    elif isinstance(value, Variable):
        value = value.array or find_variable(value, load)
    elif isinstance(value, Options):
        return Namespace(**without_tensors(checked(require_dict(value.values or {}), budget, load, depth, length)))
    if isinstance(value, Array):
        return tensor(value, budget)
    if isinstance(value, dict):
        names = {name: str(name) for name in value}
        if too_long := [name for name in names.values() if len(name) > LONGEST_NAME]:
            raise CheckpointError(f'it holds a name of {len(too_long[0]):,} characters: {printable(too_long[0])}')
        return {name: checked(value[key], budget, load, depth + 1, length + len(name)) for key, name in names.items()}
    if isinstance(value, list | tuple):
        options = [each for each in value[:LONGEST_OPTION] if not isinstance(each, Array | dict)]
        found = (checked(each, budget, load, depth + 1, length) for each in options)
        return tuple(each for each in found if not isinstance(each, Tensor))
    return value if type(value) in ATOMS else None


def without_tensors(options: dict[str, Any]) -> dict[str, Any]:
    """Options without tensors, which no script has among its arguments: they are neither true nor false."""
    return {
        name: without_tensors(value) if isinstance(value, dict) else value
        for name, value in options.items()
        if not isinstance(value, Tensor)
    }


def require_dict(value: Any) -> dict[str, Any]:
    """Returns a dict; CheckpointError for anything else."""
    if not isinstance(value, dict):
        raise CheckpointError(f'it holds a {type(value).__name__} where names with tensors are expected')
    return value


def tensor(array: Array, budget: Budget) -> Tensor:
    """Makes the tensor that a file describes, a copy.

    Returns:
        The tensor; an empty one on the meta device for one that is no plain tensor of numbers.

    Raises:
        CheckpointError: If type, shape and number of bytes don't agree.
    """
    if array.fetch is None:
        return torch.empty(0, device='meta')
    dtype = array.dtype if isinstance(array.dtype, torch.dtype) else DTYPES.get(str_or_none(array.dtype) or '')
    if dtype is None:
        raise CheckpointError(f'it holds values of type {str_or_none(array.dtype)}, which are no weights')
    if dtype not in NUMBERS:
        return torch.empty(0, dtype=dtype, device='meta')
    sizes, strides = require_sizes(array.sizes), array.strides
    count = math.prod(sizes)
    wanted = count * dtype.itemsize
    raw = array.fetch()
    if strides is None and len(raw) != wanted:
        raise CheckpointError(f'it holds {len(raw)} bytes for a tensor of shape {sizes} and type {dtype}')
    # Loading casts to float32, and copies to a model.
    budget.spend(1000 + 2 * count * (max(dtype.itemsize, 4) if dtype.is_floating_point else dtype.itemsize))
    if wanted == 0:
        return torch.empty(sizes, dtype=dtype)
    flat = raw if isinstance(raw, Tensor) else torch.frombuffer(bytearray(raw), dtype=torch.uint8)
    flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
    if strides is None:
        return flat.reshape(sizes[::-1]).permute(*reversed(range(len(sizes)))) if array.fortran else flat.reshape(sizes)
    strides, (offset,) = require_sizes(strides), require_sizes([array.offset])
    if len(strides) != len(sizes) or offset + sum((n - 1) * step for n, step in zip(sizes, strides)) >= len(flat):
        raise CheckpointError(f'it holds {len(raw)} bytes for a tensor of shape {sizes} and type {dtype} at {offset}')
    return flat.as_strided(sizes, strides, offset)


def str_or_none(value: Any) -> str | None:
    """A text, as a message may show it, or None."""
    return printable(value, 20) if isinstance(value, str) else None


def require_sizes(sizes: Any) -> list[int]:
    """Returns sizes or strides as a list; CheckpointError if a tensor can't have them."""
    if not isinstance(sizes, list | tuple) or len(sizes) > 64:
        raise CheckpointError('it holds a tensor that has no shape, or more than 64 dimensions')
    if not all(type(size) is int and 0 <= size < 1 << 63 for size in sizes):
        raise CheckpointError('it holds a tensor of sizes or strides that are not possible')
    return [*sizes]


def read_bytes(file: BinaryIO, offset: int, size: int) -> Tensor:
    """Reads a part of a file, once, without another copy."""
    found = torch.empty(size, dtype=torch.uint8)
    file.seek(offset)
    if size and file.readinto(found.numpy()) != size:  # type: ignore[attr-defined]
        raise CheckpointError('it is cut: a tensor ends beyond the end of the file')
    return found


def in_memory(raw: memoryview) -> Callable[[], memoryview]:
    """What fetches bytes that have been read."""
    return lambda: raw


# safetensors


def read_safetensors(file: BinaryIO, budget: Budget) -> Contents:
    """Reads a file of safetensors: the size of a header, the header in JSON, the bytes of the tensors."""
    types = {
        **{'F16': 'f2', 'BF16': 'bf16', 'F32': 'f4', 'F64': 'f8', 'BOOL': 'b1', 'U8': 'u1', 'I8': 'i1', 'I16': 'i2'},
        **{'I32': 'i4', 'I64': 'i8'},
    }
    size = int.from_bytes(file.read(8), 'little')
    if size > min(LONGEST_HEADER, budget.size - 8):
        raise CheckpointError(f'it is cut or damaged: its header claims to be {size:,} bytes')
    budget.spend(2 * size)
    header = require_dict(json.loads(file.read(size)))
    metadata = require_dict(header.pop('__metadata__', {}))
    found: dict[str, Array] = {}
    total = 0
    for name, entry in sorted(header.items(), key=lambda item: require_sizes(item[1]['data_offsets'])):
        start, end = entry['data_offsets']
        if not total == start <= end <= budget.size - 8 - size:
            raise CheckpointError(f'it is cut or damaged: {printable(name)} is not in it, or not where it should be')
        total = end
        dtype, sizes = entry['dtype'], entry['shape']
        place = 8 + size + start, end - start
        known = isinstance(dtype, str) and dtype in types
        found[name] = Array(types[dtype], sizes, partial(read_bytes, file, *place)) if known else Array()
    if total != budget.size - 8 - size:
        raise CheckpointError('it is cut or damaged: it does not end where its tensors do')
    return Contents(checked(found, budget), {key: text for key, text in metadata.items() if isinstance(text, str)})


# torch


class PricedFile:
    """A file for `zipfile`, whose reads cost a budget so many bytes for each that is read."""

    def __init__(self, file: BinaryIO, budget: Budget, price: int) -> None:
        self.file, self.budget, self.price = file, budget, price
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, size: int = -1) -> bytes:
        left = self.budget.size - self.file.tell()
        self.budget.spend(self.price * (min(size, left) if size >= 0 else left))
        return self.file.read(size)


def read_zip(file: BinaryIO, budget: Budget) -> Contents:
    """Reads a file of `torch.save`, or a zipped folder of OneFlow."""
    priced = PricedFile(file, budget, ENTRY)
    with zipfile.ZipFile(priced) as archive:  # makes an object of each file that it lists
        priced.price = 0
        require_weights(archive, budget)
        for name in archive.namelist():
            folder, _, last = name.rpartition('/')
            if last in ('pickled_data', 'snapshot_done'):
                return read_oneflow(archive, f'{folder}/' if folder else '', budget)
        return read_torch(file, archive, budget)


EXPORTED = 'torch.export, a program: torch.export.load(FILE).state_dict has its weights'
# Archives that begin as those of `torch.save` do, by the end of the name of a file that each has.
OTHER_ARCHIVES = {
    '/constants.pkl': 'TorchScript, a program: torch.jit.load(FILE).state_dict() has its weights',
    '/models/model.json': EXPORTED,
    'serialized_exported_program.json': EXPORTED,  # of torch 2.6
    '.npy': 'numpy arrays: torch.save a dict of tensors of them',
}


def require_weights(archive: zipfile.ZipFile, budget: Budget) -> None:
    """Raises a CheckpointError for an archive of something else, or that unpacks to far more than its size."""
    claimed = 0
    for info in archive.infolist():
        budget.spend(600)
        claimed += info.file_size
        for end, kind in OTHER_ARCHIVES.items():
            if info.filename.endswith(end):
                raise CheckpointError(f'it is an archive of {kind}')
    if claimed > MAX_EXPANSION * budget.size:
        raise CheckpointError(f'its {budget.size:,} bytes unpack to {claimed:,}, which no file of weights does')


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Reads a file of an archive, and not more of it than the archive's directory says, which was checked.

    `ZipFile.read` would unpack all there is before it finds out that it is more.

    Raises:
        CheckpointError: If it is packed in a way that Python can't unpack a part of.
        KeyError: If there is no such file.
    """
    info = archive.getinfo(name)
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise CheckpointError(f'{printable(name)} in it is packed neither as torch does nor by deflate, as usual')
    with archive.open(info) as member:
        return member.read(info.file_size)


def read_torch(file: BinaryIO, archive: zipfile.ZipFile, budget: Budget) -> Contents:
    """Reads a file of `torch.save`: a pickle of tensors and plain values, and a file for each storage."""
    members = {info.filename: info for info in archive.infolist()}
    folder = archive.namelist()[0].partition('/')[0]
    if f'{folder}/data.pkl' not in members:
        raise CheckpointError('it is an archive of something else: neither torch nor OneFlow names files like that')
    if members.get(f'{folder}/byteorder') and read_member(archive, f'{folder}/byteorder') != b'little':
        raise CheckpointError('it holds numbers of byte order big, which no machine for training has')

    @cache  # tensors can share a storage
    def load(key: str, size: int) -> Tensor:
        info = members[f'{folder}/data/{key}']
        if info.file_size != size:
            raise CheckpointError(f'it is damaged: there are {info.file_size:,} bytes for a storage of {size:,}')
        if info.compress_type == zipfile.ZIP_STORED:  # as torch writes it, without check sums if the user wants so
            file.seek(info.header_offset + 26)
            lengths = struct.unpack('<HH', file.read(4))  # of name and padding
            return read_bytes(file, info.header_offset + 30 + sum(lengths), info.file_size)
        return torch.frombuffer(bytearray(read_member(archive, info.filename)), dtype=torch.uint8)

    data = io.BytesIO(read_member(archive, f'{folder}/data.pkl'))
    found = TorchUnpickler(data, budget, lambda storage: load(storage.key, storage.size)).load()
    return Contents(checked(require_dict(found), budget))


def read_legacy(file: BinaryIO, budget: Budget) -> Contents:
    """Reads a file of `torch.save` before 1.6: five pickles, the last one of the keys of storages, which follow."""
    places: dict[str, int] = {}
    sizes: dict[str, int] = {}
    itemsizes: dict[str, int] = {}

    @cache
    def load(key: str) -> Tensor:
        return read_bytes(file, places[key] + 8, sizes[key])

    class Unpickler(TorchUnpickler):
        def persistent_load(self, saved: Any) -> Storage:
            storage = super().persistent_load(saved)
            sizes.setdefault(storage.key, storage.size)
            itemsizes.setdefault(storage.key, storage.dtype.itemsize)
            return storage

    _magic, version, system, found, keys = (
        Unpickler(file, budget, lambda storage: load(storage.key)).load() for _ in range(5)
    )
    if version != 1001 or not isinstance(keys, list):
        raise CheckpointError('it is damaged: no version of torch writes this')
    if system.get('little_endian') is False:
        raise CheckpointError('it holds numbers of byte order big, which no machine for training has')
    place = file.tell()
    for key in keys:
        places[key] = place
        file.seek(place)
        (count,) = struct.unpack('<q', file.read(8))
        if count * itemsizes[key] != sizes[key]:
            raise CheckpointError(f'it is damaged: there are {count:,} numbers for a storage of {sizes[key]:,} bytes')
        place += 8 + sizes[key]
    return Contents(checked(require_dict(found), budget))


# Pickles of numpy arrays


def read_pickle(file: BinaryIO, budget: Budget) -> Contents:
    """Reads a pickle of numpy arrays."""
    found = require_dict(ArrayUnpickler(file, budget).load())
    if '__oneflow__' in found and isinstance(found.get('data'), dict):
        found = found['data']
    return Contents(checked(found, budget))


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


def fields(data: memoryview, budget: Budget) -> Iterator[tuple[int, Any]]:
    """Reads a message of protocol buffers: the number of each field, and an integer or the field's bytes."""
    offset = 0
    while offset < len(data):
        budget.spend(64)
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


def as_bytes(value: Any) -> memoryview:
    """Returns the bytes of a field; CheckpointError for one that is a number."""
    if not isinstance(value, memoryview):
        raise CheckpointError('it is damaged: a number is where a text or a message should be')
    return value


def read_mindspore(file: BinaryIO, budget: Budget) -> Contents:
    """Reads MindSpore's checkpoint: Checkpoint {1: Value {1: name, 2: Tensor {1: sizes, 2: type, 3: bytes}}}."""
    types = {
        **{'Float32': 'f4', 'Float16': 'f2', 'Float64': 'f8', 'BFloat16': 'bf16', 'Bool': 'b1', 'UInt8': 'u1'},
        **{'Int8': 'i1', 'Int16': 'i2', 'Int32': 'i4', 'Int64': 'i8'},
    }
    data = memoryview(file.read(budget.size))
    if bytes(data[-17:-10]) == b'crc_num':  # a check sum that some versions append
        data = data[:-17]
    found: dict[str, Array] = {}
    for number, value in fields(data, budget):
        name, sizes, dtype, raw = '', [], '', memoryview(b'')
        for part, content in fields(as_bytes(value), budget) if number == 1 else ():
            if part == 1:
                name = str(as_bytes(content), 'utf-8')
            for key, item in fields(as_bytes(content), budget) if part == 2 else ():
                if key == 1:
                    sizes.append(item)
                elif key == 2:
                    dtype = str(as_bytes(item), 'utf-8')
                elif key == 3:
                    raw = as_bytes(item)
        if not name or name in found:
            raise CheckpointError(f'it is damaged: the name {printable(name)!r} is empty or there twice')
        if dtype != 'str':  # a text that a training script appended
            found[name] = Array(types.get(dtype, dtype), sizes, in_memory(raw))
    return Contents(checked(found, budget))


def read_paddle_archive(file: BinaryIO, budget: Budget) -> Contents:
    """Reads a tape archive with a file for each variable, as Paddle saved before version 2."""
    types = {2: 'i4', 3: 'i8', 4: 'f2', 5: 'f4', 6: 'f8', 22: 'bf16'}
    found: dict[str, Array] = {}
    for path, place, length in tape_members(file, budget):
        name = PurePosixPath(path).name
        if name in found:
            raise CheckpointError(f'{printable(path)} in it is there twice')
        file.seek(place)
        data = memoryview(file.read(length))
        _, levels = struct.unpack_from('<IQ', data)
        offset = 12
        for _ in range(levels):  # positions of sequences in a batch, which weights don't have
            offset += 8 + struct.unpack_from('<Q', data, offset)[0]
        _, size = struct.unpack_from('<Ii', data, offset)
        sizes, dtype = [], 0
        for number, value in fields(data[offset + 8 : offset + 8 + size], budget):
            if number == 1:
                dtype = value
            elif number == 2:
                sizes.append(value)
        known = types.get(dtype) if isinstance(dtype, int) else None
        found[name] = Array(known or str(dtype), sizes, in_memory(data[offset + 8 + size :]))
    if not found:
        raise CheckpointError('there is nothing in it')
    return Contents(checked(found, budget))


def tape_members(file: BinaryIO, budget: Budget) -> Iterator[tuple[str, int, int]]:
    """Finds the plain files in a tape archive: path, position and size of each.

    Python's own reader takes quadratic time and much memory for some of the headers that archives may have.

    Raises:
        CheckpointError: For a damaged archive, or a member that is neither a plain file nor a folder.
    """
    place, longer = 0, ''
    while place + 512 <= budget.size:
        budget.spend(1000)
        file.seek(place)
        header = file.read(512)
        if not header.strip(b'\0'):
            return
        if int(header[148:156].strip(b'\0 ') or b'0', 8) != sum(header[:148]) + 8 * ord(' ') + sum(header[156:]):
            raise CheckpointError('it is damaged: the check sum of a file in it is another')
        path, size, kind = text_of(header[:100]), int(header[124:136].strip(b'\0 ') or b'0', 8), header[156:157]
        if size < 0 or place + 512 + size > budget.size:
            raise CheckpointError('it is cut: a file in it ends beyond its end')
        if kind in b'xgLK':  # a header for the next one, with attributes or a long name
            attributes = file.read(min(size, 4096))
            named = re.search(rb'(?:\A|\n)[0-9]{1,4} path=([^\n]*)\n', attributes) if kind == b'x' else None
            longer = text_of(attributes) if kind == b'L' else text_of(named[1]) if named else longer
        elif kind in b'0\0':
            yield longer or path, place + 512, size
            longer = ''
        elif kind != b'5':
            raise CheckpointError(f'{printable(longer or path)} in it is no plain file')
        place += 512 + -(-size // 512) * 512


def text_of(field: bytes) -> str:
    """The text of a field that ends with a NUL or is full."""
    return field.partition(b'\0')[0].decode('utf-8', 'replace')


# OneFlow


def find_variable(variable: Variable, load: Callable[[str], Array] | None) -> Array | None:
    """Finds the array of a variable of OneFlow that is in a folder of its own."""
    if variable.folder is None:
        return None
    if load is None:
        raise CheckpointError(
            "it names OneFlow's tensors, which are in folders beside it. Pack the folder that it is in, and give that: "
            'python -m zipfile -c FILE.zip FOLDER'
        )
    return load(variable.folder)


def read_oneflow(archive: zipfile.ZipFile, folder: str, budget: Budget) -> Contents:
    """Reads a zipped folder that OneFlow saved before 1.0, as flowvision publishes it.

    It has a folder for each tensor, with its bytes in `out`, and type and shape as text in `meta`. Since OneFlow 0.6
    the folders are numbered and a pickle has the names of the tensors; before, the folders are named like the tensors.

    Args:
        archive: An archive whose members are not larger than the reader allows.
        folder: The folder in it, with '/' at its end.
        budget: To spend from.
    """
    types = {
        **{'kFloat': 'f4', 'kFloat16': 'f2', 'kBFloat16': 'bf16', 'kDouble': 'f8', 'kBool': 'b1', 'kUInt8': 'u1'},
        **{'kInt8': 'i1', 'kInt16': 'i2', 'kInt32': 'i4', 'kInt64': 'i8'},
    }

    def load(name: str) -> Array:
        meta = read_member(archive, f'{folder}{name}/meta').decode()
        found = re.fullmatch(r'shape \{\s*((?:dim: [0-9]{1,18}\s+)*)\}\s*data_type: (\w+)\s*', meta)
        if found is None:
            raise CheckpointError(f'it is damaged: {printable(name)}/meta is not the type and shape of a tensor')
        sizes, dtype = [int(size) for size in re.findall('[0-9]+', found[1])], types.get(found[2], found[2])
        return Array(dtype, sizes, lambda: read_member(archive, f'{folder}{name}/out'))

    names = archive.namelist()
    if f'{folder}pickled_data' not in names:
        folders = [name.removeprefix(folder).removesuffix('/meta') for name in names if name.startswith(folder)]
        present = {*names}
        return Contents(checked({name: load(name) for name in folders if f'{folder}{name}/meta' in present}, budget))
    data = read_member(archive, f'{folder}pickled_data')
    found = require_dict(ArrayUnpickler(io.BytesIO(data), budget).load())
    return Contents(checked(require_dict(found['data']), budget, load))
