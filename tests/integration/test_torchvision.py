"""torchvision's feature extractors and detectors work with these backbones."""

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.feature_extraction import create_feature_extractor
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


def test_feature_extractors_equal_forward_intermediates(kind: str) -> None:
    model = make(kind).eval()
    layers = {info['module']: info['module'] for info in model.feature_info[-3:]}
    x = torch.randn(1, 3, 64, 64)
    wanted = model.forward_intermediates(x, indices=[-3, -2, -1], intermediates_only=True)
    for extract in (create_feature_extractor(model, layers), IntermediateLayerGetter(model, layers)):
        torch.testing.assert_close(list(extract(x).values()), wanted, rtol=0, atol=0)


@pytest.mark.parametrize('detector', [FasterRCNN, RetinaNet])
def test_detectors_with_fpn_detect_and_train(detector: type[nn.Module], kind: str) -> None:
    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    key = 'rpn_anchor_generator' if detector is FasterRCNN else 'anchor_generator'
    model = detector(Pyramid(kind), num_classes=3, min_size=96, max_size=96, **{key: anchors})
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    (found, _) = model.eval()(images)
    assert found.keys() >= {'boxes', 'labels', 'scores'}
    losses = model.train()(images, TARGETS)
    total = sum(losses.values())
    assert total.isfinite()
    assert_gradient_reaches_first_layer(model.backbone.body, total)
