"""Exactly the model that a `config.json` or a training script records is created, or an error names the key."""

import json
import os
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save, save_file
from support import TINY, tiny
from timm.data import resolve_data_config, resolve_model_data_config
from torch import Tensor

from timm_res2net import CheckpointError, load_checkpoint, load_model, push
from timm_res2net.models.block import spec_of
from timm_res2net.models.classifier import class_names
from timm_res2net.models.spec import NetworkSpec
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.config import read_labels
from timm_res2net.weights.convert import convert
from timm_res2net.weights.loading import load_folder

VD = 'res2net50_vd_26w_4s'
CONFIG: dict[str, Any] = dict(
    architecture='test_res2net',
    num_classes=4,
    model_args=TINY,
    pretrained_cfg=dict(input_size=[3, 64, 64], num_classes=4, first_conv='conv1.0', classifier='fc'),
)


def weights(**changes: Tensor) -> bytes:
    return save({**tiny().state_dict(), **changes})


def config(path: str = '', value: object = None) -> bytes:
    """Returns the configuration with one value changed, at a path such as 'model_args.scale'."""
    changed = json.loads(json.dumps(CONFIG))
    *parents, last = path.split('.')
    place = changed
    for name in parents:
        place = place[name]
    if last:
        place[last] = value
    return json.dumps(changed).encode()


def folder(path: Path, text: bytes | None = None, content: bytes | None = None) -> Path:
    """Writes a model folder with a given configuration and weights."""
    (path / 'config.json').write_bytes(config() if text is None else text)
    (path / 'model.safetensors').write_bytes(weights() if content is None else content)
    return path


def test_load_folder_loads_all_weights_and_adapts_as_timm_does(tmp_path: Path) -> None:
    model: Any = load_folder(folder(tmp_path, config('label_names', [*'abcd'])))
    torch.testing.assert_close(model.state_dict(), tiny().state_dict(), rtol=0, atol=0)
    assert (model.training, [*model.pretrained_cfg['label_names']]) == (False, [*'abcd'])
    adapted: Any = load_folder(tmp_path, num_classes=2, in_chans=1)
    assert adapted(torch.zeros(1, 1, 64, 64)).shape == (1, 2)
    assert 'label_names' not in adapted.pretrained_cfg


@pytest.mark.parametrize('name', ['resnet50', ['test_res2net']])
def test_load_folder_of_another_architecture_refers_to_timm(name: object, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r'user/net: .* is not a model of this package\. Use timm\.create_model'):
        load_folder(folder(tmp_path, config('architecture', name)), 'user/net')


@pytest.mark.parametrize(
    ('path', 'value', 'message'),
    [
        ('pretrained_cfg', 'x', "pretrained_cfg must be a mapping, got 'x'"),
        ('pretrained_cfg.input_size', [3, 5000, 5000], 'input_size .*integers from 1 to 4096'),
        ('model_args.layers', 3000, 'model_args.layers must consist of numbers from 0 to 200'),
        ('model_args.layers', [200, 200, 200, 200], 'more tensors than the file'),
        ('model_args.layers', [[[[1]]]], 'model_args.layers must consist of'),
        ('model_args.scale', -1, 'model_args.scale must consist of'),
        ('model_args.scale', 'four', 'cannot build test_res2net for .*user/net'),
        ('model_args.scale', 64, 'more tensors than the file'),
        ('model_args.base_width', 4096, 'does not fit'),
        ('model_args.in_chans', 1_000_000_000, 'model_args.in_chans must consist of'),
        ('model_args.norm_layer', 'x' * 1000, 'model_args.norm_layer must consist of'),
        ('model_args.checkpoint_path', '/etc/passwd', 'model_args.checkpoint_path is not an argument of Res2Net'),
        ('model_args.device', 'cuda', 'device is not an argument'),
        ('num_classes', 10**12, 'safetensors of user/net: it has 4 classes, but config.json specifies 1000000000000'),
        ('label_names', ['a', 'b'], 'label_names has 2 names for 4 classes'),
        ('label_names', [1, 2, 3, 4], 'label_names must be a list of str'),
    ],
    ids=lambda value: str(value)[:40],
)
def test_impossible_config_is_a_checkpoint_error_with_key_and_source(
    path: str, value: object, message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message) as error:
        load_folder(folder(tmp_path, config(path, value)), 'user/net')
    assert 'user/net' in str(error.value)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        (b'[]', 'it holds a list, not a mapping'),
        (b'{', 'Expecting property name'),
        (b'[' * 100_000, 'recursion'),
        (b'["' + b'x' * 5_000_000 + b'"]', 'more than 5,000,000 bytes'),
    ],
    ids=['list', 'cut', 'deep', 'large'],
)
def test_unreadable_config_is_a_checkpoint_error(text: bytes, message: str, tmp_path: Path) -> None:
    for read in (lambda path: load_folder(path, 'user/net'), read_checkpoint):
        with pytest.raises(CheckpointError, match=f'config.json of .*{message}'):
            read(folder(tmp_path, text))


@pytest.mark.parametrize('remove', [False, True])
def test_config_with_nulls_or_without_keys_loads(remove: bool, tmp_path: Path) -> None:
    nulls = dict.fromkeys(('pretrained_cfg', 'timm_res2net', 'label_names', 'num_classes'))
    recorded = {key: value for key, value in json.loads(config()).items() if key not in nulls}
    text = json.dumps({**recorded, **({} if remove else nulls), 'more': [1]})
    assert load_folder(folder(tmp_path, text.encode())).num_classes == 4


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'fc.bias': torch.ones(4).to(torch.float8_e5m2)}, 'fc.bias cannot be a weight'),
        ({'layer9.weight': torch.ones(1)}, 'its model has no tensor layer9.weight'),
    ],
    ids=['float8', 'unknown tensor'],
)
def test_bad_weights_in_a_folder_are_a_checkpoint_error(
    changes: dict[str, Tensor], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        load_folder(folder(tmp_path, content=weights(**changes)))


@pytest.mark.parametrize('other', [dict(norm_eps=0.3), dict(first_block='paddle')], ids=str)
def test_config_that_contradicts_the_weights_metadata_never_changes_the_outputs(
    other: dict[str, Any], tmp_path: Path, images: Tensor
) -> None:
    content = save(tiny().state_dict(), spec_of(tiny()).as_text())
    try:
        model = load_folder(folder(tmp_path, config('model_args', {**TINY, **other}), content))
    except CheckpointError:
        return
    torch.testing.assert_close(model(images), tiny()(images), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='has no named pipes')
@pytest.mark.parametrize('name', ['config.json', 'model.safetensors'])
def test_missing_or_irregular_file_in_a_folder_is_a_checkpoint_error(name: str, tmp_path: Path) -> None:
    place = folder(tmp_path) / name
    place.unlink()
    with pytest.raises(CheckpointError, match=f'cannot read .*{name}.*: No such file'):
        load_folder(tmp_path)
    makers: list[Callable[[Path], object]] = [os.mkfifo, lambda path: path.symlink_to('/dev/zero')]
    for make in makers:
        make(place)
        with pytest.raises(CheckpointError, match=f'cannot read .*{name}.*: not a regular file'):
            load_folder(tmp_path)
        place.unlink()


def test_weights_with_another_checksum_than_recorded_are_a_checkpoint_error(tmp_path: Path) -> None:
    place = push(tiny(), 'user/net', dry_run=tmp_path / 'folder').folder
    assert place is not None
    load_folder(place)
    (place / 'model.safetensors').write_bytes(weights())
    with pytest.raises(CheckpointError, match=r'config\.json was written for another file'):
        load_folder(place)


# Recorded by a training script

RECORDED: dict[str, Any] = dict(img_size=48, interpolation='nearest', mean=[0.1, 0.2, 0.3], std=[0.4], crop_pct=0.9)
IMAGES: dict[str, Any] = dict(
    input_size=(3, 48, 48),
    interpolation='nearest',
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.4, 0.4),
    crop_pct=0.9,
    crop_mode='center',
)
WIDE: dict[str, Any] = dict(TINY, channels=(8, 16, 24, 32))  # so that dilated stages also have shortcuts


def saved(folder: Path, arch: str = 'test_res2net', kwargs: Any = TINY, **args: Any) -> str:
    """Saves the tiny network as timm's train script does."""
    state = tiny(**(kwargs if isinstance(kwargs, dict) else TINY)).state_dict()
    recorded = dict(arch=arch, state_dict=state, args=Namespace(model_kwargs=kwargs, **args), version=2)
    torch.save(recorded, folder / 'last.pth.tar')
    return str(folder / 'last.pth.tar')


def test_images_are_preprocessed_as_the_train_script_did(tmp_path: Path) -> None:
    file = saved(tmp_path, **RECORDED)
    for options in ({}, dict(name='test_res2net', **TINY), dict(features_only=True)):
        assert resolve_model_data_config(load_model(file, **options)) == IMAGES


@pytest.mark.parametrize(
    ('use', 'args'),
    [
        (dict(output_stride=8), {}),
        (dict(output_stride=16, dilate_pool=True, avg_down=True), {}),
        (dict(global_pool='catavgmax'), {}),
        (dict(global_pool='max'), dict(gp='max')),
    ],
    ids=str,
)
def test_recorded_stride_and_pool_are_applied(
    use: dict[str, Any], args: dict[str, Any], tmp_path: Path, images: Tensor
) -> None:
    model = tiny(**WIDE, **use)
    file = saved(tmp_path, kwargs={**WIDE, **({} if args else use)}, **args)
    convert(file, tmp_path / 'out')
    converted = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    for loaded in (load_model(file), load_model(file, 'test_res2net', **WIDE), converted):
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=0)


def test_arguments_of_the_caller_override_recorded_ones(tmp_path: Path) -> None:
    model = load_model(
        saved(tmp_path, kwargs={**WIDE, 'output_stride': 8}, gp='max'), output_stride=32, global_pool='avg'
    )
    assert model.global_pool.pool_type == 'avg'
    assert model.feature_info[-1]['reduction'] == 32


def test_recorded_number_of_channels_allocates_no_memory(tmp_path: Path) -> None:
    assert read_checkpoint(saved(tmp_path, mean=[0.5], in_chans=10**9)).images == dict(mean=(0.5,))


def test_only_image_settings_are_used_from_a_train_script_of_an_unknown_model(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path, arch='hf-hub:somebody/net', img_size=48, crop_pct=0.9))
    assert checkpoint.images == dict(input_size=(3, 48, 48), crop_pct=0.9)
    assert checkpoint.name is None


def test_empty_image_arguments_mean_the_defaults_of_the_model(tmp_path: Path) -> None:
    empty = dict(img_size=None, input_size=None, mean=None, std=None, interpolation='', crop_pct=None)
    default = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg('test_res2net').to_dict())
    assert read_checkpoint(saved(tmp_path, **empty)).images == {}
    assert resolve_model_data_config(load_model(saved(tmp_path, **empty))) == default


@pytest.mark.parametrize('wrong', [dict(img_size=-3), dict(mean=['a'])])
def test_impossible_image_settings_are_ignored_with_one_warning(
    wrong: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert read_checkpoint(saved(tmp_path, **{**RECORDED, **wrong})).images == {}
    (message,) = caplog.messages
    assert f'ignored image settings in {tmp_path}/last.pth.tar' in message


def test_class_map_of_the_train_script_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    read_checkpoint(saved(tmp_path, class_map=''))
    assert caplog.messages == []
    read_checkpoint(saved(tmp_path, class_map='map.txt'))
    assert 'order of map.txt (--class-map). Pass that file as --labels' in caplog.text


@pytest.mark.parametrize('pool', ['warp', ['max']], ids=str)
def test_impossible_recorded_pool_is_a_checkpoint_error(pool: object, tmp_path: Path) -> None:
    for options in ({}, dict(name='test_res2net', **TINY)):
        with pytest.raises(CheckpointError):
            load_model(saved(tmp_path, gp=pool), **options)


def test_lightnings_hyper_parameters_record_the_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {f'model.{name}': tensor for name, tensor in tiny('paddle').state_dict().items()}
    contents = {'state_dict': state, 'hyper_parameters': {'lr': 0.1, 'backbone': VD}}
    torch.save(contents, tmp_path / 'last.ckpt')
    checkpoint = load_checkpoint(tiny('paddle'), tmp_path / 'last.ckpt')
    assert (checkpoint.spec, checkpoint.assumed) == (NetworkSpec('paddle'), ())
    assert caplog.messages == []
    nested = dict(model_kwargs=dict(norm_eps=1e-3, global_pool='max'), decoder=dict(act_layer='silu', depth=3))
    contents['hyper_parameters'] |= dict(nested, strides=[1, 1, 1, 1])
    torch.save(contents, tmp_path / 'last.ckpt')
    checkpoint = read_checkpoint(tmp_path / 'last.ckpt')
    assert checkpoint.spec == NetworkSpec('paddle', norm_eps=1e-3, strides=(1, 1, 1, 1))
    assert checkpoint.model_args['global_pool'] == 'max'
    assert 'took strides=[1, 1, 1, 1] from its hyper_parameters. If these are of another' in caplog.text
    contents['hyper_parameters'] |= {'teacher': 'res2net50d'}  # ambiguous
    torch.save(contents, tmp_path / 'last.ckpt')
    with pytest.raises(CheckpointError, match='first_block is assumed'):
        load_checkpoint(tiny('paddle'), tmp_path / 'last.ckpt')


def test_train_script_with_a_model_of_the_hub_or_a_folder_is_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(dict(state_dict=tiny('paddle').state_dict(), arch='hf-hub:user/net'), tmp_path / 'last.pth.tar')
    assert read_checkpoint(tmp_path / 'last.pth.tar').assumed
    assert 'records the model hf-hub:user/net, but does not record what that network computes' in caplog.text


def test_transformers_config_next_to_the_weights_records_the_model(tmp_path: Path) -> None:
    state = {f'timm_model.{name}': tensor for name, tensor in tiny('paddle').state_dict().items()}
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': VD, 'model_args': {'norm_eps': 1e-3}}))
    assert read_checkpoint(tmp_path / 'model.safetensors').spec == NetworkSpec('paddle', norm_eps=1e-3)


# From a file to a folder


def test_images_and_labels_survive_from_file_to_folder_to_model(tmp_path: Path) -> None:
    convert(saved(tmp_path, **RECORDED), tmp_path / 'net', labels=list('dcba'))
    push(load_model(tmp_path / 'net'), 'user/net', dry_run=tmp_path / 'pushed')
    for model in (
        timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True),
        load_folder(tmp_path / 'net'),
        load_folder(tmp_path / 'pushed'),
        load_model(tmp_path / 'pushed' / 'model.safetensors'),
    ):
        assert json.dumps(resolve_model_data_config(model)) == json.dumps(IMAGES)  # JSON has no tuples
        assert class_names(model) == list('dcba')


def test_convert_of_a_bare_state_dict_records_the_default_image_settings_of_load_model(tmp_path: Path) -> None:
    torch.save(tiny().state_dict(), tmp_path / 'weights.pth')
    convert(tmp_path / 'weights.pth', tmp_path / 'net')
    made = timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True)
    loaded = load_model(tmp_path / 'weights.pth')
    assert json.dumps(resolve_model_data_config(made)) == json.dumps(resolve_model_data_config(loaded))
    for model in (made, loaded):
        assert all(model.pretrained_cfg.get(key) is None for key in ('license', 'tag', 'description', 'origin_url'))


def test_other_numbers_of_channels_get_the_average_mean_and_std(tmp_path: Path) -> None:
    file = saved(tmp_path, kwargs={**TINY, 'in_chans': 4}, mean=[0.1, 0.2, 0.6], std=[0.2, 0.3, 0.4])
    convert(file, tmp_path / 'net')
    for model in (load_model(file), timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True)):
        settings = resolve_model_data_config(model)
        assert settings['input_size'] == (4, 32, 32)
        assert [*settings['mean'], *settings['std']] == pytest.approx([0.3] * 8)


def test_ten_classes_without_names_do_not_get_names_of_published_weights(tmp_path: Path) -> None:
    torch.save(tiny(num_classes=10).state_dict(), tmp_path / 'plain.pth')
    assert class_names(load_model(tmp_path / 'plain.pth'))[:2] == ['class 0', 'class 1']


def test_labels_are_read_from_a_file_or_from_folder_names(tmp_path: Path) -> None:
    (tmp_path / 'names.txt').write_text('cat\n\ndog\n', encoding='utf-8-sig')
    assert read_labels(str(tmp_path / 'names.txt')) == ['cat', 'dog']
    for name in ('class10', 'class2', 'empty'):
        (tmp_path / 'data' / 'train' / name).mkdir(parents=True)
        if name != 'empty':
            Image.new('RGB', (8, 8)).save(tmp_path / 'data' / 'train' / name / 'a.png')
    assert read_labels(str(tmp_path / 'data')) == ['class2', 'class10']  # in timm's order
    with pytest.raises(ValueError, match=r'cannot read absent\.txt: No such file'):
        read_labels('absent.txt')


def test_checkpoint_repr_is_one_line(tmp_path: Path) -> None:
    file = saved(tmp_path)
    assert (
        repr(read_checkpoint(file)) == f"Checkpoint('{file}', official, {len(tiny().state_dict())} tensors, 4 classes)"
    )
