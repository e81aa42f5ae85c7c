"""The family: registration, parity with timm, exact sizes, and one contract for every name."""

import copy
import hashlib
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from registry import ORIGINAL, copy_registry
from safetensors import safe_open
from safetensors.torch import save_file
from support import ROOT, TINY, TRUNKS, build_meta, fitting, randomize, shallow, slow_but, small, strides, tiny
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_res2net import register, unregister
from timm_res2net.models import OLDEST_TIMM, require_timm
from timm_res2net.models.block import Bottle2neck
from timm_res2net.models.cifar import Res2NetCifar
from timm_res2net.models.variants import ARCHS, ASSETS, WEIGHTS
from timm_res2net.res2net import timm_entrypoint
from timm_res2net.weights.checkpoints import read_checkpoint

TIMMS_OWN: dict[str, Any] = {name: own for name in ARCHS if (own := timm_entrypoint(name))}
every_trunk = pytest.mark.parametrize('name', TRUNKS)


# Registration


def test_register_replaces_eleven_models_of_timm_and_lists_them_in_both_modules() -> None:
    assert len(TIMMS_OWN) == 11
    assert {*timm.list_models(module='res2net')} == ARCHS.keys()
    assert {'dla60', 'dla60_res2net', 'dla60_res2next'} <= {*timm.list_models(module='dla')}
    assert {timm.models.model_entrypoint(name).__module__ for name in ARCHS} == {'timm_res2net.res2net'}


def test_pretrained_cfg_of_all_weights_is_complete_and_fits_model() -> None:
    archs = {name.split('.')[0] for name in WEIGHTS}
    models = {arch: timm.create_model(arch, in_chans=4, device='meta', **small(arch)) for arch in archs}
    for name in WEIGHTS:
        cfg, model = timm.get_pretrained_cfg(name), models[name.split('.')[0]]
        for key in ('license', 'origin_url', 'paper_ids', 'description', 'first_conv', 'classifier', 'pool_size'):
            assert getattr(cfg, key), (name, key)
        assert model.get_submodule(cfg.first_conv).in_channels == model.in_chans == 4
        assert model.get_submodule(cfg.classifier) is model.get_classifier()
        assert cfg.pool_size == tuple(side // model.feature_info[-1]['reduction'] for side in cfg.input_size[1:])


def test_pretrained_cfg_of_in1k_weights_has_repository_and_preprocessing_of_timm() -> None:
    tags = [name for name in timm.list_models(module='res2net', pretrained=True) if name.endswith('.in1k')]
    assert sorted(tags) == sorted(f'{name}.in1k' for name in TIMMS_OWN)
    keys = ('input_size', 'pool_size', 'crop_pct', 'interpolation', 'mean', 'std', 'num_classes', 'first_conv')
    timms = {**timm.models.res2net.default_cfgs, **timm.models.dla.default_cfgs}
    for name in TIMMS_OWN:
        ours, theirs = timm.get_pretrained_cfg(f'{name}.in1k'), timms[name].cfgs['in1k']
        assert {key: getattr(ours, key) for key in keys} == {key: getattr(theirs, key) for key in keys}
        assert (ours.hf_hub_id, ours.license) == (f'timm/{name}.in1k', 'cc-by-nc-sa-4.0')


def test_unregister_restores_timm_exactly() -> None:
    ours = copy_registry()
    assert ours != ORIGINAL
    try:
        for _ in range(2):
            unregister()
            assert copy_registry() == ORIGINAL
        assert type(timm.create_model('res2net50d', device='meta', **small('res2net50d'))) is timm.models.ResNet
    finally:
        register()
    assert copy_registry() == ours


# Parity with timm


SE = dict(scale=4, attn_layer=timm.layers.SEModule)
FULL_SIZE = 'res2net50_26w_8s', 'res2net50d', 'dla60_res2next'


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        *((name, small(name)) for name in TIMMS_OWN),
        *(pytest.param(name, {}, marks=pytest.mark.slow) for name in FULL_SIZE),
        *(
            ('res2net50_26w_4s', {**small('res2net50_26w_4s'), **arguments})
            for arguments in (
                dict(block_args=SE),
                dict(output_stride=16),
                dict(output_stride=8, avg_down=True, down_kernel_size=3),
                dict(output_stride=8, down_kernel_size=3),
                dict(stem_type='deep', stem_width=8, replace_stem_pool=True),
                dict(stem_type='deep_tiered', stem_width=8, avg_down=True, channels=(8, 8, 8, 8), output_stride=8),
                dict(drop_rate=0.2, drop_path_rate=0.3, drop_block_rate=0.1, zero_init_last=False),
                dict(global_pool='catavgmax', norm_layer='groupnorm1'),
            )
        ),
    ],
    ids=str,
)
def test_model_weights_outputs_and_gradients_equal_timm_bit_for_bit(
    name: str, arguments: dict[str, Any], images: Tensor
) -> None:
    results, features = [], []
    for make in (TIMMS_OWN[name], timm.models.model_entrypoint(name)):
        torch.manual_seed(0)
        model: Any = make(**arguments)
        initial = copy.deepcopy(model.state_dict())
        torch.manual_seed(0)
        randomize(model)(images).square().sum().backward()
        gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
        results.append((initial, gradients, model.state_dict(), model.eval()(images)))
        features.append([list(info.values()) for info in model.feature_info])
    torch.testing.assert_close(*results, rtol=0, atol=0)
    assert features[0] == features[1]


@pytest.mark.parametrize('name', ['res2net50d', 'dla60_res2net'])
@pytest.mark.parametrize('changes', [dict(in_chans=1), dict(in_chans=4, num_classes=7), dict(features_only=True)])
def test_create_model_pretrained_adapts_weights_as_timm_does(
    name: str, changes: dict[str, Any], tmp_path: Path, build: Any
) -> None:
    file = str(tmp_path / 'weights.safetensors')
    save_file(build(name).state_dict(), file)
    options = dict(pretrained=True, pretrained_cfg_overlay=dict(file=file), **changes, **small(name))
    x = torch.randn(1, changes.get('in_chans', 3), 64, 64)
    outputs = []
    for make in (TIMMS_OWN[name], timm.models.model_entrypoint(name)):
        torch.manual_seed(0)
        outputs.append(make(**options).eval()(x))
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


# Exact sizes


@pytest.mark.parametrize('name', ARCHS)
def test_model_parameter_count_equals_table(name: str) -> None:
    assert sum(p.numel() for p in build_meta(name).parameters()) == ARCHS[name].params


@pytest.mark.parametrize('name', slow_but(['test_res2net', 'res2net50d', 'res2next29_6c_24w_4s'], ARCHS))
def test_model_multiply_adds_equal_table(name: str) -> None:
    model = build_meta(name).eval()
    with FlopCounterMode(display=False) as counter:
        size = 32 if isinstance(model, Res2NetCifar) else 224
        model(torch.empty(1, 3, size, size, device='meta'))
    assert round(counter.get_total_flops() / 2e9, 3) == ARCHS[name].gmacs


# Arguments


def test_attn_layer_in_block_args_keeps_scale_of_variant() -> None:
    options = dict(device='meta', **small('res2net50_26w_8s'))
    for attn_layer in ('se', timm.layers.SEModule):
        model = timm.create_model('res2net50_26w_8s', block_args=dict(attn_layer=attn_layer), **options)
        assert {module.scale for module in model.modules() if isinstance(module, Bottle2neck)} == {8}
        assert isinstance(model.layer1[0].se, timm.layers.SEModule)


@every_trunk
def test_keywords_that_set_layers_and_drop_rates_take_effect(name: str) -> None:
    layers = dict(act_layer='silu', norm_layer='groupnorm1', attn_layer='eca', global_pool='max', dtype=torch.float64)
    training = dict(drop_rate=0.3, drop_path_rate=0.1, drop_block_rate=0.2, zero_init_last=True)
    model: Any = timm.create_model(name, **layers, **training, **small(name))
    block = [module for module in model.modules() if isinstance(module, Bottle2neck)][-1]
    kinds = {type(module).__name__ for module in block.modules()}
    assert {'SiLU', 'GroupNorm1', 'EcaModule', 'DropPath', 'DropBlock2d'} <= kinds
    assert (block.bn3.weight == 0).all()
    assert model.global_pool.pool_type == 'max'
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float64}
    dropped = model.train().forward_head(torch.ones(16, model.num_features, 2, 2, dtype=torch.float64), pre_logits=True)
    assert 0.2 < (dropped == 0).double().mean() < 0.4


@every_trunk
@pytest.mark.parametrize(
    ('arguments', 'error', 'message'),
    [
        (dict(block_args=dict(not_an_argument=1)), TypeError, 'not_an_argument'),
        (dict(scale=4, block_args=dict(scale=8)), TypeError, 'got scale both as a keyword and in block_args'),
        (dict(output_stride=64), ValueError, 'output_stride=64'),
        (dict(attn_layer='sea'), ValueError, "attn_layer='sea'"),
    ],
)
def test_create_model_invalid_argument_raises_an_error_with_its_name(
    name: str, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        timm.create_model(name, device='meta', **arguments)


# The contract

# timm's classes of feature extractors, and the prefix of their tensors' names.
FEATURE_CLASSES = {'list': '', 'dict': '', 'hook': 'body.', 'getter': 'model.', 'fx': 'graph_module.'}


def test_pretrained_model_without_published_weights_raises_runtime_error() -> None:
    with pytest.raises(RuntimeError, match='No pretrained weights exist for blres2net50_26w_4s'):
        timm.create_model('blres2net50_26w_4s', pretrained=True, **small('blres2net50_26w_4s'))


def test_features_need_all_tensors_of_the_backbone_unless_pretrained_strict_is_false(
    tmp_path: Path, images: Tensor
) -> None:
    state = {name: tensor for name, tensor in tiny().state_dict().items() if not name.startswith('fc.')}
    save_file(state, tmp_path / 'backbone.safetensors')
    overlay = dict(file=str(tmp_path / 'backbone.safetensors'))
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, **TINY)
    model = timm.create_model('test_res2net', features_only=True, **options).eval()
    expected = tiny().forward_intermediates(images, intermediates_only=True)
    torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    getter = timm.create_model('test_res2net', features_only=True, feature_cls='getter', **options)
    assert 'state_dict' not in getter.model.pretrained_cfg
    with pytest.raises(RuntimeError, match=r'Missing key.* "fc\.weight", "fc\.bias"'):
        timm.create_model('test_res2net', **options)
    with pytest.raises(RuntimeError, match=r"Missing key.* 'layer1\.0\.se\.fc1\.bias'"):
        timm.create_model('test_res2net', attn_layer='se', num_classes=2, **options)
    with pytest.raises(RuntimeError, match=r"Unexpected key.* 'layer2\.1\.bn1\.bias'"):
        timm.create_model('test_res2net', num_classes=2, **options | dict(layers=(1, 1, 1, 1)))
    del state['layer4.0.conv1.weight']
    save_file(state, tmp_path / 'backbone.safetensors')
    with pytest.raises(RuntimeError, match=r"Missing key.* 'layer4\.0\.conv1\.weight'"):
        timm.create_model('test_res2net', features_only=True, **options)
    timm.create_model('test_res2net', features_only=True, pretrained_strict=False, **options)


@every_trunk
def test_backward_gives_every_parameter_a_nonzero_gradient(name: str, build: Any, images: Tensor) -> None:
    model = copy.deepcopy(build(name)).train()
    model(fitting(name, images)).square().sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert parameter.grad is not None, parameter_name
        assert parameter.grad.abs().sum() > 0, parameter_name


@every_trunk
def test_reset_classifier_changes_classes_and_pooling(name: str) -> None:
    model: Any = timm.create_model(name, **small(name)).eval()
    features = torch.empty(2, model.num_features, 2, 2)
    assert model.get_classifier() is model.get_submodule(model.get_classifier(name_only=True))
    model.reset_classifier(11, 'catavgmax')
    assert model.forward_head(features).shape == (2, 11)
    assert model.head_hidden_size == 2 * model.num_features
    assert not any(module.training for module in model.modules())
    model.reset_classifier(0)
    assert model.forward_head(features).shape == (2, 2 * model.num_features)
    model.reset_classifier(0, '')
    assert model.forward_head(features).shape == features.shape


@every_trunk
def test_every_way_to_get_features_agrees_with_feature_info(name: str, build: Any, images: Tensor) -> None:
    model, images = build(name), fitting(name, images)
    final, intermediates = model.forward_intermediates(images)
    torch.testing.assert_close(final, model.forward_features(images), rtol=0, atol=0)
    torch.testing.assert_close(model.forward_head(final), model(images), rtol=0, atol=0)
    assert final.shape[1] == model.num_features
    assert model.forward_head(final, pre_logits=True).shape == (2, model.head_hidden_size)
    assert len(intermediates) == len(model.feature_info)
    for info, feature in zip(model.feature_info, intermediates):
        assert feature.shape == (2, info['num_chs'], *(pixels // info['reduction'] for pixels in images.shape[2:]))
    for feature_cls, prefix in FEATURE_CLASSES.items():
        extractor = timm.create_model(name, features_only=True, feature_cls=feature_cls, **small(name)).eval()
        state = {prefix + key: tensor for key, tensor in model.state_dict().items()}
        assert not extractor.load_state_dict(state, strict=False).missing_keys
        features = extractor(images)
        features = list(features.values()) if isinstance(features, dict) else list(features)
        wanted = [intermediates[index] for index in extractor.feature_info.out_indices]
        torch.testing.assert_close(features, wanted, rtol=0, atol=0)


@every_trunk
def test_prune_intermediate_layers_keeps_requested_features(name: str, build: Any, images: Tensor) -> None:
    model, images = copy.deepcopy(build(name)), fitting(name, images)
    expected = model.forward_intermediates(images, indices=[1, 2], intermediates_only=True)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    pruned = model.forward_intermediates(images, indices=[1, 2], intermediates_only=True, stop_early=True)
    torch.testing.assert_close(pruned, expected, rtol=0, atol=0)
    whole = sum(p.numel() for p in build(name).parameters())
    assert sum(p.numel() for p in model.parameters()) < whole / 2
    assert model(images).shape[1] == model.num_features


@pytest.mark.parametrize(('name', 'output_stride'), [(name, stride) for name in TRUNKS for stride in strides(name)])
def test_features_only_shapes_equal_feature_info(name: str, output_stride: int) -> None:
    options = dict(features_only=True, output_stride=output_stride, device='meta', **small(name))
    model = timm.create_model(name, **options).eval()
    reductions = model.feature_info.reduction()
    assert max(reductions) == output_stride
    for size in ((64, 43), (7, 5)):  # even and odd, and smaller than the stride
        features = model(torch.empty(1, 3, *size, device='meta'))
        for channels, reduction, feature in zip(model.feature_info.channels(), reductions, features):
            assert feature.shape == (1, channels, *(-(-pixels // reduction) for pixels in size))


@every_trunk
def test_layer_decay_has_a_learning_rate_for_each_block(name: str, build: Any) -> None:
    groups = param_groups_layer_decay(build(name), layer_decay=0.7)
    assert len({group['lr_scale'] for group in groups}) > 5


# Small networks for compilers, which take long for each convolution.
COMPILED = {'test_res2net': TINY, 'dla60_res2net': dict(small('dla60_res2net'), scale=2)}


@pytest.mark.slow
@pytest.mark.parametrize('name', COMPILED)
def test_model_scripted_traced_or_exported_keeps_output(name: str, images: Tensor) -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model(name, **COMPILED[name])).eval()
    expected = model(images)
    for converted in (
        torch.jit.script(model),
        torch.fx.symbolic_trace(model),
        torch.export.export(model, (images,)).module(),
    ):
        torch.testing.assert_close(converted(images), expected, rtol=1e-4, atol=1e-4)


def step(model: nn.Module, images: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Runs a forward and a backward pass; returns the gradients, and the model's buffers after it."""
    model.train().zero_grad()
    outputs = model(images)
    outputs = outputs.values() if isinstance(outputs, dict) else outputs
    sum(x.square().mean() for x in outputs).backward()
    return [p.grad.clone() for p in model.parameters()], {key: b.clone() for key, b in model.named_buffers()}


@pytest.mark.parametrize(
    ('name', 'options'),
    [
        *((name, {}) for name in TRUNKS),
        *(('test_res2net', dict(features_only=True, feature_cls=kind)) for kind in ('list', 'dict', 'hook', 'getter')),
    ],
)
def test_grad_checkpointing_keeps_exact_gradients_and_norm_statistics(
    name: str, options: dict[str, Any], images: Tensor
) -> None:
    results = []
    for enable in (False, True):
        torch.manual_seed(0)
        model = randomize(timm.create_model(name, drop_path_rate=0.2, drop_block_rate=0.1, **options, **small(name)))
        model.set_grad_checkpointing(enable)
        assert any(getattr(module, 'grad_checkpointing', False) for module in model.modules()) == enable
        results.append(step(model, fitting(name, images)))
    torch.testing.assert_close(*results, rtol=0, atol=0)


@every_trunk
def test_grad_checkpointing_halves_saved_activations(name: str, images: Tensor) -> None:
    model = timm.create_model(name, **shallow(name)).train()
    size = 32 if name.startswith('res2next29') else 64  # networks for CIFAR have no stride in the stem
    parameters = {p.data_ptr() for p in model.parameters()}
    saved: dict[bool, int] = {}
    for enable in (False, True):
        tensors: dict[int, int] = {}

        def pack(x: Tensor, tensors: dict[int, int] = tensors) -> Tensor:
            if x.data_ptr() not in parameters:
                tensors[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        model.set_grad_checkpointing(enable)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(images[..., :size, :size])
        saved[enable] = sum(tensors.values())
    assert saved[True] < saved[False] / 2


def test_grad_checkpointing_is_left_out_of_a_trace(images: Tensor) -> None:
    model: Any = tiny()
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.jit.trace(model, images, check_trace=False)(images), model(images))


@pytest.mark.slow
@pytest.mark.parametrize('name', COMPILED)
def test_grad_checkpointing_compiles_without_graph_break(name: str, images: Tensor) -> None:
    results = []
    for compile_it in (False, True):
        torch.manual_seed(0)
        model: Any = randomize(timm.create_model(name, **COMPILED[name])).train()
        model.set_grad_checkpointing()
        runner = torch.compile(model, fullgraph=True, backend='aot_eager') if compile_it else model
        results.append(step(runner, images))
    gradients, buffers = zip(*results)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(*({k.removeprefix('_orig_mod.'): v for k, v in b.items()} for b in buffers))


# The embedded weights


def test_embedded_weights_have_the_published_checksum_and_record_their_spec() -> None:
    file = ASSETS / 'test_res2net.digits.safetensors'
    digest = 'd06d8b30568d08b4d9f2ae649442e3413d7bd23b2648168a8646550f37e3f21e'
    assert hashlib.sha256(file.read_bytes()).hexdigest() == digest
    with safe_open(file, 'pt') as weights:
        assert weights.metadata() == {'first_block': 'official', 'format': 'pt'}
    assert read_checkpoint(file).assumed == ()


def test_import_with_an_older_timm_raises_an_error_with_both_versions_and_the_path(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for version in ('1.0.29', '0.9.16'):
        monkeypatch.setattr(timm, '__version__', version)
        with pytest.raises(ImportError, match=rf'needs timm >= 1\.0\.31, found {version} at .*timm.__init__\.py'):
            require_timm()
    monkeypatch.setattr(timm, '__version__', '1.1.0rc1')
    require_timm()
    assert f'"timm>={OLDEST_TIMM}"' in (ROOT / 'pyproject.toml').read_text()
