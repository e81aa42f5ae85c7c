"""Checkpoints of other frameworks give the same outputs as there, or are refused."""

import argparse
import json
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support import TINY, TRUNKS, assert_computes, built, randomise, slow_but, small, tiny
from timm.models import reparameterize_model
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

from timm_res2net import CheckpointError, export_checkpoint, fuse, load_checkpoint
from timm_res2net.models.block import function_of
from timm_res2net.models.function import FIRST_BLOCKS, STYLES
from timm_res2net.models.variants import ARCHS
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.convert import convert
from timm_res2net.weights.dialects import PARTS
from timm_res2net.weights.files import sha256
from timm_res2net.weights.folder import write_folder
from timm_res2net.weights.loading import adapt_state_dict, load_model
from timm_res2net.weights.readers import read

References = Callable[[str], Path]

THIN: dict[str, Any] = dict(layers=(1, 2, 1, 1), channels=(16, 32, 64, 128))
# Files written by the frameworks themselves: the file, its model, and the arguments besides the number of classes.
PADDLE_DCN: dict[str, Any] = dict(base_width=2, deformable=(None, 'v2', 'v2', 'v2'))
WRITTEN: list[tuple[str, str, dict[str, Any]]] = [
    ('paddle/res2net50.pdparams', 'res2net50_pd_26w_4s', dict(base_width=2)),
    ('paddle/res2net50.tar', 'res2net50_pd_26w_4s', dict(base_width=2)),
    ('paddle/res2net50_vd.pdparams', 'res2net50_vd_26w_4s', dict(base_width=2)),
    ('paddle/res2net50_vd.tar', 'res2net50_vd_26w_4s', dict(base_width=2)),
    ('paddle/res2net200_vd.pdparams', 'res2net200_vd_26w_4s', dict(base_width=1, scale=3)),
    ('paddle/res2net200_vd.tar', 'res2net200_vd_26w_4s', dict(base_width=1, scale=3)),
    ('paddle/detection_d.pdparams', 'res2net50_vd_26w_4s', dict(base_width=2, avg_down=False)),
    ('paddle/detection_dcn.pdparams', 'res2net50_vd_26w_4s', dict(PADDLE_DCN, avg_down=False)),
    ('paddle/detection_dcn_static.tar', 'res2net50_vd_26w_4s', PADDLE_DCN),
    ('mindspore/res2net.ckpt', 'res2net50_26w_4s', dict(layers=(1, 2, 1, 1), base_width=2)),
    ('mindspore/res2net_v1b.ckpt', 'res2net50d', dict(layers=(1, 2, 1, 1), base_width=3, scale=3)),
    ('openmmlab/mmpretrain.pth', 'res2net50_26w_4s', dict(base_width=2)),
    ('openmmlab/mmpretrain_deep_stem.pth', 'res2net50d', dict(base_width=2)),
    ('openmmlab/mmdet.pth', 'res2net50d', dict(base_width=2, first_block='mmdet')),
    ('oneflow/legacy.zip', 'res2net50_26w_4s', dict(layers=(1, 2, 1, 1), base_width=2)),
    ('oneflow/folder.zip', 'res2net50_26w_4s', dict(layers=(1, 2, 1, 1), base_width=2)),
    ('oneflow/single.pkl', 'res2net50_26w_4s', dict(layers=(1, 2, 1, 1), base_width=2)),
    ('holocron/plain.pth', 'res2net50_26w_4s', dict(THIN, base_width=16)),
    ('holocron/deep_stem.pth', 'res2net50d', dict(THIN, base_width=20, scale=3)),
]


def reference_file(references: References, name: str) -> Path:
    framework, file = name.split('/')
    return references(framework) / file


@pytest.mark.parametrize(('file', 'name', 'args'), WRITTEN, ids=[file for file, *_ in WRITTEN])
def test_load_checkpoint_computes_outputs_of_original_framework(
    file: str, name: str, args: dict[str, Any], references: References
) -> None:
    path = reference_file(references, file)
    done = convert(path, dry_run=True)
    assert (done.name, done.args) == (name, args)
    model = timm.create_model(name, num_classes=done.checkpoint.num_classes, **args).eval()
    load_checkpoint(model, path)
    assert_computes(model, path.with_suffix('.npz'))


@pytest.mark.parametrize(
    ('file', 'name'),
    [
        ('paddle/res2net50.pdparams', 'res2net50_26w_4s'),
        ('paddle/res2net50_vd.pdparams', 'res2net50d'),
        ('openmmlab/mmdet.pth', 'res2net50d'),
    ],
)
def test_load_checkpoint_of_another_function_is_refused_and_forced_load_is_wrong(
    file: str, name: str, references: References
) -> None:
    path = reference_file(references, file)
    model = timm.create_model(name, base_width=2, num_classes=read_checkpoint(path).num_classes).eval()
    function = read_checkpoint(path).function.first_block
    with pytest.raises(CheckpointError, match=f"first_block='{function}'.*It fits timm.create_model"):
        load_checkpoint(model, path)
    load_checkpoint(model, path, first_block='official')
    with pytest.raises(AssertionError):
        assert_computes(model, path.with_suffix('.npz'), tolerance=0.01)


# Detectors, strided in the 1x1 convolution or deformable: the file, its model, and arguments.
CAFFE: dict[str, Any] = dict(first_block='mmdet', style='caffe', base_width=2)
FCA_NET: dict[str, Any] = dict(first_block='mmdet', strides=(1, 2, 2, 1), dilations=(1, 1, 1, (2, 4, 8)))
DETECTORS: list[tuple[str, str, dict[str, Any]]] = [
    ('deformable/detectron2.pkl', 'res2net50d', CAFFE),
    ('deformable/centernet2.pth', 'res2net50d', CAFFE),
    ('deformable/centernet2_dcn.pth', 'res2net50d', dict(CAFFE, deformable=(None, None, 'v2', 'v2'))),
    (
        'deformable/mmdet_dcnv2.pth',
        'res2net50d',
        dict(first_block='mmdet', base_width=2, deformable=(None, 'v2', 'v2', 'v2')),
    ),
    (
        'deformable/universenet_dcn.pth',
        'res2net50d',
        dict(first_block='mmdet', base_width=2, deformable=(None, None, None, 'v1')),
    ),
    ('maskrcnn/maskrcnn.pth', 'res2net50_26w_4s', dict(base_width=2, style='caffe', norm_eps=0.0)),
    (
        'vecroad/vecroad.pth',
        'res2net50d',
        dict(base_width=2, first_block='mmdet', strides=(1, 2, 1, 1), dilations=(1, 1, 2, (4, 8, 16))),
    ),
    ('encoders/meganet.pth', 'res2net50d', dict(layers=(2, 1, 1, 1), base_width=2)),
    ('encoders/fcanet.pth', 'res2net50d', dict(layers=(2, 1, 1, 3), base_width=2, in_chans=5, **FCA_NET)),
]


@pytest.mark.parametrize(('file', 'name', 'args'), DETECTORS, ids=[file for file, *_ in DETECTORS])
def test_load_model_detector_computes_what_its_own_code_computes(
    file: str, name: str, args: dict[str, Any], references: References
) -> None:
    path = reference_file(references, file)
    done = convert(path, dry_run=True)
    assert (done.name, done.args) == (name, args)
    assert len(done.checkpoint.translation.dropped) == 1  # the tensor of another part
    assert_computes(load_model(path).eval(), path.with_suffix('.npz'))


@pytest.mark.parametrize(
    ('file', 'wrong'),
    [
        ('deformable/detectron2.pkl', dict(style='pytorch')),
        ('deformable/centernet2_dcn.pth', dict(style='pytorch')),
        ('deformable/mmdet_dcnv2.pth', dict(first_block='official')),
        ('maskrcnn/maskrcnn.pth', dict(style='pytorch')),
        ('maskrcnn/maskrcnn.pth', dict(first_block='mmdet')),
        ('maskrcnn/maskrcnn.pth', dict(norm_eps=1e-5)),
        ('vecroad/vecroad.pth', dict(first_block='official')),
        ('vecroad/vecroad.pth', dict(dilations=(1, 1, 2, 4))),
        ('encoders/meganet.pth', dict(first_block='mmdet')),
        ('encoders/fcanet.pth', dict(first_block='official')),
    ],
)
def test_load_checkpoint_detector_of_another_function_is_refused_and_would_be_wrong(
    file: str, wrong: dict[str, str], references: References
) -> None:
    path = reference_file(references, file)
    done = convert(path, dry_run=True)
    model = timm.create_model(done.name, num_classes=0, **{**done.args, **wrong}).eval()
    with pytest.raises(CheckpointError, match='would load and compute something else'):
        load_checkpoint(model, path)
    load_checkpoint(model, path, **wrong)
    with pytest.raises(AssertionError):
        assert_computes(model, path.with_suffix('.npz'), tolerance=0.01 if 'norm_eps' in wrong else 0.1)


# Dilated and other backbones, of which the files can't tell: what was computed, the file, and what must be said of it.
DEEPLAB: dict[str, Any] = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))
UNSAID: list[tuple[str, str, dict[str, Any]]] = [
    ('inspyrenet', 'backbone', dict(dilations=(1, 1, 2, (4, 8, 16)))),
    ('uacanet_s', 'uacanet', dict(dilations=(1, 1, 2, 4))),
    ('uacanet_l', 'uacanet', DEEPLAB),
    ('urn', 'backbone', dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4))),
    ('poolnet', 'poolnet', dict(DEEPLAB, stem_ceil_mode=True)),
    ('mmdet_dilated', 'mmdet_dilated', DEEPLAB),
    ('mmpretrain_caffe', 'mmpretrain_caffe', dict(style='caffe')),
]


@pytest.mark.parametrize(('reference', 'file', 'said'), UNSAID, ids=[reference for reference, *_ in UNSAID])
def test_load_model_of_given_geometry_computes_what_its_own_code_computes(
    reference: str, file: str, said: dict[str, Any], references: References
) -> None:
    folder = references('dilated')
    assert_computes(load_model(folder / f'{file}.pth', **said).eval(), folder / f'{reference}.npz')
    with pytest.raises(AssertionError):
        assert_computes(load_model(folder / f'{file}.pth').eval(), folder / f'{reference}.npz', tolerance=0.1)


@pytest.mark.parametrize(
    ('reference', 'file', 'dilations'),
    [
        ('dilated/inspyrenet', 'dilated/backbone.pth', (1, 1, 2, (4, 8, 16))),
        ('dilated/uacanet_s', 'dilated/uacanet.pth', (1, 1, 2, 4)),
        ('vecroad/vecroad', 'vecroad/vecroad.pth', (1, 1, 2, (4, 8, 16))),
        ('encoders/fcanet', 'encoders/fcanet.pth', (1, 1, 1, (2, 4, 8))),
    ],
)
def test_load_model_computes_the_dilations_of_the_last_stage_on_a_wide_image(
    reference: str, file: str, dilations: tuple[Any, ...], references: References
) -> None:
    # Small images have a last stage smaller than its dilation, where any dilation computes the same.
    archive, name = reference.split('/')
    with np.load(references(archive) / 'wide.npz') as arrays:
        x, theirs = (torch.from_numpy(arrays[each]) for each in ('images', name))
    for last in (dilations[3], 4, 2):
        model = load_model(reference_file(references, file), dilations=(*dilations[:3], last)).eval()
        with torch.inference_mode():
            error = (model.forward_features(x)[:, ::8] - theirs).abs().max() / theirs.abs().max()
        assert error < 1e-5 if last == dilations[3] else error > 0.1


# detectron2, in the format that its fork documents


def detectron_names(state: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Renames a v1b backbone as the authors' fork of detectron2 does."""
    renamed = {}
    for name, tensor in state.items():
        name = re.sub(r'^layer(\d)', lambda match: f'res{int(match[1]) + 1}', name)
        name = re.sub(r'(res\d\.\d+)\.bn([13])\.', r'\1.conv\2.norm.', name)
        name = re.sub(r'downsample\.1\.', 'shortcut.1.', name)
        name = re.sub(r'downsample\.2\.', 'shortcut.1.norm.', name)
        name = re.sub(r'^(conv1|bn1)\.', r'stem.\1.', name)
        if not name.endswith('num_batches_tracked'):
            renamed[name] = tensor.numpy()
    return renamed


def detectron_features(weights: dict[str, np.ndarray], x: Tensor) -> list[Tensor]:
    """What that fork computes, in plain equations on its own names."""
    tensors = {name: torch.from_numpy(array) for name, array in weights.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance, weight, bias = (
            tensors[f'{name}.{part}'][:, None, None] for part in ('running_mean', 'running_var', 'weight', 'bias')
        )
        return (x - mean) / (variance + 1e-5) ** 0.5 * weight + bias

    for i, stride in ((0, 2), (3, 1), (6, 1)):
        x = F.conv2d(x, tensors[f'stem.conv1.{i}.weight'], stride=stride, padding=1)
        x = F.relu(norm(x, f'stem.conv1.{i + 1}' if i < 6 else 'stem.bn1'))
    x = F.max_pool2d(x, 3, 2, 1)
    features = []
    for stage in (2, 3, 4, 5):
        for i in range(sum(name.startswith(f'res{stage}.') and name.endswith('.conv1.weight') for name in tensors)):
            block = f'res{stage}.{i}'
            stride = 2 if stage > 2 and i == 0 else 1
            y = F.conv2d(x, tensors[f'{block}.conv1.weight'], stride=stride)  # STRIDE_IN_1X1 is their default
            y = F.relu(norm(y, f'{block}.conv1.norm'))
            width = len(tensors[f'{block}.convs.0.weight'])
            *splits, last = y.split(width, 1)
            outs: list[Tensor] = []
            for k, split in enumerate(splits):
                split = split + outs[-1] if i > 0 and k > 0 else split
                split = F.conv2d(split, tensors[f'{block}.convs.{k}.weight'], padding=1)
                outs.append(F.relu(norm(split, f'{block}.bns.{k}')))
            outs.append(last)  # they pool beside strided 3x3 convolutions only
            y = norm(F.conv2d(torch.cat(outs, 1), tensors[f'{block}.conv3.weight']), f'{block}.conv3.norm')
            if i == 0:
                x = F.avg_pool2d(x, stride, stride, ceil_mode=True, count_include_pad=False)
                x = norm(F.conv2d(x, tensors[f'{block}.shortcut.1.weight']), f'{block}.shortcut.1.norm')
            x = F.relu(x + y)
        features.append(x)
    return features


@pytest.mark.parametrize('size', [32, 41])
def test_load_checkpoint_detectron2_detector_computes_its_equations(size: int, tmp_path: Path) -> None:
    weights = detectron_names(tiny(num_classes=0).state_dict())
    detector = {f'backbone.bottom_up.{name}': array for name, array in weights.items()}
    detector['proposal_generator.weight'] = np.ones(3, 'float32')
    (tmp_path / 'detector.pkl').write_bytes(pickle.dumps({'model': detector, '__author__': 'somebody'}))
    model = tiny('mmdet', style='caffe', num_classes=0)
    nn.init.zeros_(model.conv1[0].weight)
    checkpoint = load_checkpoint(model, tmp_path / 'detector.pkl')
    assert list(checkpoint.translation.dropped) == ['model.proposal_generator.weight']
    x = torch.randn(1, 3, size, size)
    ours = model.forward_intermediates(x, indices=[1, 2, 3, 4], intermediates_only=True)
    torch.testing.assert_close(ours, detectron_features(weights, x), rtol=1e-4, atol=1e-4)


def test_read_checkpoint_detectron2_backbone_is_official_but_uncertain(tmp_path: Path) -> None:
    weights = detectron_names(tiny(num_classes=0).state_dict())
    (tmp_path / 'r2.pkl').write_bytes(pickle.dumps(weights))
    checkpoint = read_checkpoint(tmp_path / 'r2.pkl')
    assert (checkpoint.translation.dialect, checkpoint.function.first_block) == ('detectron2', 'official')
    assert {'first_block', 'style'} <= set(checkpoint.assumed)


# Official files, and those of projects that build on them


def under(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def save_checkpoint(state: dict[str, Any], folder: Path, **options: Any) -> Path:
    torch.save(state, folder / 'weights.pth', **options)
    return folder / 'weights.pth'


@pytest.mark.parametrize(
    'wrap',
    [
        lambda state: state,
        lambda state: {'state_dict': {f'module.{name}': tensor for name, tensor in state.items()}, 'epoch': 3},
        lambda state: {'model': {f'encoder.{name}': tensor for name, tensor in state.items()}},
        lambda state: (
            {f'module.resnet.{name}': tensor for name, tensor in state.items()} | {'agg.weight': torch.ones(2)}
        ),
        lambda state: {name: tensor for name, tensor in state.items() if 'num_batches' not in name},
        lambda state: {name: tensor.half() if 'conv' in name else tensor for name, tensor in state.items()},
        lambda state: {'state_dict': {name: tensor + 1 for name, tensor in state.items()}, 'state_dict_ema': state},
    ],
    ids=['plain', 'state_dict and module', 'model and encoder', 'PraNet', 'without counters', 'float16', 'averaged'],
)
@pytest.mark.parametrize('zip_archive', [True, False])
def test_load_checkpoint_every_wrapper_and_prefix_loads_same_tensors(
    wrap: Any, zip_archive: bool, tmp_path: Path
) -> None:
    expected = tiny()
    expected.load_state_dict({name: tensor.half().to(tensor.dtype) for name, tensor in expected.state_dict().items()})
    file = save_checkpoint(wrap(expected.state_dict()), tmp_path, _use_new_zipfile_serialization=zip_archive)
    model = tiny()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    load_checkpoint(model, file)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


def test_load_checkpoint_reports_dropped_filled_and_cast_tensors(tmp_path: Path) -> None:
    state = {f'resnet.{name}': tensor.half() for name, tensor in tiny().state_dict().items() if 'batches' not in name}
    file = save_checkpoint({**state, 'head.weight': torch.ones(2)}, tmp_path)
    translation = load_checkpoint(tiny(), file).translation
    norms = sum(isinstance(module, nn.BatchNorm2d) for module in tiny().modules())
    assert translation.dropped == {'head.weight': 'beside the network'}
    assert len(translation.filled) == norms
    assert translation.cast == {'float16': len(state)}
    assert {t.dtype for name, t in translation.state.items() if 'batches' not in name} == {torch.float32}


def test_load_checkpoint_official_dla_drops_only_dead_projections(tmp_path: Path, build: Any) -> None:
    model = build('dla60_res2net', full=True)
    dead = {}
    for part in ('level3.project', 'level4.project', 'level4.tree1.project'):
        dead[f'{part}.0.weight'] = torch.ones(4, 4, 1, 1)
        dead |= {f'{part}.1.{name}': torch.ones(4) for name in ('weight', 'bias', 'running_mean', 'running_var')}
        dead[f'{part}.1.num_batches_tracked'] = torch.tensor(0)
    file = save_checkpoint({**model.state_dict(), **dead}, tmp_path)
    loaded = timm.create_model('dla60_res2net').eval()
    assert sorted(load_checkpoint(loaded, file).translation.dropped) == sorted(dead)
    assert len(dead) == 18
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    assert convert(file, dry_run=True).name == 'dla60_res2net'


@pytest.mark.parametrize(
    'name',
    slow_but(
        ['dla60_res2next'], ['dla60_res2next', 'blres2net50_26w_4s', 'seres2next29_8c_25w_4s', 'resnext29_8c_64w']
    ),
)
def test_convert_finds_model_of_full_size_weights(name: str, tmp_path: Path, build: Any) -> None:
    model = build(name, full=True)
    file = save_checkpoint(model.state_dict(), tmp_path)
    done = convert(file, dry_run=True)
    assert (done.name, done.args) == (name, {})
    load_checkpoint(model, file)


@pytest.mark.parametrize(
    ('name', 'args'),
    [
        ('res2net50_14w_8s', {}),
        ('res2next50', dict(in_chans=1)),
        ('seres2net50_26w_4s', dict(base_width=13)),
        ('res2net50d', dict(attn_layer='eca')),
        ('res2net50d', dict(replace_stem_pool=True)),
        ('res2net101_vd_26w_4s', {}),
        ('res2net50_26w_4s', dict(channels=(16, 24, 32, 40))),  # of which each leaves other values of base_width open
        ('res2net50_26w_4s', dict(first_block='mmdet')),
        ('res2net50_48w_2s', dict(first_block='group')),
    ],
)
def test_convert_infers_model_arguments_from_shapes(name: str, args: dict[str, Any], tmp_path: Path) -> None:
    model = timm.create_model(name, num_classes=3, **args)
    function = args.get('first_block') or ('paddle' if '_vd_' in name else 'official')
    save_file(model.state_dict(), tmp_path / 'w.safetensors', {'first_block': function})
    done = convert(tmp_path / 'w.safetensors', dry_run=True)
    assert (done.name, done.args, done.checkpoint.num_classes) == (name, args, 3)


def test_read_checkpoint_takes_first_block_from_record_of_timm_train_script(tmp_path: Path) -> None:
    from argparse import Namespace

    state = tiny('mmdet').state_dict()
    args = Namespace(model_kwargs={'first_block': 'mmdet'})
    recorded = {'epoch': 1, 'arch': 'test_res2net', 'state_dict': state, 'args': args}
    file = save_checkpoint(recorded, tmp_path)
    assert (read_checkpoint(file).function.first_block, read_checkpoint(file).assumed) == ('mmdet', ())
    file = save_checkpoint({**recorded, 'arch': 'res2net50_vd_26w_4s', 'args': Namespace()}, tmp_path)
    assert read_checkpoint(file).function.first_block == 'paddle'
    file = save_checkpoint({**recorded, 'arch': 'resnet50'}, tmp_path)
    assert read_checkpoint(file).function.first_block == 'official'
    assert 'first_block' in read_checkpoint(file).assumed


def test_read_checkpoint_bare_mmdet_backbone_defaults_to_official(references: References, tmp_path: Path) -> None:
    tree = read(reference_file(references, 'openmmlab/mmdet.pth')).nested['state_dict']
    prefix = 'backbone.'
    file = save_checkpoint(
        {name[len(prefix) :]: tensor for name, tensor in tree.items() if name.startswith(prefix)}, tmp_path
    )
    assert read_checkpoint(file).function.first_block == 'official'
    assert read_checkpoint(file, first_block='mmdet').function.first_block == 'mmdet'


# Ports in the order of equation (1)


def equation_1(state: dict[str, Tensor], scale: int) -> dict[str, Tensor]:
    """Moves the split that is not convolved from the end to the beginning, and renames the convolutions."""
    moved = {}
    for name, tensor in state.items():
        if re.search(r'layer\d\.\d+\.(conv1|bn1)\.', name) and tensor.ndim:
            *convolved, raw = tensor.chunk(scale, 0)
            tensor = torch.cat([raw, *convolved], 0)
        elif name.endswith('conv3.weight'):
            *convolved, raw = tensor.chunk(scale, 1)
            tensor = torch.cat([raw, *convolved], 1)
        moved[name.replace('.convs.', '.conv2.').replace('.bns.', '.bn2.')] = tensor
    return moved


@pytest.mark.parametrize('names', ['of the ports', 'official'])
def test_load_checkpoint_equation_1_port_loads_with_explicit_first_block(names: str, tmp_path: Path) -> None:
    expected = tiny('paddle')
    state = equation_1(expected.state_dict(), 3)
    options: dict[str, Any] = dict(first_block='paddle')
    if names == 'official':
        state = {name.replace('.conv2.', '.convs.').replace('.bn2.', '.bns.'): tensor for name, tensor in state.items()}
        options['dialect'] = 'equation-1'
    else:
        with pytest.raises(CheckpointError, match='equation'):
            load_checkpoint(tiny('paddle'), save_checkpoint(state, tmp_path))
    model = tiny('paddle')
    load_checkpoint(model, save_checkpoint(state, tmp_path), **options)
    torch.testing.assert_close(model.state_dict(), expected.state_dict(), rtol=0, atol=0)


# Errors

NARROW: dict[str, Any] = dict(channels=(32, 32, 32, 32))


def assert_refused_and_unchanged(model: nn.Module, file: Path, message: str) -> str:
    """Loads a file that has to be refused, leaving the model as it was; returns the error's whole message."""
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=message) as error:
        load_checkpoint(model, file)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    return str(error.value)


@pytest.mark.parametrize(
    ('make', 'message'),
    [
        (
            lambda: timm.create_model('res2net101_26w_4s', **NARROW),
            r"510 of the model's tensors are not in it \(first: layer3\.6\.conv1",
        ),
        (lambda: timm.create_model('res2net50_14w_8s', **NARROW), r'unexpected|another shape'),
        (
            lambda: timm.create_model('res2net50_26w_4s', num_classes=7, **NARROW),
            r'2 have another shape \(first: fc\.weight',
        ),
    ],
)
def test_load_checkpoint_mismatch_lists_problems_suggests_model_changes_nothing(
    make: Any, message: str, tmp_path: Path, build: Any
) -> None:
    file = save_checkpoint(timm.create_model('res2net50_26w_4s', **NARROW).state_dict(), tmp_path)
    error = assert_refused_and_unchanged(make(), file, message)
    assert "It fits timm.create_model('res2net50_26w_4s', channels=(32, 32, 32, 32))" in error
    assert str(file) in error


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            lambda state: {**state, 'fc.bias': torch.tensor([1.0, 2.0, float('nan'), 0.0])},
            'fc.bias holds values that are NaN',
        ),
        (lambda state: {**state, 'layer1.0.bn1.bias': torch.full((12,), float('inf'))}, 'NaN or infinite'),
        (lambda state: {**state, 'layer1.0.extra.weight': torch.ones(1)}, '1 in it are unknown to the model'),
        (
            lambda state: {**state, **{f'depth.{name}': tensor.clone() for name, tensor in state.items()}},
            "under '', 'depth.'",
        ),
        (lambda state: {name.replace('convs.0', 'conv2'): tensor for name, tensor in state.items()}, 'plain ResNet'),
        (
            lambda state: {**state, 'layer1.1.conv2.0.weight': torch.ones(1), 'layer1.0.conv2.0.weight': torch.ones(1)},
            '2 in it are unknown',
        ),
        (lambda state: {'a': torch.ones(1)}, r'no Res2Net among its 1 tensors \(first: a\)'),
        (lambda state: {}, r'no Res2Net among its 0 tensors'),
    ],
)
def test_load_checkpoint_bad_tensors_are_refused_and_change_nothing(change: Any, message: str, tmp_path: Path) -> None:
    assert_refused_and_unchanged(tiny(), save_checkpoint(change(tiny().state_dict()), tmp_path), message)


def hiding_nan(tensor: Tensor) -> Tensor:
    """A tensor of NaN with an attribute that answers, instead of its method, that it is no floating-point one."""
    hiding = torch.full_like(tensor, float('nan'))
    hiding.is_floating_point = OrderedDict  # type: ignore[method-assign, assignment]  # called, it is empty: false
    return hiding


@pytest.mark.filterwarnings('ignore:.*(quantized|[Ss]parse|TypedStorage)')
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda tensor: tensor.to('meta'), 'sparse, quantized, nested or without values'),
        (Tensor.to_sparse, 'sparse, quantized, nested or without values'),
        (Tensor.to_sparse_csr, 'sparse, quantized, nested or without values'),
        (
            lambda tensor: torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8),
            'sparse, quantized, nested or without values',
        ),
        (lambda tensor: torch.zeros(tensor.shape, dtype=torch.uint8).view(torch.bits8), 'bits8'),
        (lambda tensor: tensor.to(torch.float8_e4m3fn), 'float8_e4m3fn'),
        (lambda tensor: tensor.to(torch.complex64), 'complex64'),
        (Tensor.long, 'int64'),
        (Tensor.bool, 'torch.bool'),
        (lambda tensor: torch.full_like(tensor, 1e300, dtype=torch.float64), 'NaN or infinite'),
        (hiding_nan, 'NaN or infinite'),
    ],
)
def test_load_checkpoint_tensor_that_can_be_no_weight_is_refused_and_changes_nothing(
    change: Callable[[Tensor], Tensor], message: str, tmp_path: Path
) -> None:
    state = tiny().state_dict()
    file = save_checkpoint({**state, 'fc.weight': change(state['fc.weight'])}, tmp_path)
    assert_refused_and_unchanged(tiny(), file, f'fc.weight .*{message}')


@pytest.mark.parametrize(
    ('dtype', 'value', 'message'),
    [
        (torch.float16, 1e6, r'1 hold numbers too large for its torch\.float16 \(first: fc\.bias\)'),
        (torch.bfloat16, 3.4e38, r'too large for its torch\.bfloat16'),
    ],
)
def test_weights_too_large_for_the_models_type_are_refused(
    dtype: torch.dtype, value: float, message: str, tmp_path: Path
) -> None:
    state = {**tiny().state_dict(), 'fc.bias': torch.full((4,), value)}
    file = save_checkpoint(state, tmp_path)
    assert_refused_and_unchanged(tiny().to(dtype), file, message)
    with pytest.raises(CheckpointError, match=message):
        load_model(file, dtype=dtype)
    with pytest.raises(CheckpointError, match=message):  # as timm calls it
        adapt_state_dict(state, tiny().to(dtype))
    load_checkpoint(tiny(), file)


def test_sums_of_an_images_channels_that_are_infinite_are_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    state['conv1.0.weight'].fill_(3e38)
    file = save_checkpoint(state, tmp_path)
    with pytest.raises(CheckpointError, match=r'numbers too large for its torch\.float32 \(first: conv1\.0\.weight\)'):
        load_model(file, in_chans=1)
    options: dict[str, Any] = dict(pretrained_cfg_overlay=dict(file=str(file)), num_classes=4, **TINY)
    with pytest.raises(CheckpointError, match=r'would have infinity in them \(first: conv1\.0\.weight\)'):
        timm.create_model('test_res2net', pretrained=True, in_chans=1, **options)


def test_load_checkpoint_two_tensors_with_one_target_name_are_refused(tmp_path: Path) -> None:
    state = tiny().state_dict()
    file = save_checkpoint({**state, 'layer1.0.conv2.0.weight': state['layer1.0.convs.0.weight']}, tmp_path)
    with pytest.raises(CheckpointError, match=r'becomes layer1\.0\.convs\.0\.weight, which is there already'):
        load_checkpoint(tiny(), file, dialect='equation-1')


def test_load_checkpoint_prefix_selects_one_of_several_networks(tmp_path: Path) -> None:
    state = {f'rgb.{name}': tensor for name, tensor in tiny().state_dict().items()}
    state |= {name.replace('rgb', 'depth'): 3 * tensor for name, tensor in state.items()}
    model = tiny()
    load_checkpoint(model, save_checkpoint({'model': state}, tmp_path), prefix='depth.')
    torch.testing.assert_close(model.fc.weight, 3 * tiny().fc.weight)


@pytest.mark.parametrize('prefix', ['', 'ing.'])
def test_load_checkpoint_prefix_is_the_whole_prefix_of_a_network(prefix: str, tmp_path: Path) -> None:
    state: dict[str, Tensor] = {}
    for factor, each in enumerate(('', 'ing.', 'learning.', 'ing.learn.', 'deep.ing.')):
        state |= {each + name: tensor * (factor + 1) for name, tensor in tiny().state_dict().items()}
    model = tiny()
    load_checkpoint(model, save_checkpoint({'model': state}, tmp_path), prefix=prefix)
    torch.testing.assert_close(model.fc.weight, (2 if prefix else 1) * tiny().fc.weight)


@pytest.mark.parametrize(
    ('wrap', 'prefix'),
    [
        (lambda raw, mean: {'model': raw, 'ema': {'module': mean, 'updates': 3}}, 'ema.module.'),
        (lambda raw, mean: {'state_dict': raw, 'ema_state_dict': mean}, 'ema_state_dict.'),
        (lambda raw, mean: {'model': under('resnet.', raw), 'ema': under('resnet.', mean)}, 'ema.resnet.'),
    ],
)
def test_load_checkpoint_prefers_averaged_weights_and_names_them(wrap: Any, prefix: str, tmp_path: Path) -> None:
    mean = tiny().state_dict()
    raw = {name: tensor + 1 for name, tensor in mean.items()}
    model = tiny(first_block='paddle')
    checkpoint = load_checkpoint(model, save_checkpoint(wrap(raw, mean), tmp_path), first_block='paddle')
    assert checkpoint.translation.prefix == prefix
    torch.testing.assert_close(model.fc.weight, mean['fc.weight'])


def test_load_checkpoint_one_network_under_two_names_is_one_network(tmp_path: Path) -> None:
    state = tiny().state_dict()
    model = tiny()
    nn.init.zeros_(model.fc.weight)
    file = save_checkpoint(under('encoder.', state) | state | {'head.mask': torch.full((2, 2), -torch.inf)}, tmp_path)
    checkpoint = load_checkpoint(model, file)
    assert 'head.mask' in checkpoint.translation.dropped
    torch.testing.assert_close(model.fc.weight, state['fc.weight'])


def test_read_checkpoint_unknown_tensor_of_a_block_is_an_error(references: References, tmp_path: Path) -> None:
    weights = read(reference_file(references, 'paddle/detection_d.pdparams')).nested
    extra = {'res3.blocks.1.branch2b.0.gate.weight': torch.ones(2), 'neck.gate.weight': torch.ones(2)}
    with pytest.raises(CheckpointError, match=r'blocks\.1\.branch2b\.0\.gate\.weight is of a block, and no tensor'):
        read_checkpoint(save_checkpoint({**weights, **extra}, tmp_path))
    del extra['res3.blocks.1.branch2b.0.gate.weight']
    dropped = read_checkpoint(save_checkpoint({**weights, **extra}, tmp_path)).translation.dropped
    assert dropped['neck.gate.weight'] == 'beside the network'


def test_load_model_logs_what_is_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level('INFO'):
        load_model(save_checkpoint(tiny().state_dict(), tmp_path), first_block='official')
    assert 'assumed, as nothing in it tells: style, strides, dilations, ' in caplog.text


def test_convert_network_at_top_level_of_a_larger_one_drops_and_names_the_rest(tmp_path: Path) -> None:
    extra = {'deconv_layers.0.weight': torch.ones(2), 'final_layer.bias': torch.ones(2)}
    done = convert(save_checkpoint(tiny(num_classes=0).state_dict() | extra, tmp_path), dry_run=True)
    assert done.checkpoint.translation.dropped == dict.fromkeys(extra, 'beside the network')


def test_all_parts_of_all_networks_are_known() -> None:
    assert {type(built(name)) for name in TRUNKS} == {arch.trunk for arch in ARCHS.values()}
    models = [*(built(name) for name in TRUNKS), tiny(replace_stem_pool=True)]
    assert {name.partition('.')[0] for model in models for name in model.state_dict()} == PARTS


def test_load_checkpoint_wrong_arguments_raise_with_reason(tmp_path: Path) -> None:
    file = save_checkpoint(tiny().state_dict(), tmp_path)
    with pytest.raises(ValueError, match="dialect='caffe' is not known; choose from paddleclas"):
        load_checkpoint(tiny(), file, dialect='caffe')
    with pytest.raises(ValueError, match="first_block='caffe' is not known; choose from official"):
        load_checkpoint(tiny(), file, first_block='caffe')
    with pytest.raises(CheckpointError, match='no Res2Net in the dialect mindcv'):
        load_checkpoint(tiny(), file, dialect='mindcv')
    with pytest.raises(TypeError, match='no Res2Net block'):
        load_checkpoint(nn.Linear(2, 2), file)
    with pytest.raises(ValueError, match='meta device'):
        load_checkpoint(timm.create_model('test_res2net', device='meta'), file)


@pytest.mark.parametrize(
    'arguments',
    [dict(num_classes=0), dict(features_only=True), dict(features_only=True, out_indices=(1, 2))]
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
    assert (again.function.first_block, again.assumed) == ('mmdet', ())
    with pytest.raises(ValueError, match="are of a network with first_block='mmdet'"):
        timm.create_model(f'local-dir:{done.folder}', pretrained=True, first_block='official')


def test_convert_published_file_keeps_license_and_tag(references: References, tmp_path: Path) -> None:
    file = tmp_path / 'Res2Net50_vd_26w_4s_ssld_pretrained.pdparams'
    model = timm.create_model('res2net50_vd_26w_4s')
    export_checkpoint(model, file, 'paddleclas')
    done = convert(file, tmp_path / 'out')
    cfg = done.config['pretrained_cfg']
    assert (cfg['license'], cfg['tag']) == ('apache-2.0', 'ssld_in1k')
    assert 'url' not in cfg
    loaded = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_convert_overwrites_nothing_and_leaves_nothing_on_failure(references: References, tmp_path: Path) -> None:
    file = save_checkpoint(tiny().state_dict(), tmp_path)
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'notes.txt').write_text('mine')
    convert(file, tmp_path / 'out')
    assert (tmp_path / 'out' / 'notes.txt').read_text() == 'mine'
    with pytest.raises(ValueError, match='has a model'):
        convert(file, tmp_path / 'out')
    (tmp_path / 'bad.pth').write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CheckpointError):
        convert(tmp_path / 'bad.pth', tmp_path / 'none')
    (tmp_path / 'file').touch()
    with pytest.raises(OSError, match='folder can not be written'):
        convert(file, tmp_path / 'file' / 'folder')
    assert sorted(path.name for path in tmp_path.iterdir()) == ['bad.pth', 'file', 'out', 'weights.pth']


def test_convert_model_argument_must_fit_file(tmp_path: Path, build: Any) -> None:
    file = save_checkpoint(build('res2net50d', full=True).state_dict(), tmp_path)
    assert convert(file, dry_run=True, model='res2net50_26w_4s').args == dict(
        stem_type='deep', stem_width=32, avg_down=True
    )
    with pytest.raises(CheckpointError, match='those of no model of this package, or not those of dla60_res2net'):
        convert(file, dry_run=True, model='dla60_res2net')
    with pytest.raises(ValueError, match='there is no model resnet50 in this package; did you mean res2next50'):
        convert(file, dry_run=True, model='resnet50')


# Exporting

MIXED: dict[str, Any] = dict(first_block='mmdet', num_classes=0)


@pytest.mark.parametrize(
    ('file', 'dialect'),
    [
        ('paddle/res2net50.pdparams', 'paddleclas'),
        ('paddle/res2net50_vd.pdparams', 'paddleclas'),
        ('paddle/res2net200_vd.pdparams', 'paddleclas'),
        ('openmmlab/mmpretrain.pth', 'mmpretrain'),
        ('openmmlab/mmpretrain_deep_stem.pth', 'mmpretrain'),
        ('deformable/mmdet_dcnv2.pth', 'mmdet'),
        ('deformable/universenet_dcn.pth', 'mmdet'),
    ],
)
def test_export_checkpoint_has_names_and_values_of_original_file(
    file: str, dialect: str, references: References, tmp_path: Path
) -> None:
    original = reference_file(references, file)
    export_checkpoint(load_model(original), tmp_path / 'exported', dialect)
    theirs, ours = read(original).nested, read(tmp_path / 'exported').nested
    if dialect == 'paddleclas':
        del theirs['StructuredToParameterName@@']
    else:
        theirs, ours = theirs['state_dict'], ours['state_dict']
    torch.testing.assert_close(ours, {name: theirs[name] for name in ours}, rtol=0, atol=0)
    beside = set(read_checkpoint(original).translation.dropped)
    assert {f'state_dict.{name}' for name in theirs.keys() - ours.keys()} == beside


@pytest.mark.parametrize(
    ('name', 'args', 'dialect', 'message'),
    [
        ('res2net50d', {}, 'paddleclas', "computes first_block='paddle' and the model first_block='official'"),
        ('res2net50_vd_26w_4s', {}, 'mmpretrain', "computes first_block='official' and the model first_block='paddle'"),
        ('res2net50_vd_26w_4s', dict(avg_down=False), 'paddleclas', 'has no place for layer1.0.downsample.0.weight'),
        ('test_res2net', dict(replace_stem_pool=True), 'mmpretrain', r'has no place for maxpool\.0\.weight'),
        ('test_res2net', dict(replace_stem_pool=True), 'official', r'has no place for maxpool\.0\.weight'),
        ('res2next50', {}, 'mmpretrain', 'no Res2NeXt'),
        (
            'test_res2net',
            dict(act_layer='silu'),
            'official',
            "the model act_layer='silu'",
        ),
        ('test_res2net', dict(output_stride=16), 'official', r'layer4\.\d\.convs\.0 of the model is dilated'),
        ('test_res2net', dict(global_pool='max'), 'official', "its global_pool is 'max'"),
        ('test_res2net', dict(stem_ceil_mode=True), 'official', 'the model stem_ceil_mode=True'),
        ('test_res2net', dict(style='caffe'), 'official', "computes style='pytorch' and the model style='caffe'"),
        (
            'test_res2net',
            dict(deformable=(None, None, None, 'v2')),
            'official',
            r'the model deformable=\(None, ',
        ),
        (
            'test_res2net',
            dict(norm_layer=partial(nn.BatchNorm2d, eps=1e-3)),
            'official',
            'the model norm_eps=0.001',
        ),
        ('seres2net50_26w_4s', {}, 'official', 'without attention'),
        ('dla60_res2net', {}, 'official', 'ResNet-hosted'),
        ('res2net50d', {}, 'mindcv', 'choose from official, mmpretrain, mmdet, paddleclas'),
        ('test_res2net', {}, 'mmdet', 'make the model with num_classes=0'),
        (
            'test_res2net',
            dict(num_classes=0),
            'mmdet',
            "and the model first_block='official'",
        ),
        ('test_res2net', dict(MIXED, deformable=(None, None, 'v1', 'v2')), 'mmdet', 'one kind of deformable'),
        ('test_res2net', dict(MIXED, dilations=(1, 1, 1, (2, 4))), 'mmdet', 'one dilation in all blocks'),
    ],
)
def test_export_checkpoint_unsupported_model_raises_and_writes_nothing(
    name: str, args: dict[str, Any], dialect: str, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export_checkpoint(timm.create_model(name, **args), tmp_path / 'out.pth', dialect)
    assert list(tmp_path.iterdir()) == []


def test_export_checkpoint_official_equals_state_dict(tmp_path: Path) -> None:
    export_checkpoint(tiny(), tmp_path / 'out.pth', 'official')
    torch.testing.assert_close(torch.load(tmp_path / 'out.pth'), tiny().state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('name', ['blres2net50_26w_4s', 'blresnet50'])
def test_export_checkpoint_refuses_a_big_little_network(name: str, build: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r'official has no place for layer1\.big\.0\.conv1\.weight'):
        export_checkpoint(build(name), tmp_path / 'out.pth', 'official')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('device', 'value', 'message'),
    [('cpu', math.nan, 'NaN or infinity in them'), ('meta', 0, 'are on the meta device, without values')],
)
def test_export_checkpoint_refuses_weights_that_are_none(
    device: str, value: float, message: str, tmp_path: Path
) -> None:
    model = tiny(device=device)
    with torch.no_grad():
        model.get_parameter('fc.bias')[1] = value
    with pytest.raises(ValueError, match=message):
        export_checkpoint(model, tmp_path / 'net.pth', 'official')
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('make', [fuse, reparameterize_model])
def test_export_checkpoint_refuses_a_fused_model(make: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='export the model that it was made from'):
        export_checkpoint(make(tiny()), tmp_path / 'out.pth', 'official')
    assert list(tmp_path.iterdir()) == []


def test_train_script_model_kwargs_override_the_row_of_the_model(tmp_path: Path) -> None:
    args = argparse.Namespace(model_kwargs={'first_block': 'mmdet'})
    recorded = {'arch': 'res2net50_vd_26w_4s', 'state_dict': tiny('mmdet').state_dict(), 'args': args}
    assert read_checkpoint(save_checkpoint(recorded, tmp_path)).function.first_block == 'mmdet'


def test_load_checkpoint_ignores_batch_counters_that_the_model_lacks(tmp_path: Path) -> None:
    model = tiny(norm_layer=FrozenBatchNorm2d)
    assert not any(name.endswith('num_batches_tracked') for name in model.state_dict())
    load_checkpoint(model, save_checkpoint(tiny().state_dict(), tmp_path))
    torch.testing.assert_close(model.get_buffer('bn1.running_mean'), tiny().get_buffer('bn1.running_mean'))


def test_load_checkpoint_twice_read_checkpoint_with_options_raises_type_error(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(save_checkpoint(tiny().state_dict(), tmp_path))
    with pytest.raises(TypeError, match='was read already: give dialect and prefix to read_checkpoint'):
        load_checkpoint(tiny(), checkpoint, dialect='official')
    with pytest.raises(TypeError, match='frist_block is no argument here'):
        load_checkpoint(tiny(), checkpoint, frist_block='mmdet')


STAGES = st.tuples(st.just(1), *[st.sampled_from([1, 2])] * 3)
DILATIONS = st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 2, (1, 3)]), *[st.sampled_from([1, 2, 4])] * 2)
FIELDS: dict[str, Any] = dict(
    first_block=st.sampled_from(list(FIRST_BLOCKS)),
    act_layer=st.sampled_from(['relu', 'silu', 'leaky_relu', 'hard_swish']),
    norm_eps=st.sampled_from([0.0, 1e-5, 1e-3]),
)
RESNET_FIELDS: dict[str, Any] = dict(
    FIELDS,
    style=st.sampled_from(STYLES),
    strides=STAGES,
    dilations=DILATIONS,
    deformable=st.tuples(*[st.sampled_from([None, 'v1', 'v2'])] * 4),
    stem_ceil_mode=st.booleans(),
    avg_down=st.booleans(),
    stem_type=st.sampled_from(['', 'deep']),
)


@st.composite
def arguments_of_function(draw: Any) -> tuple[str, dict[str, Any]]:
    """A small model, and what it computes."""
    name = draw(st.sampled_from(['test_res2net', 'test_res2net', 'test_res2net', *TRUNKS]))
    fields = draw(st.fixed_dictionaries({}, optional=RESNET_FIELDS if name == 'test_res2net' else FIELDS))
    if any(dilation != 1 for dilation in fields.get('dilations', ())):
        fields['dilate_first'] = draw(st.booleans())
    return name, {**(TINY if name == 'test_res2net' else small(name)), **fields}


@settings(max_examples=20, deadline=None, derandomize=True)
@given(case=arguments_of_function())
def test_load_model_of_saved_weights_gives_any_function_and_its_outputs_back(
    case: tuple[str, dict[str, Any]], tmp_path_factory: pytest.TempPathFactory
) -> None:
    name, arguments = case
    torch.manual_seed(0)
    model = randomise(timm.create_model(name, num_classes=4, **arguments)).eval()
    for each, parameter in model.named_parameters():
        if 'conv_offset' in each:
            nn.init.normal_(parameter, std=0.3)
    folder = tmp_path_factory.mktemp('saved') / 'net'
    write_folder(folder, model.state_dict(), {'timm_res2net': {}}, function_of(model))
    sizes = {} if name == 'test_res2net' else dict(name=name, **small(name))  # other trunks are found at full size
    loaded = load_model(folder / 'model.safetensors', **sizes).eval()
    assert function_of(loaded) == function_of(model)
    x = torch.randn(1, 3, 33, 33)
    with torch.inference_mode():
        torch.testing.assert_close(loaded(x), model(x), rtol=0, atol=0)


def test_load_checkpoint_deformable_tensors_for_a_plain_model_are_refused(tmp_path: Path) -> None:
    file = save_checkpoint(tiny(deformable=(None, None, None, 'v2')).state_dict(), tmp_path)
    error = assert_refused_and_unchanged(tiny(), file, r'is of a network with deformable=\(None, None, None, .v2.\)')
    assert "Make the model with deformable=(None, None, None, 'v2')" in error
    assert 'load it with' not in error  # the tensors tell


@pytest.mark.parametrize(
    'arguments',
    [
        dict(num_classes=7),
        dict(num_classes=0),
        dict(in_chans=1),
        dict(in_chans=4, num_classes=7),
        dict(features_only=True, out_indices=(1, 3)),
        dict(features_only=True, in_chans=1, feature_cls='getter'),
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


@pytest.mark.parametrize('stem', [{}, dict(stem_type='', stem_width=64)], ids=['deep stem', 'plain stem'])
def test_load_model_named_model_gets_the_channels_of_the_file(
    stem: dict[str, Any], tmp_path: Path, images: Tensor
) -> None:
    expected = tiny(in_chans=1, **stem)
    save_file(expected.state_dict(), tmp_path / 'a.safetensors', {'first_block': 'official'})
    options = {'name': 'test_res2net', **TINY, **stem}
    model = load_model(tmp_path / 'a.safetensors', **options).eval()
    torch.testing.assert_close(model(images[:, :1]), expected(images[:, :1]), rtol=0, atol=0)
    assert model.pretrained_cfg['input_size'][0] == 1
    assert load_model(tmp_path / 'a.safetensors', in_chans=3, **options)(images).shape == (len(images), 4)


class Halved(nn.ReLU):
    """An activation that timm doesn't have."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


LEAKY = partial(nn.LeakyReLU, negative_slope=0.3)


@pytest.mark.parametrize(('layer', 'name'), [(Halved, 'halved'), (LEAKY, 'leaky_relu(negative_slope=0.3)')])
def test_file_with_an_activation_that_timm_lacks_loads_into_its_model_only(
    layer: Any, name: str, tmp_path: Path
) -> None:
    model = tiny(act_layer=layer)
    write_folder(tmp_path / 'net', model.state_dict(), {'timm_res2net': {}}, function_of(model))
    file = tmp_path / 'net' / 'model.safetensors'
    assert load_checkpoint(tiny(act_layer=layer), file).function == function_of(model)
    with pytest.raises(CheckpointError, match=f"act_layer='{re.escape(name)}'.*No model of this package is like it"):
        load_checkpoint(tiny(), file)
    for options in ({}, dict(name='test_res2net', **TINY)):
        with pytest.raises(CheckpointError, match=f"act_layer='{re.escape(name)}' is no activation of timm"):
            load_model(file, **options)


def test_load_model_named_model_gets_the_stated_function(tmp_path: Path, images: Tensor) -> None:
    expected = tiny('mmdet', style='caffe')
    file = save_checkpoint(expected.state_dict(), tmp_path)
    model = load_model(file, 'test_res2net', first_block='mmdet', style='caffe', **TINY).eval()
    torch.testing.assert_close(model(images), expected(images), rtol=0, atol=0)
