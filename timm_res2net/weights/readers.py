"""Reads tensors from untrusted files: safetensors with its own library, every other format in a sandboxed process.

The sandbox (`sandbox.py`) parses a file and answers with its content. The answer is as untrusted as the file: types,
ranges and total sizes are checked here before anything becomes a tensor. Tensors are copies, so later changes to the
file do not affect them.
"""

import io
import json
import math
import os
import subprocess
import sys
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import safetensors.torch
import torch
from torch import Tensor

from .._errors import CheckpointError, first_line
from .._files import PathLike, open_regular
from .sandbox import WIDTHS

SANDBOX = str(Path(__file__).with_name('sandbox.py'))
TIMEOUT, BYTES_PER_SECOND = 20, 5_000_000  # wall-clock seconds, for a busy machine with a slow disk
MAX_HEADER = 8_000_000  # bytes of the sandbox's line of JSON
MAX_EXPANSION, ALLOWANCE = 4, 1_000_000  # tensors may take 4 times the file's bytes plus 1 MB
MAX_TENSORS, MAX_NAME, MAX_DIMENSIONS = 30_000, 500, 8  # MAX_NAME in characters
DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in WIDTHS}


@dataclass(frozen=True)
class RawFile:
    """The content of a weights file."""

    tensors: dict[str, Tensor]  # keyed by name; keys of nested dicts are joined by dots
    unsupported: dict[str, str] = field(default_factory=dict)  # names of tensors that cannot be read, and why
    values: dict[str, Any] = field(default_factory=dict)  # plain values next to the tensors: `arch`, `args`, ...
    metadata: dict[str, str] = field(default_factory=dict)  # of safetensors


def read_file(path: PathLike, shown: str | None = None) -> RawFile:
    """Reads a weights file in any supported format; raises only CheckpointErrors, which show the file as `shown`."""
    shown = shown or str(path)
    try:
        with open_regular(path) as file:
            raw: io.FileIO = getattr(file, 'raw')  # noqa: B009 - unbuffered, as the sandbox moves the position
            head = raw.read(9)
            raw.seek(0)
            found = read_safetensors(file.read()) if head[8:] == b'{' else read_sandboxed(raw)
        names = [*found.tensors, *found.unsupported]
        longest = max(map(len, names), default=0)
        if len(names) > MAX_TENSORS or longest > MAX_NAME:
            counted = f'{len(names):,} tensors with names of up to {longest:,} characters'
            raise CheckpointError(f'it holds {counted}, more than any weights file')
        return found
    except CheckpointError as error:
        raise CheckpointError(f'cannot read {shown}: {error}') from error
    except OSError as error:
        raise CheckpointError(f'cannot read {shown}: {error.strerror or error}') from error
    except Exception as error:  # damaged data can make a decoder raise nearly anything
        kind = '' if isinstance(error, ValueError) else f'{type(error).__name__}: '
        problem = f'{kind}{first_line(error)}. The file may be damaged: download it again'
        raise CheckpointError(f'cannot read {shown}: {problem}') from error


def read_safetensors(content: bytes) -> RawFile:
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], 'little')])
    tensors = safetensors.torch.load(content)
    readable = {name: each for name, each in tensors.items() if each.dtype in DTYPES.values()}
    unsupported = {name: f'its type is {each.dtype}' for name, each in tensors.items() if name not in readable}
    return RawFile(readable, unsupported, metadata=header.get('__metadata__', {}))


def read_sandboxed(file: io.FileIO) -> RawFile:
    """Reads any other format, in a separate process with limited memory and time."""
    size = os.fstat(file.fileno()).st_size
    command = [sys.executable, '-I', '-S', SANDBOX]
    environment = {**os.environ, 'LC_ALL': 'C'}  # the archive of a locale can exceed the memory limit
    try:
        process = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment
        )
    except OSError as error:
        raise CheckpointError(f'cannot start the process that parses it: {error.strerror}. Try again') from error
    timer = threading.Timer(TIMEOUT + size / BYTES_PER_SECOND, process.kill)
    try:
        timer.start()
        assert process.stdout is not None
        return read_answer(process, process.stdout, file, size)
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def read_answer(process: subprocess.Popen[bytes], pipe: IO[bytes], file: io.FileIO, size: int) -> RawFile:
    """Reads and checks the sandbox's answer, and reads the bytes that it located in the file."""
    line = pipe.readline(MAX_HEADER)
    died = CheckpointError(f'parsing its {size:,} bytes takes more time or memory than any weights file needs')
    if not line.endswith(b'\n'):
        raise died
    answer = json.loads(line)
    if 'refused' in answer:
        raise CheckpointError(str(answer['refused']))
    storages = [check_storage(each, size) for each in answer['storages']]
    require_small(sum(each[1] for each in storages), size)
    piped = [read_exactly(pipe, length) if start is None else None for start, length in storages]
    if pipe.read(1) or process.wait() != 0:
        raise died
    data = [
        read_exactly(file, length, start) if raw is None else raw
        for (start, length), raw in zip(storages, piped, strict=True)
    ]
    tensors = {name: make_tensor(entry, data) for name, entry in answer['tensors'].items()}
    require_small(sum(each.numel() * each.element_size() for each in tensors.values()), size)
    return RawFile(tensors, {name: str(why) for name, why in answer['unsupported'].items()}, answer['values'])


def require_small(unpacked: int, size: int) -> None:
    """Raises CheckpointError if tensors have far more bytes than a file of that size can hold."""
    if unpacked > MAX_EXPANSION * size + ALLOWANCE:
        raise CheckpointError(f'its {size:,} bytes unpack to far more than those of any weights file')


def is_size(value: object) -> bool:
    """Whether a value is a non-negative integer and not a bool."""
    return type(value) is int and 0 <= value < 1 << 62


def check_storage(entry: Any, size: int) -> tuple[int | None, int]:
    """Checks that a storage lies within the file; returns its start (None for piped bytes) and length."""
    start, length = entry
    if not is_size(length) or not (start is None or (is_size(start) and start + length <= size)):
        raise ValueError('a tensor ends beyond the end of the file')
    return start, length


def read_exactly(file: Any, length: int, start: int | None = None) -> Tensor:
    """Reads `length` bytes as a uint8 tensor (length,)."""
    if start is not None:
        file.seek(start)
    data = torch.empty(length, dtype=torch.uint8)
    view, done = memoryview(data.numpy().data), 0
    while done < length:
        count = file.readinto(view[done:])
        if not count:
            raise ValueError('it ends too early')
        done += count
    return data


def make_tensor(entry: Any, storages: list[Tensor]) -> Tensor:
    """Returns the tensor that an entry of the answer describes, as a view of its storage."""
    dtype_name, index, shape, strides, offset = entry
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f'a tensor has {len(shape):,} dimensions')
    dtype = DTYPES[dtype_name]
    if strides is None:
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        if math.prod(shape) * dtype.itemsize != len(storages[index]):
            raise ValueError(f'a tensor of shape {str(shape)[:80]} has {len(storages[index]):,} bytes')
    numbers = [*shape, *strides, offset]
    if not (all(map(is_size, numbers)) and is_size(index) and len(shape) == len(strides)):
        raise ValueError(f'a tensor has the impossible shape {str(shape)[:80]} or strides {str(strides)[:80]}')
    flat = storages[index]
    flat = flat[: len(flat) // dtype.itemsize * dtype.itemsize].view(dtype)
    end = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if math.prod(shape) == 0:
        return torch.empty(shape, dtype=dtype)
    if end >= len(flat):
        raise ValueError(f'a tensor of shape {shape} needs more than the {len(flat)} numbers in its storage')
    return flat.as_strided(shape, strides, offset)
