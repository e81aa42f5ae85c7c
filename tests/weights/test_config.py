"""Whatever a stranger's `config.json` says, a model of just these weights is made, or an error names the key."""

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save
from support import TINY, tiny
from timm.data.transforms import _str_to_torch_interpolation

from timm_res2net import CheckpointError, push
from timm_res2net.models.block import function_of
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.config import Meter, load_folder, make_model
from timm_res2net.weights.files import PREFIX
from timm_res2net.weights.recorded import INTERPOLATIONS

CONFIG: dict[str, Any] = dict(
    architecture='test_res2net',
    num_classes=4,
    model_args=TINY,
    pretrained_cfg=dict(input_size=[3, 64, 64], num_classes=4, first_conv='conv1.0', classifier='fc'),
)


def weights(**changes: torch.Tensor) -> bytes:
    return save({**tiny().state_dict(), **changes})


def config(path: str = '', value: object = None) -> bytes:
    """The configuration with one value changed, at a path such as 'model_args.scale'."""
    changed = json.loads(json.dumps(CONFIG))
    *parents, last = path.split('.')
    place = changed
    for name in parents:
        place = place[name]
    if last:
        place[last] = value
    return json.dumps(changed).encode()


def test_make_model_loads_all_weights_and_adapts_as_timm_does() -> None:
    model = make_model(config(), weights(), 'user/net')
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)
    assert not model.training
    adapted = make_model(config(), weights(), 'user/net', num_classes=2, in_chans=1)
    assert adapted(torch.zeros(1, 1, 64, 64)).shape == (1, 2)


def test_make_model_of_other_architectures_of_timm_is_the_same_as_timms() -> None:
    expected = timm.create_model('test_resnet', num_classes=3).eval()
    other = dict(architecture='test_resnet', num_classes=3, pretrained_cfg=dict(first_conv='conv1.0', classifier='fc'))
    found = make_model(json.dumps(other).encode(), save(expected.state_dict()), 'user/net')
    torch.testing.assert_close(found.state_dict(), expected.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('architecture', 'res2net9000', r"architecture is 'res2net9000', and should be the name of a model"),
        ('architecture', ['test_res2net'], 'architecture is'),
        ('pretrained_cfg', None, 'pretrained_cfg is None, and should be a mapping'),
        ('pretrained_cfg.colour', 'red', "pretrained_cfg.colour is 'red', and should be left out"),
        ('pretrained_cfg.input_size', 'large', r"pretrained_cfg.input_size is 'large', and should be a size"),
        ('pretrained_cfg.input_size', [3, 5000, 5000], r'should be a size of three numbers from 1 to 4096'),
        ('pretrained_cfg.input_size', [32, 32], r'input_size is \[32, 32\], and should be a size of three numbers'),
        ('pretrained_cfg.test_input_size', [3, 0, 0], r'test_input_size is \[3, 0, 0\], and should be a size of three'),
        ('pretrained_cfg.pool_size', [0, 7], r'pretrained_cfg.pool_size is \[0, 7\], and should be a size from 1'),
        ('pretrained_cfg.crop_pct', 1e-4, r'pretrained_cfg.crop_pct is 0.0001, and should be a number from 0.5 to 2'),
        ('pretrained_cfg.test_crop_pct', 1e9, r'pretrained_cfg.test_crop_pct is 1000000000.0, and should be a number'),
        ('pretrained_cfg.mean', [None], r'pretrained_cfg.mean is \[None\]'),
        ('pretrained_cfg.mean', [0.5, 0.5], r'mean is \[0.5, 0.5\], and should be a number for each of 3 channels'),
        ('pretrained_cfg.mean', [float('inf')], r'pretrained_cfg.mean is \[inf\]'),
        ('pretrained_cfg.std', [0.2, 0, 0.2], r'std is \[0.2, 0, 0.2\], and should be a positive number for each'),
        ('pretrained_cfg.std', [], r'pretrained_cfg.std is \[\], and should be a positive number for each channel'),
        ('pretrained_cfg.interpolation', 3, 'interpolation is 3, and should be one of nearest, bilinear, bicubic'),
        ('pretrained_cfg.interpolation', 'evil', "interpolation is 'evil', and should be one of nearest, bilinear"),
        ('pretrained_cfg.crop_mode', 'evil', "crop_mode is 'evil', and should be one of center, squash, border"),
        ('pretrained_cfg.first_conv', 'layer1.0.conv1', "should be 'conv1.0'"),
        ('pretrained_cfg.classifier', ['fc', 'layer4'], "should be 'fc'"),
        ('pretrained_cfg.state_dict', {}, 'should be null'),
        ('timm_res2net', None, 'timm_res2net is None, and should be a mapping'),
        ('model_args', [], r'model_args is \[\], and should be a mapping'),
        ('model_args.layers', 3000, 'model_args.layers is 3000, and should be made of numbers from 0 to 200'),
        ('model_args.layers', [200, 200, 200, 200], 'far more tensors than the [0-9]+ of its weights'),
        ('model_args.scale', 100_000, 'model_args.scale is 100000'),
        ('model_args.base_width', 1_000_000, 'model_args.base_width is 1000000'),
        ('model_args.base_width', 4096, 'describes a network of [0-9,]+ numbers, and its weights have only 12,'),
        ('model_args.in_chans', 1_000_000_000, 'model_args.in_chans is 1000000000'),
        ('model_args.scale', -1, 'model_args.scale is -1'),
        ('model_args.scale', float('nan'), 'model_args.scale is nan'),
        ('model_args.scale', 'four', 'describes no network'),
        ('model_args.colour', 'red', 'describes no network: .*colour'),
        ('model_args.num_classes', 7, 'model_args.num_classes is 7, and should be 4'),
        ('model_args.pretrained_strict', False, 'model_args.pretrained_strict is False, and should be left out'),
        ('model_args.features_only', True, 'model_args.features_only is True, and should be left out'),
        ('model_args.checkpoint_path', '/etc/passwd', "checkpoint_path is '/etc/passwd', and should be left out"),
        ('model_args.scriptable', True, 'model_args.scriptable is True, and should be left out'),
        ('model_args.exportable', True, 'model_args.exportable is True, and should be left out'),
        ('model_args.no_jit', True, 'model_args.no_jit is True, and should be left out'),
        ('num_classes', -4, 'num_classes is -4'),
        ('pretrained_cfg.input_size', [1, 64, 64], r'config.json: .* is inconsistent with input_size\[0\]=1'),
        ('num_classes', 5, 'does not fit its config.json: 2 have another shape'),
        ('label_names', ['a', 'b'], 'label_names has 2 names for 4 classes'),
        ('label_names', 'abcd', 'label_names is'),
        ('label_names', [1, 2, 3, 4], r'label_names is \[1, 2, 3, 4\], and should be a list of texts'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_make_model_of_impossible_config_raises_with_key_and_source(path: str, value: object, message: str) -> None:
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=message) as error:
        make_model(config(path, value), weights(), 'user/net')
    assert 'user/net' in str(error.value)
    assert '\n' not in str(error.value)
    assert time.perf_counter() - start < 2


def test_timm_knows_the_interpolations_of_config_and_no_more() -> None:
    assert {*INTERPOLATIONS} == {*_str_to_torch_interpolation}


def test_meter_that_ends_a_function_without_gradients_leaves_them_enabled() -> None:
    def make() -> None:
        with torch.no_grad():
            for _ in range(5000):
                torch.ones(1)

    with pytest.raises(ValueError, match='far more tensors than the 3 of its weights'), Meter(3):
        make()
    assert torch.is_grad_enabled()


@pytest.mark.parametrize(
    ('name', 'arguments'),
    [
        ('dla60_res2net', dict(levels=[1, 1, 8, 8, 8, 8])),
        ('dla60_res2net', dict(levels=[1, 1, 5, 5, 5, 5], scale=64)),
        ('vit_tiny_patch16_224', dict(depth=4096)),
        ('res2net50_26w_4s', dict(layers=[200, 200, 200, 200], scale=64)),
    ],
    ids=str,
)
def test_make_model_of_a_network_far_larger_than_its_weights_raises_at_once(
    name: str, arguments: dict[str, Any]
) -> None:
    content = json.dumps(dict(architecture=name, model_args=arguments, pretrained_cfg={})).encode()
    start = time.thread_time()
    with pytest.raises(CheckpointError, match=r'user/net .* far more tensors than the 2 of its weights'):
        make_model(content, save({'a': torch.ones(1), 'b': torch.ones(1)}), 'user/net')
    assert time.thread_time() - start < 1


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'[]', r'it is \[\], and should be a mapping'),
        (b'"text"', "it is 'text'"),
        (b'null', 'it is None'),
        (b'\xff\xfe{}', 'codec'),
        (b'{', 'Expecting property name'),
        (b'[' * 100_000, 'it is nested too deeply'),
        (b'{"num_classes": ' + b'9' * 5000 + b'}', 'digits'),
        (b'["' + b'x' * 5_000_000 + b'"]', 'it has more than 5,000,000 bytes'),
        (b'{"architecture": "test_res2net", "pretrained_cfg": {}, "num_classes": Infinity}', 'num_classes is inf'),
    ],
    ids=['list', 'text', 'null', 'encoding', 'cut', 'deep', 'digits', 'large', 'infinity'],
)
def test_make_model_of_unreadable_config_raises_checkpoint_error(content: bytes, message: str) -> None:
    with pytest.raises(CheckpointError, match=f'config.json of user/net is of no use: .*{message}'):
        make_model(content, weights(), 'user/net')


def lacking(name: str) -> bytes:
    return save({key: tensor for key, tensor in tiny().state_dict().items() if key != name})


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (lambda: b'', 'is cut, or is no file of safetensors'),
        (lambda: weights()[:-1000], 'is cut, or is no file of safetensors'),
        (lambda: b'\x80\x04N.', 'is cut, or is no file of safetensors'),
        (lambda: weights(**{'fc.bias': torch.full((4,), float('nan'))}), 'has NaN or infinity in fc.bias'),
        (lambda: weights(**{'bn1.running_var': -torch.ones(8)}), 'has a variance below zero in bn1.running_var'),
        (lambda: lacking('layer1.0.conv1.weight'), r"1 of the model's tensors are not in it \(first: layer1.0.conv1"),
        (lambda: weights(more=torch.zeros(2)), r'1 in it are unknown to the model \(first: more\)'),
    ],
    ids=['empty', 'cut', 'pickle', 'nan', 'variance', 'missing', 'unexpected'],
)
def test_make_model_of_bad_weights_raises_checkpoint_error(content: Callable[[], bytes], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        make_model(config(), content(), 'user/net')


@pytest.mark.parametrize(
    'contradicting',
    [dict(norm_eps=0.3), dict(strides=[1, 2, 2, 1]), dict(dilations=[1, 1, 1, 2]), dict(first_block='paddle')],
    ids=str,
)
def test_make_model_of_config_that_contradicts_weights_names_source(contradicting: dict[str, Any]) -> None:
    model = tiny()
    content = save(model.state_dict(), function_of(model).as_text())
    with pytest.raises(CheckpointError, match=r'^model\.safetensors of user/net is of a network with ') as error:
        make_model(config('model_args', {**TINY, **contradicting}), content, 'user/net')
    assert PREFIX not in str(error.value)


def test_make_model_of_integers_names_source() -> None:
    with pytest.raises(CheckpointError, match=r'^model\.safetensors of user/net can not be used: fc\.bias can be no'):
        make_model(config(), weights(**{'fc.bias': torch.ones(4).int()}), 'user/net')


@pytest.mark.parametrize(
    ('value', 'arguments'), [(3e38, dict(in_chans=1)), (1e6, dict(dtype=torch.float16))], ids=['channels', 'half']
)
def test_make_model_whose_weights_would_be_infinite_raises(value: float, arguments: dict[str, Any]) -> None:
    content = weights(**{'conv1.0.weight': torch.full_like(tiny().state_dict()['conv1.0.weight'], value)})
    with pytest.raises(CheckpointError, match=r'of user/net has numbers too large .* \(first: conv1\.0\.weight\)'):
        make_model(config(), content, 'user/net', **arguments)


@pytest.mark.parametrize('dtype', [torch.complex64, torch.float8_e5m2, torch.uint64], ids=str)
@pytest.mark.parametrize('name', ['test_res2net', 'test_resnet'])
def test_make_model_of_tensors_of_types_that_no_weights_have_raises(name: str, dtype: torch.dtype) -> None:
    state = timm.create_model(name, num_classes=3).state_dict()
    state['fc.bias'] = torch.ones(3).to(dtype)
    content = json.dumps(dict(architecture=name, num_classes=3, pretrained_cfg={})).encode()
    with pytest.raises(CheckpointError, match=f'model.safetensors of user/net has fc.bias of {dtype}'):
        make_model(content, save(state), 'user/net')


def test_load_folder_without_files_names_the_missing_one(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'^config\.json of .* can not be read: No such file'):
        load_folder(tmp_path)
    (tmp_path / 'config.json').write_bytes(config())
    with pytest.raises(CheckpointError, match=r'^model\.safetensors of .* can not be read: No such file'):
        load_folder(tmp_path)


def test_load_folder_with_other_weights_than_recorded_raises(tmp_path: Path) -> None:
    folder = push(tiny(), 'user/net', dry_run=tmp_path / 'folder').folder
    assert folder is not None
    load_folder(folder)
    (folder / 'model.safetensors').write_bytes(weights())
    with pytest.raises(CheckpointError, match=r'folder is not the file that its config\.json was written with'):
        load_folder(folder)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no pipes with names')
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_load_folder_with_a_pipe_or_device_raises_at_once(name: str, tmp_path: Path) -> None:
    folder = push(tiny(), 'user/net', dry_run=tmp_path / 'folder').folder
    assert folder is not None
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(CheckpointError, match=f'{name} of .* can not be read: It is no regular file'):
        load_folder(folder)
    (folder / name).unlink()
    (folder / name).symlink_to('/dev/zero')
    with pytest.raises(CheckpointError, match=f'{name} of .* can not be read: It is no regular file'):
        load_folder(folder)


def test_huge_config_is_not_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = push(tiny(), 'user/net', dry_run=tmp_path / 'folder').folder
    assert folder is not None
    os.truncate(folder / 'config.json', 1 << 33)  # which takes no room
    with pytest.raises(CheckpointError, match='it has more than 5,000,000 bytes'):
        load_folder(folder)
    assert read_checkpoint(folder / 'model.safetensors').num_classes == 4
    assert 'config.json is not used: it has more than 5,000,000 bytes' in caplog.text
