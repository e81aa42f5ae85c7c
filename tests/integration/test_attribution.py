"""captum and torchcam explain these models; attributions sum to differences of scores."""

from typing import Any

import pytest
import timm
import torch
from support import randomise
from torch import Tensor, nn

from integration.conftest import make

captum = pytest.importorskip('captum.attr')


def attributed(method: Any, model: nn.Module, **options: Any) -> tuple[Tensor, Tensor]:
    """The sum of the attributions of a score, and the difference of scores that it has to equal."""
    x, baseline = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.zeros(2, 3, 32, 32, dtype=torch.double)
    x.requires_grad_()
    parts = method(model).attribute(x, baseline, target=1, **options)
    difference = (model(x) - model(baseline))[:, 1]
    return parts.sum((1, 2, 3)).detach(), difference.detach()


@pytest.mark.filterwarnings('ignore:Setting forward, backward hooks:UserWarning')
@pytest.mark.parametrize('pools', ['as they are', 'averaging'])
def test_deeplift_attributions_sum_to_score_difference(pools: str, kind: str) -> None:
    model = make(kind, num_classes=3).double().eval()
    strided = [(part, name) for part in model.modules() for name, pool in part.named_children() if is_max_pool(pool)]
    # captum's rule for max-pooling loses the part of a pool where input and baseline are equal. With average pooling
    # instead, the sum is exact in every trunk, so the blocks are not the cause.
    if pools == 'averaging':
        for part, name in strided:
            setattr(part, name, nn.AvgPool2d(2, 2, ceil_mode=True))
    elif strided and kind != 'res2net50_26w_4s':
        pytest.skip("captum's rule for max-pooling is not exact")
    torch.testing.assert_close(*attributed(captum.DeepLift, model))


def is_max_pool(module: nn.Module) -> bool:
    return isinstance(module, nn.MaxPool2d)


@pytest.mark.filterwarnings('ignore:Setting forward, backward hooks:UserWarning')
def test_deeplift_on_model_of_timm_raises_runtime_error() -> None:
    model = timm.models.res2net.res2net50_26w_4s(num_classes=3).double().eval()
    with pytest.raises(RuntimeError, match='used more than once'):
        attributed(captum.DeepLift, model)


def test_integrated_gradients_sum_to_score_difference(kind: str) -> None:
    parts, difference = attributed(captum.IntegratedGradients, make(kind, num_classes=3).double().eval(), n_steps=60)
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


@pytest.mark.filterwarnings('ignore:Setting forward, backward hooks:UserWarning')
def test_lrp_of_captum_keeps_no_score_of_residual_networks(kind: str) -> None:
    rules = pytest.importorskip('captum.attr._utils.lrp_rules')
    torchvision = pytest.importorskip('torchvision')
    x = torch.randn(1, 3, 64, 64, dtype=torch.double, requires_grad=True)
    with pytest.raises(TypeError, match='Identity'):
        captum.LRP(make(kind, num_classes=3).double().eval()).attribute(x, target=1)
    for model in (make(kind, num_classes=3), randomise(torchvision.models.resnet18())):
        model = model.double().eval()
        for module in model.modules():
            if isinstance(module, nn.Identity | nn.Flatten):
                module.rule = rules.EpsilonRule()
        parts = captum.LRP(model).attribute(x, target=1)
        assert parts.sum().abs() > 100 * model(x)[0, 1].abs()
