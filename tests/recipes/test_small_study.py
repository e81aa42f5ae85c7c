"""The small study compares networks of similar size, and its table is up to date."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT

from timm_res2net import recipes
from timm_res2net.recipes import small_study
from timm_res2net.recipes.small_study import BASE_WIDTHS, TASKS, data, mean_and_error, network, parameters_of, table

ASSETS = Path(recipes.__file__).parents[1] / 'assets'


def test_small_study_networks_have_similar_parameter_counts() -> None:
    plain, *counts = [parameters_of(network(scale, num_classes=10)) for scale in BASE_WIDTHS]
    assert all(count == pytest.approx(plain, rel=0.025) for count in counts)
    assert [network(scale, 10).layer1[1].scale for scale in BASE_WIDTHS] == list(BASE_WIDTHS)


@pytest.mark.parametrize('task', TASKS)
def test_small_study_data_has_balanced_classes_and_images_of_zero_mean(task: str) -> None:
    (images, labels), (test_images, test_labels) = data(task)
    counts, test_counts = torch.bincount(labels), torch.bincount(test_labels)
    assert len(counts) == len(test_counts) == {'digits': 10, 'photographs': 18}[task]
    assert counts.max() < 1.1 * counts.min()
    assert 2 * len(test_images) <= len(images) <= 3 * len(test_images)
    for part in (images, test_images):
        torch.testing.assert_close(part.mean((2, 3)), torch.zeros(len(part), 1), rtol=0, atol=1e-4)
        assert part.std((2, 3)).median() == pytest.approx(1, abs=1e-3)
    again = data(task)
    assert torch.equal(images, again[0][0])


def test_small_study_held_out_patches_do_not_overlap_training_patches(monkeypatch: pytest.MonkeyPatch) -> None:
    def held_out_is_white(file: Any) -> Image.Image:
        cells = np.repeat(np.repeat(np.eye(4), 100, axis=0), 120, axis=1)
        return Image.fromarray((cells * 255).astype(np.uint8))

    monkeypatch.setattr(Image, 'open', held_out_is_white)
    (images, _), (held_out, _) = small_study.patches()
    assert images.max() == 0
    assert held_out.min() == 255


def test_mean_and_error_returns_mean_and_standard_error() -> None:
    assert mean_and_error([1.0, 2.0, 3.0, 4.0]) == pytest.approx((2.5, (5 / 3) ** 0.5 / 2))
    assert mean_and_error([1.0]) == (1.0, 0.0)


def test_small_study_table_of_committed_runs_is_in_readme() -> None:
    document = json.loads((ASSETS / 'small_study.json').read_text())
    readme = (ROOT / 'timm_res2net' / 'recipes' / 'README.md').read_text()
    assert '\n'.join(table(document['runs'])) in readme
    for run in document['runs']:
        assert run['params'] == parameters_of(network(run['scale'], num_classes=10))
    assert len(document['runs']) == len(TASKS) * len(BASE_WIDTHS) * 5
