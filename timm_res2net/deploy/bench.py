"""Measures the speed and memory of models side by side with timm's own, interleaved in one run."""

import ctypes
import itertools
import os
import platform
import random
import signal
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from .._errors import UnknownModelError, first_line
from ..models.variants import ARCHS
from ..res2net import timm_entrypoint
from .backends import BACKENDS
from .fuse import fuse
from .inference import TOLERANCES
from .optimize import optimize
from .program import Exportable, Program

MODELS = 'res2net50_26w_4s', 'res2net50d', 'res2next50', 'dla60_res2net'
RUNTIMES = {'openvino': '.xml', 'onnxruntime': '.onnx'}  # and the suffixes of their files
OPPONENTS = 'timm', *RUNTIMES
TIMM, OURS = 'timm', 'timm_res2net'  # ratios are to timm's own model as people run it: eager, float32, NCHW
INSTRUCTION_SETS = 'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'avx_vnni', 'avx512_vnni', 'amx_int8'

Make = Callable[[], nn.Module]
Call = Callable[[], Tensor]
run: Call  # in a worker process, made by `start`


@dataclass(frozen=True)
class Way:
    """One way to run a model."""

    model: str
    name: str
    dtype: str
    prepare: Callable[[Tensor, str], Call]  # for images (N, C, H, W), in a data type

    def __str__(self) -> str:
        return f'{self.model} ({self.name}, {self.dtype})'


@dataclass(frozen=True)
class Result:
    """The measurement of one way to run a model."""

    model: str
    batch: int
    size: int  # pixels
    way: str
    dtype: str
    milliseconds: float  # for a batch, median
    spread: float  # milliseconds between the quartiles
    images_per_second: float
    ratio: float | None  # to the throughput of timm's own, if timm has the model
    peak_memory: int | None  # bytes beyond weights and input, where the system reports them


def inference_ways(model: str, dtypes: Sequence[str], against: Sequence[str]) -> list[Way]:
    """Returns the ways to compare in inference, timm's own first if timm has the model."""
    timms, ours, fused = (partial(make, model) for make in (make_timms, make_ours, make_fused))
    ways = [
        Way(model, TIMM, 'float32', partial(run_eager, timms)),
        Way(model, f'{OURS}, as it is', 'float32', partial(run_eager, ours)),
        Way(model, f'{OURS}, fused', 'float32', partial(run_optimized, ours, False)),
        *(Way(model, f'{OURS}, optimized', dtype, partial(run_optimized, ours, True)) for dtype in dtypes),
    ]
    for (runtime, suffix), dtype in itertools.product(RUNTIMES.items(), dtypes):
        backend = BACKENDS[suffix]
        if runtime in against and dtype in backend.precisions:
            ways.append(Way(model, f'{OURS}, {backend.format}', dtype, partial(run_exported, fused, suffix)))
            if dtype != 'int8':
                ways.append(Way(model, f'{TIMM}, {backend.format}', dtype, partial(run_exported, timms, suffix)))
    return [way for way in ways if timm_entrypoint(model) or way.name.startswith(OURS)]


def training_ways(model: str, dtypes: Sequence[str]) -> list[Way]:
    """Returns the ways to compare in training, timm's own first if timm has the model."""
    timms, ours = partial(make_timms, model), partial(make_ours, model)
    ways = []
    for dtype in dtypes:
        ways += [
            Way(model, TIMM, dtype, partial(run_step, timms)),
            Way(model, OURS, dtype, partial(run_step, ours)),
            Way(model, f'{OURS}, checkpointing', dtype, partial(run_step, ours, checkpointing=True)),
        ]
    return [way for way in ways if timm_entrypoint(model) or way.name != TIMM]


def make_ours(name: str) -> nn.Module:
    """Makes our model, with the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def make_fused(name: str) -> nn.Module:
    """Makes our model as `export` writes it."""
    return fuse(make_ours(name))


def make_timms(name: str) -> nn.Module:
    """Makes timm's own model, with the same weights as ours, because the seed is the same."""
    make: Any = timm_entrypoint(name)
    torch.manual_seed(0)
    return make().eval()


def run_eager(make: Make, x: Tensor, dtype: str) -> Call:
    return partial(make().to(x.device), x)


def run_optimized(make: Make, compile: bool, x: Tensor, dtype: str) -> Call:
    return partial(optimize(make().to(x.device), x, dtype=getattr(torch, dtype), compile=compile), x)


def run_exported(make: Make, suffix: str, x: Tensor, dtype: str) -> Call:
    """Writes a model to a file, and runs it from there."""
    record = dict(input=[None, *x.shape[1:]], outputs=[{'name': 'logits'}])
    program = Program(Exportable(make(), dtype), x, record, calibration=x if dtype == 'int8' else None)
    with TemporaryDirectory() as folder:
        file = Path(folder, f'model{suffix}')
        BACKENDS[suffix].write(program, file)
        _, start = BACKENDS[suffix].load(file)
        run = start(dtype)
    return lambda: run(x)[0]


def run_step(make: Make, x: Tensor, dtype: str, checkpointing: bool = False) -> Call:
    """Makes a training step with SGD, in channels-last memory format, that returns the loss."""
    model: Any = make().train().to(x.device).to(memory_format=torch.channels_last)
    if checkpointing:
        model.set_grad_checkpointing()
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, getattr(torch, dtype), enabled=dtype != 'float32'):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def start(way: Way, shape: tuple[int, ...], train: bool, device: torch.device) -> Any:
    """Prepares this worker process to run images of a shape; returns the first output as a numpy array."""
    global run
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    warnings.simplefilter('ignore')  # of other packages about each other
    torch.backends.cudnn.benchmark = True
    torch.set_grad_enabled(train)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    run = way.prepare(x, way.dtype)
    return run().float().cpu().numpy()


def bench(
    models: Sequence[str],
    batches: Sequence[int],
    sizes: Sequence[int],
    dtypes: Sequence[str],
    against: Sequence[str],
    train: bool,
    device: torch.device,
    rounds: int,
) -> list[Result]:
    """Measures models side by side with timm's own.

    All ways to run a model must return the same outputs. Each has its own process: in a shared one, memory freed by one
    way speeds up those that allocate much, such as timm's own, and threads of one runtime may still spin while another
    is measured. Each round runs every way once, in random order, so that other load on the machine affects all alike. A
    run is two calls, and the second is measured: the first fills the caches.
    """
    if unknown := sorted(set(models) - ARCHS.keys()):
        raise UnknownModelError.among(unknown[0], ARCHS, ' in this package')
    if unknown := sorted(set(against) - set(OPPONENTS)):
        raise ValueError(f'unknown against={", ".join(unknown)}. Choose from {", ".join(OPPONENTS)}.')
    inference_on_cpu = sorted({*RUNTIMES, 'int8'} & {*against, *dtypes})
    if inference_on_cpu and (train or device.type != 'cpu'):
        raise ValueError(f'cannot measure {", ".join(inference_on_cpu)}: only for inference on the CPU. Leave it out.')
    results = []
    for model, size, batch in itertools.product(models, sizes, batches):
        ways = training_ways(model, dtypes) if train else inference_ways(model, dtypes, against)
        times, memory = measure(ways, (batch, 3, size, size), train, device, rounds)
        quartiles = {way: np.percentile(times[way], [25, 50, 75]).tolist() for way in ways}
        baselines = {way.dtype: quartiles[way][1] for way in ways if way.name == TIMM}
        for way, (low, median, high) in quartiles.items():
            baseline = baselines.get(way.dtype if train else 'float32')
            results.append(
                Result(
                    model=model,
                    batch=batch,
                    size=size,
                    way=way.name,
                    dtype=way.dtype,
                    milliseconds=round(median * 1e3, 2),
                    spread=round((high - low) * 1e3, 2),
                    images_per_second=round(batch / median, 2),
                    ratio=None if baseline is None else round(baseline / median, 3),
                    peak_memory=memory[way],
                )
            )
    return results


def measure(
    ways: Sequence[Way], shape: tuple[int, ...], train: bool, device: torch.device, rounds: int
) -> tuple[dict[Way, list[float]], dict[Way, int | None]]:
    """Measures ways to run a model, in turns; returns the seconds of each call, and the peak memory in bytes."""
    with ExitStack() as stack:
        workers = {way: stack.enter_context(ProcessPoolExecutor(1, get_context('spawn'))) for way in ways}

        def ask(way: Way, function: Callable[..., Any], *args: Any) -> Any:
            try:
                return workers[way].submit(function, *args).result()
            except Exception as error:  # libraries can raise anything, and a process may run out of memory
                raise ValueError(f'cannot measure {way}: {first_line(error)}') from error

        outputs = {way: ask(way, start, way, shape, train, device) for way in ways}
        require_agreement(outputs)
        times: dict[Way, list[float]] = {way: [] for way in ways}
        for _ in tqdm(range(rounds), f'{ways[0].model}, {shape}', disable=None, leave=False):
            for way in random.sample(ways, len(ways)):
                times[way].append(ask(way, second_call, device))
        return times, {way: ask(way, peak_memory, device) for way in ways}


def require_agreement(outputs: Mapping[Way, Any]) -> None:
    first, expected = next(iter(outputs.items()))
    for way, output in outputs.items():
        difference = float(abs(output - expected).max() / abs(expected).max())
        if not difference < TOLERANCES[way.dtype]:
            raise ValueError(f'{way} differs by {difference:.1e} from {first.name}')


def second_call(device: torch.device) -> float:
    """Returns the seconds that the second of two calls takes, in a worker process."""
    for _ in range(2):
        began = time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize()
    return time.perf_counter() - began


def peak_memory(device: torch.device) -> int | None:
    """Returns the peak memory of a call in bytes, beyond that in use before; None if the system does not report it."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns memory that glibc has kept from earlier calls
        Path('/proc/self/clear_refs').write_text('5')  # resets the peak
        resident = read_fields('/proc/self/status')['VmRSS']  # such as '123 kB'
        run()
        peak = read_fields('/proc/self/status')['VmHWM']
    except (OSError, AttributeError):
        return None
    return (int(peak.split()[0]) - int(resident.split()[0])) * 1024


def read_fields(file: str) -> dict[str, str]:
    """Reads the lines 'name: value' of a file below /proc."""
    lines = Path(file).read_text().splitlines()
    return {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in lines)}


def environment() -> dict[str, str]:
    """Returns the processor, threads, GPU and versions that measurements depend on."""
    found = {'processor': processor(), 'threads': str(torch.get_num_threads()), 'python': platform.python_version()}
    for package in ('timm_res2net', 'torch', 'timm', 'openvino', 'nncf', 'onnxruntime'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found['gpu'] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """Returns the processor's name, and the instruction sets that matter for speed."""
    try:
        fields = read_fields('/proc/cpuinfo')
    except OSError:
        return platform.processor() or platform.machine()
    known = [each for each in INSTRUCTION_SETS if each in fields.get('flags', '').split()]
    return ' '.join([f'{os.cpu_count()} x {fields.get("model name", platform.machine())}', *known])
