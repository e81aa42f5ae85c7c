"""How images are prepared and what classes are called survives from a training to whatever is made of its file."""

import json
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import TINY, TRUNKS, small, tiny
from timm.data import resolve_data_config, resolve_model_data_config
from timm.models import save_for_hf
from torch import Tensor

from timm_res2net import CheckpointError, load_checkpoint, load_model, push
from timm_res2net.__main__ import main
from timm_res2net.deploy.runtimes import load_exported
from timm_res2net.models.classifier import class_names
from timm_res2net.models.function import Function
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.convert import convert
from timm_res2net.weights.readers import read
from timm_res2net.weights.recorded import read_labels

VD = 'res2net50_vd_26w_4s'
STATED: dict[str, Any] = dict(img_size=48, interpolation='nearest', mean=[0.1, 0.2, 0.3], std=[0.4], crop_pct=0.9)
IMAGES: dict[str, Any] = dict(
    input_size=(3, 48, 48),
    interpolation='nearest',
    mean=(0.1, 0.2, 0.3),
    std=(0.4, 0.4, 0.4),
    crop_pct=0.9,
    crop_mode='center',
)
CLASSES = ['class1', 'class2', 'class10', 'other']  # in timm's order, which is not that of the alphabet


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder of data with four classes, and a folder that is none."""
    for name in CLASSES:
        folder = tmp_path / 'data' / 'train' / name
        folder.mkdir(parents=True)
        Image.new('RGB', (8, 8)).save(folder / 'a.png')
    (tmp_path / 'data' / 'train' / 'empty').mkdir()
    return tmp_path / 'data'


def saved(folder: Path, arch: str = 'test_res2net', kwargs: dict[str, Any] = TINY, **args: Any) -> str:
    """Saves the tiny network as timm's train script does."""
    state = tiny(**kwargs).state_dict()
    recorded = dict(arch=arch, state_dict=state, args=Namespace(model_kwargs=kwargs, **args), version=2)
    torch.save(recorded, folder / 'last.pth.tar')
    return str(folder / 'last.pth.tar')


def test_load_model_prepares_images_as_the_train_script_did(tmp_path: Path) -> None:
    file = saved(tmp_path, **STATED)
    for options in ({}, dict(name='test_res2net', **TINY), dict(features_only=True)):
        config = resolve_model_data_config(load_model(file, **options))
        assert config == IMAGES


WIDE: dict[str, Any] = dict(TINY, channels=(8, 16, 24, 32))  # in which a dilated stage has a shortcut, too


@pytest.mark.parametrize(
    ('use', 'args'),
    [
        (dict(output_stride=8), {}),
        (dict(output_stride=16, dilate_pool=True, avg_down=True), {}),
        (dict(global_pool='max'), dict(gp='max')),
        (dict(global_pool='catavgmax'), dict(gp='catavgmax')),
    ],
    ids=str,
)
@pytest.mark.parametrize('beside', [False, True], ids=['train script', 'configuration beside'])
def test_load_model_and_convert_dilate_and_pool_as_the_file_states(
    use: dict[str, Any], args: dict[str, Any], beside: bool, tmp_path: Path, images: Tensor
) -> None:
    model = tiny(**WIDE, **use)
    if beside:
        save_for_hf(model, tmp_path, model_args={**WIDE, **use}, safe_serialization=True)
        file = tmp_path / 'model.safetensors'
    else:
        kwargs = {**WIDE, **({} if args else use)}
        recorded = dict(arch='test_res2net', state_dict=model.state_dict(), args=Namespace(model_kwargs=kwargs, **args))
        file = tmp_path / 'last.pth.tar'
        torch.save(recorded, file)
    convert(file, tmp_path / 'out')
    converted = timm.create_model(f'local-dir:{tmp_path / "out"}', pretrained=True)
    for loaded in (load_model(file), load_model(file, 'test_res2net', **WIDE), converted):
        torch.testing.assert_close(loaded.eval()(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize('name', TRUNKS)
def test_file_of_the_train_script_loads_into_the_model_of_every_trunk(name: str, tmp_path: Path) -> None:
    model = timm.create_model(name, **small(name))
    args = Namespace(model_kwargs=small(name))
    torch.save(dict(arch=name, state_dict=model.state_dict(), args=args), tmp_path / 'last.pth.tar')
    assert load_checkpoint(model, tmp_path / 'last.pth.tar').assumed == ()


def test_arguments_of_the_caller_win_over_what_a_file_states_of_its_use(tmp_path: Path) -> None:
    file = saved(tmp_path, kwargs={**WIDE, 'output_stride': 8}, gp='max')
    model = load_model(file, output_stride=32, global_pool='avg')
    assert model.global_pool.pool_type == 'avg'
    assert model.feature_info[-1]['reduction'] == 32


@pytest.mark.parametrize('wrong', [dict(gp='warp'), dict(gp=['max']), dict(gp=3)], ids=str)
def test_impossible_pooling_in_a_train_script_is_refused(wrong: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match='states of its network is not possible: global_pool='):
        read_checkpoint(saved(tmp_path, **wrong))


def test_train_script_arguments_that_say_nothing_mean_the_models_usual(tmp_path: Path) -> None:
    unsaid = dict(img_size=None, input_size=None, mean=None, std=None, interpolation='', crop_pct=None)
    usual = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg('test_res2net').to_dict())
    assert read_checkpoint(saved(tmp_path, **unsaid)).training.images == usual
    assert usual['input_size'] == (3, 32, 32)


def test_train_script_with_an_unknown_model_tells_only_what_it_states(tmp_path: Path) -> None:
    file = saved(tmp_path, arch='hf-hub:somebody/net', img_size=48, crop_pct=0.9)
    assert read_checkpoint(file).training.images == dict(input_size=(3, 48, 48), crop_pct=0.9)


@pytest.mark.parametrize(
    'wrong',
    [
        *(dict(img_size=-3), dict(img_size='48'), dict(mean=['a']), dict(mean=[1, 2]), dict(std=[0])),
        *(dict(img_size=5000), dict(input_size=[3, 48, 5000]), dict(crop_pct=1e-4), dict(crop_pct=100)),
        *(dict(crop_pct='x'), dict(interpolation='random'), dict(crop_mode='warp'), dict(input_size=[1, 2])),
    ],
    ids=str,
)
def test_impossible_argument_is_left_out_with_a_warning_and_the_others_are_kept(
    wrong: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (key,) = wrong
    usual = resolve_data_config({}, pretrained_cfg=timm.get_pretrained_cfg('test_res2net').to_dict())
    size = {} if key != 'img_size' else {'input_size': usual['input_size']}
    expected = {**IMAGES, **({key: usual[key]} if key in IMAGES and key != 'input_size' else {}), **size}
    assert read_checkpoint(saved(tmp_path, **{**STATED, **wrong})).training.images == expected
    assert f'{key} of the images in {tmp_path}/last.pth.tar is not used' in caplog.text
    assert caplog.text.count('is not used') == 1


@pytest.mark.parametrize('more', [{}, {'crop_mode': torch.ones(2)}], ids=['plain', 'tensor'])
def test_arguments_that_a_training_saved_as_a_mapping_are_read(more: dict[str, Any], tmp_path: Path) -> None:
    file = saved(tmp_path, **STATED)
    recorded = torch.load(file, weights_only=False)
    torch.save({**recorded, 'args': {**vars(recorded['args']), **more}}, file)
    assert read_checkpoint(file).training.images == IMAGES


@pytest.mark.parametrize('key', [*STATED, 'crop_mode', 'data_dir', 'dataset', 'class_map', 'model_kwargs'])
def test_tensor_among_the_arguments_is_left_out(key: str, tmp_path: Path) -> None:
    file = saved(tmp_path)
    recorded = torch.load(file, weights_only=False)
    tensor = torch.ones(2)
    setattr(recorded['args'], key, tensor)
    recorded['args'].nested = {'a': tensor, 'b': [('c', tensor), 1]}  # a pair is how Paddle names an array
    torch.save(recorded, file)
    args = read(file).nested['args']
    assert not hasattr(args, key)
    assert args.nested == {'b': (1,)}
    assert read_checkpoint(file).num_classes == 4


def test_load_model_names_classes_after_the_data_folder_but_not_other_classes(tmp_path: Path, data: Path) -> None:
    file = saved(tmp_path, data_dir=str(data), dataset='')
    assert class_names(load_model(file)) == CLASSES
    assert class_names(load_model(file, num_classes=2)) == ['class 0', 'class 1']


def test_class_map_names_classes_and_only_a_text_file_does(tmp_path: Path, data: Path) -> None:
    for name in ('map.txt', 'map'):
        (data / name).write_text('\n'.join(CLASSES[::-1]))
    for class_map in ('map.txt', str(data / 'map.txt')):
        assert class_names(load_model(saved(tmp_path, data_dir=str(data), class_map=class_map))) == CLASSES[::-1]
    assert read_checkpoint(saved(tmp_path, data_dir=str(data), class_map='map')).training.labels == ()


def test_text_that_a_file_calls_its_class_map_tells_nothing_but_names_of_folders(
    tmp_path: Path, data: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for folder in (tmp_path, data):
        (folder / 'keys.txt').write_text('secret1\nsecret2\nsecret3\nother\n')
    with caplog.at_level('INFO'):
        for class_map in ('keys.txt', '../keys.txt', str(tmp_path / 'keys.txt')):
            assert read_checkpoint(saved(tmp_path, data_dir=str(data), class_map=class_map)).training.labels == ()
    assert caplog.text.count('not all of its lines are names of folders') == 3
    assert 'secret' not in caplog.text


@pytest.mark.parametrize(
    'args', [dict(data_dir='absent'), dict(data_dir='.', dataset='torch/cifar10'), dict()], ids=str
)
def test_without_folder_of_as_many_classes_there_are_no_names(args: dict[str, Any], tmp_path: Path) -> None:
    assert read_checkpoint(saved(tmp_path, **args)).training.labels == ()


def test_convert_keeps_preparation_and_names_also_for_a_file_of_its_folder(tmp_path: Path, data: Path) -> None:
    convert(saved(tmp_path, data_dir=str(data), **STATED), tmp_path / 'net')
    for model in (
        timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True),
        load_model(tmp_path / 'net' / 'model.safetensors'),
    ):
        assert json.dumps(resolve_model_data_config(model)) == json.dumps(IMAGES)  # JSON has no tuples
        assert class_names(model) == CLASSES


@pytest.mark.parametrize('name', ['test_res2net', 'res2net50d'])
def test_file_that_tells_nothing_of_its_images_is_converted_with_what_load_model_assumes(
    name: str, tmp_path: Path
) -> None:
    torch.save(timm.create_model(name, num_classes=3).state_dict(), tmp_path / 'weights.pth')
    convert(tmp_path / 'weights.pth', tmp_path / 'net')
    made = timm.create_model(f'local-dir:{tmp_path}/net', pretrained=True)
    loaded = load_model(tmp_path / 'weights.pth')
    assert json.dumps(resolve_model_data_config(made)) == json.dumps(resolve_model_data_config(loaded))
    assert made.pretrained_cfg.get('license') is None


@pytest.mark.parametrize('channels', [1, 4])
def test_images_of_other_channels_get_the_mean_of_the_means(channels: int, tmp_path: Path) -> None:
    file = saved(tmp_path, kwargs={**TINY, 'in_chans': channels}, mean=[0.1, 0.2, 0.6], std=[0.2, 0.3, 0.4])
    convert(file, tmp_path / 'net')
    push(load_model(file), 'user/net', dry_run=tmp_path / 'pushed')
    for model in (
        *(load_model(file), load_model(file, features_only=True)),
        *(timm.create_model(f'local-dir:{tmp_path}/{folder}', pretrained=True) for folder in ('net', 'pushed')),
    ):
        config = resolve_model_data_config(model)
        assert config['input_size'] == (channels, 32, 32)
        assert [*config['mean'], *config['std']] == pytest.approx([0.3] * channels + [0.3] * channels)


def test_configuration_beside_weights_that_is_none_is_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(tiny().state_dict(), tmp_path / 'model.safetensors')
    for text in ('{', '{"pretrained_cfg": []}', '[]', '{"model_type": "bert"}'):
        (tmp_path / 'config.json').write_text(text)
        assert read_checkpoint(tmp_path / 'model.safetensors').training.images == {}
    assert caplog.text.count('config.json is not used') == 2  # the others are of other code


def test_impossible_value_in_the_configuration_beside_weights_leaves_the_others_and_the_names_of_classes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_file(tiny().state_dict(), tmp_path / 'model.safetensors')
    cfg = {**IMAGES, 'mean': 'x'}
    (tmp_path / 'config.json').write_text(json.dumps({'pretrained_cfg': cfg, 'label_names': CLASSES}))
    training = read_checkpoint(tmp_path / 'model.safetensors').training
    assert training.labels == (*CLASSES,)
    assert training.images == {key: value for key, value in IMAGES.items() if key != 'mean'}
    assert f'mean of the images in {tmp_path}/config.json is not used' in caplog.text


def test_push_keeps_preparation_and_names(tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved(tmp_path, data_dir=str(data), **STATED)
    assert main(['push', file, 'user/net', '--dry-run', str(tmp_path / 'folder')]) == 0
    printed = capsys.readouterr().out
    assert 'images       48 x 48, nearest, crop 0.9, mean 0.1, 0.2, 0.3, std 0.4, 0.4, 0.4: as the file says' in printed
    assert f'classes      4, named in {data}: class1, class2, class10, ...' in printed
    config = json.loads((tmp_path / 'folder' / 'config.json').read_text())
    assert config['label_names'] == CLASSES
    assert config['pretrained_cfg']['mean'] == [0.1, 0.2, 0.3]
    assert 'pretrained_cfg_overlay' not in config.get('model_args', {})


def test_predict_weights_prepares_images_as_stated_and_says_so(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = str(data / 'train' / 'other' / 'a.png')
    (tmp_path / 'names.txt').write_text('a\nb\nc\nd\n')
    for labels, names in ((str(data), CLASSES), (str(tmp_path / 'names.txt'), list('abcd'))):
        file = saved(tmp_path, **STATED)
        assert main(['predict', image, '--weights', file, '--labels', labels, '--json']) == 0
        out, err = capsys.readouterr()
        assert sorted(each['label'] for each in json.loads(out)['results'][0]['predictions']) == sorted(names)
        assert '48 x 48, nearest, crop 0.9' in err
        assert 'named as given' in err
    torch.save(tiny().state_dict(), tmp_path / 'plain.pth')
    assert main(['predict', image, '--weights', str(tmp_path / 'plain.pth')]) == 0
    assert 'assumed, the usual; the file does not tell' in capsys.readouterr().err


WAYS = {  # of using a file of weights
    'validate': ('validate', 'data/train', '--weights', 'last.pth.tar'),
    'explain': ('explain', 'data/train/other/a.png', '--weights', 'last.pth.tar'),
    'export': ('export', 'last.pth.tar', 'a.pt2'),
    'validate exported': ('validate', 'data/train', '--weights', 'a.pt2'),
    'predict exported': ('predict', 'data/train', '--weights', 'a.pt2'),
    'export features': ('export', 'last.pth.tar', 'b.pt2', '--features'),
    'export folder': ('export', 'folder', 'c.pt2'),
}


def test_every_command_prepares_images_as_the_file_states_and_says_so(
    tmp_path: Path, data: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (data / 'train' / 'empty').rmdir()
    saved(tmp_path, kwargs=dict(channels=(8, 16, 24, 32)), data_dir='data', **STATED)  # a dilated one has all tensors
    convert('last.pth.tar', 'folder')
    said = {}
    for way, arguments in WAYS.items():
        capsys.readouterr()
        assert main([*arguments]) == 0
        said[way] = '\n'.join(capsys.readouterr())
    images = 'images       48 x 48, nearest, crop 0.9, mean 0.1, 0.2, 0.3, std 0.4, 0.4, 0.4: as the file says\n'
    names = '{}: class1, class2, class10, ...'.format
    for way in ('validate', 'explain', 'export'):
        assert f'{images}classes      4, named in {names("data")}\n' in said[way]
    for way in ('validate exported', 'predict exported'):
        assert f'{images}classes      4, named in {names("a.pt2")}\n' in said[way]
    assert images in said['export features']
    assert 'classes ' not in said['export features']
    for file in ('a.pt2', 'c.pt2'):
        assert {**load_exported(file).pretrained_cfg}.items() >= json.loads(json.dumps(IMAGES)).items()
    assert main([*WAYS['explain'], '--labels', 'data']) == 0
    assert 'class10' in capsys.readouterr().out


def test_what_is_assumed_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(file: str) -> str:
        assert main(['predict', '--weights', file]) == 0
        return capsys.readouterr().err

    told = said(saved(tmp_path, arch='hf-hub:somebody/net', img_size=48, crop_pct=0.9))
    assert 'crop 0.9, mean 0.5, 0.5, 0.5, std 0.5, 0.5, 0.5: as the file says, but for interpolation, mean,' in told
    torch.save(tiny(num_classes=1000).state_dict(), tmp_path / 'plain.pth')
    told = said(str(tmp_path / 'plain.pth'))
    assert "classes      1000, named as ImageNet's: assumed, there are as many" in told


def test_ten_classes_without_names_are_not_named_as_those_of_the_published_weights(tmp_path: Path) -> None:
    torch.save(tiny(num_classes=10).state_dict(), tmp_path / 'plain.pth')
    assert class_names(load_model(tmp_path / 'plain.pth'))[:2] == ['class 0', 'class 1']


@pytest.mark.parametrize('command', ['convert', 'predict --weights'])
def test_labels_for_other_classes_are_refused(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('names.txt').write_text('a\nb\n')
    assert main([*command.split(), saved(tmp_path), '--labels', 'names.txt']) == 1
    assert 'labels has 2 names for 4 classes' in capsys.readouterr().err


def test_read_labels_leaves_out_the_mark_that_windows_puts_before_a_text(tmp_path: Path) -> None:
    (tmp_path / 'names.txt').write_text('cat\ndog\n', encoding='utf-8-sig')
    assert read_labels(str(tmp_path / 'names.txt')) == ['cat', 'dog']


def test_read_labels_of_absent_file_raises_with_its_name() -> None:
    with pytest.raises(ValueError, match=r'absent\.txt can not be opened'):
        read_labels('absent.txt')


def test_checkpoint_is_shown_in_one_line(tmp_path: Path) -> None:
    checkpoint = read_checkpoint(saved(tmp_path))
    assert repr(checkpoint) == (
        f"Checkpoint('{tmp_path}/last.pth.tar', official, {len(tiny().state_dict())} tensors, 4 classes)"
    )


@pytest.mark.parametrize('key', ['model_name', 'backbone'])
def test_read_checkpoint_takes_the_model_from_hyper_parameters_of_lightning(key: str, tmp_path: Path) -> None:
    state = {f'model.{name}': tensor for name, tensor in tiny('paddle').state_dict().items()}
    saved = {'state_dict': state, 'pytorch-lightning_version': '2.5', 'hyper_parameters': {'lr': 0.1, key: VD}}
    torch.save(saved, tmp_path / 'last.ckpt')
    checkpoint = load_checkpoint(tiny('paddle'), tmp_path / 'last.ckpt')
    assert (checkpoint.function.first_block, checkpoint.assumed) == ('paddle', ())
    saved['hyper_parameters']['teacher'] = 'res2net50d'  # which of both is it?
    torch.save(saved, tmp_path / 'last.ckpt')
    with pytest.raises(CheckpointError, match=r"does not tell whether its network has first_block='official'"):
        load_checkpoint(tiny('paddle'), tmp_path / 'last.ckpt')


def test_read_checkpoint_takes_the_model_from_the_configuration_of_transformers_beside(tmp_path: Path) -> None:
    state = {f'timm_model.{name}': tensor for name, tensor in tiny('paddle').state_dict().items()}
    save_file(state, tmp_path / 'model.safetensors', {'format': 'pt'})
    (tmp_path / 'config.json').write_text(json.dumps({'architecture': VD, 'model_args': {'norm_eps': 1e-3}}))
    function = read_checkpoint(tmp_path / 'model.safetensors').function
    assert (function.first_block, function.norm_eps) == ('paddle', 1e-3)
    (tmp_path / 'config.json').write_text('[' * 100_000)
    assert read_checkpoint(tmp_path / 'model.safetensors').function.first_block == 'official'


PAIRS = [[('a', torch.ones(2)), ('b', torch.zeros(2))], 1, 1, 1]


@pytest.mark.parametrize(
    ('key', 'value'), [*((key, torch.ones(2)) for key in vars(Function())), ('strides', PAIRS), ('deformable', PAIRS)]
)
def test_tensor_among_the_hyper_parameters_of_lightning_is_refused(key: str, value: object, tmp_path: Path) -> None:
    parameters = {'model_name': 'test_res2net', key: value}
    torch.save({'state_dict': tiny().state_dict(), 'hyper_parameters': parameters}, tmp_path / 'last.ckpt')
    with pytest.raises(CheckpointError, match='what it states of its network is not possible'):
        read_checkpoint(tmp_path / 'last.ckpt')
