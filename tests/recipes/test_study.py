"""The study compares networks of equal size on equal batches and resumes runs, and its statistics are exact."""

import json
import multiprocessing
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT

from timm_res2net.models.variants import ASSETS
from timm_res2net.recipes import study
from timm_res2net.recipes.study import (
    BASE_WIDTHS,
    PARTS,
    difference,
    mean_and_error,
    network,
    parameters_of,
    plot,
    table,
)


def record(part: str, scale: int, seed: int, value: float) -> dict[str, Any]:
    metrics = dict.fromkeys(PARTS[part].metrics, value)
    return dict(part=part, scale=scale, seed=seed, params=1000 + scale, mmacs=2.0, radius=3.0, **metrics)


def test_study_networks_have_equal_parameters_and_their_scales() -> None:
    with torch.device('meta'):
        networks = {scale: network(scale, num_classes=10) for scale in BASE_WIDTHS}
    plain, *counts = map(parameters_of, networks.values())
    assert all(count == pytest.approx(plain, rel=0.01) for count in counts)
    assert {scale: each.get_submodule('layer1.1').scale for scale, each in networks.items()} == {1: 1, 4: 4, 8: 8}


def test_study_augmentation_moves_and_mirrors_each_image_by_itself() -> None:
    images = torch.zeros(64, 28, 28, dtype=torch.uint8)
    images[:, 10, 10] = 255
    torch.manual_seed(0)
    shown = study.mirrored(study.cropped(images))
    assert shown.shape == (64, 56, 56)
    assert (shown.flatten(1).sum(dim=1) == 4 * 255).all()  # a pixel is shown as four
    places = {tuple(each.nonzero()[0].tolist()) for each in shown}
    assert len(places) > 40
    rows, columns = zip(*places)
    assert (min(rows), max(rows)) == (2 * 6, 2 * 14)
    assert set(columns) <= {2 * (10 + by) for by in range(-4, 5)} | {2 * (17 + by) for by in range(-4, 5)}


def test_study_batches_hold_each_image_once_in_an_order_of_the_seed() -> None:
    images = torch.arange(10, dtype=torch.uint8)[:, None, None].expand(10, 4, 4)
    batches = study.Shuffled(images, torch.arange(10), 4, study.unchanged)
    epochs = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn = list(batches)
        assert [len(labels) for _, labels in drawn] == [4, 4]
        for x, labels in drawn:
            assert torch.equal(x[:, 0, 0, 0], (labels.float() / 255 - 0.5) / 0.25)
        epochs.append(torch.cat([labels for _, labels in drawn]))
    assert len(set(epochs[0].tolist())) == 8
    assert torch.equal(epochs[0], epochs[1])
    assert not torch.equal(epochs[0], epochs[2])


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


@pytest.mark.parametrize('part', PARTS)
def test_study_picture_of_each_part_is_drawn(part: str, tmp_path: Path) -> None:
    runs = [record(part, scale, seed, 10.0 * scale + seed) for scale in BASE_WIDTHS for seed in range(2)]
    plot(runs, part, str(tmp_path / 'part.png'))
    assert (tmp_path / 'part.png').read_bytes().startswith(b'\x89PNG')


def test_study_tables_of_committed_runs_are_in_readme() -> None:
    runs = json.loads((ASSETS / 'study.json').read_text())['runs']
    readme = (ROOT / 'timm_res2net' / 'recipes' / 'README.md').read_text()
    for name, part in PARTS.items():
        those = [each for each in runs if each['part'] == name]
        pairs = [(each['scale'], each['seed']) for each in those]
        assert pairs == [(scale, seed) for scale in BASE_WIDTHS for seed in range(part.seeds)]
        assert {(each['epochs'], each['images']) for each in those} == {(part.settings.epochs, None)}
        assert '\n'.join(table(runs, name)) + '\n' in readme
        assert f'](../assets/{name}.png)' in readme


def arguments(folder: Path, source: Path, *more: str) -> list[str]:
    sizes = ['--scales', '4', '--seeds', '2', '--epochs', '1', '--images', '128', '--workers', '1']
    return [str(folder), '--fashion-mnist', str(source), '--part', 'sizes', *sizes, *more]


@pytest.mark.slow
def test_study_resumes_missing_runs_and_refuses_other_lengths(
    fashion_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    study.main(arguments(tmp_path, fashion_mnist))
    shown = capsys.readouterr().out
    lost, kept = tmp_path / 'sizes_scale4_seed0.json', tmp_path / 'sizes_scale4_seed1.json'
    first, before = json.loads(lost.read_text()), kept.stat().st_mtime_ns
    lost.unlink()
    study.main(arguments(tmp_path, fashion_mnist))
    assert capsys.readouterr().out == shown
    assert kept.stat().st_mtime_ns == before
    assert {**json.loads(lost.read_text()), 'seconds': 0} == {**first, 'seconds': 0}
    document = json.loads((tmp_path / 'study.json').read_text())
    assert [(run['scale'], run['seed']) for run in document['runs']] == [(4, 0), (4, 1)]
    assert not any(path.is_dir() for path in tmp_path.iterdir())
    with pytest.raises(SystemExit, match='2'):
        study.main(arguments(tmp_path, fashion_mnist, '--epochs', '2'))
    assert 'sizes_scale4_seed0.json is of 1 epochs and 128 images, not of 2 and 128' in capsys.readouterr().err
    study.main(arguments(tmp_path, fashion_mnist, '--scales', '1', '--seeds', '1'))
    document = json.loads((tmp_path / 'study.json').read_text())
    assert [(run['scale'], run['seed']) for run in document['runs']] == [(1, 0), (4, 0), (4, 1)]


@pytest.mark.slow
def test_study_ends_at_once_if_a_run_fails(
    fashion_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / 'sizes_scale4_seed0'  # the run of other settings
    other.mkdir()
    (other / 'settings.json').write_text('{"epochs": 3}')
    (other / 'last.pth').write_bytes(b'')
    with pytest.raises(SystemExit, match='2'):
        study.main(arguments(tmp_path, fashion_mnist, '--seeds', '9'))
    assert 'sizes_scale4_seed0 holds a run with epochs 3, not 1' in capsys.readouterr().err
    assert list(tmp_path.glob('*.json')) == []
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize('part', ['detection', 'fashion_mnist'])
def test_study_run_of_each_part_gives_its_metrics(
    part: str, fashion_mnist: Path, detection_set: Path, tmp_path: Path
) -> None:
    source = detection_set if part == 'detection' else fashion_mnist
    found = study.run(part, 8, 0, 1, 256, source, tmp_path / 'run')
    assert PARTS[part].metrics.keys() <= found.keys()
    assert found['params'] == pytest.approx(622_656, rel=0.02)  # a detector sees three channels
    assert found['radius'] > 3
