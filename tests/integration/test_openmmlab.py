"""The calls by which mmsegmentation and mmpretrain use timm models; the packages themselves do not install here."""

import pytest
import torch
from torch import nn

from integration.conftest import make, step


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'dla60_res2net'])
def test_mmsegmentation_backbone_calls_give_features_and_train(name: str) -> None:
    wanted = dict(features_only=True, pretrained=False, in_chans=3, checkpoint_path='', out_indices=(0, 1, 2, 3))
    model = make(name, **wanted, norm_layer=nn.BatchNorm2d)
    for attribute in ('global_pool', 'fc', 'classifier'):  # as mmseg and mmpretrain take the head off
        setattr(model, attribute, None)
    features = model(torch.randn(2, 3, 64, 64))
    assert [feature.shape[1] for feature in features] == model.feature_info.channels()
    step(model, sum(feature.square().mean() for feature in features))


def test_mmpretrain_backbone_calls_give_last_feature_map(kind: str) -> None:
    model = make(kind)
    model.reset_classifier(0, '')
    x = torch.randn(2, 3, 64, 64)
    assert model(x).shape == (2, model.num_features, 2, 2)
    torch.testing.assert_close(model.eval()(x), model.forward_features(x), rtol=0, atol=0)
