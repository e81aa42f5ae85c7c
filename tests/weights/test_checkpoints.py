"""Checkpoints from other frameworks give the same outputs as in their own code, or are refused."""

import json
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from formats import save_checkpoint, under
from safetensors.torch import save_file
from support import TINY, TRUNKS, assert_computes, built, randomize, slow_but, small, tiny
from torch import Tensor, nn

from timm_res2net import CheckpointError, export_checkpoint, fuse, load_checkpoint
from timm_res2net._files import sha256
from timm_res2net.models.block import spec_of
from timm_res2net.models.variants import ARCHS
from timm_res2net.weights.checkpoints import identify, read_checkpoint
from timm_res2net.weights.convert import convert, describe_weights
from timm_res2net.weights.loading import load_model
from timm_res2net.weights.matching import find_model
from timm_res2net.weights.readers import RawFile, read_file
from timm_res2net.weights.renaming import PARTS

References = Callable[[str], Path]

# Files written by the frameworks themselves, with the model and arguments (besides num_classes) that each one fits, and
# wrong specs with the minimum relative error of a network that has them.
R50, V1B, VD = 'res2net50_26w_4s', 'res2net50d', 'res2net50_vd_26w_4s'
THIN: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(16, 32, 64, 128))
SHORT: dict[str, Any] = dict(layers=(1, 2, 1, 1), base_width=2)
MMDET: dict[str, Any] = dict(base_width=2, first_block='mmdet')
CAFFE: dict[str, Any] = dict(MMDET, style='caffe')
VECROAD: dict[str, Any] = dict(MMDET, strides=(1, 2, 1, 1), dilations=(1, 1, 2, (4, 8, 16)))
FCA_NET: dict[str, Any] = dict(MMDET, strides=(1, 2, 2, 1), dilations=(1, 1, 1, (2, 4, 8)))
DCN: dict[str, Any] = dict(base_width=2, deformable=(None, 'v2', 'v2', 'v2'))
OFFICIAL, PYTORCH = dict(first_block='official'), dict(style='pytorch')
REFERENCES: dict[str, tuple[str, dict[str, Any], list[tuple[dict[str, Any], float]]]] = {
    'paddle/res2net50.pdparams': ('res2net50_pd_26w_4s', dict(base_width=2), [(OFFICIAL, 0.01)]),
    'paddle/res2net50.tar': ('res2net50_pd_26w_4s', dict(base_width=2), []),
    'paddle/res2net50_vd.pdparams': (VD, dict(base_width=2), [(OFFICIAL, 0.01)]),
    'paddle/res2net50_vd.tar': (VD, dict(base_width=2), []),
    'paddle/res2net200_vd.pdparams': ('res2net200_vd_26w_4s', dict(base_width=1, scale=3), []),
    'paddle/res2net200_vd.tar': ('res2net200_vd_26w_4s', dict(base_width=1, scale=3), []),
    'paddle/detection_d.pdparams': (VD, dict(base_width=2, avg_down=False), []),
    'paddle/detection_dcn.pdparams': (VD, dict(DCN, avg_down=False), []),
    'paddle/detection_dcn_static.tar': (VD, DCN, []),
    'mindspore/res2net.ckpt': (R50, SHORT, []),
    'mindspore/res2net_v1b.ckpt': (V1B, dict(layers=(1, 2, 1, 1), base_width=3, scale=3), []),
    'openmmlab/mmpretrain.pth': (R50, dict(base_width=2), []),
    'openmmlab/mmpretrain_deep_stem.pth': (V1B, dict(base_width=2), []),
    'openmmlab/mmdet.pth': (V1B, MMDET, [(OFFICIAL, 0.01)]),
    'oneflow/legacy.zip': (R50, SHORT, []),
    'oneflow/folder.zip': (R50, SHORT, []),
    'oneflow/single.pkl': (R50, SHORT, []),
    'holocron/plain.pth': (R50, dict(THIN, base_width=16), []),
    'holocron/deep_stem.pth': (V1B, dict(THIN, base_width=20, scale=3), []),
    'deformable/detectron2.pkl': (V1B, CAFFE, [(PYTORCH, 0.1)]),
    'deformable/centernet2.pth': (V1B, CAFFE, []),
    'deformable/centernet2_dcn.pth': (V1B, dict(CAFFE, deformable=(None, None, 'v2', 'v2')), [(PYTORCH, 0.1)]),
    'deformable/mmdet_dcnv2.pth': (V1B, {**MMDET, **DCN}, [(OFFICIAL, 0.1)]),
    'deformable/universenet_dcn.pth': (V1B, dict(MMDET, deformable=(None, None, None, 'v1')), []),
    'maskrcnn/maskrcnn.pth': (
        R50,
        dict(base_width=2, style='caffe', norm_eps=0.0),
        [(PYTORCH, 0.1), (dict(norm_eps=1e-5), 0.01)],
    ),
    'vecroad/vecroad.pth': (V1B, VECROAD, [(OFFICIAL, 0.1), (dict(dilations=(1, 1, 2, 4)), 0.1)]),
    'encoders/meganet.pth': (V1B, dict(layers=(2, 1, 1, 1), base_width=2), [(dict(first_block='mmdet'), 0.1)]),
    'encoders/fcanet.pth': (V1B, dict(FCA_NET, layers=(2, 1, 1, 3), in_chans=5), [(OFFICIAL, 0.1)]),
}
STATE = tiny().state_dict()
PARTS_OF_OTHERS = 'deformable/', 'maskrcnn/', 'vecroad/', 'encoders/'
FAST = {  # one file of each dialect
    *('paddle/res2net50_vd.pdparams', 'paddle/res2net50.tar', 'paddle/detection_dcn.pdparams'),
    *('mindspore/res2net.ckpt', 'openmmlab/mmpretrain.pth', 'openmmlab/mmdet.pth', 'oneflow/folder.zip'),
    *('holocron/plain.pth', 'deformable/centernet2_dcn.pth', 'maskrcnn/maskrcnn.pth', 'vecroad/vecroad.pth'),
    *('encoders/meganet.pth', 'encoders/fcanet.pth'),
}


def reference_file(references: References, name: str) -> Path:
    framework, file = name.split('/')
    return references(framework) / file


@pytest.mark.parametrize('file', slow_but([*FAST], REFERENCES))
def test_load_model_computes_outputs_of_original_framework(file: str, references: References) -> None:
    path, (name, args, wrong_specs) = reference_file(references, file), REFERENCES[file]
    checkpoint = read_checkpoint(path)
    assert find_model(checkpoint)[:2] == (name, args)
    assert file.startswith(PARTS_OF_OTHERS) <= bool(checkpoint.dropped)  # a tensor of another part
    assert_computes(load_model(checkpoint).eval(), path.with_suffix('.npz'))
    for wrong, error in wrong_specs:
        model = load_model(checkpoint, **wrong).eval()
        with pytest.raises(AssertionError):
            assert_computes(model, path.with_suffix('.npz'), tolerance=error)
        with pytest.raises(CheckpointError, match=r'would load and compute something else.*It fits timm\.create_model'):
            load_checkpoint(model, checkpoint)


@pytest.mark.parametrize(
    ('name', 'given'),
    [('mmdet_dilated', dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))), ('mmpretrain_caffe', dict(style='caffe'))],
)
def test_load_model_with_given_geometry_computes_outputs_of_original_code(
    name: str, given: dict[str, Any], references: References
) -> None:
    file = references('dilated') / f'{name}.pth'
    checkpoint = read_checkpoint(file)
    assert_computes(load_model(checkpoint, **given).eval(), file.with_suffix('.npz'))
    with pytest.raises(AssertionError):
        assert_computes(load_model(checkpoint).eval(), file.with_suffix('.npz'), tolerance=0.1)


WIDE: dict[str, tuple[str, tuple[Any, ...]]] = {
    'fcanet': ('encoders/fcanet.pth', (1, 1, 1, (2, 4, 8))),
    'inspyrenet': ('dilated/backbone.pth', (1, 1, 2, (4, 8, 16))),
    'uacanet_s': ('dilated/uacanet.pth', (1, 1, 2, 4)),
    'vecroad': ('vecroad/vecroad.pth', (1, 1, 2, (4, 8, 16))),
}


@pytest.mark.parametrize('name', slow_but(['fcanet'], WIDE))
def test_load_model_applies_the_dilations_of_the_last_stage_on_a_wide_image(name: str, references: References) -> None:
    # On small images, the last stage's maps are smaller than its dilation, so any dilation computes the same.
    path, dilations = reference_file(references, WIDE[name][0]), WIDE[name][1]
    with np.load(path.with_name('wide.npz')) as arrays:
        x, theirs = (torch.from_numpy(arrays[each]) for each in ('images', name))
    checkpoint = read_checkpoint(path)
    for last in (dilations[3], 4, 2):
        model = load_model(checkpoint, dilations=(*dilations[:3], last)).eval()
        with torch.inference_mode():
            error = (model.forward_features(x)[:, ::8] - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5 if last == dilations[3] else error > 0.1


# Official files, and those of projects that build on them


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: {'state_dict': under('module.', state), 'epoch': 3},
        lambda state: {'model': under('encoder.', state)},
        lambda state: under('module.resnet.', state) | {'agg.weight': torch.ones(2)},
    ],
    ids=['state_dict and module', 'model and encoder', 'PraNet'],
)
def test_load_checkpoint_every_wrapper_and_prefix_loads_same_tensors(wrap: Any, tmp_path: Path) -> None:
    expected, model = tiny(), tiny()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    load_checkpoint(model, save_checkpoint(wrap(expected.state_dict()), tmp_path))
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_load_checkpoint_reports_dropped_filled_and_cast_tensors(tmp_path: Path) -> None:
    state = {f'resnet.{name}': tensor.half() for name, tensor in tiny().state_dict().items() if 'batches' not in name}
    file = save_checkpoint({**state, 'head.weight': torch.ones(2)}, tmp_path)
    checkpoint = load_checkpoint(tiny(), file)
    assert checkpoint.dropped == {'head.weight': 'part of another module'}
    assert {*checkpoint.filled} == {name for name in tiny().state_dict() if 'batches' in name}
    assert checkpoint.cast == {'float16': len(state)}
    loaded = {f'resnet.{name}': each for name, each in checkpoint.state.items() if 'batches' not in name}
    torch.testing.assert_close(loaded, {name: each.float() for name, each in state.items()}, rtol=0, atol=0)


SHORT_AND_THIN: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(32, 64, 128, 256))


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        *((name, {}) for name in ('dla60_res2next', 'blres2net50_26w_4s', 'seres2next29_8c_25w_4s')),
        ('res2net50_14w_8s', SHORT_AND_THIN),
        ('res2next50', dict(SHORT_AND_THIN, in_chans=1)),
        ('seres2net50_26w_4s', dict(SHORT_AND_THIN, base_width=13)),
        ('res2net50d', dict(SHORT_AND_THIN, attn_layer='eca')),
        ('res2net50d', dict(SHORT_AND_THIN, replace_stem_pool=True)),
        # Each stage allows different values of base_width.
        ('res2net50_26w_4s', dict(layers=(1, 2, 1, 1), channels=(16, 24, 32, 40))),
        ('res2net50_48w_2s', dict(SHORT_AND_THIN, first_block='group')),
    ],
)
def test_find_model_infers_model_and_arguments_from_shapes(name: str, args: dict[str, Any]) -> None:
    shapes = timm.create_model(name, num_classes=3, device='meta', **args).state_dict()
    ones = {key: torch.ones((), dtype=tensor.dtype).expand(tensor.shape) for key, tensor in shapes.items()}
    checkpoint = identify(RawFile(ones), 'file')
    assert (*find_model(checkpoint)[:2], checkpoint.num_classes) == (name, args, 3)


def test_bare_backbone_of_mmdet_defaults_to_official_but_a_detector_to_mmdet(tmp_path: Path) -> None:
    stem = {'conv1.': 'stem.', 'bn1.': 'stem.7.'}
    state = {re.sub(r'^(conv1|bn1)\.', lambda match: stem[match[0]], name): each for name, each in STATE.items()}
    file = save_checkpoint(state, tmp_path)
    assert read_checkpoint(file).dialect == 'mmdet'
    assert read_checkpoint(file).spec.first_block == 'official'
    assert read_checkpoint(file, first_block='mmdet').spec.first_block == 'mmdet'
    assert 'first_block' in read_checkpoint(file).assumed
    detector = under('backbone.', state) | {'bbox_head.fc.weight': torch.ones(2)}
    found = read_checkpoint(save_checkpoint(detector, tmp_path))
    assert (found.spec.first_block, found.provenance['first_block']) == ('mmdet', 'inferred')


# Errors


def assert_refused_and_unchanged(model: nn.Module, file: Path, message: str) -> str:
    """Asserts that loading a file fails and leaves the model unchanged; returns the error message."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(model, file)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    return str(error.value)


@pytest.mark.parametrize(
    ('args', 'message'),
    [
        (dict(layers=(1, 2, 2, 1)), r"24 of the model's tensors are missing \(first: layer3\.1\.conv1"),
        (dict(layers=(1, 1, 1, 1)), r'20 tensors are unknown to the model \(first: layer2\.1\.conv1'),
        (dict(num_classes=7), r'2 have a different shape \(first: fc\.weight, \(4, 32\) instead of \(7, 32\)'),
    ],
    ids=['deeper', 'shallower', 'classes'],
)
def test_load_checkpoint_mismatch_lists_problems_and_suggests_a_model_and_changes_nothing(
    args: dict[str, Any], message: str, tmp_path: Path
) -> None:
    file = save_checkpoint(STATE, tmp_path)
    error = assert_refused_and_unchanged(tiny(**args), file, message)
    found = 'scale=3, base_width=32, layers=(1, 2, 1, 1), channels=(8, 8, 8, 8), num_classes=4'
    assert f"It fits timm.create_model('test_res2net', {found})" in error
    assert str(file) in error


ONE, FC = torch.ones(1), STATE['fc.weight']
BAD: list[tuple[dict[str, Tensor], str]] = [
    ({**STATE, 'fc.bias': torch.tensor([1.0, 2.0, math.nan, 0.0])}, 'fc.bias has NaN or infinite values'),
    *(({**STATE, 'fc.bias': torch.tensor([0, limit, 0, 0])}, 'NaN or infinite') for limit in (math.inf, -math.inf)),
    ({**STATE, 'layer1.0.bn1.running_var': -STATE['layer1.0.bn1.running_var']}, 'running_var has a negative variance'),
    ({**STATE, 'layer1.0.extra.weight': ONE}, '1 tensors are unknown to the model'),
    ({**STATE, **{f'depth.{name}': tensor.clone() for name, tensor in STATE.items()}}, "under '', 'depth.'"),
    ({name.replace('convs.0', 'conv2'): tensor for name, tensor in STATE.items()}, 'plain ResNet'),
    ({name.replace('.convs.', '.conv2.'): tensor for name, tensor in STATE.items()}, r'equation \(1\)'),
    (fuse(tiny()).state_dict(), 'fused model.*before calling `fuse`'),
    ({**under('backbone.', STATE), 'head.fc.weight': ONE}, r'head\.fc\.weight and another tensor both become fc\.w'),
    ({**STATE, 'fc.weight': FC.to_sparse()}, r'fc\.weight .*sparse, quantized, nested, without values'),
    ({**STATE, 'fc.weight': FC.to(torch.float8_e4m3fn)}, r'fc\.weight .*float8_e4m3fn'),
    ({**STATE, 'fc.weight': FC.to(torch.complex64)}, r'fc\.weight .*ComplexFloat'),
    ({**STATE, 'fc.weight': FC.long()}, r'fc\.weight .*int64'),
    ({**STATE, 'fc.weight': FC.double().fill_(1e300)}, r'fc\.weight .*NaN or infinite'),
    ({'a': ONE}, r'no Res2Net among 1 tensors \(first: a\)'),
    ({}, r'no Res2Net among 0 tensors \(first: none\)'),
]


@pytest.mark.filterwarnings('ignore:.*([Ss]parse|TypedStorage)')
@pytest.mark.parametrize(('state', 'message'), BAD, ids=[message for _, message in BAD])
def test_load_checkpoint_bad_tensors_are_refused_and_change_nothing(
    state: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    assert_refused_and_unchanged(tiny(), save_checkpoint(state, tmp_path), message)


def test_weights_too_large_for_the_models_type_are_refused(tmp_path: Path) -> None:
    message = r'1 tensors hold numbers too large for torch\.float16 \(first: fc\.bias\)'
    file = save_checkpoint({**STATE, 'fc.bias': torch.full((4,), 1e6)}, tmp_path)
    assert_refused_and_unchanged(tiny().half(), file, message)
    with pytest.raises(CheckpointError, match=message):
        load_model(file, dtype=torch.float16)
    load_checkpoint(tiny(), file)


def test_overflow_from_summed_channels_is_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    state['conv1.0.weight'].fill_(3e38)
    file = save_checkpoint(state, tmp_path)
    with pytest.raises(CheckpointError, match=r'does not fit 1 channels: 1 tensors hold numbers too large'):
        load_model(file, in_chans=1)
    options: dict[str, Any] = dict(pretrained_cfg_overlay=dict(file=str(file)), num_classes=4, **TINY)
    with pytest.raises(CheckpointError, match=r'numbers too large for torch\.float32 \(first: conv1\.0\.weight\)'):
        timm.create_model('test_res2net', pretrained=True, in_chans=1, **options)


@pytest.mark.parametrize('prefix', ['', 'ing.'])
def test_load_checkpoint_prefix_must_be_the_whole_prefix_of_a_network(prefix: str, tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    for factor, each in enumerate(('', 'ing.', 'learning.', 'ing.learn.', 'deep.ing.')):
        state |= {each + name: tensor * (factor + 1) for name, tensor in tiny().state_dict().items()}
    model = tiny()
    load_checkpoint(model, save_checkpoint({'model': state}, tmp_path), prefix=prefix)
    torch.testing.assert_close(model.fc.weight, (2 if prefix else 1) * tiny().fc.weight)


def test_load_checkpoint_treats_one_network_under_two_names_as_one(tmp_path: Path) -> None:
    state = tiny().state_dict()
    model = tiny()
    nn.init.zeros_(model.fc.weight)
    file = save_checkpoint(under('encoder.', state) | state | {'head.mask': torch.full((2, 2), -torch.inf)}, tmp_path)
    checkpoint = load_checkpoint(model, file)
    assert 'head.mask' in checkpoint.dropped
    torch.testing.assert_close(model.fc.weight, state['fc.weight'])


def test_network_compiled_in_parts_loads_and_saves_without_compile_prefixes(tmp_path: Path) -> None:
    compile: Any = partial(torch.compile, backend='eager')
    model, parts = tiny(), tiny()
    parts.layer1 = compile(parts.layer1)
    parts.layer3[0].conv1 = compile(parts.layer3[0].conv1)
    compiled = compile(parts)
    torch.save(compiled.state_dict(), tmp_path / 'compiled.pth')
    torch.testing.assert_close(load_model(tmp_path / 'compiled.pth').state_dict(), model.state_dict())
    torch.save(randomize(model).state_dict(), tmp_path / 'plain.pth')
    load_checkpoint(compiled, tmp_path / 'plain.pth')
    torch.testing.assert_close([*compiled.state_dict().values()], [*model.state_dict().values()], rtol=0, atol=0)
    torch.save({**compiled.state_dict(), **model.state_dict()}, tmp_path / 'both.pth')
    with pytest.raises(CheckpointError, match='compiled and not compiled'):
        load_model(tmp_path / 'both.pth')


def test_read_checkpoint_unknown_tensor_of_a_block_is_an_error(references: References, tmp_path: Path) -> None:
    weights = read_file(reference_file(references, 'paddle/detection_d.pdparams')).tensors
    extra = {'res3.blocks.1.branch2b.0.gate.weight': torch.ones(2), 'neck.gate.weight': torch.ones(2)}
    with pytest.raises(CheckpointError, match=r'blocks\.1\.branch2b\.0\.gate\.weight belongs to a block'):
        read_checkpoint(save_checkpoint({**weights, **extra}, tmp_path))
    del extra['res3.blocks.1.branch2b.0.gate.weight']
    dropped = read_checkpoint(save_checkpoint({**weights, **extra}, tmp_path)).dropped
    assert dropped['neck.gate.weight'] == 'part of another module'


def test_top_level_modules_of_all_networks_are_known() -> None:
    assert {type(built(name)) for name in TRUNKS} == {arch.trunk for arch in ARCHS.values()}
    models = [*map(built, TRUNKS), tiny(replace_stem_pool=True), tiny(act_layer='prelu')]
    assert {name.partition('.')[0] for model in models for name in model.state_dict()} == PARTS


@pytest.mark.parametrize(
    ('options', 'error', 'message'),
    [
        (dict(dialect='caffe'), ValueError, r"unknown dialect 'caffe'\. Choose from paddleclas"),
        (dict(dialect='mindcv'), CheckpointError, "no Res2Net in the dialect 'mindcv'"),
        (dict(model=nn.Linear(2, 2)), TypeError, 'Linear has no Res2Net block'),
        (dict(model=tiny(device='meta')), ValueError, 'meta device'),
    ],
    ids=str,
)
def test_load_checkpoint_wrong_arguments_raise_errors_with_the_reason(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        load_checkpoint(**{'model': tiny(), 'file': save_checkpoint(STATE, tmp_path), **options})


@pytest.mark.parametrize(
    'arguments',
    [dict(num_classes=0), dict(features_only=True, out_indices=(1, 2))]
    + [dict(features_only=True, feature_cls=each) for each in ('hook', 'getter')],
)
def test_load_checkpoint_ignores_tensors_of_parts_that_model_lacks(
    arguments: dict[str, Any], tmp_path: Path, images: Tensor
) -> None:
    whole = tiny()
    model = tiny(**{**dict(num_classes=4), **arguments}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_checkpoint(model, save_checkpoint(whole.state_dict(), tmp_path))
    ours = model(images)
    if 'features_only' in arguments:
        indices = list(arguments.get('out_indices', range(5)))
        expected = whole.forward_intermediates(images, indices=indices, intermediates_only=True)
        torch.testing.assert_close(list(ours.values() if isinstance(ours, dict) else ours), expected, rtol=0, atol=0)
    else:
        torch.testing.assert_close(ours, whole.forward_head(whole.forward_features(images), pre_logits=True))


# Converting


def test_convert_writes_folder_that_timm_loads(references: References, tmp_path: Path) -> None:
    file = reference_file(references, 'openmmlab/mmdet.pth')
    done = convert(file, tmp_path / 'deep' / 'folder')
    model = timm.create_model(f'local-dir:{done.folder}', pretrained=True).eval()
    assert_computes(model, file.with_suffix('.npz'))
    config = json.loads((done.folder / 'config.json').read_text())
    assert config['timm_res2net']['sha256'] == sha256(done.folder / 'model.safetensors')
    assert config['timm_res2net']['converted_from']['sha256'] == sha256(file)
    assert 'num_classes' not in config['model_args']
    assert sorted(path.name for path in done.folder.iterdir()) == ['config.json', 'model.safetensors']
    assert [path.name for path in done.folder.parent.iterdir()] == ['folder']
    again = read_checkpoint(done.folder / 'model.safetensors')
    assert (again.spec.first_block, again.assumed) == ('mmdet', ())
    with pytest.raises(ValueError, match="they need first_block='mmdet'"):
        timm.create_model(f'local-dir:{done.folder}', pretrained=True, first_block='official')


def test_weights_with_a_published_name_keep_license_and_tag() -> None:
    cfg = describe_weights('res2net50_vd_26w_4s', {}, 'Res2Net50_vd_26w_4s_ssld_pretrained.pdparams')
    assert (cfg['license'], cfg['tag']) == ('apache-2.0', 'ssld_in1k')
    assert 'url' not in cfg


def test_convert_model_argument_must_fit_file(tmp_path: Path) -> None:
    narrow: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(32, 32, 32, 32))
    file = save_checkpoint(timm.create_model('res2net50d', **narrow).state_dict(), tmp_path)
    args = dict(stem_type='deep', stem_width=32, avg_down=True, **narrow)
    assert convert(file, dry_run=True, model='res2net50_26w_4s').args == args
    with pytest.raises(CheckpointError, match='its tensors do not match dla60_res2net'):
        convert(file, dry_run=True, model='dla60_res2net')
    with pytest.raises(ValueError, match=r"no model 'resnet50' in this package\. Did you mean res2next50"):
        convert(file, dry_run=True, model='resnet50')


# Exporting

MIXED: dict[str, Any] = dict(first_block='mmdet', num_classes=0)
EXPORTABLE = {
    'deformable/universenet_dcn.pth': 'mmdet',
    'openmmlab/mmpretrain_deep_stem.pth': 'mmpretrain',
    'paddle/res2net50_vd.pdparams': 'paddleclas',
    'paddle/res2net50.pdparams': 'paddleclas',
    'paddle/res2net200_vd.pdparams': 'paddleclas',
}


@pytest.mark.parametrize('file', slow_but([*EXPORTABLE][:3], EXPORTABLE))
def test_export_checkpoint_has_names_and_values_of_original_file(
    file: str, references: References, tmp_path: Path
) -> None:
    original = reference_file(references, file)
    checkpoint = read_checkpoint(original)
    export_checkpoint(load_model(checkpoint), tmp_path / 'exported', EXPORTABLE[file])
    theirs, ours = read_file(original).tensors, read_file(tmp_path / 'exported').tensors
    torch.testing.assert_close(ours, {name: theirs[name] for name in ours}, rtol=0, atol=0)
    assert theirs.keys() - ours.keys() == {*checkpoint.dropped}


@pytest.mark.parametrize(
    ('name', 'args', 'dialect', 'message'),
    [
        ('res2net50_vd_26w_4s', {}, 'mmpretrain', "has first_block='official', the model has first_block='paddle'"),
        ('res2net50_vd_26w_4s', dict(avg_down=False), 'paddleclas', r'has layer2\.0\.downsample\.0'),
        ('test_res2net', dict(replace_stem_pool=True), 'official', r'none of its networks has maxpool\.0\.weight'),
        ('res2next50', {}, 'mmpretrain', 'no Res2NeXt'),
        ('test_res2net', dict(act_layer='silu'), 'official', "the model has act_layer='silu'"),
        ('test_res2net', dict(output_stride=16), 'official', r'layer4\.0\.(convs\.0|downsample\.\d) is .* there and'),
        ('test_res2net', dict(global_pool='max'), 'official', r'global_pool.* is .*Avg.* there and .*Max'),
        ('test_res2net', dict(style='caffe'), 'official', "network has style='pytorch', the model has style='caffe'"),
        ('seres2net50_26w_4s', {}, 'official', 'without attention'),
        ('dla60_res2net', {}, 'official', 'ResNet-hosted'),
        ('blres2net50_26w_4s', {}, 'official', 'ResNet-hosted'),
        ('res2net50d', {}, 'mindcv', "cannot export to 'mindcv'. Choose from official, mmpretrain, mmdet, paddleclas"),
        ('test_res2net', dict(device='meta'), 'official', 'are on the meta device, without values'),
        ('test_res2net', {}, 'mmdet', 'Pass num_classes=0'),
        ('test_res2net', dict(MIXED, deformable=(None, None, 'v1', 'v2')), 'mmdet', 'one kind of deformable'),
        ('test_res2net', dict(MIXED, dilations=(1, (2, 4), 1, 1)), 'mmdet', 'one dilation for all blocks'),
    ],
)
def test_export_checkpoint_unsupported_model_raises_and_writes_nothing(
    name: str, args: dict[str, Any], dialect: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_checkpoint(timm.create_model(name, **{**(small(name) or TINY), **args}), tmp_path / 'out.pth', dialect)
    assert list(tmp_path.iterdir()) == []


def test_export_checkpoint_refuses_weights_that_nobody_could_use(tmp_path: Path) -> None:
    diverged = tiny()
    nn.init.constant_(diverged.fc.bias, math.nan)
    for model, message in ((diverged, 'contain NaN or infinity'), (fuse(tiny()), 'Export the model it was made from')):
        with pytest.raises(ValueError, match=message):
            export_checkpoint(model, tmp_path / 'net.pth', 'official')
    assert list(tmp_path.iterdir()) == []


def test_load_checkpoint_of_a_read_checkpoint_with_options_raises_type_error(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_checkpoint(tiny().state_dict(), tmp_path))
    with pytest.raises(TypeError, match=r'was already read\. Pass dialect, prefix and weights_from to read_checkpoint'):
        load_checkpoint(tiny(), checkpoint, dialect='official')
    with pytest.raises(TypeError, match="unknown argument 'frist_block'"):
        load_checkpoint(tiny(), checkpoint, frist_block='mmdet')


def test_load_checkpoint_deformable_tensors_for_a_plain_model_are_refused(tmp_path: Path) -> None:
    file = save_checkpoint(tiny(deformable=(None, None, None, 'v2')).state_dict(), tmp_path)
    error = assert_refused_and_unchanged(tiny(), file, r'its network has deformable=\(None, None, None, .v2.\)')
    assert "Create the model with deformable=(None, None, None, 'v2')" in error
    assert 'if the file really is' not in error  # the tensors prove it


@pytest.mark.parametrize(
    'arguments',
    [
        dict(num_classes=0),
        dict(in_chans=4, num_classes=7),
        dict(features_only=True, in_chans=1, feature_cls='getter', out_indices=(1, 3)),
    ],
    ids=str,
)
def test_load_model_adapts_channels_classes_and_features_as_timm_does(
    arguments: dict[str, Any], tmp_path: Path, images: Tensor
) -> None:
    expected = tiny('mmdet')
    save_file(expected.state_dict(), tmp_path / 'a.safetensors', {'first_block': 'mmdet'})
    torch.manual_seed(1)
    model = load_model(tmp_path / 'a.safetensors', **arguments).eval()
    torch.manual_seed(1)
    named = load_model(tmp_path / 'a.safetensors', 'test_res2net', **TINY, **arguments).eval()
    overlay = dict(file=str(tmp_path / 'a.safetensors'), num_classes=4)
    options = dict(pretrained=True, pretrained_cfg_overlay=overlay, first_block='mmdet', **TINY)
    torch.manual_seed(1)
    timms = timm.create_model('test_res2net', **{**options, **arguments}).eval()
    x = images[:, :1].expand(-1, arguments.get('in_chans', 3), -1, -1)
    torch.testing.assert_close(model(x), timms(x), rtol=0, atol=0)
    torch.testing.assert_close(named(x), timms(x), rtol=0, atol=0)


def test_load_model_named_model_gets_the_channels_of_the_file_and_the_given_spec(
    tmp_path: Path, images: Tensor
) -> None:
    options: dict[str, Any] = dict(TINY, style='caffe', stem_type='', stem_width=64)
    expected = tiny(in_chans=1, **options)
    save_file(expected.state_dict(), tmp_path / 'a.safetensors', {'first_block': 'official'})
    model = load_model(tmp_path / 'a.safetensors', 'test_res2net', **options).eval()
    torch.testing.assert_close(model(images[:, :1]), expected(images[:, :1]), rtol=0, atol=0)
    assert model.pretrained_cfg['input_size'][0] == 1
    adapted = load_model(tmp_path / 'a.safetensors', 'test_res2net', in_chans=3, **options)
    assert adapted(images).shape == (len(images), 4)


def test_file_with_an_activation_that_timm_lacks_loads_only_into_its_own_model(tmp_path: Path) -> None:
    layer = partial(nn.LeakyReLU, negative_slope=0.3)
    message = re.escape("act_layer='leaky_relu(negative_slope=0.3)'")
    model, file = tiny(act_layer=layer), tmp_path / 'net.safetensors'
    save_file(model.state_dict(), file, spec_of(model).as_text())
    assert load_checkpoint(tiny(act_layer=layer), file).spec == spec_of(model)
    with pytest.raises(CheckpointError, match=f'{message}.*No model of this package fits it'):
        load_checkpoint(tiny(), file)
    for options in ({}, dict(name='test_res2net', **TINY)):
        with pytest.raises(CheckpointError, match=f'{message} is not a timm activation'):
            load_model(file, **options)
