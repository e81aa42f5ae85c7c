"""captum's attributions sum to the difference between the scores of input and baseline."""

from typing import Any

import pytest
import torch
from torch import nn

from integration.conftest import make

captum = pytest.importorskip('captum.attr')


def require_sum_equals_score_difference(method: Any, model: nn.Module, tolerance: float, **options: Any) -> None:
    """Compares the sum of a score's attributions with the difference between the scores of input and baseline."""
    x, baseline = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.zeros(2, 3, 32, 32, dtype=torch.double)
    x.requires_grad_()
    parts = method(model).attribute(x, baseline, target=1, **options)
    difference = (model(x) - model(baseline))[:, 1]
    torch.testing.assert_close(parts.sum((1, 2, 3)), difference, rtol=0, atol=tolerance * difference.abs().max().item())


@pytest.mark.filterwarnings('ignore:Setting forward, backward hooks:UserWarning')
def test_deeplift_attributions_sum_to_score_difference(kind: str) -> None:
    model = make(kind, num_classes=3).double().eval()
    # captum's rule for max pooling loses attributions where input and baseline are equal. With average pooling instead,
    # the sum is exact in every trunk.
    for part in [*model.modules()]:
        for name, pool in part.named_children():
            if isinstance(pool, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2, 2, ceil_mode=True))
    require_sum_equals_score_difference(captum.DeepLift, model, 1e-7)


def test_integrated_gradients_sum_to_score_difference(kind: str) -> None:
    model = make(kind, num_classes=3).double().eval()
    require_sum_equals_score_difference(captum.IntegratedGradients, model, 0.1, n_steps=30)
