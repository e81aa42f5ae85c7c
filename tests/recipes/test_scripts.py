"""timm's own scripts run unmodified on every trunk; the variable TIMM_SCRIPTS names their folder."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
from PIL import Image
from safetensors.torch import save_file
from support import ROOT, TINY

SCRIPTS = Path(os.environ.get('TIMM_SCRIPTS', ''))
KINDS: dict[str, dict[str, Any]] = {  # a tiny network for each trunk
    'test_res2net': TINY,
    'dla60_res2net': dict(levels=(1, 1, 1, 1, 1, 1), channels=(8, 8, 16, 16, 16, 32)),
    'blres2net50_26w_4s': dict(layers=(2, 2, 2, 1), base_width=8),
    'res2next29_6c_24w_4s': dict(layers=(1, 1, 1), channels=(8, 8, 16), cardinality=1),
}
pytestmark = pytest.mark.skipif(
    not (SCRIPTS / 'train.py').is_file(), reason="TIMM_SCRIPTS does not name the folder of timm's train.py"
)


def run(*command: str, cwd: Path) -> str:
    environment = {**os.environ, 'OMP_NUM_THREADS': '1'}
    done = subprocess.run([sys.executable, *command], cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('digits')
    run('-m', 'timm_res2net.recipes.digits', str(folder), cwd=folder)
    return folder


def options_of(name: str) -> list[str]:
    """Returns options of timm's scripts that make a small network."""
    kwargs = [f'{key}={value}'.replace(' ', '') for key, value in KINDS[name].items()]
    return ['--model', name, '--model-kwargs', *kwargs]


def script(name: str) -> tuple[str, ...]:
    return '-m', 'timm_res2net.run', str(SCRIPTS / name)


@pytest.mark.parametrize('name', KINDS)
def test_timm_train_and_validate_scripts_run_on_every_trunk(name: str, digits: Path, tmp_path: Path) -> None:
    model = ['--num-classes', '10', *options_of(name)]
    common = ['--data-dir', str(digits), '--device', 'cpu', '--workers', '0', '--input-size', '3', '32', '32']
    options = '--epochs 1 --batch-size 64 --opt adamw --lr 3e-3 --warmup-epochs 0 --layer-decay 0.9 --mixup 0.2'
    more = '--amp --amp-dtype bfloat16 --channels-last --grad-checkpointing --model-ema --drop-path 0.1'
    output = ['--output', str(tmp_path), '--experiment', 'run']
    train = str(SCRIPTS / 'train.py'), '--device-modules', 'timm_res2net'
    run(*train, *model, *common, *options.split(), *more.split(), *output, cwd=tmp_path)
    summary = (tmp_path / 'run' / 'summary.csv').read_text().splitlines()
    assert summary[0].startswith('epoch,')
    assert len(summary) == 2
    weights = str(tmp_path / 'run' / 'last.pth.tar')
    found = run(*script('validate.py'), *model, *common, '--checkpoint', weights, '--crop-pct', '1.0', cwd=tmp_path)
    assert 0 <= float(re.findall(r'"top1": ([\d.]+)', found)[0]) <= 100


def test_every_command_reproduces_accuracy_of_timm_train_script_with_its_image_settings(
    digits: Path, tmp_path: Path
) -> None:
    images = '--input-size 3 24 24 --mean 0.2 0.3 0.4 --std 0.1 0.2 0.3 --crop-pct 0.8 --interpolation nearest'
    options = '--model test_res2net --num-classes 10 --epochs 4 --batch-size 64 --opt adamw --lr 4e-3 --hflip 0'
    more = '--warmup-epochs 0 --scale 0.8 1.0 --device cpu --workers 0 --output . --experiment run'
    train = str(SCRIPTS / 'train.py'), '--device-modules', 'timm_res2net', '--data-dir', str(digits)
    run(*train, *images.split(), *options.split(), *more.split(), cwd=tmp_path)
    accuracy = float((tmp_path / 'run' / 'summary.csv').read_text().splitlines()[-1].split(',')[3])
    assert 20 < accuracy < 100
    program = '-m', 'timm_res2net'
    file = 'run/last.pth.tar'
    run(*program, 'convert', file, '--out', 'net', cwd=tmp_path)
    run(*program, 'push', file, 'user/net', '--dry-run', 'pushed', cwd=tmp_path)
    run(*program, 'export', file, 'net.pt2', cwd=tmp_path)
    files = (file, 'net/model.safetensors', 'pushed/model.safetensors', 'net.pt2')
    for source in (['--trust', '--weights', *files], ['--model', 'local-dir:pushed']):
        found = run(*program, 'validate', str(digits / 'val'), *source, '--json', cwd=tmp_path)
        results = json.loads(found[: found.index('\n}') + 2])['results']
        assert [each['top1'] for each in results] == pytest.approx([accuracy] * len(results), abs=1e-3)
    assert len(results) == 1
    found = run(*program, 'predict', str(digits / 'val' / '7'), '--weights', file, '--topk', '1', cwd=tmp_path)
    assert '24 x 24, nearest, crop 0.8, mean 0.2, 0.3, 0.4, std 0.1, 0.2, 0.3: recorded in the file' in found
    assert 'classes      10, without names' in found


def test_readme_commands_fine_tune_on_a_folder_of_photos(tmp_path: Path) -> None:
    readme = (ROOT / 'timm_res2net' / 'recipes' / 'README.md').read_text()
    section = readme.partition('## Fine-tune on a folder of photos')[2]
    clone, *commands = section.split('```')[1].replace('\\\n', ' ').strip().splitlines()
    assert clone == 'git clone --depth 1 https://github.com/huggingface/pytorch-image-models'
    (tmp_path / 'pytorch-image-models').symlink_to(SCRIPTS.resolve())
    from sklearn.datasets import load_sample_image

    photos = {name: load_sample_image(f'{name}.jpg') for name in ('china', 'flower')}
    for name, pixels in {**photos, 'negative': 255 - photos['china']}.items():
        for i in range(20):
            path = tmp_path / 'photos' / ('train' if i % 5 else 'val') / name / f'{i}.jpg'
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels[i * 10 : i * 10 + 200, i * 20 : i * 20 + 200]).save(path)
    replaced = {'python': '', 'res2net50_vd_26w_4s': 'test_res2net', '1e-4': '3e-3', 'timm-res2net': '-m timm_res2net'}
    found = {}
    for command in commands:
        words = ' '.join(replaced.get(word, word) for word in command.split()).split()
        if 'push' in words:
            words += ['--dry-run', 'pushed']
        elif 'validate' not in words and 'predict' not in words:
            words += ['--device', 'cpu', '--workers', '0']
        found[words[2]] = run(*words, cwd=tmp_path)
    assert float(re.findall(r'([\d.]+) %', found['validate'])[0]) > 60
    assert 'named china, flower, negative' in found['predict']
    assert found['predict'].count('china') > 10
    config = json.loads((tmp_path / 'pushed' / 'config.json').read_text())
    assert config['label_names'] == ['china', 'flower', 'negative']


def test_timm_validate_script_finds_accuracy_of_embedded_weights(digits: Path, tmp_path: Path) -> None:
    options = '--model test_res2net.digits --pretrained --device cpu --workers 0 --split val'
    found = run(*script('validate.py'), *options.split(), '--data-dir', str(digits), cwd=tmp_path)
    assert float(re.findall(r'"top1": ([\d.]+)', found)[0]) == pytest.approx(99.5, abs=0.01)


@pytest.mark.parametrize('name', KINDS)
def test_timm_benchmark_script_reports_speed_of_every_trunk(name: str, tmp_path: Path) -> None:
    options = '--device cpu --bench both --batch-size 2 --input-size 3 64 64 --num-warm-iter 1 --num-bench-iter 5'
    found = run(*script('benchmark.py'), *options_of(name), *options.split(), cwd=tmp_path)
    result = json.loads(found[found.index('--result') :].partition('\n')[2].rpartition('}')[0] + '}')
    assert result['infer_samples_per_sec'] > 0
    assert result['train_samples_per_sec'] > 0


@pytest.mark.parametrize('name', KINDS)
def test_timm_onnx_export_script_writes_checked_model_of_every_trunk(name: str, tmp_path: Path) -> None:
    pytest.importorskip('onnx')
    weights = tmp_path / 'weights.safetensors'
    model = timm.create_model(name)
    model.get_classifier().weight.data *= 1e-3  # for scores near 1: the script compares them to 3 decimals
    save_file(model.state_dict(), weights)
    options = ['--model', name, '--checkpoint', str(weights), '--img-size', '64', '--check-forward', '--dynamo']
    run(*script('onnx_export.py'), 'model.onnx', *options, cwd=tmp_path)
    assert (tmp_path / 'model.onnx').stat().st_size > 100_000
