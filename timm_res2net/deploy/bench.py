"""Measures the speed and memory of models side by side with timm's own, interleaved in one run."""

import ctypes
import itertools
import os
import platform
import random
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

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
from .optimize import name_of, optimize
from .program import Exportable, Program

MODELS = 'res2net50_26w_4s', 'res2net50d', 'res2next50', 'dla60_res2net'
RUNTIMES = 'openvino', 'onnxruntime'
OPPONENTS = 'timm', *RUNTIMES, 'inductor'
TIMM, OURS = 'timm', 'timm_res2net'  # ratios are to timm's own as people run it: eager, float32, NCHW
BUDGETS = 1.0, 0.7, 0.5, 0.3  # share of the activations that a compiled training step may keep
INSTRUCTION_SETS = 'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'avx_vnni', 'avx512_vnni', 'amx_int8'
# Differences between outputs, relative to the largest; int8 is calibrated with random images.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2, torch.int8: 5e-1}

Make = Callable[[str], nn.Module]  # from the name of a model
Run = Callable[[], Tensor]
run: Run  # in a worker process, made by `start`


@dataclass(frozen=True)
class Way:
    """One way to run a model."""

    name: str
    dtype: torch.dtype
    make: Callable[[str, Tensor, torch.dtype], Run]  # from the name of a model, images (N, C, H, W) and a data type

    @property
    def label(self) -> str:
        return f'{self.name} in {name_of(self.dtype)}'


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
    peak_memory: int | None  # bytes beyond weights and input, where the system knows them


def inference_ways(has_timm: bool, dtypes: Sequence[torch.dtype], against: Sequence[str]) -> list[Way]:
    """Returns the ways to compare in inference, timm's own first."""
    ways = [
        Way(TIMM, torch.float32, partial(run_eager, make_timms)),
        Way(f'{OURS}, as it is', torch.float32, partial(run_eager, make_ours)),
        Way(f'{OURS}, fused', torch.float32, partial(run_optimized, False)),
        *(Way(f'{OURS}, optimized', dtype, partial(run_optimized, True)) for dtype in dtypes),
    ]
    for name, dtype in itertools.product(RUNTIMES, dtypes):
        backend = BACKENDS[name]
        if name in against and name_of(dtype) in backend.precisions:
            ways.append(Way(f'{OURS}, {backend.format}', dtype, partial(run_exported, name, make_ours)))
            if dtype != torch.int8:
                ways.append(Way(f'{TIMM}, {backend.format}', dtype, partial(run_exported, name, make_timms)))
    return [way for way in ways if has_timm or way.name.startswith(OURS)]


def training_ways(has_timm: bool, dtypes: Sequence[torch.dtype], against: Sequence[str]) -> list[Way]:
    """Returns the ways to compare in training, all with channels last, timm's own first."""
    ways = []
    for dtype in dtypes:
        ways += [
            Way(TIMM, dtype, partial(run_step, make_timms)),
            Way(OURS, dtype, partial(run_step, make_ours)),
            Way(f'{OURS}, checkpointing', dtype, partial(run_step, make_ours, checkpointing=True)),
        ]
        for budget in BUDGETS if 'inductor' in against else ():
            ways.append(Way(f'{OURS}, compiled, budget {budget}', dtype, partial(run_step, make_ours, budget=budget)))
    return [way for way in ways if has_timm or way.name != TIMM]


def make_ours(name: str) -> nn.Module:
    """Makes our model, with the same weights each time."""
    torch.manual_seed(0)
    return timm.create_model(name).eval()


def make_timms(name: str) -> nn.Module:
    """Makes timm's own model, with the weights of ours: the same seed makes the same."""
    make: Any = timm_entrypoint(name)
    torch.manual_seed(0)
    return make().eval()


def run_eager(make: Make, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(make(name).to(x.device), x)


def run_optimized(compile: bool, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(optimize(make_ours(name).to(x.device), x, dtype=dtype, compile=compile), x)


def run_exported(backend: str, make: Make, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    """Writes a model to a file for a backend, ours fused as `export` does, and runs it from there."""
    model = fuse(make(name)) if make is make_ours else make(name)
    program = Program(
        module=Exportable(model, dtype if dtype.is_floating_point else torch.float32),
        example=x,
        dynamic=(0,),
        outputs=('logits',),
        record='',
        calibration=x if dtype == torch.int8 else None,
    )
    with TemporaryDirectory() as folder:
        file = Path(folder, f'model{BACKENDS[backend].suffix}')
        BACKENDS[backend].write(program, file)
        _, start = BACKENDS[backend].load(file)
        run = start(name_of(dtype))
    return lambda: run(x)[0]


def run_step(
    make: Make, name: str, x: Tensor, dtype: torch.dtype, checkpointing: bool = False, budget: float | None = None
) -> Run:
    """Makes a training step with SGD that returns the loss; compiled to keep a share of the activations, if given."""
    from torch._functorch import config

    model: Any = make(name).train().to(x.device).to(memory_format=torch.channels_last)
    if checkpointing:
        model.set_grad_checkpointing()
    run = model if budget is None else torch.compile(model)
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with (
            config.patch(activation_memory_budget=budget or 1.0),  # read when torch.compile compiles
            torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32),
        ):
            loss = F.cross_entropy(run(x), target)
            loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def start(way: Way, model: str, shape: tuple[int, ...], train: bool, device: torch.device) -> Any:
    """Makes the run of this worker process for images of a shape; returns its first output as a numpy array."""
    global run
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it without a traceback
    warnings.simplefilter('ignore')  # of other packages about each other
    torch.backends.cudnn.benchmark = True
    torch.set_grad_enabled(train)
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
    run = way.make(model, x, way.dtype)
    return run().float().cpu().numpy()


def ask(worker: Executor, way: Way, function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function in a worker process; ValueError if that fails."""
    try:
        return worker.submit(function, *args).result()
    except Exception as error:  # libraries raise anything, and a process may run out of memory
        raise ValueError(f'cannot measure {way.label}: {first_line(error)}') from error


def bench(
    models: Sequence[str] = MODELS,
    batches: Sequence[int] = (8,),
    sizes: Sequence[int] = (224,),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16),
    against: Sequence[str] = ('timm',),
    train: bool = False,
    device: str | torch.device = 'cpu',
    rounds: int = 20,
) -> list[Result]:
    """Measures models side by side with timm's own.

    All ways to run a model must compute the same. Each has its own process: in a shared one, memory that others freed
    speeds up those that allocate much, as timm's own does, and threads of one runtime may still spin while another is
    measured. In each round, each has a turn, in random order, so that other load on the machine affects all alike. In a
    turn, the second of two calls is measured: the first runs with the caches of another way.

    `sizes` are heights and widths in pixels, and `dtypes` those of optimized and exported models, in training of all
    ways. Raises an UnknownModelError or ValueError if arguments do not fit each other, a way fails, or two compute
    other outputs.
    """
    device = torch.device(device)
    require_measurable(models, dtypes, against, train, device)
    find_ways = training_ways if train else inference_ways
    results = []
    for model, size, batch in itertools.product(models, sizes, batches):
        ways = find_ways(timm_entrypoint(model) is not None, dtypes, against)
        times, memory = measure(ways, model, (batch, 3, size, size), train, device, rounds)
        medians = [statistics.median(each) for each in times]
        timms = {way.dtype: seconds for way, seconds in zip(ways, medians) if way.name == TIMM}
        for way, measured, seconds, peak in zip(ways, times, medians, memory):
            baseline = timms.get(way.dtype if train else torch.float32)
            low, _, high = statistics.quantiles(measured, n=4) if rounds > 1 else (seconds,) * 3
            results.append(
                Result(
                    model=model,
                    batch=batch,
                    size=size,
                    way=way.name,
                    dtype=name_of(way.dtype),
                    milliseconds=round(seconds * 1e3, 2),
                    spread=round((high - low) * 1e3, 2),
                    images_per_second=round(batch / seconds, 2),
                    ratio=None if baseline is None else round(baseline / seconds, 3),
                    peak_memory=peak,
                )
            )
    return results


def require_measurable(
    models: Sequence[str], dtypes: Sequence[torch.dtype], against: Sequence[str], train: bool, device: torch.device
) -> None:
    """Raises an error for arguments of `bench` that do not fit each other."""
    if unknown := sorted(set(models) - ARCHS.keys()):
        raise UnknownModelError.among(unknown[0], ARCHS, ' in this package')
    if unknown := sorted(set(against) - set(OPPONENTS)):
        raise ValueError(f'unknown against={", ".join(unknown)}. Choose from {", ".join(OPPONENTS)}.')
    only_inference_on_cpu = sorted({*RUNTIMES, 'int8'} & {*against, *map(name_of, dtypes)})
    if only_inference_on_cpu and (train or device.type != 'cpu'):
        raise ValueError(f'{" and ".join(only_inference_on_cpu)} is for inference on the CPU. Leave it out.')
    if not train and 'inductor' in against:
        raise ValueError('inductor is for training. In inference, optimized models are always compiled by it.')


def measure(
    ways: Sequence[Way], model: str, shape: tuple[int, ...], train: bool, device: torch.device, rounds: int
) -> tuple[list[list[float]], list[int | None]]:
    """Measures ways to run a model, in turns; returns the seconds of each, and its peak memory in bytes."""
    times: list[list[float]] = [[] for _ in ways]
    with ExitStack() as stack:
        workers = [stack.enter_context(ProcessPoolExecutor(1, get_context('spawn'))) for _ in ways]
        outputs = [ask(worker, way, start, way, model, shape, train, device) for worker, way in zip(workers, ways)]
        require_agreement(model, ways, outputs)
        for _ in tqdm(range(rounds), f'{model}, {shape}', disable=None, leave=False):
            for i in random.sample(range(len(ways)), len(ways)):
                times[i].append(ask(workers[i], ways[i], second_call, device))
        return times, [ask(worker, way, peak_memory, device) for worker, way in zip(workers, ways)]


def require_agreement(name: str, ways: Sequence[Way], outputs: Sequence[Any]) -> None:
    """Raises a ValueError if the outputs of two ways to run a model differ."""
    for way, output in zip(ways, outputs):
        difference = float(abs(output - outputs[0]).max() / abs(outputs[0]).max())
        if not difference < TOLERANCES[way.dtype]:
            raise ValueError(f'{name}: {way.label} differs by {difference:.1e} from {ways[0].name}')


def second_call(device: torch.device) -> float:
    """Returns the seconds of a call right after another, in a worker process."""
    times = []
    for _ in range(2):
        start = time.perf_counter()
        run()
        if device.type == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return times[-1]


def peak_memory(device: torch.device) -> int | None:
    """Returns the bytes that a call takes beyond those already taken; None where the system does not know them."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # returns memory of earlier calls, which glibc keeps
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
    for package in ('timm_res2net', 'torch', 'torchao', 'timm', 'openvino', 'nncf', 'onnxruntime'):
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
