"""The study compares networks of equal size, continues where it stopped, and computes exact statistics."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import ROOT

from timm_res2net.models.variants import ASSETS
from timm_res2net.recipes import multi_scale, study
from timm_res2net.recipes.study import BASE_WIDTHS, PARTS, SIZES, accuracy, count_parameters, difference, network, table


def test_networks_have_equal_parameter_counts_and_different_scales() -> None:
    networks = {scale: network(scale, num_classes=10) for scale in BASE_WIDTHS}
    plain, *counts = map(count_parameters, networks.values())
    assert all(count == pytest.approx(plain, rel=0.01) for count in counts)
    assert {scale: each.get_submodule('layer1.1').scale for scale, each in networks.items()} == {1: 1, 4: 4, 8: 8}


def test_accuracy_is_computed_for_each_range_of_sizes_that_occurs() -> None:
    sizes = np.array([14, 24, 25, 45, 46, 84])
    evaluation = SimpleNamespace(predictions=np.array([100.0, 0, 100, 100, 0, 0]))
    assert accuracy(sizes, SIZES['val'], evaluation) == dict(top1=50, small=50, medium=100, large=0)
    assert accuracy(sizes, SIZES['unseen'], evaluation) == pytest.approx(dict(smaller=200 / 3, larger=100 / 3))
    assert 'large' not in accuracy(sizes[:5] - 1, SIZES['val'], SimpleNamespace(predictions=np.zeros(5)))


def test_differences_are_paired_by_seed() -> None:
    values = {1: (50.0, 60.0, 70.0), 4: (51.0, 62.0, 73.0), 8: (50.0, 60.0, 70.0)}
    runs = [
        dict(part='fashion_mnist', scale=scale, seed=seed, params=1000 + scale, mmacs=2.0, radius=3.0, top1=value)
        for scale, each in values.items()
        for seed, value in enumerate(each)
    ]
    mean, half = difference(runs, 'fashion_mnist', 4, 'top1')
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.30265 / 3**0.5, rel=1e-4)  # Student's t of two degrees of freedom
    lines = table(runs, 'fashion_mnist')
    assert lines[2] == '| 1 | 1,001 | 2.0 | 3.00 ± 0.00 | 60.00 ± 5.77 |'
    assert lines[5] == '| 4 - 1 |  |  |  | +2.00 [-0.48, +4.48] |'


def test_committed_tables_match_the_committed_runs() -> None:
    document = json.loads((ASSETS / 'study.json').read_text())
    tables = (ASSETS / 'study.md').read_text()
    for name, part in PARTS.items():
        runs = [each for each in document['runs'] if each['part'] == name]
        pairs = [(each['scale'], each['seed']) for each in runs]
        assert pairs == [(scale, seed) for scale in BASE_WIDTHS for seed in range(part.seeds)]
        assert {each['epochs'] for each in runs} == {part.epochs}
        assert '\n'.join([name, '', *table(document['runs'], name)]) + '\n' in tables


def test_readme_has_the_version_and_the_gains_of_the_study() -> None:
    document = json.loads((ASSETS / 'study.json').read_text())
    readme = (ROOT / 'timm_res2net' / 'recipes' / 'README.md').read_text()
    assert f'made by version {document["environment"]["timm_res2net"]}' in readme
    for scale in (4, 8):
        assert f'{difference(document["runs"], "sizes", scale, "top1")[0]:+.2f}' in readme


@pytest.mark.slow
@pytest.mark.parametrize('part', PARTS)
def test_study_runs_only_what_is_missing(
    part: str, fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(study, 'PARTS', {part: replace(PARTS[part], epochs=1, seeds=2)})
    monkeypatch.delitem(BASE_WIDTHS, 8)
    monkeypatch.setattr(study, 'CANVASES', {'train': 64, 'val': 32, 'unseen': 32})
    monkeypatch.setattr(multi_scale, 'COUNTS', {'train': 16, 'val': 8, 'unseen': 8})
    arguments = [str(tmp_path), '--fashion-mnist', str(fashion_mnist)]
    study.main(arguments)
    shown = capsys.readouterr().out.partition(f'{part}\n')[2]
    lost, kept = (tmp_path / f'{part}_scale4_seed{seed}.json' for seed in (0, 1))
    first, before = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    assert first['params'] == pytest.approx(622_656, rel=0.02)  # a detector sees three channels
    assert first['radius'] > 3
    lost.unlink()
    study.main(arguments)
    assert capsys.readouterr().out.partition(f'{part}\n')[2] == shown
    assert kept.stat().st_mtime_ns == before
    assert json.loads(lost.read_text()) == first
    runs: list[dict[str, Any]] = json.loads((tmp_path / 'study.json').read_text())['runs']
    assert [(run['scale'], run['seed']) for run in runs] == [(1, 0), (4, 0), (1, 1), (4, 1)]
    assert PARTS[part].metrics.keys() <= runs[0].keys()
