"""torchvision's necks, detectors and segmentation heads on these backbones."""

import pytest
import torch
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, RetinaNet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.segmentation.deeplabv3 import DeepLabHead, DeepLabV3
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from integration.conftest import make, step

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


def test_backbone_with_fpn_on_whole_model_gives_five_levels() -> None:
    model = make('res2net50_26w_4s').eval()
    layers = {f'layer{i}': str(i) for i in range(1, 5)}
    backbone = BackboneWithFPN(model, layers, [256, 512, 1024, 2048], 32)
    x = torch.randn(1, 3, 64, 64)
    assert [level.shape[-1] for level in backbone(x).values()] == [16, 8, 4, 2, 1]
    wanted = model.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    torch.testing.assert_close(list(IntermediateLayerGetter(model, layers)(x).values()), wanted, rtol=0, atol=0)


def test_create_feature_extractor_equals_forward_intermediates(kind: str) -> None:
    model = make(kind).eval()
    nodes = [info['module'] for info in model.feature_info[-3:]]
    x = torch.randn(1, 3, 64, 64)
    found = create_feature_extractor(model, nodes)(x)
    wanted = model.forward_intermediates(x, indices=[-3, -2, -1], intermediates_only=True)
    torch.testing.assert_close(list(found.values()), wanted, rtol=0, atol=0)


@pytest.mark.parametrize('detector', [FasterRCNN, RetinaNet])
def test_detectors_with_fpn_detect_and_train(detector: type[nn.Module], kind: str) -> None:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    anchors = AnchorGenerator(tuple((size,) for size in (16, 32, 64, 128, 256)), ((0.5, 1.0, 2.0),) * 5)
    key = 'rpn_anchor_generator' if detector is FasterRCNN else 'anchor_generator'
    model = detector(Pyramid(kind), num_classes=3, min_size=96, max_size=96, **{key: anchors})
    images = [torch.rand(3, 96, 96) for _ in range(2)]
    (found, _) = model.eval()(images)
    assert found.keys() >= {'boxes', 'labels', 'scores'}
    losses = model.train()(images, TARGETS)
    total = sum(losses.values())
    assert total.isfinite()
    step(model.backbone.body, total)


@pytest.mark.parametrize(('name', 'output_stride'), [('res2net50_26w_4s', 16), ('dla60_res2net', 8)])
def test_deeplabv3_segments_and_trains(name: str, output_stride: int) -> None:
    body = make(name, features_only=True, out_indices=(-1,), output_stride=output_stride)

    class Body(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = body

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            (out,) = self.body(x)
            assert out.shape[-1] == x.shape[-1] // output_stride
            return {'out': out}

    model = DeepLabV3(Body(), DeepLabHead(body.feature_info.channels()[-1], 3))
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert model.eval()(x)['out'].shape == (2, 3, 64, 64)
    loss = nn.functional.cross_entropy(model.train()(x)['out'], torch.randint(0, 3, (2, 64, 64)))
    step(body, loss)
