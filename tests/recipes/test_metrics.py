"""Metrics are exact on cases worked out by hand."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_coco import BIG, SQUARES, square, write_set
from torch import Tensor, nn

from timm_res2net.recipes.coco import CocoImages
from timm_res2net.recipes.masks import IGNORED
from timm_res2net.recipes.metrics import (
    average_scores,
    compute_iou,
    compute_precision,
    count_pixels,
    pack_detections,
    score_binary,
)

Box = tuple[list[int], int, float]  # left, top, width and height, label, score


class Detector(nn.Module):
    """A detector that finds the given boxes in the images of a batch."""

    detections_per_img = 5

    def __init__(self, *found: list[Box]) -> None:
        super().__init__()
        self.found = found

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        return [
            dict(
                boxes=torch.tensor([[x, y, x + w, y + h] for (x, y, w, h), _, _ in boxes]).reshape(-1, 4).float(),
                labels=torch.tensor([label for _, label, _ in boxes]),
                scores=torch.tensor([score for _, _, score in boxes]),
            )
            for boxes in self.found
        ]


def precision(dataset: CocoImages, *found: list[Box], areas: tuple[int, int] = (32, 96)) -> dict[str, float]:
    """Computes the metrics of the boxes found in each image."""
    rows = pack_detections(Detector(*found), dict(image=[]))
    return compute_precision(dataset, areas, SimpleNamespace(predictions=rows.numpy(), label_ids=range(len(found))))


def test_average_precision_of_a_worked_case(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(BIG, 3), square(SQUARES['apart'], 3)])
    # One of two objects is found, before a false one: precision is 1 up to a recall of 0.5, the first 51 of 101 points.
    scores = precision(dataset, [(BIG, 1, 0.9), ([30, 50, 9, 9], 1, 0.8)], [], areas=(20, 30))
    half = pytest.approx(100 * 51 / 101, abs=1e-3)
    assert scores == {'AP': half, 'AP50': half, 'AP75': half, 'APs': 0.0, 'APm': -1.0, 'APl': 100.0}


def test_average_precision_counts_overlaps_above_each_threshold(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(BIG, 3)])
    scores = precision(dataset, [([0, 0, 40, 26], 1, 0.5)])  # 0.65 of it
    assert (scores['AP'], scores['AP50'], scores['AP75']) == (40.0, 100.0, 0.0)  # at 0.5, 0.55, 0.6 and 0.65


@pytest.mark.parametrize('found', [[], [(BIG, 2, 0.5)], [(BIG, 0, 0.5)]], ids=['nothing', 'wrong class', 'background'])
def test_average_precision_is_0_if_no_object_is_found(tmp_path: Path, found: list[Box]) -> None:
    assert precision(write_set(tmp_path, [square(BIG, 3)]), found, [])['AP'] == 0


@pytest.mark.parametrize('ids', [(0, 1, 2), (5, 5, 5), ('a', 'b', 'c')], ids=['zero', 'repeated', 'strings'])
def test_average_precision_of_all_objects_is_100_whatever_their_ids(tmp_path: Path, ids: tuple[Any, ...]) -> None:
    boxes = SQUARES.values()
    dataset = write_set(tmp_path, [square(box, 3, id=number) for box, number in zip(boxes, ids)])
    assert precision(dataset, [(box, 1, 0.9) for box in boxes])['AP'] == 100
    assert precision(dataset, [(BIG, 1, 0.9)])['AP'] == pytest.approx(100 * 34 / 101, abs=1e-3)


def test_average_precision_needs_neither_area_nor_crowd_and_leaves_out_empty_boxes(tmp_path: Path) -> None:
    empty = [square([5, 5, 0, 9], 3), square([5, 5, 9, -1], 3)]
    dataset = write_set(tmp_path, [dict(category_id=3, bbox=BIG), *empty])
    assert precision(dataset, [(BIG, 1, 0.9)])['APm'] == 100


class Recalling(nn.Module):
    """A segmenter that returns given logits; the first pixel of an image is their index."""

    def __init__(self, *logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, x: Tensor) -> Tensor:
        return self.logits[int(x[0, 0, 0, 0])][None]


def as_batch(*masks: Tensor) -> dict[str, Any]:
    return dict(image=[torch.full((3, *mask.shape), float(i)) for i, mask in enumerate(masks)], mask=masks)


def as_evaluation(values: Tensor) -> Any:
    return SimpleNamespace(predictions=values.numpy())


def test_mean_intersection_over_union_of_a_worked_case() -> None:
    labels = [torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]]), torch.tensor([[0, 1], [1, 0]])]
    model = Recalling(*(nn.functional.one_hot(each, 3).permute(2, 0, 1).float() for each in labels))
    batch = as_batch(torch.tensor([[0, 0, 1, 1], [0, 0, 1, IGNORED]]), torch.tensor([[0, 1], [1, 1]]))
    scores = compute_iou(as_evaluation(count_pixels(model, batch)))
    # Label 0 has 4 hits, 1 missed pixel and 2 false ones; label 1 has 4, 2 and 1; label 2 does not occur.
    assert scores == pytest.approx({'mIoU': 100 * 4 / 7, 'pixel_accuracy': 100 * 8 / 11}, abs=1e-3)


def test_evaluation_with_only_ignored_pixels_is_an_error() -> None:
    with pytest.raises(ValueError, match='cannot evaluate: all pixels of all images have label 255'):
        compute_iou(SimpleNamespace(predictions=np.zeros((2, 3, 3), np.int64)))


def test_binary_scores_are_means_over_images_of_a_worked_case() -> None:
    ninety = math.log(9)  # a probability of 0.9
    first = torch.stack([torch.zeros(2, 2), torch.tensor([[ninety, ninety], [-ninety, -ninety]])])
    empty = torch.stack([torch.zeros(1, 2), torch.full((1, 2), -ninety)])
    batch = as_batch(torch.tensor([[1, 0], [1, 0]]), torch.tensor([[0, 0]]))
    scores = average_scores(as_evaluation(score_binary(Recalling(first, empty), batch)))
    # In the first image, one of two pixels and a false one are found; in the second, nothing is to be found.
    assert scores == pytest.approx({'mDice': (0.5 + 1) / 2, 'mIoU': (1 / 3 + 1) / 2, 'MAE': (0.5 + 0.1) / 2}, abs=1e-4)
