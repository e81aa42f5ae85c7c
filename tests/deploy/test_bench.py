"""Counters are exact, compared models compute the same, and ours never does more work than timm's."""

import json
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from support import shallow, tiny
from torch import Tensor, nn
from torch._functorch import config

import timm_res2net.deploy.bench
from timm_res2net import fuse
from timm_res2net.__main__ import main
from timm_res2net.deploy.bench import (
    Counter,
    Plan,
    Result,
    Run,
    Way,
    bench,
    fastest,
    interrupts_held_back,
    keep_convolutions,
    ours_compiled_step,
    ours_eager,
    ours_step,
    peak,
    processor,
    storages_of,
    ways_to_train,
)
from timm_res2net.models.block import Bottle2neck
from timm_res2net.models.variants import ARCHS
from timm_res2net.res2net import timm_entrypoint
from timm_res2net.vision.figures import plot_bench

TIMMS = [name for name in ARCHS if timm_entrypoint(name)]


def test_counter_counts_operators_and_allocated_bytes() -> None:
    x = torch.ones(2, 5)
    for _ in range(2):
        with Counter() as counter:
            y = x + 1  # 40 bytes
            y.view(5, 2).relu_()  # a view, and in place
            torch.chunk(y, 5, dim=1)  # views
            torch.cat([x, y])  # 80 bytes
        assert (counter.operators, counter.allocated) == (5, 120)


def timms(name: str, **arguments: Any) -> nn.Module:
    """timm's own model."""
    entrypoint = timm_entrypoint(name)
    assert entrypoint is not None
    return entrypoint(**arguments)


def counted(model: nn.Module, x: Tensor, train: bool = False) -> tuple[int, int]:
    with Counter() as counter, torch.set_grad_enabled(train):
        model(x)
    return counter.operators, counter.allocated


@pytest.mark.parametrize('full', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', TIMMS)
def test_model_does_no_more_work_than_timm_and_fused_39_percent_less(name: str, full: bool, images: Tensor) -> None:
    arguments = {} if full else shallow(name)
    theirs, ours = timms(name, **arguments), timm.create_model(name, **arguments)
    for training in (True, False):
        pairs = zip(*(counted(model.train(training), images, training) for model in (ours, theirs)))
        assert all(mine <= timms for mine, timms in pairs)
    operators, allocated = counted(fuse(ours), images)
    timms_operators, timms_allocated = counted(theirs, images)
    assert operators < 0.61 * timms_operators
    assert allocated < 0.61 * timms_allocated


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'res2net50_14w_8s', 'res2net101_26w_4s', 'res2next50'])
def test_fuse_operator_count_follows_from_depth_and_scale(name: str, images: Tensor) -> None:
    blocks, scale = sum(ARCHS[name].args['layers']), ARCHS[name].args['scale']
    stem = 3  # convolution, activation, pool
    first = 8  # 1x1, 3x3 of all splits as one and their activations, 1x1, shortcut, sum, activation
    # Split; convolutions and activations; sums of the cascade; concatenation; 1x1 before and after, sum, activations.
    later = 1 + 2 * (scale - 1) + (scale - 2) + 1 + 5
    head = 4  # average, flatten, classifier and its transpose
    operators, _ = counted(fuse(timm.create_model(name).eval()), images)
    assert operators == stem + 4 * first + (blocks - 4) * later + head


def saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Bytes that a forward pass keeps for the backward pass, without images, parameters and buffers."""
    saved: dict[int, Any] = {}  # references keep the memory, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        saved.update(storages_of(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    del output
    known = storages_of([x, *model.parameters(), *model.buffers()])
    return sum(saved[pointer].nbytes() for pointer in saved.keys() - known.keys())


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'dla60_res2net'])
def test_training_saves_no_more_bytes_than_timm_and_a_third_with_checkpointing(name: str, images: Tensor) -> None:
    ours, theirs = timm.create_model(name, **shallow(name)).train(), timms(name, **shallow(name)).train()
    plain = saved_bytes(ours, images)
    assert 0 < plain <= saved_bytes(theirs, images)
    ours.set_grad_checkpointing()
    assert saved_bytes(ours, images) <= plain / 3


def test_saved_bytes_counts_outputs_of_activations_without_parameters() -> None:
    layers = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Sigmoid(), nn.Tanh())
    assert saved_bytes(layers, torch.ones(2, 4)) == 2 * 2 * 4 * 4  # what each activation returns, 32 bytes


def test_step_that_keeps_convolutions_has_the_same_gradients_and_norms(images: Tensor) -> None:
    plain, keeping = tiny().train(), tiny().train()
    for block in keeping.modules():
        if isinstance(block, Bottle2neck):
            block.forward = partial(keep_convolutions, block, block.forward)  # type: ignore[method-assign]
    for model in (plain, keeping):
        model(images).square().sum().backward()
    for ours, theirs in zip(keeping.parameters(), plain.parameters()):
        assert torch.equal(ours.grad, theirs.grad)
    torch.testing.assert_close(keeping.state_dict(), plain.state_dict(), rtol=0, atol=0)


@pytest.mark.slow
def test_training_step_compiles_without_graph_break(images: Tensor) -> None:
    torch._dynamo.reset()
    model: Any = tiny().train()
    torch.compile(model, fullgraph=True, backend='aot_eager')(images).sum().backward()  # type: ignore[no-untyped-call]
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    again: Any = tiny().train()
    again(images).sum().backward()
    for gradient, parameter in zip(gradients, again.parameters()):
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-4)


class InlineWorker:
    """Replaces the process of a worker, which takes seconds to start."""

    def __init__(self, way: Way, plan: Plan, device: torch.device) -> None:
        self.way, self.device = way, device
        self.train = plan.train
        with torch.set_grad_enabled(self.train):
            x = torch.ones(plan.batch, 3, plan.size, plan.size)
            self.run = way.make(plan.model, x, way.dtype)

    def end(self) -> None: ...

    def ask(self, question: Any = None) -> Any:
        with torch.set_grad_enabled(self.train):
            return self.run().detach() if question is None else question(self.run, self.device)


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_res2net.deploy.bench, 'Worker', InlineWorker)


@pytest.mark.usefixtures('inline')
def test_bench_inference_compares_with_timm() -> None:
    results = bench(['res2net50_26w_4s'], batches=(1,), sizes=(32,), dtypes=(), rounds=2)
    assert [each.way for each in results] == ['timm', 'timm_res2net, as it is', 'timm_res2net, fused']
    theirs, ours, fused = results
    assert theirs.ratio == 1
    assert ours.ratio == pytest.approx(theirs.milliseconds / ours.milliseconds, rel=0.01)
    assert ours.images_per_second == pytest.approx(1000 / ours.milliseconds, rel=0.01)
    assert ours.operators == theirs.operators
    assert fused.operators is not None
    assert theirs.operators is not None
    assert fused.operators < theirs.operators
    assert all(0 < each.share_of_peak < 1 for each in results)


@pytest.mark.slow
@pytest.mark.usefixtures('inline')
def test_bench_train_measures_timm_ours_and_checkpointing() -> None:
    results = bench(['res2net50_26w_4s'], batches=(2,), sizes=(32,), dtypes=(torch.float32,), train=True, rounds=1)
    ways = 'timm', 'timm_res2net', 'timm_res2net, checkpointing', 'timm_res2net, keeping convolutions'
    assert tuple(each.way for each in results) == ways
    assert results[0].operators == results[1].operators


@pytest.mark.slow
def test_bench_command_writes_json_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch._dynamo.reset()
    json_file, png = tmp_path / 'speed.json', tmp_path / 'speed.png'
    arguments = '--models test_res2net --size 32 --batch 1 --dtype float32 --rounds 1'
    assert main(['bench', *arguments.split(), '--json', str(json_file), '--plot', str(png)]) == 0
    document = json.loads(json_file.read_text())
    assert [each['way'] for each in document['inference']] == [
        'timm_res2net, as it is',
        'timm_res2net, fused',
        'timm_res2net, optimized',
    ]
    assert document['environment']['torch'] == torch.__version__.partition('+')[0]
    assert all(each['ratio'] is None for each in document['inference'])  # timm has no such model
    assert 'timm_res2net, optimized' in capsys.readouterr().out
    assert png.read_bytes().startswith(b'\x89PNG')


def test_plot_bench_writes_file(tmp_path: Path) -> None:
    some = dict(batch=1, size=32, milliseconds=1.0, spread=0.1, share_of_peak=0.5)
    more = dict(operators=1, peak_memory=None)
    results = [
        Result(model=model, way=way, dtype='float32', images_per_second=speed, ratio=ratio, **some, **more)
        for model in ('res2net50d', 'test_res2net')
        for way, speed, ratio in (('timm', 10.0, 1.0), ('timm_res2net, fused', 20.0, 2.0))
    ]
    plot_bench(results, str(tmp_path / 'a.png'))
    assert (tmp_path / 'a.png').stat().st_size > 10_000


def shifted(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return lambda: ours_eager(name, x, dtype)() + 0.1


def failing(name: str, x: Tensor, dtype: torch.dtype) -> Run:
    raise KeyError('no such thing')


@pytest.mark.usefixtures('inline')
def test_bench_way_with_other_output_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_res2net.deploy.bench, 'ours_fused', shifted)
    problem = r'timm_res2net, fused in torch\.float32 is .* off what timm_res2net, as it is computes'
    with pytest.raises(ValueError, match=problem):
        bench(['test_res2net'], batches=(1,), sizes=(32,), dtypes=(), rounds=1)


@pytest.mark.slow
def test_bench_way_that_fails_in_its_process_raises_value_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_res2net.deploy.bench, 'ours_fused', failing)
    problem = r"timm_res2net, fused in torch\.float32 can not be measured: 'no such thing'"
    with pytest.raises(ValueError, match=problem):
        bench(['test_res2net'], batches=(1,), sizes=(32,), dtypes=(), rounds=1)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_peak_is_found_in_seconds_and_no_convolution_is_beyond_it(dtype: torch.dtype) -> None:
    start, device = time.perf_counter(), torch.device('cpu')
    found = peak(dtype, device)
    assert time.perf_counter() - start < 20  # a matrix product of 2048 in float16 alone takes longer on some machines
    x = torch.randn(4, 256, 28, 28).to(dtype, memory_format=torch.channels_last)
    weight = torch.randn(256, 256, 3, 3).to(dtype, memory_format=torch.channels_last)
    seconds = fastest(partial(F.conv2d, x, weight, padding=1), device)
    assert 2 * x.numel() * 256 * 9 / seconds < 3 * found  # with other load on the machine


def test_bench_train_against_inductor_adds_budgets_of_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    names = [way.name for way in ways_to_train(True, [torch.float32], ('timm', 'inductor'))]
    assert names[4:] == [f'timm_res2net, compiled, budget {budget}' for budget in (1.0, 0.7, 0.5, 0.3)]
    with pytest.raises(ValueError, match='inductor is for training'):
        bench(['test_res2net'], against=('timm', 'inductor'))
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))  # inductor takes a minute
    x, seen = torch.randn(2, 3, 32, 32), []

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(config.activation_memory_budget)
        return logits.mean()

    monkeypatch.setattr(F, 'cross_entropy', mean)
    loss = ours_compiled_step(0.5, 'test_res2net', x, torch.float32)()
    assert seen == [0.5]
    torch.testing.assert_close(loss, ours_step('test_res2net', x, torch.float32)())


@pytest.mark.slow
def test_peak_of_8_bits_is_of_the_order_of_that_of_float32() -> None:
    eight, whole = (peak(dtype, torch.device('cpu')) for dtype in (torch.int8, torch.float32))
    assert 0.1 * whole < eight < 20 * whole  # 4 times with VNNI, fewer where instructions for it lack


def test_processor_names_the_instruction_sets_that_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    text = 'processor\t: 0\nmodel name\t: Fast One\nflags\t\t: fpu avx2 avx512_vnni amx_int8 sse\n\n'
    monkeypatch.setattr(Path, 'read_text', lambda path: text)
    assert processor().endswith(' x Fast One avx2 avx512_vnni amx_int8')


def test_bench_training_against_others_raises_value_error() -> None:
    with pytest.raises(ValueError, match='openvino can not train'):
        bench(['test_res2net'], against=('timm', 'openvino'), train=True)


def test_bench_against_an_unknown_opponent_raises_value_error() -> None:
    with pytest.raises(ValueError, match='against=tensorrt is not known; choose from timm, openvino'):
        bench(['test_res2net'], against=('timm', 'tensorrt'))


def test_bench_training_in_8_bits_raises_value_error() -> None:
    with pytest.raises(ValueError, match='int8 is for inference on the CPU'):
        bench(['test_res2net'], dtypes=(torch.int8,), train=True)


def test_process_started_with_interrupts_held_back_ignores_them() -> None:
    with interrupts_held_back():
        command = [sys.executable, '-c', 'import os, signal; os.kill(os.getpid(), signal.SIGINT); print("goes on")']
        done = subprocess.run(command, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ('goes on\n', '')
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())


def test_bench_growth_varies_scale_batch_and_size(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def measured(models: Any, batches: Any = (8,), sizes: Any = (224,), **options: Any) -> list[Result]:
        plans = [(model, batch, size) for model in models for batch in batches for size in sizes]
        rest = dict(spread=0.0, images_per_second=1.0, ratio=1.0, share_of_peak=0.5, operators=1, peak_memory=None)
        return [Result(*plan, way='timm', dtype='float32', milliseconds=1.0, **rest) for plan in plans]

    monkeypatch.setattr(timm_res2net.deploy.bench, 'bench', measured)
    png = tmp_path / 'growth.png'
    assert main(['bench', '--growth', '--plot', str(png), '--json', str(tmp_path / 'a.json')]) == 0
    assert png.stat().st_size > 10_000
    parts = json.loads((tmp_path / 'a.json').read_text())
    assert sorted(ARCHS[each['model']].args['scale'] for each in parts['scale']) == [4, 6, 8]
    assert len({each['batch'] for each in parts['batch']}) > 2
    assert len({each['size'] for each in parts['size']}) > 2
    assert 'res2net50_26w_8s' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('arguments', 'named'), [('--against timm,tensorrt', 'tensorrt'), ('--dtype int4', 'int4'), ('--batch 0', '0')]
)
def test_bench_command_wrong_argument_exits_with_its_value(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['bench', *arguments.split()])
    assert named in capsys.readouterr().err


def test_bench_command_unknown_model_prints_its_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(['bench', '--models', 'res2net50']) == 2
    assert (
        'there is no model res2net50 in this package; did you mean res2next50 or res2net50d' in capsys.readouterr().err
    )
