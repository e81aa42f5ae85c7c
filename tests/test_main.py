"""The command line: what each command prints and writes, and one line for each wrong call."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from PIL import Image
from sklearn.datasets import load_sample_image
from support import tiny

from timm_res2net import card
from timm_res2net.__main__ import main
from timm_res2net.deploy.images import bundled_digits
from timm_res2net.hub.catalogue import catalogue
from timm_res2net.models.variants import ARCHS, WEIGHTS
from timm_res2net.version import __version__
from timm_res2net.weights.dialects import DIALECTS
from timm_res2net.weights.files import sha256


@dataclass
class Done:
    """What a command returned and printed."""

    status: Any
    out: str
    err: str


Run = Callable[..., Done]
Patch = pytest.MonkeyPatch


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line in this process."""

    def run(*arguments: str) -> Done:
        capsys.readouterr()
        try:
            status: Any = main(list(arguments))
        except SystemExit as exit_of_argparse:
            status = exit_of_argparse.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture(scope='module')
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two real photographs, a digit, and two files that are no images."""
    folder = tmp_path_factory.mktemp('photos')
    for name in ('china.jpg', 'flower.jpg'):
        Image.fromarray(load_sample_image(name)).save(folder / name)
    bundled_digits()[20][0].save(folder / 'three.png')
    (folder / 'cut.jpg').write_bytes((folder / 'china.jpg').read_bytes()[:5000])
    (folder / 'text.png').write_text('this is text')
    return folder


def test_predict_without_arguments_shows_truth_beside_predictions(run: Run) -> None:
    done = run('predict')
    assert done.status == 0
    rows = [line.split() for line in done.out.splitlines() if line.startswith('  ')]
    assert [row[0] for row in rows] == list('0123456789')
    assert '60 of 60 are right' in done.out
    assert 'timm-res2net predict PHOTO.jpg --model res2net50d' in done.out


def test_predict_classifies_good_files_and_lists_bad_ones(run: Run, photos: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(photos)
    done = run('predict', '.', 'absent.png', '--model', 'test_res2net', '--topk', '2', '--json')
    assert done.status == 1
    output: dict[str, Any] = json.loads(done.out)
    assert [item['file'] for item in output['results']] == ['china.jpg', 'flower.jpg', 'three.png']
    assert all(len(item['predictions']) == 2 for item in output['results'])
    assert output['results'][2]['predictions'][0]['label'] == '3'
    assert sorted(item['file'] for item in output['failed']) == ['absent.png', 'cut.jpg', 'text.png']
    assert done.err.count('timm-res2net: ') == 3


def test_predict_prints_files_with_their_labels(run: Run, photos: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(photos)
    done = run('predict', 'thr*.png', '--model', 'test_res2net.digits', '--batch-size', '1')
    assert done.status == 0
    lines = done.out.splitlines()
    assert lines[0] == 'three.png'
    assert lines[1].split()[1] == '3'
    assert len(lines) == 6


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (('predict', '--model', 'res2nt50_26w_4s'), 2, 'did you mean res2net50_26w_4s'),
        (('predict', '--model', 'res2net101_v1b_26w_4s'), 2, 'did you mean res2net101d?'),
        (('push', 'mine.pth', 'me/net', '--result', 'accuracy'), 2, "'accuracy' is no WHAT=PERCENT, such as accuracy="),
        (('predict', '--weights', 'absent.pth'), 1, 'absent.pth can not be opened: No such file'),
        (('predict', 'china.jpg', '--model', 'res2net50d'), 1, 'weights of res2net50d can not be had'),
        (('predict', '--model', 'res2net152d'), 1, 'no published weights of res2net152d'),
        (('predict', '--topk', '0'), 2, '0 is not above zero'),
        (('predict', '--device', 'warp'), 2, 'warp can not be used here'),
        (('list', 'vgg*'), 1, 'no model of the family matches vgg'),
        (('features', 'text.png', '--model', 'test_res2net'), 1, 'text.png: this is not an image'),
        (('features', 'nofile', '--model', 'test_res2net'), 1, 'nofile: there is no such file'),
        (('explain', 'nofile'), 1, 'nofile: there is no such file'),
        (('push', 'absent.pth', 'me/net'), 2, 'no file, no folder, and no name of published weights; `timm-res2net'),
        (('push', 'res2net50d.in1', 'me/net'), 2, 'did you mean res2net50d.in1k'),
        (('export', 'absent.pth', 'a.pt2'), 2, 'no file, no folder, and no name of published weights; `timm-res2net'),
        (('export', 'res2net50d.in1', 'a.pt2'), 2, 'did you mean res2net50d.in1k'),
        (('export', '.', 'a.pt2'), 1, 'config.json of . can not be read: No such file'),
        (('export', 'test_res2net.digits', 'a.pt2', '--model', 'res2net50d'), 2, 'says which model it is'),
        (('features', 'china.jpg', '--weights', 'absent.onnx'), 1, 'absent.onnx is an exported model, in which'),
        (('explain', '--weights', 'absent.pt2'), 1, 'absent.pt2 is an exported model, in which nothing can be looked'),
        (('predict', '--device', 'meta'), 2, 'meta can not be used here'),
        (('predict', '', '--model', 'test_res2net'), 1, "'': this is no name of a file"),
        (('predict', '--model', 'local-dir:.'), 1, 'weights of local-dir:. can not be had: Config file not found'),
        (('push', '.', 'me/digits'), 1, 'config.json of . can not be read: No such file'),
        (('explain', '--model', 'res2nt50_26w_4s'), 2, 'did you mean res2net50_26w_4s'),
        (('features', 'china.jpg', '--model', 'res2nt50_26w_4s'), 2, 'did you mean res2net50_26w_4s'),
        (('bench', '--models', 'res2nt50_26w_4s'), 2, 'did you mean res2net50_26w_4s'),
        (('convert', 'text.png', '--model', 'res2nt50_26w_4s'), 2, 'did you mean res2net50_26w_4s'),
        (('card', 'china.jpg', '--validate'), 1, 'china.jpg is no text in UTF-8'),
        (('card', 'absent.jpg', '--validate'), 2, 'there is no file absent.jpg, and there are no published weights'),
        (('card', 'res2net50d.in22k'), 2, 'there are res2net50d.in1k'),
        (('card',), 2, 'name published weights'),
        (('recipe', 'absent'), 2, 'there is no recipe absent; there are cifar100'),
        (('convert', 'text.png'), 1, 'text.png is no file of weights'),
        (('convert', '.'), 1, '. can not be opened: Is a directory'),
        (('convert', 'text.png', '--dialect', 'caffe'), 2, 'invalid choice'),
        (('bench', '--growth', '--train', '--size', '64'), 2, '--size and --train would have no effect'),
        (('bench', '--train', '--against', 'openvino'), 2, '--against would have no effect'),
        (('validate', '.', '--weights', 'net.onnx', '--compile'), 2, 'exported models run as they are'),
        (('predict', '--weights', 'net.onnx', '--compile'), 2, 'an exported model runs as it is'),
        (('push', 'test_res2net.digits', 'me/digits', '--model', 'res2net50d'), 2, 'says which model it is'),
        (('recipe', '--out', 'a.yaml'), 2, 'name the recipe'),
        (('card', 'res2net50d.in1k', '--all'), 2, 'NAME would have no effect'),
        (('card', 'res2net50d.in1k', '--out', 'cards'), 2, 'cards are written by --all'),
    ],
)
def test_main_wrong_arguments_return_status_and_print_message(
    run: Run, arguments: tuple[str, ...], status: int, message: str, photos: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(photos)
    done = run(*arguments)
    assert done.status == status
    assert done.out == ''
    line = done.err.splitlines()[-1]
    assert message in line
    assert line.startswith('timm-res2net')


def test_main_without_command_shows_help(run: Run) -> None:
    done = run()
    assert (done.status, done.err) == (0, '')
    assert 'bring other people' in done.out


def test_main_version_is_the_packages(run: Run) -> None:
    assert run('--version').out == f'timm_res2net {__version__}\n'


def test_main_interrupted_ends_in_one_line(run: Run, monkeypatch: Patch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_res2net.commands.sources.pretrained_model', interrupt)
    assert run('predict') == Done(130, '', 'timm-res2net: interrupted\n')


def test_predict_folder_names_what_it_skips_and_succeeds(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    Path('photos').mkdir()
    bundled_digits()[20][0].save('photos/three.png')
    for name in ('a.heic', 'b.svg', 'c.pdf', 'd.txt'):
        Path('photos', name).touch()
    Path('photos/lost.jpg').symlink_to('nowhere.jpg')
    done = run('predict', 'photos', '--model', 'test_res2net')
    assert done.status == 0
    assert done.err.splitlines() == [
        'timm-res2net: skipped, no image of a format that Pillow reads: '
        '4: photos/a.heic, photos/b.svg, photos/c.pdf, ...',
        'timm-res2net: skipped, a link to nothing: 1: photos/lost.jpg',
    ]
    skipped = json.loads(run('predict', 'photos', '--model', 'test_res2net', '--json').out)['skipped']
    assert [each['file'] for each in skipped] == [
        f'photos/{x}' for x in ('a.heic', 'b.svg', 'c.pdf', 'd.txt', 'lost.jpg')
    ]


def test_validate_names_what_it_leaves_out(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for label in '38':
        Path('data', label).mkdir(parents=True)
    bundled_digits()[20][0].save('data/3/three.png')
    Path('data/3/a.heic').touch()
    Path('data/3/lost.jpg').symlink_to('nowhere.jpg')
    done = run('validate', 'data', '--model', 'test_res2net.digits')
    assert done.status == 1
    assert done.err.splitlines() == [
        'timm-res2net: skipped, no image of a format that Pillow reads: 1: data/3/a.heic',
        'timm-res2net: skipped, a link to nothing: 1: data/3/lost.jpg',
        'timm-res2net: data/8: there is no image in this folder',
    ]
    done = run('validate', 'data', '--model', 'test_res2net.digits', '--json')
    assert [each['file'] for each in json.loads(done.out)['skipped']] == ['data/3/a.heic', 'data/3/lost.jpg']
    assert [each['file'] for each in json.loads(done.out)['failed']] == ['data/8']


def test_list_shows_every_architecture_and_its_weights(run: Run) -> None:
    done = run('list')
    assert done.status == 0
    header, *rows = done.out.split('\n\n')[0].splitlines()
    assert header.split() == ['name', 'params', 'GMACs', 'top-1', 'licence', 'weights']
    names = [row.split()[0] for row in rows]
    assert {name.split('.')[0] for name in names} == set(ARCHS)
    assert {name for name in names if '.' in name} == set(WEIGHTS)


def test_list_selects_by_pattern_and_weights(run: Run) -> None:
    rows = run('list', '*50d*', '--pretrained').out.splitlines()
    assert rows[1].split() == [
        'res2net50d.in1k',
        *('25.72', 'M', '4.495', '80.28', '%', 'cc-by-nc-sa-4.0', 'hf-hub:timm/res2net50d.in1k'),
    ]
    assert rows[2].split()[-2:] == ['apache-2.0', WEIGHTS['res2net50d.mindcv_in1k'].cfg['url']]
    assert rows[3] == ''


def test_list_chooses_for_a_budget(run: Run) -> None:
    names = [row.split()[0] for row in run('list', '--max-params', '20.9', '--sort', 'top1').out.splitlines()[1:3]]
    assert names == ['dla60_res2next.in1k', 'dla60_res2net.in1k']  # 78.49 and 78.48 %, digits come after
    found = json.loads(run('list', '--max-params', '20.9', '--json').out)
    assert {each['name'] for each in found} >= {*names, 'res2net50_18w_4s', 'test_res2net.digits'}
    assert all(each['params'] <= 20.9e6 for each in found)
    for key in ('params', 'gmacs'):
        values = [each[key] for each in json.loads(run('list', '--sort', key, '--json').out)]
        assert len(values) > len(ARCHS)
        assert values == sorted(values)
    done = run('list', '*101*', '--max-params', '1')
    assert (done.status, done.err.count('*101* with at most 1 M parameters')) == (1, 1)
    assert 'is not above zero' in run('list', '--max-params', '0').err


def test_features_prints_and_draws_the_pyramid(run: Run, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / 'pyramid.png'
    done = run('features', str(photos / 'china.jpg'), '--model', 'test_res2net', '--out', str(out))
    assert done.status == 0
    table = [line.split(maxsplit=3) for line in done.out.splitlines()[3:8]]
    assert table == [
        ['act1', '2', '16', '16 x 16'],
        ['layer1', '4', '32', '8 x 8'],
        ['layer2', '8', '64', '4 x 4'],
        ['layer3', '16', '128', '2 x 2'],
        ['layer4', '32', '256', '1 x 1'],
    ]
    with Image.open(out) as image:
        assert image.width > 5 * image.height / 1.3


def test_features_of_weights_in_a_file_are_those_of_the_model_that_it_fits(
    run: Run, photos: Path, tmp_path: Path
) -> None:
    file = tmp_path / 'weights.pth'
    torch.save(tiny(channels=(8, 16, 24, 40)).state_dict(), file)
    done = run('features', str(photos / 'china.jpg'), '--weights', str(file))
    assert done.out.startswith(f'{file} on ')
    assert [line.split()[2] for line in done.out.splitlines()[3:8]] == ['16', '32', '64', '96', '160']


@pytest.mark.parametrize('arguments', [['features', 'china.jpg', '--model', 'test_res2net'], ['explain']], ids=str)
def test_picture_without_suffix_is_png(run: Run, arguments: list[str], photos: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(photos)
    before = {path.name for path in photos.iterdir()}
    assert run(*arguments, '--out', 'drawn').status == 0
    assert Path('drawn').read_bytes().startswith(b'\x89PNG')
    assert {path.name for path in photos.iterdir()} - before == {'drawn'}
    Path('drawn').unlink()


@pytest.mark.parametrize(
    'arguments',
    [
        ('features', 'three.png', '--model', 'test_res2net', '--out'),
        ('explain', '--out'),
        ('recipe', 'digits', '--out'),
        ('bench', '--json'),
        ('bench', '--plot'),
    ],
    ids=str,
)
@pytest.mark.parametrize('name', ['pipe.png', ''])
def test_out_that_is_no_regular_file_is_refused_before_work(
    run: Run, arguments: tuple[str, ...], name: str, photos: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(photos)
    for place in ('features', 'explain', 'sources'):
        monkeypatch.setattr(f'timm_res2net.commands.{place}.pretrained_model', None)
    monkeypatch.setattr('timm_res2net.commands.bench.bench', None)
    if not Path('pipe.png').exists():
        os.mkfifo('pipe.png')
    done = run(*arguments, name)
    assert (done.status, done.out, done.err.count('\n')) == (1, '', 1)
    assert re.search(r'can not be written: it is (no regular file|a folder)', done.err)
    assert Path('pipe.png').is_fifo()


@pytest.mark.parametrize('name', ['file', '/proc/cards'])
def test_card_all_into_what_can_be_no_folder_prints_one_line(
    run: Run, name: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path('file').touch()
    done = run('card', '--all', '--out', name)
    assert (done.status, done.out, done.err.count('\n')) == (1, '', 1)
    assert f'{name} is no folder and can not be made one' in done.err


def test_convert_names_the_folder_after_the_whole_stem_and_gives_files_one_mode(
    run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, folder in (('x.digits.pth', 'x.digits'), ('last.pth.tar', 'last')):
        torch.save(tiny().state_dict(), name)
        assert run('convert', name).status == 0
        modes = {(Path(folder) / file).stat().st_mode for file in ('model.safetensors', 'config.json')}
        assert len(modes) == 1


def test_features_without_matplotlib_prints_install_command(run: Run, photos: Path, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('features', str(photos / 'china.jpg'), '--model', 'test_res2net', '--out', 'x.png')
    assert done.status == 1
    assert 'pip install "timm_res2net[plot]"' in done.err


def test_convert_prints_detected_model_and_written_files(
    run: Run, references: Callable[[str], Path], tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = references('paddle') / 'res2net50_vd.pdparams'
    done = run('convert', str(file), '--out', 'net')
    assert done.status == 0, done.err
    assert done.out.splitlines() == [
        str(file),
        f'  sha256 {sha256(file)}',
        '',
        'dialect      paddleclas: PaddleClas, .pdparams',
        "computes     first_block='paddle'",
        "model        timm.create_model('res2net50_vd_26w_4s', base_width=2): certain, all tensors fit",
        'images       224 x 224, bilinear, crop 0.875, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225: assumed, '
        'the usual; the file does not tell',
        'classes      5, without names',
        'filled in    87: conv1.1.num_batches_tracked, conv1.4.num_batches_tracked, bn1.num_batches_tracked, ...',
        'cast         0',
        '',
        'net/model.safetensors',
        f'  sha256 {sha256(tmp_path / "net" / "model.safetensors")}',
        '',
        'wrote net; load it by',
        "  timm.create_model('local-dir:net', pretrained=True)",
    ]
    done = run('convert', 'net/model.safetensors', '--to', 'paddleclas', '--out', 'back.pdparams')
    assert done.status == 0, done.err
    assert f'wrote back.pdparams\n  sha256 {sha256(tmp_path / "back.pdparams")}' in done.out
    done = run('convert', 'net/model.safetensors', '--to', 'paddleclas', '--out', 'back.pdparams')
    assert (done.status, 'there is a back.pdparams already' in done.err) == (1, True)


def test_convert_dry_run_writes_nothing(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(
        {'state_dict': {f'backbone.{name}': t.half() for name, t in tiny().state_dict().items()}}, tmp_path / 'x.pth'
    )
    done = run('convert', 'x.pth', '--dry-run', '--first-block', 'mmdet')
    lines = done.out.splitlines()
    assert lines[4] == "computes     first_block='mmdet'"
    assert lines[5].startswith('assumed      style, strides, dilations, ')
    assert lines[10].startswith('cast         ')
    assert lines[10].endswith('of float16 to float32')
    assert lines[-1] == 'nothing was written'
    done = run('convert', 'x.pth', '--dry-run')
    assert 'assumed      first_block, style, strides, dilations, ' in done.out
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']


def test_convert_lists_all_dialects(run: Run) -> None:
    done = run('convert', '--list-dialects')
    assert done.status == 0
    rows = [line.split()[0] for line in done.out.splitlines()]
    assert rows == ['dialect', *DIALECTS]


# The Hub


def test_push_and_pull_print_files_and_checksums(run: Run, hub: Hub, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    torch.save(tiny('mmdet').state_dict(), 'mine.pth')
    Path('labels.txt').write_text('a\nb\nc\nd\n')
    options = ['--license', 'Our Own', '--license-link', 'https://example.org', '--result', 'accuracy=91.5']
    options += ['--labels', 'labels.txt', '--dataset', 'somebody/shapes', '--tag', 'mine']
    done = run('push', 'mine.pth', 'user/net', *options, '--dry-run', 'folder')
    assert (done.status, 'wrote folder; nothing was sent' in done.out) == (0, True)
    assert hub.log == []
    printed = run('push', 'folder', 'user/net', *options, '--private', '--message', 'First').out.splitlines()
    assert [line.split()[1] for line in printed[:3]] == ['model.safetensors', 'config.json', 'README.md']
    assert printed[4].startswith(f'{os.environ["HF_ENDPOINT"]}/user/net/commit/')
    assert hub.repos['user/net'].private
    assert 'license_name: our-own' in hub.files('user/net')['README.md'].decode()

    pulled = run('pull', 'user/net', '--out', 'back').out.splitlines()
    assert pulled[:2] == printed[:2]
    assert pulled[-1] == "  timm.create_model('local-dir:back', pretrained=True)"
    assert sorted(os.listdir('back')) == ['config.json', 'model.safetensors']
    assert Path('back/config.json').read_bytes() == hub.files('user/net')['config.json']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('pull', 'user/absent'), 'Repository Not Found for url: .*user/absent'),
        (('push', 'test_res2net.digits', 'user/net'), 'write permission'),
        (('push', '.', 'user/net'), r'config\.json of \. can not be read: No such file'),
        (('push', 'test_res2net.digits', 'brandnew', '--dry-run', 'folder'), 'is no name of a repository'),
        (('push', 'test_res2net.digits', 'user/net', '--timeout', '-1'), 'timeout is -1.0; give a positive number'),
        (('pull', 'user/net', '--out', __file__), 'is a file; name a folder by --out'),
        (('push', 'test_res2net.digits', 'user/net', '--labels', 'absent.txt'), 'absent.txt can not be opened'),
        (('push', 'test_res2net.digits', 'user/net', '--license', 'made-up'), 'must be one of'),
    ],
)
def test_hub_command_failure_prints_one_line_without_token(
    run: Run, arguments: tuple[str, ...], message: str, hub: Hub, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_read')
    done = run(*arguments)
    assert (done.status, done.out) == (1, '')
    assert re.search(message, done.err)
    assert done.err.count('\n') == 1
    assert 'hf_read' not in done.err


def test_card_command_prints_writes_and_validates_cards(run: Run, hub: Hub, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    text = run('card', 'test_res2net.digits').out
    assert text == card('test_res2net.digits')
    assert run('card', 'test_res2net.digits', '--validate').out == 'test_res2net.digits is a good card\n'
    Path('bad.md').write_text(text.replace('license: apache-2.0', 'license: made-up\nlicence: mit'))
    done = run('card', 'bad.md', '--validate')
    assert done.status == 1
    assert done.err.count('timm-res2net: bad.md: ') == 2  # one found here, one by the Hub
    monkeypatch.setattr('timm_res2net.commands.card.WEIGHTS', ['test_res2net.digits'])
    assert run('card', '--all', '--out', 'cards').out == 'wrote 1 cards and README.md to cards\n'
    assert Path('cards/test_res2net.digits.md').read_text() == text
    assert Path('cards/README.md').read_text() == catalogue()


def test_recipe_out_in_absent_folder_prints_one_line(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run('recipe', 'digits.yaml').out == run('recipe', 'digits').out
    done = run('recipe', 'digits', '--out', 'absent/digits.yaml')
    assert (done.status, done.err) == (1, 'timm-res2net: there is no folder absent to write digits.yaml to\n')


def test_list_into_closed_pipe_exits_without_error() -> None:
    command = [sys.executable, '-m', 'timm_res2net', 'list']
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait() == 0
    process.stderr.close()


def test_main_with_closed_standard_output_prints_one_line(run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sys, 'stdout', None)
    assert run('list') == Done(1, '', 'timm-res2net: standard output is closed\n')


def test_main_with_closed_standard_error_keeps_messages_off_standard_output(
    tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, 'stderr', None)
    monkeypatch.setattr('timm_res2net.commands.card.WEIGHTS', ['test_res2net.digits'])
    assert main(['card', '--all', '--out', str(tmp_path)]) == 0
    assert main(['card', 'absent']) == 2
    sys.stderr.close()
    assert capsys.readouterr().out == f'wrote 1 cards and README.md to {tmp_path}\n'


@pytest.mark.parametrize('arguments', [['list'], ['convert', '--list-dialects'], ['card', 'res2net50d.in1k']], ids=str)
def test_main_with_full_disk_prints_one_line(run: Run, arguments: list[str], monkeypatch: Patch) -> None:
    with open('/dev/full', 'w') as full:  # closing it would raise if something were left in it
        monkeypatch.setattr(sys, 'stdout', full)
        assert run(*arguments) == Done(1, '', 'timm-res2net: [Errno 28] No space left on device\n')


def test_recipes_are_listed_with_descriptions_that_end(run: Run) -> None:
    done = run('recipe')
    assert [line[-1] for line in done.out.splitlines() if line.endswith((':', ','))] == []


def test_predict_and_explain_weights_without_model_use_the_model_that_they_fit(
    run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(tiny(num_classes=10, channels=(8, 16, 24, 32)).state_dict(), 'mine.pth')
    done = run('predict', '--weights', 'mine.pth')
    assert done.status == 0
    assert re.search(r'\d+ of 60 are right', done.out)
    done = run('explain', '--weights', 'mine.pth', '--out', 'a.png')
    assert (done.status, Path('a.png').exists()) == (0, True)
    geometry = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))  # which can't be dilated once more
    state = tiny(num_classes=10, **geometry).state_dict()
    torch.save(dict(state_dict=state, hyper_parameters=dict(backbone='test_res2net', **geometry)), 'dilated.pth')
    assert run('explain', '--weights', 'dilated.pth', '--out', 'b.png').status == 0


@pytest.mark.parametrize(
    'arguments', [('predict',), ('predict', 'three.png'), ('validate', '.'), ('explain',), ('predict', '--labels', '.')]
)
def test_weights_without_a_classifier_are_refused_in_one_line(
    arguments: tuple[str, ...], run: Run, photos: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(photos)
    file = str(tmp_path / 'backbone.pth')
    torch.save(tiny(num_classes=0).state_dict(), file)
    message = f'timm-res2net: {file} has no classifier to predict classes with; give weights that have one\n'
    assert run(*arguments, '--weights', file) == Done(1, '', message)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm leaves image files open
def test_weights_of_one_channel_go_through_every_command(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, (image, label) in enumerate(bundled_digits()[:20]):
        (tmp_path / 'digits' / label).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'digits' / label / f'{i}.png')
    torch.save(tiny(in_chans=1, channels=(8, 16, 24, 32)).state_dict(), 'grey.pth')
    (tmp_path / 'labels.txt').write_text(''.join(f'{file.relative_to("digits")} 0\n' for file in Path().glob('*/*/*')))
    assert run('export', 'grey.pth', 'grey.pt2', '--images', 'digits').status == 0
    assert run('convert', 'grey.pth').status == 0
    for arguments in (
        ('predict', '--weights', 'grey.pth'),
        ('predict', 'digits', '--weights', 'grey.pt2'),
        ('validate', 'digits', '--truth', 'labels.txt', '--weights', 'grey.pth', 'grey.pt2'),
        ('explain', '--weights', 'grey.pth', '--out', 'a.png'),
        ('features', 'digits/0/0.png', '--model', 'local-dir:grey', '--out', 'b.png'),
    ):
        done = run(*arguments)
        assert done.status == 0, done.err
        assert 'mean 0.5, std 0.5' in done.err or arguments[0] == 'features'


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm leaves image files open
def test_export_then_validate_and_predict_use_the_file(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    for i, (image, label) in enumerate(bundled_digits()):
        (tmp_path / 'digits' / label).mkdir(parents=True, exist_ok=True)
        image.save(tmp_path / 'digits' / label / f'{i}.png')
    done = run('export', 'test_res2net.digits', 'digits.pt2', '--images', 'digits')
    assert (done.status, done.err) == (0, '')
    size = (tmp_path / 'digits.pt2').stat().st_size
    assert done.out.splitlines()[:2] == [
        f'wrote digits.pt2, {size / 1e6:.2f} MB: fused, torch, float32',
        'compared with the model on 60 images, by its own runtime:',
    ]
    assert done.out.splitlines()[-1] == '  likeliest class    the same for 100.00%'
    done = run('validate', 'digits', '--weights', 'digits.pt2', '--confusion', 'c.png')
    assert done.status == 0
    assert done.out.splitlines() == [
        'model       images     top-1     top-5',
        'digits.pt2      60  100.00 %  100.00 %',
        '',
        'drawn to c.png',
    ]
    assert (tmp_path / 'c.png').stat().st_size > 5000
    done = run('validate', 'digits', '--model', 'test_res2net.digits', '--weights', 'digits.pt2', '--json')
    assert [item['model'] for item in json.loads(done.out)['results']] == ['test_res2net.digits', 'digits.pt2']
    torch.save(timm.create_model('test_res2net.digits', pretrained=True).state_dict(), 'digits.pth')
    done = run('validate', 'digits', '--model', 'test_res2net', '--weights', 'digits.pth', 'digits.pt2', '--json')
    assert [item['top1'] for item in json.loads(done.out)['results']] == [100, 100]
    done = run('predict', 'digits/3', '--weights', 'digits.pt2', '--topk', '1', '--json')
    found = json.loads(done.out)
    assert [item['predictions'][0]['label'] for item in found['results']] == ['3'] * 6
    assert found['model'] == 'test_res2net'
    (tmp_path / 'digits' / '3' / 'broken.png').write_bytes(b'')
    done = run('validate', 'digits', '--model', 'test_res2net.digits', '--json')
    assert done.status == 1
    assert json.loads(done.out)['results'] == [dict(model='test_res2net.digits', images=60, top1=100.0, top5=100.0)]
    assert 'broken.png' in json.loads(done.out)['failed'][0]['file']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('export', 'test_res2net.digits', 'a.tflite'), 'a.tflite has no known suffix; choose .onnx, .xml, .pt2'),
        (('export', 'test_res2net.digits', 'a.pt2', '--precision', 'int8'), "'int8' is not possible in .pt2"),
        (('validate', 'nowhere', '--model', 'test_res2net.digits'), 'nowhere is no folder'),
        (('predict', '--weights', 'a.pt2'), 'a.pt2 can not be opened: there is no such file'),
    ],
)
def test_export_and_validate_wrong_calls_are_one_line(
    arguments: tuple[str, ...], message: str, run: Run, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = run(*arguments)
    assert (done.status, done.out) == (1, '')
    assert message in done.err
    assert done.err.count('\n') == 1
    assert list(tmp_path.iterdir()) == []


def test_list_plot_draws_what_is_listed(run: Run, tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.chdir(tmp_path)
    done = run('list', '*50*', '--pretrained', '--plot', 'c.png')
    assert (done.status, done.out.splitlines()[0]) == (0, 'drawn to c.png')
    with Image.open('c.png') as image:
        assert min(image.size) > 500
    done = run('list', 'blresnet50', '--plot', 'd.png')
    assert (done.status, 'there are no weights to draw' in done.err) == (1, True)
    assert [path.name for path in tmp_path.iterdir()] == ['c.png']
