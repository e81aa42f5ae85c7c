"""Measures the speed of models beside timm's own, interleaved in one run."""

import ctypes
import multiprocessing
import os
import platform
import random
import signal
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..models.block import Bottle2neck
from ..models.recompute import BufferCopies
from ..models.variants import ARCHS
from ..res2net import timm_entrypoint
from ..weights.errors import UnknownModelError, first_line
from .export import export
from .optimize import compile_by_openvino, optimize
from .runtimes import load_exported

__all__ = ['MODELS', 'OPPONENTS', 'Counter', 'Result', 'bench', 'environment', 'growth']

Run = Callable[[], Any]

MODELS = 'res2net50_26w_4s', 'res2net50d', 'res2next50', 'dla60_res2net'
OPPONENTS = 'timm', 'openvino', 'onnxruntime', 'inductor'
TIMM = 'timm'  # as people run it: eager, float32, NCHW; ratios are to this
OURS = 'timm_res2net'
BUDGETS = 1.0, 0.7, 0.5, 0.3  # of torch.compile: the share of the activations that a training step may keep
INSTRUCTION_SETS = 'avx2', 'avx512f', 'avx512_bf16', 'amx_bf16', 'avx_vnni', 'avx512_vnni', 'amx_int8'
TOLERANCES = {  # relative to the largest output
    torch.float32: 1e-3,
    torch.bfloat16: 5e-2,
    torch.float16: 1e-2,
    torch.int8: 5e-1,  # calibrated with random images
}


class Counter(TorchDispatchMode):
    """Counts the operators that PyTorch runs while it is active.

    Attributes:
        operators: Calls of ATen operators.
        allocated: Bytes of their new tensors, without views and in-place results.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        before = storages_of([args, list(kwargs.values())])
        after = storages_of(outputs)
        self.operators += 1
        self.allocated += sum(after[pointer].nbytes() for pointer in after.keys() - before.keys())
        return outputs


def storages_of(values: Any) -> dict[int, Any]:
    """The storages of the tensors among values, also in lists and tuples, by address."""
    if isinstance(values, Tensor):
        storage = values.untyped_storage()
        return {storage.data_ptr(): storage}
    found: dict[int, Any] = {}
    for value in values if isinstance(values, list | tuple) else ():
        found |= storages_of(value)
    return found


@dataclass(frozen=True)
class Result:
    """The measurement of one way to run a model."""

    model: str
    batch: int
    size: int  # pixels
    way: str
    dtype: str
    milliseconds: float  # of a batch, the median
    spread: float  # milliseconds between the quartiles
    images_per_second: float
    ratio: float | None  # to the throughput of timm's own, if timm has the model
    share_of_peak: float  # of the machine's fastest matrix product or convolution in this data type
    operators: int | None  # of ATen, where PyTorch runs them one by one
    peak_memory: int | None  # bytes beyond weights and input, where they can be known


@dataclass(frozen=True)
class Way:
    """One way to run a model."""

    name: str
    dtype: torch.dtype
    make: Callable[[str, Tensor, torch.dtype], Run]  # from the model's name, images and the data type
    eager: bool = False  # PyTorch runs its operators one by one
    torch: bool = True  # PyTorch has its memory


def ways_to_infer(own: bool, dtypes: Sequence[torch.dtype], against: Sequence[str]) -> list[Way]:
    """Ways to compare in inference; timm's own is the first, if there is one."""
    ways = [Way(TIMM, torch.float32, timms_eager, eager=True)] if own else []
    ways.append(Way(f'{OURS}, as it is', torch.float32, ours_eager, eager=True))
    ways.append(Way(f'{OURS}, fused', torch.float32, ours_fused, eager=True))
    for dtype in dtypes:
        ways.append(Way(f'{OURS}, optimized', dtype, ours_optimized))
        if 'openvino' in against:
            ways.append(Way(f'{OURS}, OpenVINO', dtype, ours_by_openvino, torch=False))
            if dtype == torch.float32:
                ways.append(Way(f'{OURS}, exported .xml', dtype, ours_exported_xml, torch=False))
            if own and dtype != torch.int8:
                ways.append(Way(f'{TIMM}, OpenVINO', dtype, timms_by_openvino, torch=False))
        if 'onnxruntime' in against and dtype in (torch.float32, torch.int8):
            ways.append(Way(f'{OURS}, exported .onnx', dtype, ours_exported_onnx, torch=False))
    if 'onnxruntime' in against and own:
        ways.append(Way(f'{TIMM}, onnxruntime', torch.float32, timms_by_onnxruntime, torch=False))
    return ways


def ways_to_train(own: bool, dtypes: Sequence[torch.dtype], against: Sequence[str]) -> list[Way]:
    """Ways to compare in training, all with channels last; timm's own is the first, if there is one."""
    ways = []
    for dtype in dtypes:
        ways += [Way(TIMM, dtype, timms_step, eager=True)] if own else []
        ways.append(Way(OURS, dtype, ours_step, eager=True))
        ways.append(Way(f'{OURS}, checkpointing', dtype, ours_checkpointing_step, eager=True))
        ways.append(Way(f'{OURS}, keeping convolutions', dtype, ours_keeping_step, eager=True))
        for budget in BUDGETS if 'inductor' in against else ():
            ways.append(Way(f'{OURS}, compiled, budget {budget}', dtype, partial(ours_compiled_step, budget)))
    return ways


def ours(name: str, x: Tensor) -> nn.Module:
    """Makes our model, always with the same weights."""
    torch.manual_seed(0)
    return timm.create_model(name).to(x.device).eval()


def timms(name: str, x: Tensor) -> nn.Module:
    """Makes timm's own model, with the weights that ours has: the same seed makes the same."""
    make: Any = timm_entrypoint(name)
    torch.manual_seed(0)
    return make().to(x.device).eval()


def timms_eager(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(timms(name, x), x)


def ours_eager(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(ours(name, x), x)


def ours_fused(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(optimize(ours(name, x), x, compile=False), x)


def ours_optimized(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(optimize(ours(name, x), x, dtype=dtype), x)


def ours_by_openvino(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(optimize(ours(name, x), x, dtype=dtype, backend='openvino'), x)


def ours_exported(suffix: str, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    precision = str(dtype).removeprefix('torch.')
    with TemporaryDirectory() as folder:
        export(ours(name, x), f'{folder}/model{suffix}', precision=precision, images=x, size=x.shape[-1])
        return partial(load_exported(f'{folder}/model{suffix}'), x)


ours_exported_xml, ours_exported_onnx = partial(ours_exported, '.xml'), partial(ours_exported, '.onnx')


def timms_by_openvino(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(compile_by_openvino(timms(name, x), x, dtype), x.numpy())


def timms_by_onnxruntime(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    import onnxruntime

    with TemporaryDirectory() as folder:
        file = f'{folder}/model.onnx'
        torch.onnx.export(timms(name, x), (x,), file, dynamo=True, external_data=False, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # not into the turn of others
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    return partial(session.run, None, {session.get_inputs()[0].name: x.numpy()})


def timms_step(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return training_step(timms(name, x), x, dtype)


def ours_step(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return training_step(ours(name, x), x, dtype)


def ours_checkpointing_step(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    model: Any = ours(name, x)
    model.set_grad_checkpointing()
    return training_step(model, x, dtype)


def ours_keeping_step(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    """A step that keeps the outputs of convolutions and computes all else of a block again, by torch's own means."""
    model = ours(name, x)
    for block in model.modules():
        if isinstance(block, Bottle2neck):
            block.forward = partial(keep_convolutions, block, block.forward)  # type: ignore[method-assign]
    return training_step(model, x, dtype)


def keep_convolutions(block: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Runs a block and keeps the outputs of its convolutions. The second run updates copies of norm statistics."""

    @contextmanager
    def with_copies(run: Any) -> Iterator[None]:
        with BufferCopies(block), run:
            yield

    def contexts() -> tuple[Any, Any]:
        first, second = create_selective_checkpoint_contexts([torch.ops.aten.convolution.default])
        return first, with_copies(second)

    return checkpoint(forward, x, use_reentrant=False, context_fn=contexts)


def ours_compiled_step(budget: float, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    from torch._functorch import config

    step = training_step(ours(name, x), x, dtype, compiled=True)

    def step_within_budget() -> Tensor:
        with config.patch(activation_memory_budget=budget):
            return step()

    return step_within_budget


def training_step(model: nn.Module, x: Tensor, dtype: torch.dtype, compiled: bool = False) -> Run:
    """Makes a step of training of a model: forward, backward and an update by SGD. It returns the loss."""
    model = model.train().to(memory_format=torch.channels_last)
    run = torch.compile(model) if compiled else model
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(run(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


@dataclass(frozen=True)
class Plan:
    """A model and its input."""

    model: str
    batch: int
    size: int  # pixels
    train: bool

    @property
    def flops(self) -> int:
        """Floating-point operations of a batch."""
        forward = flops_of(self.model, self.size) * self.batch
        return 3 * forward if self.train else forward  # training also computes gradients of inputs and weights


class Worker:
    """A process of its own for one way to run a model.

    In a shared process, memory that others have freed speeds up those that allocate much, as timm's own does, and
    threads of one runtime may still spin while another is measured.
    """

    def __init__(self, way: Way, plan: Plan, device: torch.device) -> None:
        context = multiprocessing.get_context('spawn')
        self.way = way
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, way, plan, device), daemon=True)
        with interrupts_held_back():  # which the process inherits: Ctrl-C is answered by this one alone
            self.process.start()
        theirs.close()  # so that the connection ends with the process

    def ask(self, question: Callable[[Run, torch.device], Any] | None = None) -> Any:
        """Sends a function that is given the run and the device, and returns its result; None for the first output.

        Raises:
            ValueError: If the process failed.
        """
        try:
            if question is not None:
                self.connection.send(question)
            answer = self.connection.recv()
        except (EOFError, BrokenPipeError):
            answer = RuntimeError('its process ended; it may have run out of memory')
        if isinstance(answer, Exception):
            raise ValueError(
                f'{self.way.name} in {self.way.dtype} can not be measured: {first_line(answer)}'
            ) from answer
        return answer

    def end(self) -> None:
        """Ends the process, also while it is busy."""
        self.connection.close()
        self.process.join(timeout=1)
        self.process.terminate()
        self.process.join()


@contextmanager
def interrupts_held_back() -> Iterator[None]:
    """Context in which Ctrl-C waits, for this thread and for processes that it starts, where a system can do that."""
    if not hasattr(signal, 'pthread_sigmask'):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def work(connection: Any, way: Way, plan: Plan, device: torch.device) -> None:
    """The main function of a worker's process: makes the run, then answers questions until the connection ends."""
    warnings.simplefilter('ignore')  # what other packages find deprecated in each other, a dozen times
    try:
        torch.backends.cudnn.benchmark = True
        shape = plan.batch, 3, plan.size, plan.size
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.set_grad_enabled(plan.train):
            run = way.make(plan.model, x, way.dtype)
            output = run()
            connection.send(output.cpu().numpy() if isinstance(output, Tensor) else output[0])
            while True:
                connection.send(connection.recv()(run, device))
    except EOFError:  # nobody asks any more
        return
    except Exception as error:
        connection.send(RuntimeError(first_line(error)))


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
    """Measures models side by side.

    Each way to run a model has a process of its own, and all have to compute the same. Then each has a turn in each
    round, in random order, so that other load on the machine affects all alike. A turn is two calls, of which the
    second is measured, because the first one runs with the caches of another.

    Args:
        models: Names.
        batches: Batch sizes.
        sizes: Image heights and widths, in pixels.
        dtypes: Data types of what is optimized. timm's own is in float32 in inference, and in each of them in training.
        against: Of 'timm', 'openvino' and 'onnxruntime', in training of 'timm' and 'inductor' (torch.compile, also with
            half the memory for activations). timm's own is always there.
        train: Measure steps of training instead of inference.
        device: Where to run; others than timm only on the CPU.
        rounds: Measurements of each.

    Raises:
        UnknownModelError: If there is no such model.
        ValueError: If a way to run a model is not known or fails, or two don't agree.
    """
    if strange := sorted(set(against) - set(OPPONENTS)):
        raise ValueError(f'against={", ".join(strange)} is not known; choose from {", ".join(OPPONENTS)}')
    device = torch.device(device)
    others = sorted(set(against) - {TIMM, 'inductor'})
    if train and others:
        raise ValueError(f'{" and ".join(others)} can not train; leave it out')
    if not train and 'inductor' in against:
        raise ValueError('inductor is for training; what is optimized is compiled by it in any case')
    if unknown := sorted(set(models) - ARCHS.keys()):
        raise UnknownModelError.among(unknown[0], ARCHS, ' in this package')
    if torch.int8 in dtypes and (train or device.type != 'cpu'):
        raise ValueError('int8 is for inference on the CPU')
    if device.type != 'cpu' and others:
        raise ValueError(f'{" and ".join(others)} can be measured on the CPU only')
    plans = [Plan(name, batch, size, train) for name in models for size in sizes for batch in batches]
    results = []
    with tqdm(total=len(plans) * rounds, unit='round', disable=None, leave=False) as bar:
        peaks = {}
        for dtype in dict.fromkeys([torch.float32, *dtypes]):
            bar.set_description(f'peak of {str(dtype).removeprefix("torch.")}')
            peaks[dtype] = peak(dtype, device)
        for plan in plans:
            own = timm_entrypoint(plan.model) is not None
            ways = ways_to_train(own, dtypes, against) if train else ways_to_infer(own, dtypes, against)
            workers = [Worker(way, plan, device) for way in ways]
            try:
                require_agreement(plan.model, workers, bar)
                bar.set_description(f'{plan.model}, {plan.batch} x {plan.size} px')
                results += summarize(plan, workers, take_turns(workers, rounds, bar), peaks)
            finally:
                for worker in workers:
                    worker.end()
    return results


def require_agreement(name: str, workers: Sequence[Any], bar: Any) -> None:
    """Raises a ValueError if the outputs of two ways to run a model differ."""
    outputs = []
    for worker in workers:
        bar.set_description(f'{name}: waiting for {worker.way.name}')
        outputs.append(torch.from_numpy(np.asarray(worker.ask(), np.float32)))
    for worker, output in zip(workers, outputs):
        difference = ((output - outputs[0]).abs().max() / outputs[0].abs().max()).item()
        if not difference < TOLERANCES[worker.way.dtype]:
            first, way = workers[0].way, worker.way
            raise ValueError(f'{name}: {way.name} in {way.dtype} is {difference:.1e} off what {first.name} computes')


def take_turns(workers: Sequence[Worker], rounds: int, bar: Any) -> list[list[float]]:
    """Has each worker run its model in each round; seconds of each."""
    times: list[list[float]] = [[] for _ in workers]
    for _ in range(rounds):
        for i in random.sample(range(len(workers)), len(workers)):
            times[i].append(workers[i].ask(second_call))
        bar.update()
    return times


def summarize(
    plan: Plan, workers: Sequence[Worker], times: Sequence[Sequence[float]], peaks: dict[torch.dtype, float]
) -> list[Result]:
    """Makes the results of a plan.

    Args:
        plan: The model and its input.
        workers: Asked for operators and memory.
        times: Seconds that each worker took.
        peaks: Operations per second of the machine.
    """
    medians = [statistics.median(measured) for measured in times]
    timms_seconds = {w.way.dtype: seconds for w, seconds in zip(workers, medians) if w.way.name == TIMM}
    results = []
    for worker, measured, seconds in zip(workers, times, medians):
        way = worker.way
        baseline = timms_seconds.get(way.dtype if plan.train else torch.float32)
        result = Result(
            model=plan.model,
            batch=plan.batch,
            size=plan.size,
            way=way.name,
            dtype=str(way.dtype).removeprefix('torch.'),
            milliseconds=round(seconds * 1e3, 2),
            spread=round(quartiles(measured) * 1e3, 2),
            images_per_second=round(plan.batch / seconds, 2),
            ratio=None if baseline is None else round(baseline / seconds, 3),
            share_of_peak=round(plan.flops / peaks[way.dtype] / seconds, 3),
            operators=worker.ask(operators) if way.eager else None,
            peak_memory=worker.ask(peak_memory) if way.torch else None,
        )
        results.append(result)
    return results


def second_call(run: Run, device: torch.device) -> float:
    """Seconds that a call takes right after another."""
    run()
    return timed(run, device)


def timed(run: Run, device: torch.device) -> float:
    """Seconds that a call takes."""
    if device.type == 'cuda':
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def quartiles(values: Sequence[float]) -> float:
    """The distance between the quartiles."""
    if len(values) < 2:
        return 0.0
    low, _, high = statistics.quantiles(values, n=4)
    return high - low


def peak(dtype: torch.dtype, device: torch.device) -> float:
    """Operations per second of the fastest matrix product or 3x3 convolution, found within seconds.

    Both, as in float16 a CPU's matrix products can be a thirtieth as fast as its convolutions. In 8 bits torch has
    matrix products only.
    """
    product = torch._int_mm if dtype == torch.int8 else torch.matmul
    best = 0.0
    for n in (256, 512, 1024, 2048):
        a = torch.randn(n, n, device=device).to(dtype)
        seconds = fastest(partial(product, a, a), device)
        best = max(best, 2 * n**3 / seconds)
        if seconds > 0.05:
            break
    if dtype == torch.int8:
        return best
    x = torch.randn(8, 256, 28, 28, device=device).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3, device=device).to(dtype, memory_format=torch.channels_last)
    seconds = fastest(partial(F.conv2d, x, weight, padding=1), device)
    return max(best, 2 * x.numel() * weight[:, 0].numel() / seconds)


def fastest(run: Run, device: torch.device) -> float:
    """Seconds of the fastest of ten calls after a first one, or of those that fit in a third of a second."""
    run()
    times, start = [timed(run, device)], time.perf_counter()
    while len(times) < 10 and time.perf_counter() - start < 0.3:
        times.append(timed(run, device))
    return min(times)


def flops_of(name: str, size: int) -> int:
    """Floating-point operations of convolutions and classifier for an image, two for each multiply-add."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        timm.create_model(name).eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def operators(run: Run, device: torch.device) -> int:
    """Calls of ATen operators."""
    with Counter() as counter:
        run()
    return counter.operators


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a call takes beyond what was taken before, None where the system doesn't tell."""
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    try:
        ctypes.CDLL(None).malloc_trim(0)  # gives back what glibc keeps of calls before
        Path('/proc/self/clear_refs').write_text('5')  # the peak starts anew
        before = resident('VmRSS')
        run()
        return resident('VmHWM') - before
    except (OSError, AttributeError):
        return None


def resident(which: str) -> int:
    """Bytes of this process in memory, now ('VmRSS') or at the peak ('VmHWM')."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(which))


def growth(device: str | torch.device = 'cpu', rounds: int = 20) -> dict[str, list[Result]]:
    """Measures how the cost of ours and timm's grows with scale, batch and resolution, in float32: many minutes."""
    options: dict[str, Any] = dict(dtypes=(torch.float32,), device=device, rounds=rounds)
    return {
        'scale': bench(['res2net50_26w_4s', 'res2net50_26w_6s', 'res2net50_26w_8s'], **options),
        'batch': bench(['res2net50_26w_4s'], batches=(1, 2, 4, 8, 16), **options),
        'size': bench(['res2net50_26w_4s'], sizes=(128, 192, 256, 384), **options),
    }


def environment() -> dict[str, str]:
    """Processor, threads, GPU and versions, on which the figures depend."""
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
    """The processor's name and those of its instruction sets that matter here."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in lines)}
    flags = fields.get('flags', '').split()
    known = [flag for flag in INSTRUCTION_SETS if flag in flags]
    return ' '.join([f'{os.cpu_count()} x {fields.get("model name", platform.machine())}', *known])
