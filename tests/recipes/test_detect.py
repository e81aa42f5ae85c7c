"""Detectors take any backbone with the right strides, and they learn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import small
from test_training import DETECT, LEARN, last_metrics, run
from torch import nn

from timm_res2net.models.variants import ARCHS
from timm_res2net.recipes import detect, pictures
from timm_res2net.recipes.detect import create_backbone, create_detector, find_objects


@pytest.mark.parametrize('name', ['test_res2net', 'dla60_res2net', 'blres2net50_26w_4s', 'resnet18'])
def test_backbone_has_strides_8_16_32(name: str) -> None:
    with torch.device('meta'):
        body: Any = create_backbone(name, **small(name) if name in ARCHS else {})
        assert [each.shape[-1] for each in body(torch.empty(1, 3, 64, 64))] == [8, 4, 2]
    assert body.feature_info.reduction() == [8, 16, 32]


def test_backbone_with_other_strides_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"cannot build a pyramid on 'res2next29_6c_24w_4s': .* not \[8, 16, 32\]"):
        create_backbone('res2next29_6c_24w_4s')


def test_detector_uses_normalization_of_the_backbone_and_keywords_of_fcos() -> None:
    body: Any = create_backbone('test_res2net')
    body.pretrained_cfg = {**body.pretrained_cfg, 'mean': (0.1, 0.2, 0.3)}
    model: Any = create_detector(body, 4, channels=64, nms_thresh=0.4)
    assert model.transform.image_mean == (0.1, 0.2, 0.3)
    assert (model.nms_thresh, model.score_thresh) == (0.4, 0.05)
    assert model.head.classification_head.num_classes == 5


class Finding(nn.Module):
    """A detector that finds the same objects in each image."""

    def __init__(self, **found: torch.Tensor) -> None:
        super().__init__()
        self.found, self.weight = found, nn.Parameter(torch.zeros(()))

    def forward(self, images: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
        return [self.found for _ in images]


def test_objects_are_the_most_likely_of_each_place_above_the_score() -> None:
    boxes = torch.tensor([[1.0, 1, 20, 20], [2, 1, 20, 21], [30, 30, 40, 40], [40, 1, 60, 20], [1, 1, 20, 20]])
    scores = torch.tensor([0.7, 0.8, 0.2, 0.4, 0.9])
    model: Any = Finding(boxes=boxes, scores=scores, labels=torch.tensor([1, 2, 1, 1, 0]))  # 0 is the background
    found = find_objects(model, torch.zeros(3, 64, 64))
    assert found['labels'].tolist() == [2, 1]
    assert found['scores'].tolist() == pytest.approx([0.8, 0.4])


def test_no_two_of_80_classes_share_a_color() -> None:
    colors = {pictures.color_of(label) for label in range(81)}
    assert len(colors) == 81


@pytest.mark.slow
def test_detector_learns(simple_set: Path, tmp_path: Path) -> None:
    data = ['--data', str(simple_set), '--val', 'train', '--output-dir', str(tmp_path), *DETECT]
    sgd = ['--optim', 'sgd', '--optim-args', 'momentum=0.9', '--learning-rate', '0.05', '--max-grad-norm', '5']
    assert run(detect, *data, *sgd, *LEARN) == 0
    assert last_metrics(tmp_path)['eval_AP50'] > 80
