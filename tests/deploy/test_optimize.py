"""Optimized models compute the same, and refuse images for which they would return wrong outputs."""

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support import assert_same, randomize, tiny
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from timm_res2net import optimize


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """The log of the module."""
    with caplog.at_level(logging.INFO, 'timm_res2net.deploy.optimize'):
        yield caplog


@pytest.mark.slow
def test_two_optimized_models_keep_their_own_outputs_without_recompiling(log: pytest.LogCaptureFixture) -> None:
    torch._dynamo.reset()
    images = torch.randn(2, 16, 16, 16)
    # A single block compiles faster than a whole network.
    first, second = (nn.Sequential(model.layer1).eval() for model in (tiny(), randomize(tiny())))
    optimized = [optimize(model, images) for model in (first, second)]
    assert [each.path for each in optimized] == ['fused, channels last, float32, compiled'] * 2
    ours = [record.message for record in log.records if record.name.startswith('timm_res2net')]
    assert ours == ['Sequential: fused, channels last, float32, compiled'] * 2
    for each, model in zip(optimized, (first, second)):
        assert_same(each, model, images)
    frames = torch._dynamo.utils.counters['frames']['total']
    with torch.inference_mode():  # none of these calls compiles again
        optimized[0](images.clone())
        optimized[0](images.to(memory_format=torch.channels_last))
        optimized[0](images.double())
    assert torch._dynamo.utils.counters['frames']['total'] == frames
    assert_same(optimized[0], first, images[:1])


def test_optimize_bfloat16_returns_dtype_of_input(images: Tensor) -> None:
    model = tiny()
    optimized = optimize(model, images, dtype=torch.bfloat16, compile=False)
    assert optimized.path == 'fused, channels last, bfloat16'
    assert optimized(images).dtype == torch.float32
    assert optimized(images.bfloat16()).dtype == torch.bfloat16
    assert_same(optimized, model, images, tolerance=5e-2)
    assert next(model.parameters()).dtype == torch.float32
    halved = optimize(copy.deepcopy(model).bfloat16(), images, dtype=torch.float32, compile=False)
    assert_same(halved, copy.deepcopy(model).bfloat16().float(), images)


def test_optimize_features_only_keeps_features_and_their_names(images: Tensor) -> None:
    model = tiny(features_only=True, feature_cls='dict')
    features, expected = optimize(model, images, compile=False)(images), model(images)
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


def test_optimize_with_a_torch_that_lacks_a_setting_compiles_with_the_default_ones(
    images: Tensor, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.compiler, 'skip_guard_on_inbuilt_nn_modules_unsafe', raising=False)  # as torch 2.6 does
    used = []

    def compile_with(model: nn.Module, **settings: Any) -> nn.Module:
        used.append(settings)
        return model

    monkeypatch.setattr(torch, 'compile', compile_with)
    assert optimize(tiny(), images).path == 'fused, channels last, float32, compiled'
    assert used == [{'fullgraph': True}]
    assert log.messages[0].startswith('torch.compile with fastest settings failed: ')


def test_optimize_without_a_working_compiler_skips_compilation_and_logs_why(
    images: Tensor, log: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(model: nn.Module, **settings: Any) -> nn.Module:
        raise RuntimeError('no compiler\nin line 3')

    monkeypatch.setattr(torch, 'compile', fail)
    model = tiny()
    optimized = optimize(model, images)
    assert optimized.path == 'fused, channels last, float32'
    assert [record.levelno for record in log.records] == [logging.WARNING, logging.WARNING, logging.INFO]
    assert log.messages[1] == 'torch.compile with default settings failed: no compiler'
    assert_same(optimized, model, images)


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (dict(example_input=torch.zeros(3, 32, 32)), r'got \(3, 32, 32\)'),
        (dict(example_input=torch.zeros(0, 3, 32, 32)), r'got \(0, 3, 32, 32\)'),
        (dict(example_input=torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), 'floating-point'),
        (dict(backend='tensorrt'), "unknown backend='tensorrt'. Choose 'openvino', or None"),
        (dict(dtype=torch.int8, compile=False), r'compile=False has no effect with .*torch\.int8'),
        (dict(backend='openvino', compile=False), r"compile=False has no effect with backend='openvino'"),
        (dict(backend='openvino', example_input=torch.empty(1, 3, 32, 32, device='meta')), 'example_input is on meta'),
        (dict(dtype=torch.int64), 'torch.int64'),
    ],
    ids=str,
)
def test_optimize_wrong_argument_raises_value_error(arguments: dict[str, Any], named: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=named):
        optimize(tiny(), **{'example_input': images, **arguments})


def test_optimize_example_with_wrong_channels_raises_error_of_model(
    images: Tensor, log: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ValueError, match=r'cannot run example_input, \(1, 4, 32, 32\): .*got 4 channels'):
        optimize(tiny(), torch.zeros(1, 4, 32, 32))
    assert log.messages == []  # the compiler is not blamed


Optimize = Callable[[nn.Module], Any]


class WithoutNan(nn.Module):
    """Stands in for a compiled model, which turns NaN into 0."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Any:
        return self.model(images.nan_to_num())


@pytest.fixture(params=[None, 'openvino'], ids=str)
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> Optimize:
    """Optimizes with a stand-in for the compiler."""
    monkeypatch.setattr(torch, 'compile', WithoutNan)
    compile_for_openvino = 'timm_res2net.deploy.optimize.compile_for_openvino'
    monkeypatch.setattr(compile_for_openvino, lambda model, *_: lambda x: tree_leaves(WithoutNan(model)(x)))
    return lambda model: optimize(model, images, backend=request.param)


def test_optimized_model_refuses_integer_images(fast: Optimize, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r'images must be floating-point, got torch\.uint8'):
        fast(tiny())(images.byte())


@pytest.mark.parametrize(
    ('features_only', 'value', 'dtype'), [(False, torch.nan, torch.bfloat16), (True, torch.inf, torch.float32)]
)
def test_optimized_model_returns_nan_for_an_image_that_is_not_finite(
    fast: Optimize, features_only: bool, value: float, dtype: torch.dtype, images: Tensor
) -> None:
    model = fast(tiny(features_only=features_only))
    expected, bad = model(images.to(dtype)), images.to(dtype)
    bad[1, 0, 3, 3] = value
    for output, wanted in zip(tree_leaves(model(bad)), tree_leaves(expected), strict=True):
        assert output[1].isnan().all()
        torch.testing.assert_close(output[0], wanted[0])


def test_optimized_model_keeps_image_settings_and_takes_an_empty_batch(fast: Optimize, images: Tensor) -> None:
    model = tiny(pretrained_cfg_overlay=dict(input_size=(3, 64, 64), mean=(0.1, 0.2, 0.3)))
    optimized = fast(model)
    assert resolve_model_data_config(optimized) == resolve_model_data_config(model)
    assert optimized.num_classes == 4
    assert optimized(images[:0]).shape == (0, 4)


def test_optimized_model_inside_one_that_trains_stays_in_evaluation_mode(fast: Optimize, images: Tensor) -> None:
    model = fast(tiny(drop_rate=0.5))
    before = model(images)
    nn.Sequential(model).train()
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(images), before, rtol=0, atol=0)


def test_optimize_without_openvino_raises_import_error(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match=r'^running with OpenVINO requires .* pip install "timm_res2net\[deploy\]"'):
        optimize(tiny(), images, backend='openvino')
