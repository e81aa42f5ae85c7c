"""The command line: what each command prints and writes, and the one line that it prints for invalid arguments."""

import json
import os
import re
import shlex
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hub_server import Hub
from PIL import Image
from support import tiny

from timm_res2net import card
from timm_res2net.__main__ import COMMANDS, main, make_parser
from timm_res2net._files import sha256
from timm_res2net._images import bundled_digits
from timm_res2net.commands.recipe import RECIPES
from timm_res2net.models.variants import ARCHS, WEIGHTS
from timm_res2net.version import __version__
from timm_res2net.weights.dialects import DIALECTS


@dataclass
class Done:
    """The status and output of a command."""

    status: Any
    out: str
    err: str


Run = Callable[[str], Done]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: Patch) -> None:
    """Changes to an empty folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process."""

    def run(command: str) -> Done:
        capsys.readouterr()
        try:
            status: Any = main(shlex.split(command))
        except SystemExit as exit_of_argparse:
            status = exit_of_argparse.code
        return Done(status, *capsys.readouterr())

    return run


@pytest.fixture
def photos() -> None:
    """Writes a photo, a digit, a truncated photo, and text named .png."""
    Image.effect_noise((200, 150), 50).convert('RGB').save('photo.jpg')
    bundled_digits()[20][0].save('three.png')
    Path('cut.jpg').write_bytes(Path('photo.jpg').read_bytes()[:5000])
    Path('text.png').write_text('this is text')


def write_digits(indices: Iterable[int]) -> None:
    """Writes some of the bundled digits to class folders in `digits`."""
    digits = bundled_digits()
    for i in indices:
        image, label = digits[i]
        Path('digits', label).mkdir(parents=True, exist_ok=True)
        image.save(f'digits/{label}/{i}.png')


def test_predict_without_arguments_shows_truth_and_predictions(run: Run) -> None:
    done = run('predict')
    assert done.status == 0
    rows = [line.split() for line in done.out.splitlines() if line.startswith('  ')]
    assert [row[0] for row in rows] == list('0123456789')
    assert '60 of 60 are correct' in done.out
    assert 'timm-res2net predict PHOTO.jpg --model res2net50d' in done.out


def test_predict_classifies_good_files_and_lists_bad_ones(run: Run, photos: None) -> None:
    done = run('predict . absent.png --model test_res2net --topk 2 --json')
    assert done.status == 1
    output: dict[str, Any] = json.loads(done.out)
    assert [item['file'] for item in output['results']] == ['photo.jpg', 'three.png']
    assert [len(item['predictions']) for item in output['results']] == [2, 2]
    assert output['results'][1]['predictions'][0]['label'] == '3'
    assert sorted(item['file'] for item in output['failed']) == ['absent.png', 'cut.jpg', 'text.png']
    assert done.err.count('timm-res2net: ') == 3


@pytest.mark.parametrize(
    ('command', 'status', 'message'),
    [
        ('predikt', 2, 'invalid choice'),
        ('predict --model res2nt50_26w_4s', 2, 'Did you mean res2net50_26w_4s'),
        ('predict --model res2net101_v1b_26w_4s', 2, 'Did you mean res2net101d?'),
        ('predict --model res2net152d', 1, 'no published weights for res2net152d'),
        ('predict --model local-dir:.', 1, 'cannot load the weights of local-dir:.: Config file not found'),
        ('predict photo.jpg --model res2net50d', 1, 'cannot load the weights of res2net50d'),
        ('predict --weights absent.pth', 1, 'cannot read absent.pth: No such file'),
        ('predict --weights absent.pt2', 1, "cannot load 'absent.pt2': no such file"),
        ('predict --weights .', 1, 'cannot read config.json of .: No such file'),
        ('predict --weights net.onnx --weights-from ema', 2, '--weights-from would have no effect'),
        ('predict --class-order natural', 2, '--class-order would have no effect: --labels is not a folder'),
        ('validate . --weights text.png absent.pth', 1, 'cannot read text.png'),
        ('predict --topk 0', 2, '0 is not above zero'),
        ('predict --threshold 50', 2, '50 is not between 0 and 1'),
        ('predict --device warp', 2, "cannot use device 'warp'"),
        ('validate nowhere --model test_res2net.digits', 1, 'nowhere is not a folder'),
        ('list *101* --max-params 1', 1, 'no model matches. Choose another PATTERN or --max-params'),
        ('features text.png --model test_res2net', 1, 'text.png: not an image'),
        ('features photo.jpg --weights absent.onnx', 1, 'absent.onnx is an exported model, which hides its layers'),
        ('convert text.png', 1, 'cannot read text.png: it is not a weights file'),
        ('export absent.pth a.pt2', 2, "no file, folder or published weights 'absent.pth'. Run"),
        ('export res2net50d.in1 a.pt2', 2, "no weights 'in1' of res2net50d. Available: res2net50d.in1k"),
        ('export test_res2net.digits a.pt2 --model res2net50d', 2, 'already determines the model'),
        ('export test_res2net.digits a.pt2 --precision int8', 1, ".pt2 does not support precision='int8'"),
        ('push mine.pth me/net --result accuracy', 2, "'accuracy' is not METRIC=PERCENT, such as accuracy="),
        ('recipe --out a.yaml', 2, 'name the recipe'),
    ],
)
def test_main_failure_returns_status_and_prints_message(
    run: Run, command: str, status: int, message: str, photos: None
) -> None:
    before = os.listdir()
    done = run(command)
    assert (done.status, done.out) == (status, '')
    assert done.err.splitlines()[-1].startswith('timm-res2net')
    assert message in done.err.splitlines()[-1]
    assert os.listdir() == before


def test_main_prints_version_and_help_with_examples_that_parse(run: Run) -> None:
    text, parser = run('').out, make_parser()
    for command in COMMANDS:
        assert f'\n    {command} ' in text
        *_, example = run(f'{command} --help').out.split('example: timm-res2net ')
        assert parser.parse_args(shlex.split(example)).command == command
    assert run('--version') == Done(0, f'timm_res2net {__version__}\n', '')


def test_main_interrupted_ends_in_one_line(run: Run, monkeypatch: Patch) -> None:
    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr('timm_res2net.commands.sources.pretrained_model', interrupt)
    assert run('predict') == Done(130, '', 'timm-res2net: interrupted\n')


def test_predict_and_validate_print_results_files_that_are_not_images_and_empty_folders(run: Run) -> None:
    write_digits([20])
    Path('digits/8').mkdir()
    for name in ('a.heic', 'b.svg', 'c.pdf', 'd.txt'):
        Path('digits/3', name).touch()
    done = run('predict digits/3 --model test_res2net.digits --batch-size 1')
    file, first, *others = done.out.splitlines()
    assert (file, first.split()[1], len(others)) == ('digits/3/20.png', '3', 4)
    skipped = '4 files that Pillow does not read: digits/3/a.heic, digits/3/b.svg, digits/3/c.pdf, ...'
    assert (done.status, done.err) == (0, f'timm-res2net: skipped {skipped}\n')
    done = run('validate digits --model test_res2net.digits')
    assert (done.status, done.err.splitlines()[1:]) == (1, ['timm-res2net: digits/8: no images in this folder'])
    found = json.loads(run('validate digits --model test_res2net.digits --json').out)
    assert found['results'] == [dict(model='test_res2net.digits', images=1, top1=100.0, top5=100.0)]
    assert [Path(file).name for file in found['skipped']] == ['a.heic', 'b.svg', 'c.pdf', 'd.txt']
    assert [each['file'] for each in found['failed']] == ['digits/8']


def test_list_shows_every_architecture_and_its_weights(run: Run) -> None:
    _, *rows = run('list').out.split('\n\n')[0].splitlines()
    names = {row.split()[0] for row in rows}
    assert {name.split('.')[0] for name in names} == {*ARCHS}
    assert {name for name in names if '.' in name} == {*WEIGHTS}


def test_list_selects_and_sorts(run: Run) -> None:
    rows = run('list *50d* --pretrained').out.splitlines()
    numbers = '25.72', 'M', '4.495', '80.28', '%'
    assert rows[1].split() == ['res2net50d.in1k', *numbers, 'cc-by-nc-sa-4.0', 'hf-hub:timm/res2net50d.in1k']
    assert rows[2].split()[-2:] == ['apache-2.0', WEIGHTS['res2net50d.mindcv_in1k'].cfg['url']]
    assert rows[3] == ''
    found = json.loads(run('list --max-params 20.9 --sort top1 --json').out)
    assert [each['name'] for each in found[:2]] == ['dla60_res2next.in1k', 'dla60_res2net.in1k']  # digits come after
    assert {each['name'] for each in found} >= {'res2net50_18w_4s', 'test_res2net.digits'}
    assert all(each['params'] <= 20.9e6 for each in found)
    params = [each['params'] for each in json.loads(run('list --sort params --json').out)]
    assert params == sorted(params)


def test_features_prints_and_draws_the_pyramid(run: Run, photos: None) -> None:
    done = run('features photo.jpg --model test_res2net --out pyramid.png')
    assert done.status == 0
    table = [line.split(maxsplit=3) for line in done.out.splitlines()[3:8]]
    assert [table[0], table[4]] == [['act1', '2', '16', '16 x 16'], ['layer4', '32', '256', '1 x 1']]
    with Image.open('pyramid.png') as image:
        assert image.width > 5 * image.height / 1.3


@pytest.mark.parametrize('command', ['features a.png --out', 'explain --out', 'recipe cifar100 --out', 'bench --json'])
def test_out_that_is_not_a_regular_file_is_refused_before_work(run: Run, command: str, monkeypatch: Patch) -> None:
    for work in ('features.read_image_argument', 'sources.pretrained_model', 'bench.bench'):
        monkeypatch.setattr(f'timm_res2net.commands.{work}', None)
    os.mkfifo('pipe.png')
    message = "timm-res2net: cannot write 'pipe.png': it is not a regular file\n"
    assert run(f'{command} pipe.png') == Done(1, '', message)
    assert Path('pipe.png').is_fifo()


def test_drawing_without_matplotlib_prints_install_command(run: Run, monkeypatch: Patch) -> None:
    monkeypatch.setitem(sys.modules, 'matplotlib', None)
    done = run('explain')
    assert (done.status, 'pip install "timm_res2net[plot]"' in done.err) == (1, True)


def test_convert_prints_detected_model_and_written_files(run: Run, references: Callable[[str], Path]) -> None:
    file = references('paddle') / 'res2net50_vd.pdparams'
    done = run(f'convert {file} --out net')
    assert done.status == 0, done.err
    assert done.out.splitlines() == [
        str(file),
        f'  sha256 {sha256(file)}',
        '',
        'dialect      paddleclas: PaddleClas, .pdparams',
        "computes     first_block='paddle'",
        "model        timm.create_model('res2net50_vd_26w_4s', base_width=2): certain, all tensors fit",
        'images       224 x 224, bilinear, crop 0.875, mean 0.485, 0.456, 0.406, std 0.229, 0.224, 0.225: '
        'defaults, not recorded in the file',
        'classes      5, without names',
        'filled in    87: conv1.1.num_batches_tracked, conv1.4.num_batches_tracked, bn1.num_batches_tracked, ...',
        '',
        'net/model.safetensors',
        f'  sha256 {sha256("net/model.safetensors")}',
        '',
        'wrote net; load it with',
        "  timm.create_model('local-dir:net', pretrained=True)",
    ]
    back = 'convert net/model.safetensors --to paddleclas --out back.pdparams'
    assert 'wrote back.pdparams\n  sha256 ' in run(back).out
    done = run(back)
    assert (done.status, 'back.pdparams already exists' in done.err) == (1, True)


def test_convert_dry_run_prints_what_is_assumed_and_writes_nothing(run: Run) -> None:
    state = {f'backbone.{name}': tensor.half() for name, tensor in tiny().state_dict().items()}
    torch.save({**state, 'neck.weight': torch.zeros(2, 2)}, 'x.pth')
    found = [run(f'convert x.pth --dry-run {option}').out for option in ('', '--first-block mmdet')]
    assert re.search('^assumed      first_block=.*, style=', found[0], re.MULTILINE)
    assert re.search("^computes     first_block='mmdet'$", found[1], re.MULTILINE)
    assert re.search('^assumed      style=', found[1], re.MULTILINE)
    for text in found:
        assert re.search(r'^cast         \d+ from float16 to float32$', text, re.MULTILINE)
        assert text.endswith('\nnothing was written\n')
    assert os.listdir() == ['x.pth']


def test_convert_lists_all_dialects(run: Run) -> None:
    done = run('convert --list-dialects')
    assert done.status == 0
    rows = [line.split()[0] for line in done.out.splitlines()]
    assert rows == ['dialect', *DIALECTS]


def test_push_and_pull_print_files_and_checksums(run: Run, hub: Hub, monkeypatch: Patch) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_write')
    torch.save(tiny('mmdet').state_dict(), 'mine.pth')
    for name in ('2', '10', 'a', 'b'):
        Path('classes', name).mkdir(parents=True)
        Path('classes', name, '1.jpg').touch()
    options = '--license "Our Own" --license-link https://example.org --result accuracy=91.5'
    labels = '--labels classes --class-order lexicographic'
    done = run(f'push mine.pth user/net {options} {labels} --dry-run folder')
    assert (done.status, 'wrote folder; nothing was sent' in done.out) == (0, True)
    assert hub.log == []
    printed = run(f'push folder user/net {options} --private --message First').out.splitlines()
    assert [line.split()[1] for line in printed[:3]] == ['model.safetensors', 'config.json', 'README.md']
    assert printed[5].startswith(f'{os.environ["HF_ENDPOINT"]}/user/net/commit/')
    assert hub.repos['user/net'].private
    assert json.loads(hub.files('user/net')['config.json'])['label_names'] == ['10', '2', 'a', 'b']
    metadata = hub.files('user/net')['README.md'].decode().splitlines()
    assert {'license: other', 'license_name: our-own', 'license_link: https://example.org'} <= {*metadata}

    pulled = run('pull user/net --out back').out.splitlines()
    assert pulled[:2] == printed[:2]
    assert pulled[-1] == "  timm.create_model('local-dir:back', pretrained=True)"
    assert sorted(os.listdir('back')) == ['config.json', 'model.safetensors']
    assert Path('back/config.json').read_bytes() == hub.files('user/net')['config.json']


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('pull user/absent', 'Not Found for url: .*user/absent'),
        ('push test_res2net.digits user/net', 'write permission'),
    ],
)
def test_hub_command_failure_prints_one_line_without_token(
    run: Run, command: str, message: str, hub: Hub, monkeypatch: Patch
) -> None:
    monkeypatch.setenv('HF_TOKEN', 'hf_read')
    done = run(command)
    assert (done.status, done.out) == (1, '')
    assert re.search(message, done.err)
    assert done.err.count('\n') == 1
    assert 'hf_read' not in done.err


def test_card_and_recipe_print_the_text(run: Run) -> None:
    assert run('card test_res2net.digits').out == card('test_res2net.digits')
    assert run('recipe digits.yaml').out == (RECIPES / 'digits.yaml').read_text()


def test_list_into_closed_pipe_exits_without_error(run: Run, monkeypatch: Patch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, 'w') as pipe:
        monkeypatch.setattr(sys, 'stdout', pipe)
        assert run('list') == Done(0, '', '')


def test_predict_and_explain_weights_without_model_use_the_model_that_they_fit(run: Run) -> None:
    geometry = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))  # cannot be dilated further
    state = tiny(num_classes=10, **geometry).state_dict()
    torch.save(dict(state_dict=state, hyper_parameters=dict(backbone='test_res2net', **geometry)), 'dilated.pth')
    assert re.search(r'\d+ of 60 are correct', run('predict --weights dilated.pth').out)
    assert run('explain --weights dilated.pth --out a.png').status == 0
    assert Path('a.png').exists()


@pytest.mark.parametrize('command', ['predict --labels .', 'validate .', 'explain'])
def test_weights_without_a_classifier_are_refused_in_one_line(command: str, run: Run) -> None:
    torch.save(tiny(num_classes=0).state_dict(), 'backbone.pth')
    message = 'timm-res2net: backbone.pth has no classifier. Pass weights that have one\n'
    assert run(f'{command} --weights backbone.pth') == Done(1, '', message)


@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')  # timm leaves image files open
@pytest.mark.slow
def test_weights_of_one_channel_are_exported_and_go_through_every_command(run: Run) -> None:
    write_digits(range(0, 60, 6))
    torch.save(timm.create_model('test_res2net.digits', pretrained=True, in_chans=1).state_dict(), 'gray.pth')
    done = run('export gray.pth gray.pt2 --images digits')
    assert (done.status, done.err) == (0, '')
    assert done.out.splitlines()[:2] == [
        f'wrote gray.pt2, {Path("gray.pt2").stat().st_size / 1e6:.2f} MB: fused, torch, float32',
        'compared with the model on 10 images, using the runtime of the file:',
    ]
    assert '  predicted class    the same for 100.00%' in done.out.splitlines()

    done = run('validate digits --model test_res2net.digits --trust --weights gray.pt2 --confusion c.png')
    assert 'mean 0.5, std 0.5' in done.err
    assert done.out.splitlines() == [
        'model                images     top-1     top-5',
        'test_res2net.digits      10  100.00 %  100.00 %',
        'gray.pt2                 10  100.00 %  100.00 %',
        '',
        'wrote c.png',
    ]
    assert Path('c.png').stat().st_size > 5000

    for command in (
        'convert gray.pth',
        'predict --weights gray.pth',
        'explain --weights gray.pth --out a.png',
        'features digits/0/0.png --model local-dir:gray',
    ):
        assert run(command).status == 0
