"""captum and torchcam explain these models; attributions sum to differences of scores."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from integration.conftest import make

captum = pytest.importorskip('captum.attr')


def attributed(method: Any, model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """Returns the sum of the attributions of a score, and the difference between scores that it must equal."""
    x, baseline = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.zeros(2, 3, 32, 32, dtype=torch.double)
    x.requires_grad_()
    parts = method(model).attribute(x, baseline, target=1, **options)
    difference = (model(x) - model(baseline))[:, 1]
    return parts.sum((1, 2, 3)).detach(), difference.detach()


@pytest.mark.filterwarnings('ignore:Setting forward, backward hooks:UserWarning')
def test_deeplift_attributions_sum_to_score_difference(kind: str) -> None:
    model = make(kind, num_classes=3).double().eval()
    # captum's rule for max pooling loses attributions where input and baseline are equal. With average pooling instead,
    # the sum is exact in every trunk.
    for part in [*model.modules()]:
        for name, pool in part.named_children():
            if isinstance(pool, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2, 2, ceil_mode=True))
    torch.testing.assert_close(*attributed(captum.DeepLift, model))


def test_integrated_gradients_sum_to_score_difference(kind: str) -> None:
    parts, difference = attributed(captum.IntegratedGradients, make(kind, num_classes=3).double().eval(), n_steps=30)
    torch.testing.assert_close(parts, difference, rtol=0.05, atol=0.05 * difference.abs().max().item())


@pytest.mark.parametrize('library', ['captum', 'torchcam'])
def test_grad_cam_gives_finite_map_of_last_stage(library: str, kind: str) -> None:
    model = make(kind, num_classes=3).eval()
    part = model.feature_info[-1]['module']
    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    if library == 'captum':
        found = captum.LayerGradCam(model, model.get_submodule(part)).attribute(x, target=1)[0, 0]
    else:
        methods = pytest.importorskip('torchcam.methods')
        with methods.GradCAM(model, target_layer=part) as extractor:
            (found,) = extractor(1, model(x))
        found = found.squeeze(0)
        assert found.min() >= 0
    assert found.shape == (2, 2)
    assert found.isfinite().all()
