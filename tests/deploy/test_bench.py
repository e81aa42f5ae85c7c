"""bench compares only ways that compute the same, and its results are ratios to timm's own."""

import json
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._functorch import config

import timm_res2net.deploy.bench
from timm_res2net.__main__ import main
from timm_res2net.deploy.bench import (
    BUDGETS,
    MODELS,
    Result,
    Run,
    bench,
    inference_ways,
    make_ours,
    run_exported,
    run_optimized,
    run_step,
    training_ways,
)

ONE: dict[str, Any] = dict(batches=(1,), sizes=(32,), rounds=2)


class InlineExecutor:
    """Stands in for a worker process, which takes seconds to start."""

    def __init__(self, *args: Any) -> None:
        self.run: Any = None

    def __enter__(self) -> 'InlineExecutor':
        return self

    def __exit__(self, *error: Any) -> None: ...

    def submit(self, function: Callable[..., Any], *args: Any) -> Future[Any]:
        timm_res2net.deploy.bench.run = self.run
        future: Future[Any] = Future()
        with torch.set_grad_enabled(torch.is_grad_enabled()):  # `start` sets it for its process
            future.set_result(function(*args))
        self.run = timm_res2net.deploy.bench.run
        return future


@pytest.fixture
def inline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timm_res2net.deploy.bench, 'run', None, raising=False)
    monkeypatch.setattr(timm_res2net.deploy.bench, 'ProcessPoolExecutor', InlineExecutor)
    monkeypatch.setattr('timm_res2net.deploy.bench.signal.signal', lambda *args: None)
    monkeypatch.setattr(torch.backends.cudnn, 'benchmark', False)


@pytest.mark.filterwarnings('default')
@pytest.mark.usefixtures('inline')
def test_inference_results_are_ratios_to_timm() -> None:
    results = bench(['res2net50_26w_4s'], dtypes=(), **ONE)
    assert [each.way for each in results] == ['timm', 'timm_res2net, as it is', 'timm_res2net, fused']
    theirs, ours, _ = results
    assert theirs.ratio == 1
    assert ours.ratio == pytest.approx(theirs.milliseconds / ours.milliseconds, rel=0.01)
    assert ours.images_per_second == pytest.approx(1000 / ours.milliseconds, rel=0.01)
    assert all(each.peak_memory is None or each.peak_memory >= 0 for each in results)


@pytest.mark.parametrize(
    ('ways', 'against', 'dtypes', 'added'),
    [
        (inference_ways, ['openvino'], ['float32'], ['timm_res2net, OpenVINO', 'timm, OpenVINO']),
        (inference_ways, ['openvino', 'onnxruntime'], ['int8'], ['timm_res2net, OpenVINO', 'timm_res2net, ONNX']),
        (inference_ways, ['onnxruntime'], ['bfloat16'], []),
        (training_ways, ['inductor'], ['float32'], [f'timm_res2net, compiled, budget {x}' for x in BUDGETS]),
    ],
)
def test_against_adds_ways(ways: Any, against: list[str], dtypes: list[str], added: list[str]) -> None:
    types = [getattr(torch, name) for name in dtypes]
    plain = [way.name for way in ways(True, types, ['timm'])]
    assert [way.name for way in ways(True, types, against)] == plain + added
    assert not any(way.name.startswith('timm,') or way.name == 'timm' for way in ways(False, types, against))


@pytest.mark.slow
def test_compiled_training_step_keeps_within_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, 'compile', partial(torch.compile, backend='aot_eager'))  # inductor takes a minute
    x, seen = torch.randn(2, 3, 32, 32), []

    def mean(logits: Tensor, target: Tensor) -> Tensor:
        seen.append(config.activation_memory_budget)
        return logits.mean()

    monkeypatch.setattr(F, 'cross_entropy', mean)
    compiled, plain = (run_step(make_ours, 'test_res2net', x, torch.float32, budget=each)() for each in (0.5, None))
    assert seen == [0.5, 1.0]
    torch.testing.assert_close(compiled, plain)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', ['torch', pytest.param('openvino', marks=pytest.mark.slow)])
def test_exported_way_computes_what_the_model_does(backend: str) -> None:
    pytest.importorskip(backend)
    x = torch.randn(2, 3, 32, 32)
    found = run_exported(backend, make_ours, 'test_res2net', x, torch.float32)()
    torch.testing.assert_close(found, make_ours('test_res2net')(x).detach(), rtol=0, atol=1e-4)


def make_shifted(compile: bool, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    return lambda: run_optimized(compile, name, x, dtype)() + 0.1


def fail(compile: bool, name: str, x: Tensor, dtype: torch.dtype) -> Run:
    raise KeyError('no such thing')


@pytest.mark.usefixtures('inline')
@pytest.mark.parametrize(
    ('replacement', 'problem'),
    [
        (make_shifted, 'timm_res2net, fused in float32 differs by .* from timm_res2net, as it is'),
        (fail, "cannot measure timm_res2net, fused in float32: 'no such thing'"),
    ],
)
def test_way_with_other_outputs_or_without_any_raises_value_error(
    replacement: Any, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timm_res2net.deploy.bench, 'run_optimized', replacement)
    with pytest.raises(ValueError, match=problem):
        bench(['test_res2net'], dtypes=(), **ONE)


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        (dict(models=['res2net50']), "no model 'res2net50' in this package. Did you mean res2next50"),
        (dict(against=('timm', 'tensorrt')), 'unknown against=tensorrt. Choose from timm, openvino'),
        (dict(against=('timm', 'inductor')), 'inductor is for training'),
        (dict(against=('timm', 'openvino'), train=True), 'openvino is for inference on the CPU'),
        (dict(against=('onnxruntime',), device='meta'), 'onnxruntime is for inference on the CPU'),
        (dict(dtypes=(torch.int8,), train=True), 'int8 is for inference on the CPU'),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_raise_value_error(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bench(**{'models': ['test_res2net'], **arguments})


@pytest.mark.slow
def test_command_measures_in_processes_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = '--models test_res2net --size 32 --batch 1 --dtype float32 --rounds 1'
    assert main(['bench', *arguments.split(), '--json', str(tmp_path / 'speed.json')]) == 0
    document = json.loads((tmp_path / 'speed.json').read_text())
    ways = [each['way'] for each in document['inference']]
    assert ways == ['timm_res2net, as it is', 'timm_res2net, fused', 'timm_res2net, optimized']
    assert document['environment']['torch'] == torch.__version__.partition('+')[0]
    assert all(each['ratio'] is None for each in document['inference'])  # timm has no such model
    assert 'timm_res2net, optimized' in capsys.readouterr().out


def test_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(models: Any, batches: Any, sizes: Any, **options: Any) -> list[Result]:
        assert (models, options['rounds'], options['dtypes']) == (MODELS, 3, [torch.float32, torch.bfloat16])
        return [Result('res2net50d', 8, 224, 'timm', 'float32', 1.0, 0.1, 8000.0, 1.0, 2_000_000)]

    monkeypatch.setattr('timm_res2net.commands.bench.bench', measured)
    assert main(['bench', '--rounds', '3']) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split() == ['res2net50d', '8', '224', 'timm', 'float32', '1.0', '0.1', '8000.0', '1.00', '2']


@pytest.mark.parametrize(('arguments', 'named'), [('--dtype int4', 'int4'), ('--batch 0', '0')])
def test_command_with_a_wrong_argument_exits_with_its_value(
    arguments: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['bench', *arguments.split()])
    assert named in capsys.readouterr().err
