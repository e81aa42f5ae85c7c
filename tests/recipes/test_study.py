"""The study compares networks of equal size and resumes runs, and its statistics are exact."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT

from timm_res2net.models.variants import ASSETS
from timm_res2net.recipes import study
from timm_res2net.recipes.study import (
    BASE_WIDTHS,
    PARTS,
    SIZES,
    UNSEEN_SIZES,
    Items,
    accuracy,
    count_parameters,
    difference,
    mean_and_error,
    network,
    plot,
    table,
)


def record(part: str, scale: int, seed: int, value: float) -> dict[str, Any]:
    metrics = dict.fromkeys(PARTS[part].metrics, value)
    return dict(part=part, scale=scale, seed=seed, params=1000 + scale, mmacs=2.0, radius=3.0, **metrics)


def test_study_networks_have_equal_parameters_and_their_scales() -> None:
    with torch.device('meta'):
        networks = {scale: network(scale, num_classes=10) for scale in BASE_WIDTHS}
    plain, *counts = map(count_parameters, networks.values())
    assert all(count == pytest.approx(plain, rel=0.01) for count in counts)
    assert {scale: each.get_submodule('layer1.1').scale for scale, each in networks.items()} == {1: 1, 4: 4, 8: 8}


def test_study_accuracy_is_that_of_each_range_of_sizes() -> None:
    sizes = torch.tensor([14, 24, 25, 45, 46, 84])
    items = Items([torch.zeros(6, 4, 4), torch.zeros(6), sizes])
    evaluation = SimpleNamespace(predictions=np.array([100.0, 0, 100, 100, 0, 0]))
    assert accuracy(items, SIZES, evaluation) == dict(top1=50, small=50, medium=100, large=0)
    assert accuracy(items, UNSEEN_SIZES, evaluation) == dict(smaller=66.667, larger=33.333)


def test_study_differences_are_paired_by_seed() -> None:
    runs = [record('fashion_mnist', 1, seed, value) for seed, value in enumerate((50.0, 60.0, 70.0))]
    runs += [record('fashion_mnist', 4, seed, value) for seed, value in enumerate((51.0, 62.0, 73.0))]
    mean, half = difference(runs, 'fashion_mnist', 4, 'top1')
    assert mean == pytest.approx(2)
    assert half == pytest.approx(4.30265 / 3**0.5, rel=1e-4)  # Student's t of two degrees of freedom
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, (5 / 3) ** 0.5 / 2))
    lines = table(runs, 'fashion_mnist')
    assert lines[2] == '| 1 | 1,001 | 2.0 | 3.00 ± 0.00 | 60.00 ± 5.77 |'
    assert lines[4] == '| 4 - 1 |  |  |  | +2.00 [-0.48, +4.48] |'


def test_study_of_one_seed_has_no_errors_and_intervals(tmp_path: Path) -> None:
    runs = [record('fashion_mnist', scale, 0, 50.0 + scale) for scale in (1, 4)]
    lines = table(runs, 'fashion_mnist')
    assert lines[2] == '| 1 | 1,001 | 2.0 | 3.00 ± - | 51.00 ± - |'
    assert lines[4] == '| 4 - 1 |  |  |  | +3.00 - |'
    plot(runs, 'fashion_mnist', str(tmp_path / 'one.png'))


def test_study_tables_of_committed_runs_are_committed() -> None:
    document = json.loads((ASSETS / 'study.json').read_text())
    tables = (ASSETS / 'study.md').read_text()
    for name, part in PARTS.items():
        runs = [each for each in document['runs'] if each['part'] == name]
        pairs = [(each['scale'], each['seed']) for each in runs]
        assert pairs == [(scale, seed) for scale in BASE_WIDTHS for seed in range(part.seeds)]
        assert {(each['epochs'], each['images']) for each in runs} == {(part.epochs, None)}
        assert '\n'.join([name, '', *table(document['runs'], name)]) + '\n' in tables


def test_study_readme_has_its_version_and_gains() -> None:
    document = json.loads((ASSETS / 'study.json').read_text())
    readme = (ROOT / 'timm_res2net' / 'recipes' / 'README.md').read_text()
    assert f'made by version {document["environment"]["timm_res2net"]}' in readme
    for scale in (4, 8):
        assert f'{difference(document["runs"], "sizes", scale, "top1")[0]:+.2f}' in readme


@pytest.mark.slow
@pytest.mark.parametrize('part', PARTS)
def test_study_runs_what_is_missing_and_refuses_other_lengths(
    part: str, fashion_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = ['--part', part, '--scales', '4', '--seeds', '2', '--epochs', '1', '--images', '64']
    arguments = [str(tmp_path), '--fashion-mnist', str(fashion_mnist), *sizes]
    study.main(arguments)
    shown = capsys.readouterr().out.partition(f'\n{part}\n')[2]
    lost, kept = (tmp_path / f'{part}_scale4_seed{seed}.json' for seed in (0, 1))
    first, before = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    assert PARTS[part].metrics.keys() <= first.keys()
    assert first['params'] == pytest.approx(622_656, rel=0.02)  # a detector sees three channels
    assert first['radius'] > 3
    lost.unlink()
    study.main(arguments)
    assert capsys.readouterr().out.partition(f'\n{part}\n')[2] == shown
    assert kept.stat().st_mtime_ns == before
    assert {**json.loads(lost.read_text()), 'seconds': 0} == {**first, 'seconds': 0}
    document = json.loads((tmp_path / 'study.json').read_text())
    assert [(run['scale'], run['seed']) for run in document['runs']] == [(4, 0), (4, 1)]
    assert (tmp_path / f'{part}.png').exists()
    with pytest.raises(SystemExit, match='2'):
        study.main([*arguments, '--epochs', '2'])
    assert 'has other epochs or images. Choose another folder' in capsys.readouterr().err
