"""Mutated files are read or refused: they never crash the reader or raise other errors.

    pytest -m slow tests/weights/test_fuzz.py                             # 10 seconds
    FUZZ_SECONDS=3600 FUZZ_SEED=1 pytest -m slow tests/weights/test_fuzz.py

The sandbox's functions run in one forked worker, which is 50 times faster than a new interpreter for each file.
A failure names the seed and keeps the file.
"""

import io
import multiprocessing
import os
import pickletools
import random
import resource
import signal
import struct
import sys
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from formats import FORMATS, SMALL, WRITTEN, zipped
from test_hostile import DOUBLING

from timm_res2net import CheckpointError
from timm_res2net.weights import readers, sandbox
from timm_res2net.weights.checkpoints import identify
from timm_res2net.weights.matching import find_model

SECONDS = float(os.environ.get('FUZZ_SECONDS', 10)) / len(FORMATS)
SEED = int(os.environ.get('FUZZ_SEED', 0))
INTEGERS = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**62, 2**63 - 1, -(2**63), 2**64 - 1)
WORDS = ('', '.', '/', '..', 'a' * 300, 'a' * 5000, '\x1b[2J', '\0', '9' * 5000, '\u202e', 'layer1.0.convs.0.weight')


def parse(content: bytes, complete: bool) -> str:
    """Reads as `read_file` does, without a new process; if `complete`, recognizes the network and finds its model."""
    if content[8:9] == b'{':
        raw = readers.read_safetensors(content)
    else:
        out, file = io.BytesIO(), io.BytesIO(content)
        signal.setitimer(signal.ITIMER_VIRTUAL, 1)  # ends this process, as the CPU limit ends the sandbox
        try:
            sandbox.answer(sandbox.read_file(file), out)
        except Exception as error:  # as in `sandbox.main`
            return 'refused' if isinstance(error, sandbox.Refused) else type(error).__name__
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        out.seek(0)
        process: Any = SimpleNamespace(wait=lambda: 0)
        raw = readers.read_answer(process, out, file, len(content))  # type: ignore[arg-type]
    if not complete:
        return 'read'
    checkpoint = identify(raw, 'file')
    assert all(tensor.isfinite().all() for tensor in checkpoint.state.values())
    find_model(checkpoint)
    changed = [name for name, tensor in SMALL.items() if not tensor.equal(checkpoint.state.get(name, tensor + 1))]
    return 'equal' if not changed else 'changed'


def mutate_bytes(content: bytes, random: random.Random) -> bytes:
    """Changes, inserts, repeats or deletes a few bytes, more often near the beginning or the end."""
    last = max(len(content), 1)
    at = random.choice((random.randrange(last), random.randrange(min(last, 600)), max(0, last - random.randrange(600))))
    size = random.choice((1, 2, 8, 64, 1000))
    number = (random.choice(INTEGERS) & (1 << 64) - 1).to_bytes(8, random.choice(('little', 'big')))
    new = random.choice(
        (number, random.randbytes(min(size, 8)), content[at : at + size] * random.choice((2, 100)), b'')
    )
    return content[:at] + new + content[at + random.choice((0, len(new), size)) :]


NAMES = (
    *('numpy dtype', 'numpy.core.multiarray _reconstruct', 'torch.storage UntypedStorage', 'torch FloatStorage'),
    *('torch._utils _rebuild_tensor_v2', 'collections OrderedDict', 'builtins tuple', '_codecs encode', 'os system'),
    *('builtins set', 'torch Size', 'oneflow Tensor', 'torch._tensor _rebuild_from_type_v2', 'builtins getattr'),
)
OPCODES = [  # which create, nest, memoize, call or change something
    *(bytes([code]) for code in b'.()]}0120NRbQsuaet\x81\x85\x86\x87\x88\x89\x8f\x90\x91\x92\x93\x94lodi'),
    *(b'c' + name.replace(' ', '\n').encode() + b'\n' for name in NAMES),
    *(b'\x8a\x08' + struct.pack('<q', value) for value in INTEGERS if -(2**63) <= value < 2**63),
    *(b'X' + struct.pack('<I', len(word.encode())) + word.encode() for word in WORDS),
    *(b'h\x00', b'h\x01', b'q\x00', b'r\xff\xff\xff\x7f', b'K\x01', DOUBLING, b'\x85' * 3000, b'(' * 3000, b'}' * 3000),
    *(code + struct.pack('<Q', 1 << bit) for code, bit in ((b'\x8e', 40), (b'\x96', 31), (b'\x95', 62))),
    b'\x8b' + struct.pack('<i', 100_000) + b'\x7f' * 100_000,
]


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
    """Changes, drops, renames, extends or compresses files in an archive."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        members = [(name, archive.read(name)) for name in archive.namelist()]
    pickles = [i for i, (name, _) in enumerate(members) if name.endswith(('.pkl', 'pickled_data'))]
    at = random.choice([random.randrange(len(members)), *pickles])
    name, data = members[at]
    changes = [
        (name, (mutate_pickle if at in pickles else mutate_bytes)(data, random)),
        (random.choice((random.choice(WORDS).replace('\0', ''), members[0][0], name.upper())) or 'a', data),
        (name, data + bytes(random.choice((1, 100, 100_000)))),
    ]
    members[at : at + 1] = random.choice(([], *([change] for change in changes), changes[:1]))
    method = random.choice((zipfile.ZIP_STORED, zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2))
    return zipped(members, method)


MUTATIONS: dict[str, Callable[[bytes, random.Random], bytes]] = {
    **dict.fromkeys(('safetensors', 'torch before 1.6', 'mindspore', 'paddle archive'), mutate_bytes),
    **dict.fromkeys(('torch', 'oneflow', 'oneflow before 0.6'), mutate_zip),
}


def mutated(kind: str, random: random.Random) -> bytes:
    """Returns a mutated file of a format; raises an error if a writer refuses the mutation."""
    way = random.randrange(3)
    change = mutate_bytes if way == 0 else MUTATIONS.get(kind, mutate_pickle)
    content = change(WRITTEN[kind], random)
    return change(content, random) if way == 1 and change is not mutate_pickle else content


def work(kind: str, seed: int, end: float, folder: Path) -> None:
    """Mutates files of one format until time `end`, and logs the outcome of each."""
    warnings.simplefilter('ignore')
    used = int(Path('/proc/self/statm').read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 300_000_000, resource.RLIM_INFINITY))
    with open(folder / 'outcomes', 'a', buffering=1) as log:
        while time.monotonic() < end:
            seed += 1
            try:
                content = mutated(kind, random.Random(f'{kind} {seed}'))
            except Exception:  # a writer refuses, or a second mutation cannot parse the first one's result
                continue
            (folder / 'file').write_bytes(content)  # kept if the process dies
            (folder / 'seed').write_text(str(seed))
            try:
                outcome = parse(content, complete=seed % 20 == 0)  # which takes most of the time
            except (CheckpointError, MemoryError) as error:
                outcome = type(error).__name__
            except AssertionError:
                raise
            except Exception as error:  # which `read_file` turns into a CheckpointError
                outcome = f'reader: {type(error).__name__}'
            log.write(f'{outcome}\n')


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='reads memory in /proc')
@pytest.mark.filterwarnings('ignore:.*fork')
@pytest.mark.parametrize('kind', FORMATS)
def test_mutated_file_is_read_or_refused(kind: str, tmp_path: Path) -> None:
    end, seed, crashed = time.monotonic() + SECONDS, SEED * 1_000_000, 0
    while time.monotonic() < end:
        process = multiprocessing.get_context('fork').Process(target=work, args=(kind, seed, end, tmp_path))
        process.start()
        process.join()
        seed = int((tmp_path / 'seed').read_text())
        # Python's own unpickler can overflow the stack or run forever; in real use, this ends only the sandbox.
        ended = 0, -signal.SIGSEGV, -signal.SIGVTALRM
        assert process.exitcode in ended, f'{kind}, seed {seed}, {tmp_path}/file: {process.exitcode}'
        crashed += process.exitcode != 0
    outcomes = Counter((tmp_path / 'outcomes').read_text().split('\n')[:-1]) + Counter(crashed=crashed)
    print(f'{sum(outcomes.values())} files: {dict(outcomes.most_common())}')  # shown by pytest -rP
    assert outcomes['read'] > 0  # otherwise the mutations test nothing
