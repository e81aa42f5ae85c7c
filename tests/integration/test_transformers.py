"""transformers uses these models as backbones."""

import pytest
import torch
from timm import create_model

from integration.conftest import KINDS, step

transformers = pytest.importorskip('transformers')


@pytest.mark.parametrize('name', ['test_res2net', 'res2net50_26w_4s', 'dla60_res2net'])
def test_timm_backbone_of_transformers_gives_feature_maps_and_hidden_states(name: str) -> None:
    config = transformers.TimmBackboneConfig(backbone=name, out_indices=[1, 2, 3], use_pretrained_backbone=False)
    torch.manual_seed(0)
    backbone = transformers.TimmBackbone(config).eval()
    x = torch.randn(1, 3, 64, 64)
    found = backbone(x, output_hidden_states=True)
    ours = create_model(name).eval()
    ours.load_state_dict(backbone._backbone.state_dict(), strict=False)
    wanted = ours.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(list(found.feature_maps), wanted[1:4], rtol=0, atol=0)
    assert len(found.hidden_states) >= 4
    assert list(backbone.channels) == [info['num_chs'] for info in ours.feature_info[1:4]]
    step(backbone, sum(feature.square().mean() for feature in backbone.train()(torch.randn(2, 3, 64, 64)).feature_maps))
    assert name == 'test_res2net' or name in KINDS
