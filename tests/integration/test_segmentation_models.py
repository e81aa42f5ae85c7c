"""segmentation_models_pytorch builds encoders from these models by name."""

import re

import pytest
import timm
import torch
from support import ROOT, randomize

from integration.conftest import assert_gradient_reaches_first_layer

smp = pytest.importorskip('segmentation_models_pytorch')


@pytest.mark.parametrize(
    ('architecture', 'name', 'in_channels', 'output_stride'),
    [
        ('Unet', 'test_res2net', 1, 32),
        ('Unet', 'dla60_res2net', 3, 32),
        ('PAN', 'blres2net50_26w_4s', 3, 16),
        ('DeepLabV3Plus', 'test_res2net', 3, 16),
        ('DeepLabV3Plus', 'res2net50_vd_26w_4s', 3, 8),
        ('DeepLabV3Plus', 'dla60_res2net', 3, 8),
    ],
)
def test_smp_encoder_equals_intermediates_and_model_trains(
    architecture: str, name: str, in_channels: int, output_stride: int
) -> None:
    options = dict(encoder_output_stride=output_stride) if output_stride < 32 else {}
    torch.manual_seed(0)
    make = getattr(smp, architecture)
    model = randomize(make(f'tu-{name}', encoder_weights=None, in_channels=in_channels, classes=2, **options))
    x = torch.randn(2, in_channels, 128, 128)
    with torch.no_grad():
        assert model.eval()(x).shape == (2, 2, 128, 128)
        features = model.encoder(x)
        assert [128 // feature.shape[-1] for feature in features] == [min(2**i, output_stride) for i in range(6)]
        ours = timm.create_model(name, in_chans=in_channels, output_stride=output_stride).eval()
        missing = ours.load_state_dict(model.encoder.model.state_dict(), strict=False).missing_keys
        assert [key for key in missing if not key.startswith('fc.')] == []
        wanted = ours.forward_intermediates(x, intermediates_only=True)
    torch.testing.assert_close(features[-4:], wanted[-4:], rtol=0, atol=0)
    loss = torch.nn.functional.cross_entropy(model.train()(x), torch.randint(0, 2, (2, 128, 128)))
    assert_gradient_reaches_first_layer(model.encoder, loss)


def test_readme_smp_example_returns_a_mask() -> None:
    readme = (ROOT / 'timm_res2net' / 'models' / 'README.md').read_text()
    (example,) = (block for block in re.findall(r'```python\n(.*?)```', readme, re.DOTALL) if 'smp.Unet' in block)
    exec(example.replace('224, 224', '64, 64'), made := {})
    assert made['mask'].shape == (1, 2, 64, 64)
