"""bench refuses to compare ways with different outputs, and reports speed relative to timm's own models."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from timm_res2net.__main__ import main
from timm_res2net.deploy.bench import (
    MODELS,
    Result,
    Way,
    bench,
    inference_ways,
    make_ours,
    measure,
    require_agreement,
    run_eager,
    run_exported,
    run_optimized,
    training_ways,
)

CPU = torch.device('cpu')
ONE: dict[str, Any] = dict(models=['res2net50d'], batches=[2], sizes=[32], dtypes=[], against=['timm'])
ONE |= dict(train=False, device=CPU, rounds=3)
make_tiny = partial(make_ours, 'test_res2net')


def test_results_are_medians_and_ratios_to_timm(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {'timm': [0.4, 0.2, 0.9], 'timm_res2net, as it is': [0.1] * 3, 'timm_res2net, fused': [0.2, 0.1, 0.3]}

    def measured(ways: list[Way], shape: tuple[int, ...], *options: Any) -> Any:
        assert shape == (2, 3, 32, 32)
        return {way: seconds[way.name] for way in ways}, dict.fromkeys(ways, 7)

    monkeypatch.setattr('timm_res2net.deploy.bench.measure', measured)
    theirs, ours, fused = bench(**ONE)
    assert theirs == Result('res2net50d', 2, 32, 'timm', 'float32', 400.0, 350.0, 5.0, 1.0, 7)
    assert ours == Result('res2net50d', 2, 32, 'timm_res2net, as it is', 'float32', 100.0, 0.0, 20.0, 4.0, 7)
    assert (fused.milliseconds, fused.ratio) == (200.0, 2.0)


@pytest.mark.parametrize(
    ('against', 'dtype', 'added'),
    [
        (['openvino'], 'float32', ['timm_res2net, OpenVINO', 'timm, OpenVINO']),
        (['openvino', 'onnxruntime'], 'int8', ['timm_res2net, OpenVINO', 'timm_res2net, ONNX']),
        (['onnxruntime'], 'bfloat16', []),
    ],
)
def test_against_adds_ways(against: list[str], dtype: str, added: list[str]) -> None:
    plain = [way.name for way in inference_ways('res2net50d', [dtype], ['timm'])]
    assert [way.name for way in inference_ways('res2net50d', [dtype], against)] == plain + added


def test_model_that_timm_lacks_is_measured_without_timm() -> None:
    for ways in (training_ways('test_res2net', ['float32']), inference_ways('test_res2net', ['float32'], ['openvino'])):
        assert ways
        assert all(way.name.startswith('timm_res2net') for way in ways)


@pytest.mark.parametrize('ours', [np.array([1.1, 2.0]), np.array([1.0, np.nan])])
def test_ways_whose_outputs_differ_are_refused(ours: Any) -> None:
    ways = [Way('res2net50d', name, 'float32', print) for name in ('timm', 'timm_res2net, fused')]
    require_agreement(dict(zip(ways, [np.array([1.0, 2.0]), np.array([1.0, 2.0001])])))
    with pytest.raises(ValueError, match=r'^res2net50d \(timm_res2net, fused, float32\) differs by .* from timm$'):
        require_agreement(dict(zip(ways, [np.array([1.0, 2.0]), ours])))


@pytest.mark.slow
def test_way_that_fails_in_its_process_is_named() -> None:
    way = Way('res2net50d', 'timm', 'float32', divmod)
    with pytest.raises(ValueError, match=r'cannot measure res2net50d \(timm, float32\): unsupported operand'):
        measure([way], (1, 3, 32, 32), False, CPU, 1)


@pytest.mark.filterwarnings('ignore')  # exporters warn about their own internals
@pytest.mark.parametrize(
    'prepare',
    [
        partial(run_eager, make_tiny),
        partial(run_optimized, make_tiny, False),
        pytest.param(partial(run_exported, make_tiny, '.pt2'), marks=pytest.mark.slow),
    ],
    ids=lambda prepare: prepare.func.__name__,
)
def test_every_way_computes_what_the_model_does(prepare: Callable[..., Any]) -> None:
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(prepare(x, 'float32')().detach(), make_tiny()(x).detach(), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ('arguments', 'problem'),
    [
        (dict(models=['res2net50']), "no model 'res2net50' in this package. Did you mean res2next50"),
        (dict(against=['timm', 'tensorrt']), 'unknown against=tensorrt. Choose from timm, openvino, onnxruntime'),
        (dict(against=['timm', 'openvino'], train=True), 'measure openvino: only for inference on the CPU'),
        (dict(against=['onnxruntime'], device=torch.device('meta')), 'measure onnxruntime: only for inference on the'),
        (dict(dtypes=['int8'], train=True), 'measure int8: only for inference on the CPU'),
    ],
    ids=str,
)
def test_invalid_arguments_raise_value_error(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        bench(**{**ONE, **arguments})


@pytest.mark.slow
def test_command_measures_in_processes_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = '--train --models test_res2net --size 32 --batch 2 --dtype float32 --rounds 1'
    assert main(['bench', *arguments.split(), '--json', str(tmp_path / 'speed.json')]) == 0
    document = json.loads((tmp_path / 'speed.json').read_text())
    assert [each['way'] for each in document['training']] == ['timm_res2net', 'timm_res2net, checkpointing']
    assert all(each['ratio'] is None for each in document['training'])  # timm has no such model
    assert document['environment']['torch'] == torch.__version__.partition('+')[0]
    assert 'timm_res2net, checkpointing' in capsys.readouterr().out


def test_command_prints_a_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def measured(models: Any, **options: Any) -> list[Result]:
        assert (models, options['rounds'], options['dtypes']) == (MODELS, 3, ['float32', 'bfloat16'])
        return [Result('res2net50d', 8, 224, 'timm', 'float32', 1.0, 0.1, 8000.0, 1.0, 2_000_000)]

    monkeypatch.setattr('timm_res2net.commands.bench.bench', measured)
    assert main(['bench', '--rounds', '3']) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.split() == ['res2net50d', '8', '224', 'timm', 'float32', '1.0', '0.1', '8000.0', '1.00', '2']
