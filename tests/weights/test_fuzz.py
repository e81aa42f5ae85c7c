"""Mutated files load as the right tensors, or are refused with a documented error, in time and within memory.

    pytest -m slow tests/weights/test_fuzz.py                             # a minute
    FUZZ_SECONDS=3600 FUZZ_SEED=1 pytest -m slow -n 4 tests/weights/test_fuzz.py

A failure names the seed, and keeps the file.
"""

import io
import json
import os
import pickletools
import random
import shutil
import struct
import sys
import tarfile
import time
import zipfile
from argparse import Namespace
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support import tiny
from test_hostile import DOUBLING, Child
from test_readers import FORMATS, SMALL, WRITTEN, field

from timm_res2net import CheckpointError, load_checkpoint, load_model
from timm_res2net.models.function import Function
from timm_res2net.weights.recorded import IMAGES

SECONDS = float(os.environ.get('FUZZ_SECONDS', 60)) / len(FORMATS)
SEED = int(os.environ.get('FUZZ_SEED', 0))
INTEGERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
WORDS = ('', '.', '/', '..', 'a' * 300, 'a' * 5000, '\x1b[2J', '\0', '9' * 5000, '\u202e', 'layer1.0.convs.0.weight')
VALUES: tuple[Any, ...] = (
    None,
    True,
    *INTEGERS,
    0.5,
    float('nan'),
    1e300,
    *WORDS,
    [],
    {},
    [[]],
    [0],
    [-1],
    [2**62] * 3,
    {'a': {}},
)

MODEL = tiny('paddle')


def load(file: str) -> None:
    """Loads a file into a prepared model and a new one; an AssertionError tells what is wrong with what comes of it."""
    failed = None
    for attempt in (lambda: load_checkpoint(MODEL, file, first_block='paddle'), lambda: load_model(file)):
        try:
            attempt()
        except CheckpointError as error:
            failed = failed or error
        state = MODEL.state_dict()
        finite = all(tensor.isfinite().all() for tensor in state.values())
        changed = [name for name, tensor in state.items() if not torch.equal(tensor, SMALL[name])]
        with torch.no_grad():
            for name in changed:
                state[name].copy_(SMALL[name])
        assert not (failed and changed), f'the model has changed: {changed}'
        assert finite, 'the model has numbers that are not finite'
        assert len(changed) <= 8, f'other tensors: {changed}'
    if failed:
        raise failed


def integer_bytes(random: random.Random) -> bytes:
    size, order = random.choice((1, 2, 4, 8)), random.choice(('little', 'big'))
    return (random.choice(INTEGERS) & (1 << 8 * size) - 1).to_bytes(size, order)  # type: ignore[arg-type]


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """Changes a few bytes anywhere, more often near the beginning or the end, and at most once their number."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        if len(changed) != len(content):
            break  # what is deleted here and inserted there shifts values, and no check can find that
        last = max(len(changed), 1)
        at = random.choice(
            (random.randrange(last), random.randrange(min(last, 600)), max(0, last - 1 - random.randrange(600)))
        )
        size = random.choice((1, 2, 8, 64, 1000))
        kind = random.randrange(6)
        if kind == 0 and changed:
            changed[at] ^= 1 << random.randrange(8)
        elif kind == 1:
            new = integer_bytes(random)
            changed[at : at + len(new)] = new
        elif kind == 2:
            changed[at:at] = random.randbytes(min(size, 8))
        elif kind == 3:
            del changed[at : at + size]
        elif kind == 4:
            changed[at:at] = changed[at : at + size] * random.choice((1, 2, 100))
        else:
            del changed[at:]
    return bytes(changed)


def some_opcodes() -> list[bytes]:
    """Opcodes that make, nest, refer to, call or change something."""
    names = [
        *('numpy dtype', 'numpy.core.multiarray _reconstruct', 'torch.storage UntypedStorage', 'torch FloatStorage'),
        *('torch._utils _rebuild_tensor_v2', 'collections OrderedDict', 'builtins tuple', '_codecs encode'),
        *('os system', 'builtins set', 'torch Size', 'oneflow Tensor', 'torch._utils _rebuild_sparse_tensor'),
        *('argparse Namespace', 'builtins getattr', 'torch._tensor _rebuild_from_type_v2'),
    ]
    return [
        *(bytes([code]) for code in b'.()]}0120NRbQsuaet\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94lodi'),
        *(b'c' + name.replace(' ', '\n').encode() + b'\n' for name in names),
        *(b'\x8a\x08' + struct.pack('<q', value) for value in INTEGERS if -(2**63) <= value < 2**63),
        *(b'X' + struct.pack('<I', len(word.encode())) + word.encode() for word in WORDS),
        *(
            b'h\x00',
            b'h\x01',
            b'q\x00',
            b'r\xff\xff\xff\x7f',
            b'K\x01',
            DOUBLING,
            b'\x85' * 3000,
            b'(' * 3000,
            b'}' * 3000,
        ),
        *(
            b'\x8e' + struct.pack('<Q', 1 << 40),
            b'\x96' + struct.pack('<Q', 1 << 31),
            b'\x95' + struct.pack('<Q', 1 << 62),
        ),
        b'\x8b' + struct.pack('<i', 100_000) + b'\x7f' * 100_000,
    ]


OPCODES = some_opcodes()


def mutate_pickle(content: bytes, random: random.Random) -> bytes:
    """Deletes, repeats, moves, replaces or inserts opcodes."""
    starts = [position for _, _, position in pickletools.genops(content)]
    parts = [content[start:end] for start, end in zip(starts, [*starts[1:], len(content)])]
    for _ in range(random.randint(1, 3)):
        at, other = random.randrange(len(parts)), random.randrange(len(parts))
        kind = random.randrange(5)
        if kind == 0:
            parts[at] = b''
        elif kind == 1:
            parts[at] *= random.choice((2, 3, 1000))
        elif kind == 2:
            parts[at], parts[other] = parts[other], parts[at]
        elif kind == 3:
            parts[at] = random.choice(OPCODES)
        else:
            parts[at] += random.choice(OPCODES)
    return b''.join(parts)


def mutate_zip(content: bytes, random: random.Random) -> bytes:
    """Changes, drops, repeats, renames or compresses files in an archive, or what surrounds it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    at = random.randrange(len(members))
    if random.random() < 0.6:  # the pickle, or what describes a tensor
        at = next((i for i, (name, _) in enumerate(members) if name.endswith(('.pkl', 'pickled_data'))), at)
    name, data = members[at]
    kind = random.randrange(7)
    if kind < 3:
        is_pickle = name.endswith(('.pkl', 'pickled_data'))
        members[at] = name, mutate_pickle(data, random) if is_pickle else mutate_bytes(data, random)
    elif kind == 3:
        del members[at]
    elif kind == 4:
        members[at] = random.choice((random.choice(WORDS).replace('\0', ''), members[0][0], name.upper())) or 'a', data
    elif kind == 5:
        members[at] = name, data + bytes(random.choice((1, 100, 30_000_000)))
    buffer = io.BytesIO()
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    with zipfile.ZipFile(buffer, 'w', method) as archive:
        for name, data in members:
            archive.writestr(name, data)
    return buffer.getvalue() + (bytes(random.choice((1, 70_000))) if kind == 6 else b'')


def mutate_json(content: bytes, random: random.Random) -> bytes:
    """Changes an entry of the header of safetensors."""
    (size,) = struct.unpack('<Q', content[:8])
    header = json.loads(content[8 : 8 + size])
    where, key = header, random.choice([*header])
    while isinstance(where[key], dict | list) and where[key] and random.random() < 0.9:
        where = where[key]
        key = random.choice([*where]) if isinstance(where, dict) else random.randrange(len(where))
    if random.random() < 0.2 and isinstance(where, dict):
        where[random.choice(WORDS)] = where.pop(key)
    else:
        where[key] = random.choice(VALUES)
    raw = json.dumps(header).encode()
    return struct.pack('<Q', len(raw) + random.choice((0, 0, 0, 0, 1, -1))) + raw + content[8 + size :]


def mutate_fields(content: bytes, random: random.Random) -> bytes:
    """Inserts fields of protocol buffers, or replaces some bytes by one."""
    value: Any = random.choice((abs(random.choice(INTEGERS)), b'', field(1, 2**40), field(2, b'Float32'), b'\xff' * 20))
    new = field(random.randint(1, 4), value) * random.choice((1, 1, 2, 5000))
    new = field(random.randint(1, 3), new) if random.random() < 0.5 else new
    at = random.choice((0, random.randrange(len(content)), len(content)))
    return content[:at] + new + content[at + random.choice((0, len(new))) :]


@cache
def tape_places() -> list[tuple[int, int, int]]:
    """Where each file in the tape archive has its header and its content, and its size: mutations move none."""
    with tarfile.open(fileobj=io.BytesIO(WRITTEN['paddle archive'])) as archive:
        return [(member.offset, member.offset_data, member.size) for member in archive.getmembers()]


def mutate_tape(content: bytes, random: random.Random) -> bytes:
    """Changes a header of a tape archive and mends its check sum, or a file in it."""
    at, start, size = random.choice(tape_places())  # of an archive that is mutated already, tarfile may see no end
    changed = content[start : start + size]
    header = bytearray(content[at : at + 512])
    if random.random() < 0.5:
        first, last = random.choice(((0, 100), (124, 136), (156, 157), (257, 265), (345, 500)))
        new = random.choice(
            (b'xgLKS12345\0', b'77777777777', b'-1', b'\x80' + bytes(10), b'\xff' * 12, random.randbytes(9))
        )
        header[first:last] = new[random.randrange(len(new)) :][: last - first].ljust(last - first, b'\0')
        header[148:156] = b'%06o\0 ' % (sum(header[:148]) + 256 + sum(header[156:]))
    else:
        changed = random.choice((mutate_bytes, mutate_fields))(changed, random)[:size].ljust(size, b'\0')
    return content[:at] + bytes(header) + changed + content[start + size :]


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    'safetensors': mutate_json,
    'torch': mutate_zip,
    'torch before 1.6': mutate_bytes,
    'mindspore': mutate_fields,
    'paddle archive': mutate_tape,
    'oneflow': mutate_zip,
    'oneflow before 0.6': mutate_zip,
}


def some_arguments(random: random.Random) -> dict[str, Any]:
    """What timm's train script or Lightning states of a network beside its weights, with values that neither does."""
    values = *VALUES, torch.ones(3), [torch.ones(3)], [('a', torch.ones(3))], {'a': torch.ones(3)}
    keys = *vars(Function()), *IMAGES, 'img_size', 'data_dir', 'dataset', 'class_map'
    odd = {random.choice(keys): random.choice(values) for _ in range(2)}
    if random.random() < 0.3:
        return dict(hyper_parameters={'model': 'test_res2net', **odd})
    return dict(arch='test_res2net', args=Namespace(model_kwargs=random.choice((odd, *values)), **odd))


def mutate_network(kind: str, random: random.Random) -> bytes:
    """Writes a network with a tensor of another name, type, shape or value, or with others beside it."""
    state = dict(SMALL)
    for _ in range(random.randint(1, 2)):
        name = random.choice([*state])
        tensor = state[name]
        change = random.randrange(8)
        if change == 0:
            state[random.choice((random.choice(WORDS), f'{random.choice(WORDS)}.{name}', name[1:], name + '.0'))] = (
                state.pop(name)
            )
        elif change == 1:
            shapes: list[tuple[int, ...]] = [
                (),
                (0,),
                (1,),
                (1, 0, 3),
                (1,) * 70,
                (10**6, 0, 1, 1),
                (3, 1000),
                (10**5, 1),
            ]
            state[name] = torch.ones(random.choice(shapes))
        elif change == 2:
            types = torch.float16, torch.bfloat16, torch.float64, torch.int8, torch.int64, torch.bool, torch.complex64
            state[name] = tensor.to(random.choice(types))
        elif change == 3:
            state[name] = torch.full_like(
                tensor, random.choice((float('nan'), float('inf'), 1e300)), dtype=torch.float64
            )
        elif change == 4:
            state |= {
                f'x{i}.{name}': tensor for name, tensor in SMALL.items() for i in range(random.choice((1, 3, 20)))
            }
        elif change == 5:
            stage, block = random.choice((1, 4, 5, 100)), random.choice((2, 3, 500))
            own = {name: tensor for name, tensor in SMALL.items() if name.startswith('layer2.1.')}
            count = random.choice((1, 3, 40))
            state |= {
                f'layer{stage}.{block + i}{name[8:]}': tensor for name, tensor in own.items() for i in range(count)
            }
        elif change == 6:
            state[name] = tensor.transpose(0, -1) if tensor.ndim else tensor
        else:
            state[name] = tensor.flatten()[:1].expand(tensor.shape)
    if kind == 'safetensors':  # which has no tensors that share memory
        state = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    if kind.startswith('torch') and random.random() < 0.3:
        contents: dict[str, Any] = dict(state_dict=state, **some_arguments(random))
        return FORMATS[kind](contents)
    return FORMATS[kind](state)


def mutated(kind: str, random: random.Random) -> bytes:
    """A mutated file of a format."""
    way = random.randrange(4)
    if way == 0:
        return mutate_bytes(WRITTEN[kind], random)
    if way == 1:
        return mutate_network(kind, random)
    change = MUTATIONS.get(kind, mutate_pickle)
    content = change(WRITTEN[kind], random)
    return change(content, random) if way == 3 and change is not mutate_pickle else content


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads memory in /proc')
@pytest.mark.filterwarnings('ignore')  # of what the writers think of such files
@pytest.mark.parametrize('kind', FORMATS)
def test_mutated_file_loads_or_is_refused_in_time_within_memory_and_keeps_the_model(kind: str, tmp_path: Path) -> None:
    child, file = Child(load), tmp_path / 'file'
    end, seed, loaded = time.monotonic() + SECONDS, SEED * 1_000_000, 0
    while time.monotonic() < end:
        seed += 1
        try:
            content = mutated(kind, random.Random(f'{kind} {seed}'))
        except Exception:  # the writer or the second mutation doesn't take it
            continue
        file.write_bytes(content)
        memory, seconds, outcome = child.load(file)
        wrong = not outcome.startswith(('loaded', 'refused')) or len(outcome) > 2500
        if wrong or seconds > 2 or memory > 10 * len(content) + 100e6:
            kept = shutil.copy(file, f'{tmp_path}/{seed}')
            pytest.fail(f'{kind}, seed {seed}, {kept}: {memory / 1e6:.0f} MB, {seconds:.1f} s, {outcome[:1000]}')
        loaded += outcome == 'loaded'
    child.end()
    assert loaded  # or the mutations show nothing
