"""Fused and optimized models compute the same, with less, and can't be trained."""

import copy
import logging
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from support import TRUNKS, built, fitting, randomise, slow_but, small, tiny
from timm.data import resolve_model_data_config
from timm.layers import BatchNormAct2d
from timm.models import reparameterize_model
from torch import Tensor, nn
from torchvision.models._utils import IntermediateLayerGetter

from timm_res2net import fuse, optimize
from timm_res2net.models.block import Bottle2neck
from timm_res2net.models.fold import fold_norm
from timm_res2net.models.variants import ARCHS

NORMS = nn.BatchNorm2d


def require_equal(fused: nn.Module, model: nn.Module, x: Tensor, tolerance: float = 1e-5) -> None:
    """Outputs agree, relative to the largest one."""
    with torch.no_grad():
        outputs, expected = fused(x), model(x)
    for output, wanted in zip(*([y] if isinstance(y, Tensor) else y for y in (outputs, expected))):
        torch.testing.assert_close(output, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def count(model: nn.Module, kind: Any) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@pytest.mark.parametrize('full', [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize('name', ARCHS)
def test_fuse_every_model_leaves_no_norm(
    name: str, full: bool, build: Callable[..., nn.Module], images: Tensor
) -> None:
    model, images = build(name, full), fitting(name, images)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fused = fuse(model)
    require_equal(fused, model, images)
    assert count(fused, NORMS) == 0
    assert count(model, NORMS) > 0
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize('first_block', ['official', 'paddle', 'mmdet', 'group'])
@pytest.mark.parametrize(
    'arguments',
    [
        {},
        dict(cardinality=2, base_width=16),
        dict(scale=2),
        dict(scale=1),
        dict(output_stride=8),
        dict(output_stride=8, dilate_pool=True),
        dict(attn_layer='se'),
        dict(attn_layer='cbam'),
        dict(act_layer='relu6'),
        dict(act_layer='silu'),
        dict(act_layer='leaky_relu'),
        dict(norm_layer='groupnorm1'),
        dict(norm_layer='frozenbatchnorm2d'),
        dict(drop_rate=0.1, drop_path_rate=0.1, drop_block_rate=0.1),
    ],
    ids=str,
)
def test_fuse_every_block_function_and_argument_keeps_output(
    first_block: str, arguments: dict[str, Any], images: Tensor
) -> None:
    model = tiny(first_block, **arguments)
    require_equal(fuse(model), model, images[:, :, :33, :40])
    require_equal(reparameterize_model(model), model, images[:, :, :33, :40])


def merged(model: nn.Module) -> list[bool]:
    """Whether the first block of each stage is one grouped convolution."""
    stages: Any = [model.layer1, model.layer2, model.layer3, model.layer4]
    return [len(stage[0].convs) == 1 for stage in stages]


@pytest.mark.parametrize(
    ('first_block', 'arguments', 'expected'),
    [
        ('official', {}, [True, True, True, True]),
        ('official', dict(scale=2), [True, True, True, True]),  # with one convolution before it was fused
        ('official', dict(act_layer='silu'), [False, False, False, False]),
        ('official', dict(output_stride=8), [True, True, True, False]),  # convolutions dilated, pool not
        ('official', dict(output_stride=8, dilate_pool=True), [True, True, True, True]),
        ('official', dict(norm_layer='groupnorm1'), [False, False, False, False]),
        ('paddle', {}, [False, False, False, False]),
        ('mmdet', {}, [True, True, True, True]),
        ('group', dict(act_layer='silu'), [True, True, True, True]),
    ],
    ids=str,
)
def test_fuse_merges_first_blocks_into_one_convolution_where_exact(
    first_block: str, arguments: dict[str, Any], expected: list[bool]
) -> None:
    model = tiny(first_block, channels=(8, 16, 8, 16), **arguments)
    assert merged(fuse(model)) == expected
    assert merged(reparameterize_model(model)) == expected


def test_fuse_scale_2_keeps_average_pool_beside_convolution() -> None:
    blocks = [module for module in fuse(tiny(scale=2)).modules() if isinstance(module, Bottle2neck)]
    assert [isinstance(block.pool, nn.AvgPool2d) for block in blocks] == [True, True, False, True, True]


def test_reparameterize_model_fuses_blocks_and_leaves_norms_of_stem() -> None:
    model: Any = reparameterize_model(tiny())
    assert isinstance(model.bn1, NORMS)
    assert count(model, NORMS) == 3  # those of the stem
    model = reparameterize_model(nn.Sequential(tiny()))
    assert count(model, NORMS) == 3


def test_fuse_twice_changes_nothing(images: Tensor) -> None:
    fused = fuse(tiny())
    require_equal(fuse(fused), fused, images, tolerance=0)


def test_fuse_model_around_backbone_keeps_output_and_leaves_no_norm(images: Tensor) -> None:
    head = nn.Sequential(nn.Conv2d(8, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    whole = randomise(nn.Sequential(tiny(num_classes=0, global_pool=''), nn.Conv2d(32, 8, 1), head)).eval()
    fused = fuse(whole)
    require_equal(fused, whole, images)
    assert count(fused, NORMS) == 0


def test_fuse_layers_that_torchvision_takes_from_a_model_leaves_no_norm(images: Tensor) -> None:
    body = IntermediateLayerGetter(tiny(), {'layer2': '0', 'layer4': '1'}).eval()
    fused = fuse(body)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
    for ours, wanted in zip(fused(images).values(), body(images).values()):
        torch.testing.assert_close(ours, wanted, rtol=0, atol=1e-5 * float(wanted.detach().abs().max()))


def test_fuse_model_in_training_mode_raises_value_error() -> None:
    with pytest.raises(ValueError, match=r'training mode.*eval'):
        fuse(tiny().train())


def test_reparameterize_model_in_training_mode_computes_what_the_model_does_in_evaluation(images: Tensor) -> None:
    model = tiny()
    fused = reparameterize_model(tiny().train()).eval()  # the order of timm's scripts, and of timmx
    require_equal(fused, model, images)


@pytest.mark.parametrize('make', [fuse, reparameterize_model])
def test_fused_model_train_raises_value_error_and_keeps_output(
    make: Callable[[nn.Module], nn.Module], images: Tensor
) -> None:
    model = make(tiny())
    with pytest.raises(ValueError, match='train the model that it was made from'):
        model.train()
    before = make(tiny())
    require_equal(model.eval(), before, images, tolerance=0)


def test_fuse_model_without_res2net_block_raises_value_error() -> None:
    with pytest.raises(ValueError, match='no Res2Net block'):
        fuse(timm.create_model('resnet18').eval())


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook', 'getter'])
@pytest.mark.parametrize('name', TRUNKS)
def test_fuse_features_only_keeps_features(name: str, feature_cls: str, images: Tensor) -> None:
    torch.manual_seed(0)
    options = dict(features_only=True, feature_cls=feature_cls, **small(name))
    model, images = randomise(timm.create_model(name, **options)).eval(), fitting(name, images)
    features, expected = fuse(model)(images), model(images)
    if isinstance(features, dict):
        features, expected = features.values(), expected.values()
    for feature, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_fuse_keeps_forward_intermediates(images: Tensor) -> None:
    model: Any = tiny()
    features, expected = (each.forward_intermediates(images, intermediates_only=True) for each in (fuse(model), model))
    for feature, wanted in zip(features, expected, strict=True):
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


@pytest.mark.parametrize('first_block', slow_but(['official'], ['official', 'paddle']))
def test_fused_model_scripted_exported_or_traced_keeps_output(first_block: str, images: Tensor) -> None:
    model = tiny(first_block)
    fused = fuse(model)
    require_equal(torch.jit.script(fused), model, images)
    require_equal(torch.export.export(fused, (images,)).module(), model, images)
    require_equal(torch.fx.symbolic_trace(fused), model, images)


class Log(logging.Handler):
    """What the module logs, level and message."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[tuple[str, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.levelname, record.getMessage()))


@pytest.fixture
def log() -> Iterator[list[tuple[str, str]]]:
    handler = Log()
    logger = logging.getLogger('timm_res2net.deploy.optimize')
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.setLevel(logging.NOTSET)
    logger.removeHandler(handler)


@pytest.mark.slow
def test_optimize_two_models_keep_their_own_outputs_without_recompiling(
    images: Tensor, log: list[tuple[str, str]]
) -> None:
    torch._dynamo.reset()
    first, second = tiny(), randomise(tiny())
    optimized = [optimize(model, images) for model in (first, second)]
    assert [each.path for each in optimized] == ['fused, channels last, float32, compiled'] * 2
    assert log == [('INFO', 'Res2Net: fused, channels last, float32, compiled')] * 2
    for each, model in zip(optimized, (first, second)):
        require_equal(each, model, images)
    frames = torch._dynamo.utils.counters['frames']['total']
    with torch.inference_mode():  # none of these compiles again
        optimized[0](images.clone())
        optimized[0](images.to(memory_format=torch.channels_last))
        optimized[0](images.double())
    assert torch._dynamo.utils.counters['frames']['total'] == frames
    require_equal(optimized[0], first, images[:1])
    with pytest.raises(ValueError, match='train the model'):
        optimized[0].train()


def test_optimize_bfloat16_returns_dtype_of_input(images: Tensor) -> None:
    model = tiny()
    optimized = optimize(model, images, dtype=torch.bfloat16, compile=False)
    assert optimized.path == 'fused, channels last, bfloat16'
    assert optimized(images).dtype == torch.float32
    assert optimized(images.bfloat16()).dtype == torch.bfloat16
    require_equal(optimized, model, images, tolerance=5e-2)
    assert next(model.parameters()).dtype == torch.float32


@pytest.mark.parametrize('feature_cls', ['list', 'dict'])
def test_optimize_features_only_keeps_features(feature_cls: str, images: Tensor) -> None:
    model = tiny(features_only=True, feature_cls=feature_cls)
    features, expected = optimize(model, images, compile=False)(images), model(images)
    if isinstance(expected, dict):
        assert list(features) == list(expected)
        features, expected = list(features.values()), list(expected.values())
    assert len(features) == len(expected)
    for feature, wanted in zip(features, expected):
        torch.testing.assert_close(feature, wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())


def test_optimize_with_a_torch_that_lacks_a_setting_compiles_with_the_default_ones(
    images: Tensor, log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(torch.compiler, 'skip_guard_on_inbuilt_nn_modules_unsafe', raising=False)  # as torch 2.6 does
    used = []

    def compile_with(model: nn.Module, **settings: Any) -> nn.Module:
        used.append(settings)
        return model

    monkeypatch.setattr(torch, 'compile', compile_with)
    assert optimize(tiny(), images).path == 'fused, channels last, float32, compiled'
    assert used == [{'fullgraph': True}]
    assert 'torch.compile with fastest settings is not possible here' in log[0][1]


@pytest.mark.slow
def test_optimize_without_compiler_skips_compilation_and_logs_reason(
    images: Tensor, log: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from torch._inductor import config

    torch._dynamo.reset()
    monkeypatch.setattr(config.cpp, 'cxx', ('no-such-compiler',))
    monkeypatch.setenv('TORCHINDUCTOR_CACHE_DIR', str(tmp_path))  # where nothing is compiled yet
    model = tiny()
    optimized = optimize(model, images)
    assert optimized.path == 'fused, channels last, float32'
    assert [level for level, _ in log] == ['WARNING', 'WARNING', 'INFO']
    assert 'torch.compile with fastest settings is not possible here: InvalidCxxCompiler' in log[0][1]
    require_equal(optimized, model, images)


@pytest.mark.parametrize(
    ('arguments', 'named'),
    [
        (dict(example_input=torch.zeros(3, 32, 32)), r'example_input is \(3, 32, 32\)'),
        (dict(example_input=torch.zeros(0, 3, 32, 32)), r'example_input is \(0, 3, 32, 32\)'),
        (dict(example_input=torch.zeros(1, 3, 32, 32, dtype=torch.uint8)), 'floating-point'),
        (dict(backend='tensorrt'), "backend='tensorrt'"),
        (dict(dtype=torch.int8, compile=False), r'compile=False has no meaning for .*torch\.int8'),
        (dict(backend='openvino', compile=False), r"compile=False has no meaning for backend='openvino'"),
        (dict(backend='openvino', example_input=torch.empty(1, 3, 32, 32, device='meta')), 'example_input is on meta'),
        (dict(dtype=torch.int64), 'torch.int64'),
    ],
    ids=str,
)
def test_optimize_wrong_argument_raises_value_error(arguments: dict[str, Any], named: str, images: Tensor) -> None:
    with pytest.raises(ValueError, match=named):
        optimize(tiny(), **{'example_input': images, **arguments})


def test_optimize_example_of_wrong_channels_raises_error_of_model_without_log(
    images: Tensor, log: list[tuple[str, str]]
) -> None:
    with pytest.raises(ValueError, match=r'can not run example_input, \(1, 4, 32, 32\): .*got 4 channels'):
        optimize(tiny(), torch.zeros(1, 4, 32, 32))
    assert log == []  # nothing about a compiler


def without_nan(model: nn.Module, example_input: Tensor, dtype: torch.dtype) -> Callable[..., Any]:
    """Stands in for OpenVINO, with its treatment of NaN and of an empty batch."""

    def run(images: Any) -> dict[int, Any]:
        with torch.no_grad():
            outputs = model(torch.from_numpy(images).nan_to_num() if len(images) else example_input[:1])
        return dict(enumerate(output.numpy() for output in ([outputs] if isinstance(outputs, Tensor) else outputs)))

    return run


class CompiledWithoutNan(nn.Module):
    """Stands in for torch.compile, with its treatment of NaN."""

    def __init__(self, model: nn.Module, **settings: Any) -> None:
        super().__init__()
        self.compiled = model

    def forward(self, images: Tensor) -> Any:
        return self.compiled(images.nan_to_num())


@pytest.fixture(params=['torch', 'openvino'])
def fast(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, images: Tensor) -> Callable[[nn.Module], Any]:
    """Optimizes by a stand-in of a compiler."""
    monkeypatch.setattr('timm_res2net.deploy.optimize.compile_by_openvino', without_nan)
    monkeypatch.setattr(torch, 'compile', CompiledWithoutNan)
    backend = None if request.param == 'torch' else request.param
    return lambda model: optimize(model, images, backend=backend)


@pytest.mark.parametrize('dtype', [torch.uint8, torch.bool, torch.int64], ids=str)
def test_optimized_model_refuses_images_of_integers(
    fast: Callable[[nn.Module], Any], dtype: torch.dtype, images: Tensor
) -> None:
    with pytest.raises(ValueError, match=f'images are of {dtype}; give floating-point'):
        fast(tiny())(images.to(dtype))


@pytest.mark.parametrize('value', [torch.nan, torch.inf])
@pytest.mark.parametrize('features_only', [False, True])
def test_optimized_model_passes_on_what_is_not_finite(
    fast: Callable[[nn.Module], Any], features_only: bool, value: float, images: Tensor
) -> None:
    model = fast(tiny(features_only=features_only))
    expected, bad = model(images), images.clone()
    bad[1, 0, 3, 3] = value
    for output, wanted in zip(*([y] if isinstance(y, Tensor) else y for y in (model(bad), expected)), strict=True):
        assert output[1].isnan().all()
        torch.testing.assert_close(output[0], wanted[0])


def test_optimized_model_returns_nothing_for_no_image(fast: Callable[[nn.Module], Any], images: Tensor) -> None:
    assert fast(tiny())(images[:0]).shape == (0, 4)


def test_optimized_model_keeps_how_images_are_prepared(fast: Callable[[nn.Module], Any]) -> None:
    model = tiny(pretrained_cfg_overlay=dict(input_size=(3, 64, 64), mean=(0.1, 0.2, 0.3)))
    assert resolve_model_data_config(fast(model)) == resolve_model_data_config(model)
    assert fast(model).num_classes == 4


def require_refusal_of_training(model: nn.Module) -> None:
    with pytest.raises(ValueError, match='train the model that it was made from'):
        model.train()
    assert not any(module.training for module in model.modules())


def test_refused_train_of_an_optimized_model_leaves_no_module_in_training_mode(
    fast: Callable[[nn.Module], Any], images: Tensor
) -> None:
    model = fast(tiny(drop_rate=0.5))
    require_refusal_of_training(model)
    require_equal(model, model, images, tolerance=0)


@pytest.mark.parametrize('fold', [fuse, reparameterize_model])
@pytest.mark.parametrize(
    'make',
    [
        *(partial(built, name) for name in TRUNKS),
        *(partial(tiny, features_only=True, feature_cls=each) for each in ('list', 'dict', 'hook', 'getter')),
    ],
    ids=[*TRUNKS, 'list', 'dict', 'hook', 'getter'],
)
def test_refused_train_of_a_fused_model_leaves_no_module_in_training_mode(
    make: Callable[[], nn.Module], fold: Callable[[nn.Module], nn.Module]
) -> None:
    model = fold(make())
    require_refusal_of_training(model)
    require_refusal_of_training(copy.deepcopy(model))


def test_refused_train_of_a_fused_block_or_wrapper_leaves_no_module_in_training_mode() -> None:
    require_refusal_of_training(tiny().layer2[1].fuse())
    require_refusal_of_training(fuse(nn.Sequential(nn.Dropout(), tiny()).eval()))


def test_optimize_without_openvino_raises_import_error(images: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'openvino', None)
    with pytest.raises(ImportError, match='pip install openvino'):
        optimize(tiny(), images, backend='openvino')


def test_fuse_model_with_one_part_in_training_mode_raises_value_error() -> None:
    model = tiny()
    model.get_submodule('layer3.0.bn1').train()
    with pytest.raises(ValueError, match='training mode'):
        fuse(model)


def test_fold_norm_keeps_a_norm_with_an_activation() -> None:
    norm = BatchNormAct2d(4).eval()
    assert fold_norm(nn.Conv2d(3, 4, 1), norm) is norm


@pytest.mark.parametrize('feature_cls', ['list', 'dict', 'hook'])
def test_fuse_features_only_leaves_no_norm(feature_cls: str) -> None:
    assert count(fuse(tiny(features_only=True, feature_cls=feature_cls)), NORMS) == 0
