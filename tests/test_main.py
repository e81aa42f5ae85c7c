"""The command line, run as its users run it."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from support import tiny

from timm_res2net import card
from timm_res2net.__main__ import main
from timm_res2net.models.variants import ARCHS, WEIGHTS
from timm_res2net.vision.images import bundled_digits
from timm_res2net.weights.dialects import DIALECTS
from timm_res2net.weights.files import sha256


def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs the command line; whatever it is given, there must be no traceback."""
    command = [sys.executable, '-m', 'timm_res2net', *arguments]
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True)
    assert 'Traceback' not in done.stderr, done.stderr
    return done


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


def test_predict_without_arguments_shows_truth_beside_predictions() -> None:
    done = run('predict')
    assert done.returncode == 0
    rows = [line.split() for line in done.stdout.splitlines() if line.startswith('  ')]
    assert [row[0] for row in rows] == list('0123456789')
    assert '60 of 60 are right' in done.stdout
    assert 'timm-res2net predict PHOTO.jpg --model res2net50d' in done.stdout


def test_predict_does_the_good_files_and_lists_the_bad(photos: Path) -> None:
    done = run('predict', '.', 'absent.png', '--model', 'test_res2net', '--topk', '2', '--json', cwd=photos)
    assert done.returncode == 1
    output: dict[str, Any] = json.loads(done.stdout)
    assert [item['file'] for item in output['results']] == ['china.jpg', 'flower.jpg', 'three.png']
    assert all(len(item['predictions']) == 2 for item in output['results'])
    assert output['results'][2]['predictions'][0]['label'] == '3'
    assert sorted(item['file'] for item in output['failed']) == ['absent.png', 'cut.jpg', 'text.png']
    assert done.stderr.count('timm-res2net: ') == 3


def test_predict_prints_files_with_their_labels(photos: Path) -> None:
    done = run('predict', 'thr*.png', '--model', 'test_res2net.digits', '--batch-size', '1', cwd=photos)
    assert done.returncode == 0
    lines = done.stdout.splitlines()
    assert lines[0] == 'three.png'
    assert lines[1].split()[1] == '3'
    assert len(lines) == 6


@pytest.mark.parametrize(
    ('arguments', 'status', 'message'),
    [
        (('predict', '--model', 'res2nt50_26w_4s'), 2, 'did you mean res2net50_26w_4s'),
        (('predict', '--weights', 'absent.pth'), 1, 'absent.pth can not be opened: No such file'),
        (('predict', 'china.jpg', '--model', 'res2net50d'), 1, 'weights of res2net50d can not be had'),
        (('predict', '--model', 'res2net152d'), 1, 'no published weights of res2net152d'),
        (('predict', '--topk', '0'), 2, '0 is not above zero'),
        (('predict', '--device', 'warp'), 2, 'warp can not be used here'),
        (('list', 'vgg*'), 1, 'no model of the family matches vgg'),
        (('features', 'text.png', '--model', 'test_res2net'), 1, 'this is not an image'),
        (('convert', 'text.png'), 1, 'text.png is no file of weights'),
        (('convert', 'text.png', '--dialect', 'caffe'), 2, 'invalid choice'),
        ((), 2, 'COMMAND'),
        (('bench', '--growth', '--train', '--size', '64'), 2, '--size and --train would have no effect'),
        (('push', 'test_res2net.digits', 'me/digits', '--model', 'res2net50d'), 2, 'says which model it is'),
        (('recipe', '--out', 'a.yaml'), 2, 'name the recipe'),
        (('card', 'res2net50d.in1k', '--all'), 2, 'NAME would have no effect'),
        (('card', 'res2net50d.in1k', '--out', 'cards'), 2, 'cards are written by --all'),
    ],
)
def test_a_wrong_call_gets_one_line(
    arguments: tuple[str, ...],
    status: int,
    message: str,
    photos: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(photos)
    try:
        returned = main(list(arguments))
    except SystemExit as exit_of_argparse:
        returned = exit_of_argparse.code
    output = capsys.readouterr()
    assert returned == status
    assert output.out == ''
    line = output.err.splitlines()[-1]
    assert message in line
    assert line.startswith('timm-res2net')


def test_list_shows_every_architecture_and_its_weights() -> None:
    done = run('list')
    assert done.returncode == 0
    header, *rows = done.stdout.split('\n\n')[0].splitlines()
    assert header.split() == ['name', 'params', 'GMACs', 'top-1', 'licence', 'weights']
    names = [row.split()[0] for row in rows]
    assert {name.split('.')[0] for name in names} == set(ARCHS)
    assert {name for name in names if '.' in name} == set(WEIGHTS)


def test_list_selects() -> None:
    rows = run('list', '*50d*', '--pretrained').stdout.splitlines()
    assert rows[1].split() == [
        'res2net50d.in1k',
        *('25.72', 'M', '4.495', '80.28', '%', 'cc-by-nc-sa-4.0', 'hf-hub:timm/res2net50d.in1k'),
    ]
    assert rows[2].split()[-2:] == ['apache-2.0', WEIGHTS['res2net50d.mindcv_in1k'].cfg['url']]
    assert rows[3] == ''


def test_features_prints_and_draws_the_pyramid(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / 'pyramid.png'
    done = run('features', 'china.jpg', '--model', 'test_res2net', '--out', str(out), cwd=photos)
    assert done.returncode == 0
    table = [line.split(maxsplit=3) for line in done.stdout.splitlines()[3:8]]
    assert table == [
        ['act1', '2', '16', '16 x 16'],
        ['layer1', '4', '32', '8 x 8'],
        ['layer2', '8', '64', '4 x 4'],
        ['layer3', '16', '128', '2 x 2'],
        ['layer4', '32', '256', '1 x 1'],
    ]
    with Image.open(out) as image:
        assert image.width > 5 * image.height / 1.3


def test_features_without_matplotlib_says_how_to_get_it(photos: Path, tmp_path: Path) -> None:
    (tmp_path / 'matplotlib').mkdir()
    (tmp_path / 'matplotlib' / '__init__.py').write_text("raise ModuleNotFoundError('hidden for this test')")
    arguments = ('features', 'china.jpg', '--model', 'test_res2net', '--out', 'x.png')
    done = run(*arguments, cwd=photos, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1
    assert 'pip install "timm_res2net[plot]"' in done.stderr


def test_convert_tells_what_it_found_and_did(references: Callable[[str], Path], tmp_path: Path) -> None:
    file = references('paddle') / 'res2net50_vd.pdparams'
    done = run('convert', str(file), '--out', 'net', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        str(file),
        f'  sha256 {sha256(file)}',
        '',
        'dialect      paddleclas: PaddleClas, .pdparams',
        'first block  paddle: certain',
        "model        timm.create_model('res2net50_vd_26w_4s', base_width=2): certain, all tensors fit",
        'dropped      0',
        'filled in    87: conv1.1.num_batches_tracked, conv1.4.num_batches_tracked, bn1.num_batches_tracked, ...',
        'cast         0',
        '',
        'net/model.safetensors',
        f'  sha256 {sha256(tmp_path / "net" / "model.safetensors")}',
        '',
        'wrote net; load it by',
        "  timm.create_model('local-dir:net', pretrained=True)",
    ]
    done = run('convert', 'net/model.safetensors', '--to', 'paddleclas', '--out', 'back.pdparams', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert f'wrote back.pdparams\n  sha256 {sha256(tmp_path / "back.pdparams")}' in done.stdout
    done = run('convert', 'net/model.safetensors', '--to', 'paddleclas', '--out', 'back.pdparams', cwd=tmp_path)
    assert (done.returncode, 'there is a back.pdparams already' in done.stderr) == (1, True)


def test_convert_can_write_nothing(tmp_path: Path) -> None:
    torch.save(
        {'state_dict': {f'backbone.{name}': t.half() for name, t in tiny().state_dict().items()}}, tmp_path / 'x.pth'
    )
    done = run('convert', 'x.pth', '--dry-run', '--first-block', 'mmdet', cwd=tmp_path)
    lines = done.stdout.splitlines()
    assert lines[4] == 'first block  mmdet: certain'
    assert lines[8].startswith('cast         ')
    assert lines[8].endswith('of float16 to float32')
    assert lines[-1] == 'nothing was written'
    done = run('convert', 'x.pth', '--dry-run', cwd=tmp_path)
    assert 'official: not certain, but usual for such a file; --first-block overrides it' in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ['x.pth']


def test_convert_shows_all_dialects() -> None:
    done = run('convert', '--list-dialects')
    assert done.returncode == 0
    rows = [line.split()[0] for line in done.stdout.splitlines()]
    assert rows == ['dialect', *DIALECTS]


# The Hub, by the functions themselves, as a child process would have to be told where it is


def test_push_and_pull_say_what_went_and_what_came(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    torch.save(tiny('mmdet').state_dict(), 'mine.pth')
    Path('labels.txt').write_text('a\nb\nc\nd\n')
    options = ['--license', 'Our Own', '--license-link', 'https://example.org', '--result', 'accuracy=91.5']
    options += ['--labels', 'labels.txt', '--dataset', 'somebody/shapes', '--tag', 'mine']
    assert main(['push', 'mine.pth', 'user/net', *options, '--dry-run', 'folder']) == 0
    assert 'wrote folder; nothing was sent' in capsys.readouterr().out
    assert hub.log == []
    assert main(['push', 'folder', 'user/net', *options, '--private', '--message', 'First']) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[:3]] == ['model.safetensors', 'config.json', 'README.md']
    assert printed[4].startswith(f'{os.environ["HF_ENDPOINT"]}/user/net/commit/')
    assert hub.repos['user/net'].private
    assert 'license_name: our-own' in hub.files('user/net')['README.md'].decode()

    assert main(['pull', 'user/net', '--out', 'back']) == 0
    pulled = capsys.readouterr().out.splitlines()
    assert pulled[:2] == printed[:2]
    assert pulled[-1] == "  timm.create_model('local-dir:back', pretrained=True)"
    assert sorted(os.listdir('back')) == ['config.json', 'model.safetensors']
    assert Path('back/config.json').read_bytes() == hub.files('user/net')['config.json']


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (('pull', 'user/absent'), 'Repository Not Found for url: .*user/absent'),
        (('push', 'test_res2net.digits', 'user/net'), 'write permission'),
        (('push', 'absent.pth', 'user/net'), 'can not be opened'),
        (('push', 'test_res2net.digits', 'user/net', '--labels', 'absent.txt'), 'absent.txt can not be opened'),
        (('push', 'test_res2net.digits', 'user/net', '--license', 'made-up'), 'none that the Hub knows'),
        (('card', 'res2net50d.in22k'), 'no published weights'),
        (('card',), 'name published weights'),
    ],
)
def test_what_the_hub_commands_can_not_do_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    hub: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HF_TOKEN', 'hf_read')
    assert main(list(arguments)) == 1
    captured = capsys.readouterr()
    assert captured.out == ''
    assert re.search(message, captured.err)
    assert captured.err.count('\n') == 1
    assert 'hf_read' not in captured.err


def test_card_shows_writes_and_checks(
    hub: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(['card', 'test_res2net.digits']) == 0
    text = capsys.readouterr().out
    assert text == card('test_res2net.digits')
    assert main(['card', 'test_res2net.digits', '--validate']) == 0
    assert capsys.readouterr().out == 'test_res2net.digits is a good card\n'
    Path('bad.md').write_text(text.replace('license: apache-2.0', 'license: made-up'))
    assert main(['card', 'bad.md', '--validate']) == 1
    assert capsys.readouterr().err.count('timm-res2net: bad.md: ') == 2  # found here, and by the Hub
    monkeypatch.setattr('timm_res2net.__main__.WEIGHTS', ['test_res2net.digits'])
    assert main(['card', '--all', '--out', 'cards']) == 0
    assert Path('cards/test_res2net.digits.md').read_text() == text


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = [sys.executable, '-m', 'timm_res2net', 'list']
    environment = {key: value for key, value in os.environ.items() if key != 'PYTHONUNBUFFERED'}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ''
    assert process.wait() == 0
    process.stderr.close()
