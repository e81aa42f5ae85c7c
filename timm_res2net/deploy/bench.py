"""How fast models are beside timm's own: all in one run, in turns, on the machine that asks."""

import ctypes
import multiprocessing
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Sequence
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
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from ..res2net import ARCHS, WEIGHTS, timms_own
from ..vision.predict import new_figure
from ..weights.files import first_line, replace_file
from .optimize import compiled_by_openvino, optimize

__all__ = ['MODELS', 'OPPONENTS', 'Counter', 'Result', 'bench', 'environment', 'growth', 'plot', 'plot_growth']

Run = Callable[[], Any]

MODELS = 'res2net50_26w_4s', 'res2net50d', 'res2next50', 'dla60_res2net'
OPPONENTS = 'timm', 'openvino', 'onnxruntime'
TIMM = 'timm'  # as people run it: eager, float32, NCHW; ratios are to this
OURS = 'timm_res2net'
GROWTH = {
    'scale': 'splits, equally wide',
    'batch': 'images in a batch',
    'size': 'image height and width, pixels',
}
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}  # relative to the largest output


class Counter(TorchDispatchMode):
    """Counts what PyTorch runs while it is active, the same at every repetition.

    Attributes:
        operators: Calls of ATen operators.
        allocated: Bytes of all tensors that they made, views and results written in place not counted.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operators = 0
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        given = storages_of([args, list(kwargs.values())])
        made = storages_of(outputs)
        self.operators += 1
        self.allocated += sum(made[pointer].nbytes() for pointer in made.keys() - given.keys())
        return outputs


def storages_of(values: Any) -> dict[int, Any]:
    """The memory of tensors among values and in lists or tuples of them, by its address."""
    if isinstance(values, Tensor):
        storage = values.untyped_storage()
        return {storage.data_ptr(): storage}
    found: dict[int, Any] = {}
    for value in values if isinstance(values, list | tuple) else ():
        found |= storages_of(value)
    return found


@dataclass(frozen=True)
class Result:
    """What one way to run a model came to."""

    model: str
    batch: int
    size: int  # pixels
    way: str
    dtype: str
    milliseconds: float  # of a batch, the median
    spread: float  # milliseconds between the quartiles
    images_per_second: float
    ratio: float | None  # to the throughput of timm's own, if timm has the model
    share_of_peak: float  # of the machine's matrix products in this data type
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
    """What is to be compared in inference; timm's own comes first, if there is one."""
    ways = [Way(TIMM, torch.float32, timms_eager, eager=True)] if own else []
    ways.append(Way(f'{OURS}, as it is', torch.float32, ours_eager, eager=True))
    ways.append(Way(f'{OURS}, fused', torch.float32, ours_fused, eager=True))
    for dtype in dtypes:
        ways.append(Way(f'{OURS}, optimized', dtype, ours_optimized))
        if 'openvino' in against:
            ways.append(Way(f'{OURS}, OpenVINO', dtype, ours_by_openvino, torch=False))
            ways += [Way(f'{TIMM}, OpenVINO', dtype, timms_by_openvino, torch=False)] if own else []
    if 'onnxruntime' in against and own:
        ways.append(Way(f'{TIMM}, onnxruntime', torch.float32, timms_by_onnxruntime, torch=False))
    return ways


def ways_to_train(own: bool, dtypes: Sequence[torch.dtype]) -> list[Way]:
    """What is to be compared in training, steps with channels last; timm's own comes first, if there is one."""
    ways = []
    for dtype in dtypes:
        ways += [Way(TIMM, dtype, timms_step, eager=True)] if own else []
        ways.append(Way(OURS, dtype, ours_step, eager=True))
        ways.append(Way(f'{OURS}, checkpointing', dtype, ours_checkpointing_step, eager=True))
    return ways


def ours(name: str, x: Tensor) -> nn.Module:
    """Makes our model, always with the same weights."""
    torch.manual_seed(0)
    return timm.create_model(name).to(x.device).eval()


def timms(name: str, x: Tensor) -> nn.Module:
    """Makes timm's own model, with the weights that ours has: the same seed makes the same."""
    make: Any = timms_own(name)
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


def timms_by_openvino(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return partial(compiled_by_openvino(timms(name, x), x, dtype), x.numpy())


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


def training_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    """Makes a step of training of a model: forward, backward and an update by SGD. It returns the loss."""
    model = model.train().to(memory_format=torch.channels_last)
    x = x.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


class Worker:
    """A process of its own for one way to run a model.

    In a common one, what others leave on the heap makes those fast that ask for much memory, as timm's own does, and
    threads of one runtime may still spin in the turn of another.
    """

    def __init__(self, way: Way, name: str, shape: Sequence[int], device: torch.device, train: bool) -> None:
        context = multiprocessing.get_context('spawn')
        self.way = way
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, way, name, shape, device, train), daemon=True)
        self.process.start()
        theirs.close()  # so that the end of the process is the end of the connection

    def ask(self, question: Callable[[Run, torch.device], Any] | None = None) -> Any:
        """Sends a function of what runs the model, and returns its answer; None for the output of the first call.

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


def work(connection: Any, way: Way, name: str, shape: Sequence[int], device: torch.device, train: bool) -> None:
    """What a worker's process does: makes its way to run a model, then answers questions until it is ended."""
    try:
        torch.backends.cudnn.benchmark = True
        x = torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(device)
        with torch.set_grad_enabled(train):
            run = way.make(name, x, way.dtype)
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
    round, in an order of chance, so that what else the machine does meets all alike. A turn is two calls, of which the
    second counts, as the first one finds caches as another has left them.

    Args:
        models: Names.
        batches: Batch sizes.
        sizes: Image heights and widths, in pixels.
        dtypes: Data types of what is optimized. timm's own is in float32 in inference, and in each of them in training.
        against: Of 'timm', 'openvino' and 'onnxruntime'. timm's own is always there.
        train: Measure steps of training instead of inference.
        device: Where to run; others than timm only on the CPU.
        rounds: Measurements of each.

    Raises:
        ValueError: If a name is not known, a way to run a model fails, or two don't agree.
    """
    device = torch.device(device)
    if unknown := sorted(set(models) - ARCHS.keys()):
        raise ValueError(f'not models of this package: {", ".join(unknown)}; `timm-res2net list` shows them')
    if device.type != 'cpu' and set(against) - {'timm'}:
        raise ValueError(f'{" and ".join(set(against) - {"timm"})} can be measured on the CPU only')
    plans = [(name, batch, size) for name in models for size in sizes for batch in batches]
    peaks = {dtype: peak(dtype, device) for dtype in {torch.float32, *dtypes}}
    results = []
    with tqdm(total=len(plans) * rounds, unit='round', disable=None, leave=False) as bar:
        for name, batch, size in plans:
            bar.set_description(f'{name}, {batch} x {size} px')
            own = timms_own(name) is not None
            ways = ways_to_train(own, dtypes) if train else ways_to_infer(own, dtypes, against)
            workers = [Worker(way, name, (batch, 3, size, size), device, train) for way in ways]
            try:
                require_agreement(name, workers)
                times = take_turns(workers, rounds, bar)
                timms_seconds = {
                    worker.way.dtype: statistics.median(measured)
                    for worker, measured in zip(workers, times)
                    if worker.way.name == TIMM
                }
                flops = flops_of(name, size) * batch * (3 if train else 1)  # of inputs and weights there are gradients
                for worker, measured in zip(workers, times):
                    dtype = worker.way.dtype
                    baseline = timms_seconds.get(dtype if train else torch.float32)
                    results.append(result_of((name, batch, size), worker, measured, baseline, flops / peaks[dtype]))
            finally:
                for worker in workers:
                    worker.connection.close()
                for worker in workers:
                    worker.process.join()
    return results


def require_agreement(name: str, workers: Sequence[Any]) -> None:
    """Raises a ValueError if two ways to run a model compute different things."""
    outputs = [torch.from_numpy(np.asarray(worker.ask(), np.float32)) for worker in workers]
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


def result_of(
    plan: tuple[str, int, int], worker: Worker, times: Sequence[float], baseline: float | None, shortest: float
) -> Result:
    """Sums up what a worker measured.

    Args:
        plan: Name of the model, batch size, and image height and width.
        worker: Asked for operators and memory.
        times: Seconds that the worker took.
        baseline: Seconds that timm's own takes, None where timm has no such model.
        shortest: Seconds that the machine would take at its peak.
    """
    name, batch, size = plan
    way, seconds = worker.way, statistics.median(times)
    return Result(
        model=name,
        batch=batch,
        size=size,
        way=way.name,
        dtype=str(way.dtype).removeprefix('torch.'),
        milliseconds=round(seconds * 1e3, 2),
        spread=round(quartiles(times) * 1e3, 2),
        images_per_second=round(batch / seconds, 2),
        ratio=None if baseline is None else round(baseline / seconds, 3),
        share_of_peak=round(shortest / seconds, 3),
        operators=worker.ask(operators) if way.eager else None,
        peak_memory=worker.ask(peak_memory) if way.torch else None,
    )


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


def peak(dtype: torch.dtype, device: torch.device, n: int = 2048) -> float:
    """Floating-point operations per second of the fastest of ten matrix products."""
    a = torch.randn(n, n, device=device).to(dtype)
    times = [timed(lambda: a @ a, device) for _ in range(11)]
    return 2 * n**3 / min(times[1:])


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
    """What the figures depend on."""
    found = {'processor': processor(), 'threads': str(torch.get_num_threads()), 'python': platform.python_version()}
    for package in ('timm_res2net', 'torch', 'timm', 'openvino', 'onnxruntime'):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    if torch.cuda.is_available():
        found['gpu'] = torch.cuda.get_device_name()
    return found


def processor() -> str:
    """The processor's name and what it knows that matters here."""
    try:
        lines = Path('/proc/cpuinfo').read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(':') for line in lines)}
    known = [flag for flag in ('avx2', 'avx512f', 'avx512_bf16', 'amx_bf16') if flag in fields.get('flags', '').split()]
    return ' '.join([f'{os.cpu_count()} x {fields.get("model name", platform.machine())}', *known])


def plot(results: Sequence[Result], out: str) -> None:
    """Draws throughput against accuracy, and how many times as fast as timm's own each way is.

    Args:
        results: Of `bench`; those of the first batch and image size are drawn.
        out: File to write; it appears whole or not at all.

    Raises:
        ValueError: If matplotlib is missing.
    """
    shown = [r for r in results if (r.batch, r.size) == (results[0].batch, results[0].size)]
    ways = list(dict.fromkeys((r.way, r.dtype) for r in shown))
    colours = {way: f'C{i}' for i, way in enumerate(ways)}
    models = list(dict.fromkeys(r.model for r in shown))
    figure = new_figure(12, 1.8 + 1.1 * len(models))
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.4))
    for model in models:
        of_model = [r for r in shown if r.model == model]
        weights = next((each for name, each in WEIGHTS.items() if name.split('.')[0] == model), None)
        if weights is None or weights.top5 is None:  # not of ImageNet
            continue
        area = ARCHS[model].params / 2e5
        for r in of_model:
            left.scatter(r.images_per_second, weights.top1, area, colours[r.way, r.dtype], alpha=0.6, linewidths=0)
        fastest = max(r.images_per_second for r in of_model)
        left.annotate(model, (fastest, weights.top1), (0, 9), textcoords='offset points', fontsize=8, ha='right')
    left.set(xlabel='images per second', ylabel='ImageNet top-1, %', title='Throughput and accuracy; area: parameters')
    left.margins(0.15)
    height = 0.8 / len(ways)
    for i, way in enumerate(ways):
        ratios = {models.index(r.model): r.ratio for r in shown if (r.way, r.dtype) == way and r.ratio}
        places = [row + (i - (len(ways) - 1) / 2) * height for row in ratios]
        bars = right.barh(places, list(ratios.values()), height, color=colours[way], label=', '.join(way))
        right.bar_label(bars, fmt='%.2f', fontsize=7, padding=2)
    right.axvline(1, color='black', linewidth=0.8)
    right.set_yticks(range(len(models)), models)
    right.invert_yaxis()
    right.set(xlabel="throughput, times timm's own", title=f'Batch {shown[0].batch}, {shown[0].size} x {shown[0].size}')
    figure.legend(*right.get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8)
    replace_file(out, lambda path: figure.savefig(path, dpi=120))


def plot_growth(parts: dict[str, list[Result]], out: str) -> None:
    """Draws the time of an image over scale, batch size and image size, a panel for each part of `growth`.

    Args:
        parts: Of `growth`.
        out: File to write; it appears whole or not at all.

    Raises:
        ValueError: If matplotlib is missing.
    """
    figure = new_figure(11, 3.8)
    panels = figure.subplots(1, len(parts))
    for panel, (part, results) in zip(panels, parts.items()):
        for way in dict.fromkeys((r.way, r.dtype) for r in results):
            points = [
                (ARCHS[r.model].args['scale'] if part == 'scale' else getattr(r, part), r.milliseconds / r.batch)
                for r in results
                if (r.way, r.dtype) == way
            ]
            panel.plot(*zip(*sorted(points)), marker='o', label=', '.join(way))
        panel.set(xlabel=GROWTH[part], ylabel='milliseconds for an image', xticks=[place for place, _ in points])
        panel.set_ylim(bottom=0)
    figure.legend(*panels[0].get_legend_handles_labels(), loc='outside lower center', ncols=4, fontsize=8)
    replace_file(out, lambda path: figure.savefig(path, dpi=120))
