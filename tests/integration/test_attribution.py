"""captum's attributions sum to the difference between the scores of input and baseline."""

import pytest
import torch
from torch import nn

from integration.conftest import make

captum = pytest.importorskip('captum.attr')


@pytest.mark.filterwarnings('ignore:Setting forward, backward hooks:UserWarning')
def test_deeplift_attributions_sum_to_score_difference(kind: str) -> None:
    model = make(kind, num_classes=3).double().eval()
    # captum's rule for max pooling loses attributions where input and baseline are equal. With average pooling instead,
    # the sum is exact in every trunk.
    for part in [*model.modules()]:
        for name, pool in part.named_children():
            if isinstance(pool, nn.MaxPool2d):
                setattr(part, name, nn.AvgPool2d(2, 2, ceil_mode=True))
    x, baseline = torch.randn(2, 3, 32, 32, dtype=torch.double), torch.zeros(2, 3, 32, 32, dtype=torch.double)
    attributions = captum.DeepLift(model).attribute(x.requires_grad_(), baseline, target=1)
    difference = (model(x) - model(baseline))[:, 1]
    torch.testing.assert_close(attributions.sum((1, 2, 3)), difference, rtol=1e-7, atol=1e-7)
