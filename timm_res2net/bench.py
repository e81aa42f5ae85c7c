"""How fast models are beside timm's own: all of them in one run, in turns, on the machine that asks."""

import ctypes
import logging
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

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from .files import replace_file
from .inference import compiled_by_openvino, optimize
from .predict import new_figure
from .res2net import ARCHS, WEIGHTS, timms_own

__all__ = ['MODELS', 'OPPONENTS', 'Counter', 'Result', 'bench', 'environment', 'growth', 'plot', 'saved_bytes']

_logger = logging.getLogger(__name__)

Run = Callable[[], Any]

MODELS = 'res2net50_26w_4s', 'res2net50d', 'res2next50', 'dla60_res2net'
OPPONENTS = 'timm', 'openvino', 'onnxruntime'
TIMM = 'timm'  # as people run it: eager, float32, NCHW; ratios are to this
OURS = 'timm_res2net'
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


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without images, parameters and buffers."""
    saved: dict[int, Any] = {}  # whose memory is held, so that nothing else gets its address

    def keep(tensor: Tensor) -> Tensor:
        saved.update(storages_of(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    del output
    known = storages_of([x, *model.parameters(), *model.buffers()])
    return sum(saved[pointer].nbytes() for pointer in saved.keys() - known.keys())


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
    first_ratio: float | None  # the same of first calls, after another's
    share_of_peak: float | None  # of the machine's matrix products in this data type
    operators: int | None  # of ATen, where PyTorch runs them one by one
    peak_memory: int | None  # bytes beyond weights and input, where they can be known


@dataclass(frozen=True)
class Way:
    """One way to run a model: its name, its data type, the call, and whether PyTorch runs its operators one by one."""

    name: str
    dtype: torch.dtype
    run: Run
    eager: bool = False
    torch: bool = True


def ways_to_infer(name: str, x: Tensor, dtypes: Sequence[torch.dtype], against: Sequence[str]) -> list[Way]:
    """Makes everything that is to be compared in inference, with the same weights; timm's own comes first."""
    torch.manual_seed(0)
    ours = timm.create_model(name).to(x.device).eval()
    own = timms_own(name)
    theirs = own().to(x.device).eval() if own else ours
    theirs.load_state_dict(ours.state_dict(), strict=False)  # timm's DLA has tensors that it never uses
    ways = [Way(TIMM, torch.float32, partial(theirs, x), eager=True)] if own else []
    ways.append(Way(f'{OURS}, as it is', torch.float32, partial(ours, x), eager=True))
    ways.append(Way(f'{OURS}, fused', torch.float32, partial(optimize(ours, x, compile=False), x), eager=True))
    for dtype in dtypes:
        ways.append(Way(f'{OURS}, optimized', dtype, partial(optimize(ours, x, dtype=dtype), x)))
        if 'openvino' in against:
            by_openvino = optimize(ours, x, dtype=dtype, backend='openvino')
            ways.append(Way(f'{OURS}, OpenVINO', dtype, partial(by_openvino, x), torch=False))
            converted = compiled_by_openvino(theirs, x, dtype)
            ways.append(Way(f'{TIMM}, OpenVINO', dtype, partial(converted, x.numpy()), torch=False))
    if 'onnxruntime' in against:
        ways.append(Way(f'{TIMM}, onnxruntime', torch.float32, by_onnxruntime(theirs, x), torch=False))
    return ways


def by_onnxruntime(model: nn.Module, x: Tensor) -> Run:
    """Exports a model and has onnxruntime run it."""
    import onnxruntime

    with TemporaryDirectory() as folder:
        file = f'{folder}/model.onnx'
        torch.onnx.export(model, (x,), file, dynamo=True, external_data=False, verbose=False)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry('session.intra_op.allow_spinning', '0')  # not into the turn of others
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return partial(session.run, None, feed)


def ways_to_train(name: str, x: Tensor, dtypes: Sequence[torch.dtype]) -> list[Way]:
    """Makes steps of training, channels last: forward, backward and an update by SGD; timm's own comes first."""
    x = x.to(memory_format=torch.channels_last)
    own = timms_own(name)
    makers: dict[str, Callable[[], nn.Module]] = {TIMM: own} if own else {}
    makers |= {OURS: partial(timm.create_model, name), f'{OURS}, checkpointing': partial(checkpointing, name)}
    ways = []
    for dtype in dtypes:
        for label, make in makers.items():
            torch.manual_seed(0)
            model: Any = make().to(x.device).train()
            ways.append(
                Way(label, dtype, training_step(model.to(memory_format=torch.channels_last), x, dtype), eager=True)
            )
    return ways


def training_step(model: nn.Module, x: Tensor, dtype: torch.dtype) -> Run:
    """Makes a step of training of a model: forward, backward and an update by SGD."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long, device=x.device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        return loss

    return step


def checkpointing(name: str) -> nn.Module:
    """Makes a model with gradient checkpointing."""
    model = timm.create_model(name)
    model.set_grad_checkpointing()
    return model


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

    All ways to run a model are made first, and have to compute the same. Then each has a turn in each round, in an
    order of chance, so that what else the machine does meets all alike. A turn is two calls, of which the second
    counts. The first one finds caches and memory as another has left them; only its ratio is told.

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
        ValueError: If a name is not known, or two ways to run a model don't agree.
    """
    device = torch.device(device)
    if unknown := sorted(set(models) - ARCHS.keys()):
        raise ValueError(f'not models of this package: {", ".join(unknown)}; `timm-res2net list` shows them')
    if device.type != 'cpu' and set(against) - {'timm'}:
        raise ValueError(f'{" and ".join(set(against) - {"timm"})} can be measured on the CPU only')
    torch.backends.cudnn.benchmark = True
    plans = [(name, batch, size) for name in models for size in sizes for batch in batches]
    peaks = {dtype: peak(dtype, device) for dtype in {torch.float32, *dtypes}}
    results = []
    with tqdm(total=len(plans) * rounds, unit='round', disable=None, leave=False) as bar:
        for name, batch, size in plans:
            bar.set_description(f'{name}, {batch} x {size} px')
            x = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
            ways = ways_to_train(name, x, dtypes) if train else ways_to_infer(name, x, dtypes, against)
            with torch.set_grad_enabled(train):
                results += compare(name, x, ways, peaks, train, rounds, bar)
            torch.compiler.reset()  # lets go of the models
    return results


def compare(
    name: str, x: Tensor, ways: Sequence[Way], peaks: dict[torch.dtype, float], train: bool, rounds: int, bar: Any
) -> list[Result]:
    """Measures ways to run a model; arguments as in `bench`."""
    if not train:
        require_agreement(name, ways)
    first: list[list[float]] = [[] for _ in ways]
    second: list[list[float]] = [[] for _ in ways]
    for _ in range(rounds):
        for i in random.sample(range(len(ways)), len(ways)):
            for times in (first, second):
                times[i].append(timed(ways[i].run, x.device))
        bar.update()
    flops = flops_of(name, x) * (3 if train else 1)  # a step: forward, gradients of inputs and of weights
    timms = {way.dtype: i for i, way in enumerate(ways) if way.name == TIMM}
    results = []
    for i, way in enumerate(ways):
        seconds = statistics.median(second[i])
        baseline = timms.get(way.dtype if train else torch.float32)
        ratios = [None if baseline is None else ratio(times[baseline], times[i]) for times in (second, first)]
        result = Result(
            model=name,
            batch=x.shape[0],
            size=x.shape[2],
            way=way.name,
            dtype=str(way.dtype).removeprefix('torch.'),
            milliseconds=round(seconds * 1e3, 2),
            spread=round(quartiles(second[i]) * 1e3, 2),
            images_per_second=round(x.shape[0] / seconds, 2),
            ratio=ratios[0],
            first_ratio=ratios[1],
            share_of_peak=round(flops / seconds / peaks[way.dtype], 3),
            operators=operators(way.run) if way.eager else None,
            peak_memory=peak_memory(way.run, x.device) if way.torch else None,
        )
        results.append(result)
    return results


def require_agreement(name: str, ways: Sequence[Way]) -> None:
    """Raises a ValueError if two ways to run a model compute different things."""
    first: Tensor | None = None
    for way in ways:
        output = way.run()
        if not isinstance(output, Tensor):  # one array, in what a runtime returns
            output = torch.from_numpy(output[0])
        first = output if first is None else first
        difference = ((output - first).abs().max() / first.abs().max()).item()
        if not difference < TOLERANCES[way.dtype]:
            raise ValueError(
                f'{name} by {way.name} in {way.dtype} is {difference:.1e} off what {ways[0].name} computes'
            )


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


def ratio(these: Sequence[float], those: Sequence[float]) -> float:
    """How many times as long these take as those, by their medians."""
    return round(statistics.median(these) / statistics.median(those), 3)


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


def flops_of(name: str, x: Tensor) -> int:
    """Floating-point operations of convolutions and classifier, two for each multiply-add."""
    with torch.device('meta'), FlopCounterMode(display=False) as counter, torch.no_grad():
        timm.create_model(name).eval()(torch.empty(x.shape))
    return counter.get_total_flops()


def operators(run: Run) -> int:
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


def growth(device: str | torch.device = 'cpu', rounds: int = 10) -> dict[str, list[Result]]:
    """Measures how the cost of ours and timm's grows with scale, batch and resolution, in float32."""
    options: dict[str, Any] = dict(dtypes=(torch.float32,), device=device, rounds=rounds)
    return {
        'scale': bench(['res2net50_48w_2s', 'res2net50_26w_4s', 'res2net50_26w_6s', 'res2net50_26w_8s'], **options),
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
