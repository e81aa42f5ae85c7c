"""Models quantized by torchao stay close to float32."""

import sys

import pytest
import timm
import torch
from support import TRUNKS, built, fitting, tiny

from integration.conftest import digits
from timm_res2net import optimize
from timm_res2net.recipes.digits import split

pytest.importorskip('torchao')

pytestmark = pytest.mark.filterwarnings('ignore')


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Skips compilation, which changes no output."""
    monkeypatch.setattr(torch, 'compile', lambda model, **settings: model)


def difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the root mean square difference, relative to that of the expected outputs."""
    return float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())


@pytest.mark.usefixtures('uncompiled')
def test_optimize_digits_in_8_bits_loses_at_most_a_fifth_of_a_percent() -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    optimized = optimize(model, digits('train', 300), dtype=torch.int8)
    assert optimized.path == 'fused, channels last, int8, compiled'
    images, truth = digits('val', 599), torch.from_numpy(split()['val'][1])
    with torch.no_grad():
        expected, found = model(images), optimized(images)
    right, right_before = ((logits.argmax(1) == truth).float().mean() for logits in (found, expected))
    assert right >= right_before - 0.002
    assert 0.001 < difference(found, expected) < 0.05


@pytest.mark.usefixtures('uncompiled')
@pytest.mark.parametrize('name', TRUNKS)
def test_optimize_every_trunk_in_8_bits_is_close_at_any_batch_size(name: str) -> None:
    model = built(name)
    images = fitting(name, torch.randn(8, 3, 32, 32))
    optimized = optimize(model, images, dtype=torch.int8)
    for x in (images, images[:1], images[:3]):
        assert difference(optimized(x), model(x).detach()) < 0.1


@pytest.mark.usefixtures('uncompiled')
def test_optimize_features_in_8_bits_returns_them_as_the_model_does() -> None:
    model, images = tiny(features_only=True, feature_cls='dict'), torch.randn(4, 3, 32, 32)
    found, expected = optimize(model, images, dtype=torch.int8)(images), model(images)
    assert list(found) == list(expected)
    for name in found:
        assert difference(found[name], expected[name].detach()) < 0.1


@pytest.mark.slow
def test_optimize_in_8_bits_compiles_to_what_the_program_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    model, images = tiny(), torch.randn(8, 3, 32, 32)
    before = torch._inductor.config.pre_grad_custom_pass
    compiled = optimize(model, images, dtype=torch.int8)
    assert compiled.path == 'fused, channels last, int8, compiled'
    assert torch._inductor.config.pre_grad_custom_pass is before
    monkeypatch.setattr(torch, 'compile', lambda model, **settings: model)
    expected = optimize(model, images, dtype=torch.int8)(images[:1])
    torch.testing.assert_close(compiled(images[:1]), expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_optimize_in_8_bits_without_torchao_raises_import_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'torchao.quantization.pt2e', None)
    with pytest.raises(ImportError, match=r'dtype=torch\.int8 requires .*torchao'):
        optimize(tiny(), torch.randn(2, 3, 32, 32), dtype=torch.int8)
