"""torchvision's detectors work with these backbones."""

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from integration.conftest import assert_gradient_reaches_first_layer, make

TARGETS = [dict(boxes=torch.tensor([[8.0, 8.0, 60.0, 70.0]]), labels=torch.tensor([1])) for _ in range(2)]


class Pyramid(nn.Module):
    """A backbone with FPN, as torchvision's detectors require."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.body = make(name, features_only=True, out_indices=(-4, -3, -2, -1))
        self.fpn = FeaturePyramidNetwork(self.body.feature_info.channels(), 32, extra_blocks=LastLevelMaxPool())
        self.out_channels = 32

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return self.fpn({str(i): feature for i, feature in enumerate(self.body(x))})


def test_detector_with_fpn_detects_and_trains(kind: str) -> None:
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    model = FasterRCNN(Pyramid(kind), num_classes=3, min_size=96, max_size=96, rpn_anchor_generator=anchors)
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    (found, _) = model.eval()(images)
    assert found.keys() >= {'boxes', 'labels', 'scores'}
    losses = model.train()(images, TARGETS)
    total = sum(losses.values())
    assert total.isfinite()
    assert_gradient_reaches_first_layer(model.backbone.body, total)
