"""Runs of `detect` and `segment` survive a kill, keep their settings, and report bad input in one line."""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from support import torchrun
from torch import nn

from timm_res2net import load_model
from timm_res2net.models.block import spec_of
from timm_res2net.recipes import detect, segment
from timm_res2net.recipes.coco import CocoImages
from timm_res2net.recipes.detect import create_backbone, load_detector
from timm_res2net.recipes.metrics import average_precision, pack_detections, unpack_detections
from timm_res2net.recipes.training import WriteChecksums, find_checkpoint, prepare_backbone

TINY = [
    *('--backbone', 'test_res2net', '--use-cpu', '--disable-tqdm', 'true', '--per-device-train-batch-size', '8'),
    *('--learning-rate', '0.005', '--num-train-epochs', '2'),
]
RECIPES = {
    'detect': (detect, [*TINY, '--channels', '64', '--detector-kwargs', 'min_size=64', 'max_size=64']),
    'segment': (segment, [*TINY, '--size', '64', '--architecture-kwargs', 'decoder_channels=(32,16,16,8,8)']),
}
DETECT = RECIPES['detect'][1]


def run(recipe: Any, *arguments: str) -> Any:
    """Runs a recipe in this process and returns its exit status."""
    try:
        recipe.main(list(arguments))
    except SystemExit as stopped:
        return stopped.code
    return 0


def command(recipe: str, data: Path, folder: Path, *more: str) -> list[str]:
    """Returns the command line of a tiny run that evaluates on its training images."""
    options = ['--data', str(data), '--val', 'train', '--output-dir', str(folder)]
    return ['-m', f'timm_res2net.recipes.{recipe}', *options, *RECIPES[recipe][1], *more]


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the log of the newest checkpoint."""
    newest = max(folder.glob('checkpoint-*'), key=lambda path: int(path.name.removeprefix('checkpoint-')))
    history: list[dict[str, Any]] = json.loads((newest / 'trainer_state.json').read_text())['log_history']
    return history


def last_metrics(folder: Path) -> dict[str, float]:
    return [entry for entry in history_of(folder) if 'eval_runtime' in entry][-1]


@pytest.fixture(scope='module')
def finished(simple_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `detect`."""
    folder = tmp_path_factory.mktemp('runs') / 'finished'
    assert run(detect, '--data', str(simple_set), '--val', 'train', '--output-dir', str(folder), *DETECT) == 0
    return folder


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Saves the time for pictures, half of a tiny run."""
    for name in ('training.plot_curves', 'detect.draw_examples', 'segment.draw_examples'):
        monkeypatch.setattr(f'timm_res2net.recipes.{name}', lambda *args: None)


@pytest.mark.usefixtures('undrawn')
def test_interrupted_run_continues_to_the_same_weights(
    finished: Path, simple_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:
            raise KeyboardInterrupt  # in the middle of a save
        on_save(self, args, state, control, **kwargs)

    on_save = WriteChecksums.on_save
    data = ['--data', str(simple_set), '--val', 'train', '--output-dir', str(tmp_path)]
    with monkeypatch.context() as patched:
        patched.setattr(WriteChecksums, 'on_save', interrupt)
        assert run(detect, *data, *DETECT) == 130
    assert find_checkpoint(tmp_path) == str(tmp_path / 'checkpoint-4')
    assert run(detect, *data, *DETECT) == 0
    last = Path('checkpoint-8', 'model.safetensors')
    assert (tmp_path / last).read_bytes() == (finished / last).read_bytes()


@pytest.mark.slow
def test_killed_run_continues_to_the_same_weights_and_history(simple_set: Path, tmp_path: Path) -> None:
    whole, parts = (command('segment', simple_set, tmp_path / name) for name in ('whole', 'parts'))
    subprocess.run([sys.executable, *whole], check=True, capture_output=True)
    killed = subprocess.Popen([sys.executable, *parts], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'parts' / 'checkpoint-4' / 'checksums.json').exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not (tmp_path / 'parts' / 'model.safetensors').exists()
    subprocess.run([sys.executable, *parts], check=True, capture_output=True)
    weights = [(tmp_path / name / 'checkpoint-8' / 'model.safetensors').read_bytes() for name in ('whole', 'parts')]
    assert weights[0] == weights[1]
    losses = [[entry.get('loss') for entry in history_of(tmp_path / name)] for name in ('whole', 'parts')]
    assert losses[0] == losses[1]


def test_run_keeps_its_best_model_curves_and_examples(finished: Path) -> None:
    scores = {entry['step']: entry['eval_AP'] for entry in history_of(finished) if 'eval_AP' in entry}
    best = finished / f'checkpoint-{max(scores, key=lambda step: scores[step])}' / 'model.safetensors'
    kept = load_file(finished / 'model.safetensors')
    assert all(torch.equal(value, kept[name]) for name, value in load_file(best).items())
    for name in ('curves.png', 'examples.png'):
        with Image.open(finished / name) as picture:
            assert picture.width > 600


def test_checkpoint_that_is_incomplete_is_passed_over(finished: Path, tmp_path: Path) -> None:
    for step, files in ((4, ['a', 'checksums.json']), (9, ['a', 'checksums.json']), (10, ['a'])):
        folder = tmp_path / f'checkpoint-{step}'
        folder.mkdir()
        for name in files:
            (folder / name).write_text('{}')
        if 'checksums.json' in files:
            (folder / 'a').unlink()
    (tmp_path / 'checkpoint-9' / '.timm-res2net-killed').mkdir()
    (tmp_path / 'checkpoint-x').mkdir()
    assert find_checkpoint(tmp_path) == str(tmp_path / 'checkpoint-9')
    assert find_checkpoint(tmp_path / 'nowhere') is None


@pytest.mark.parametrize('name', ['optimizer.pt', 'checksums.json', 'rng_state.pth', 'new.bin'])
@pytest.mark.parametrize('damage', ['cut', 'gone', 'pipe'])
def test_damaged_checkpoint_is_reported_and_never_waited_for(name: str, damage: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / 'checkpoint-4'
    checkpoint.mkdir()
    for each in ('optimizer.pt', 'rng_state.pth'):
        (checkpoint / each).write_text('weights')
    digest = '9be23a33d3c71aa6a3a3ff2a1cd3fb6f2a22ea4cc08c3f0d4cec4a1d7ec4ff2c'
    (checkpoint / 'checksums.json').write_text(json.dumps(dict.fromkeys(('optimizer.pt', 'rng_state.pth'), digest)))
    (checkpoint / name).unlink(missing_ok=True)
    if damage == 'pipe':
        os.mkfifo(checkpoint / name)
    elif damage == 'cut':
        (checkpoint / name).write_text('[[')
    elif name in ('checksums.json', 'new.bin'):
        return  # an incomplete checkpoint, or nothing that was there
    with pytest.raises(ValueError, match=r"cannot continue from '.*checkpoint-4': .*Delete this folder to continue"):
        find_checkpoint(tmp_path)


def test_run_with_other_settings_is_refused_and_unchanged(
    finished: Path, simple_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob('*') if path.is_file()}
    options = ['--data', str(simple_set), '--output-dir', str(finished), '--val', 'train', *DETECT]
    for more, error in (
        (['--learning-rate', '0.1'], 'holds a run with learning_rate 0.005, not 0.1. Choose another --output-dir'),
        (['--channels', '96'], 'holds a run with channels 64, not 96'),
    ):
        assert run(detect, *options, *more) == 2
        assert error in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in finished.rglob('*') if path.is_file()} == before


@pytest.mark.parametrize(
    ('recipe', 'arguments', 'error'),
    [
        ('detect', ['--val', 'test'], "has no part 'test' in the COCO format"),
        ('detect', ['--backbone', 'res2net5O'], 'Unknown model (res2net5O)'),
        ('detect', ['--weights', 'nowhere.pth'], 'nowhere.pth'),
        ('detect', ['--frozen-stages', '9'], 'cannot freeze stage 9: the last one is 4'),
        ('detect', ['--detector-kwargs', 'nms=0.5'], "torchvision's FCOS has no argument 'nms'"),
        ('detect', ['--channels', '72'], 'num_channels (72) must be divisible by num_groups (32)'),
        ('detect', ['--model', 'res2net50d'], 'not used by the HfArgumentParser'),
        ('detect', ['--optim', 'sdg'], 'sdg'),
        ('detect', ['--per-device-train-batch-size', '999'], '32 images do not fill one batch'),
        ('segment', ['--classes', '9'], 'is a COCO set, which lists its classes. Omit --classes and --binary'),
        ('segment', ['--architecture', 'unett'], 'unett'),
        ('segment', ['--architecture-kwargs', 'widths=3'], 'widths'),
        ('segment', ['--size', '100'], 'cannot use --size 100: it is not a multiple of 32'),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    recipe: str, arguments: list[str], error: str, simple_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options = RECIPES[recipe]
    data = ['--data', str(simple_set), '--val', 'train', '--output-dir', str(tmp_path / 'run')]
    assert run(module, *data, *options, *arguments) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in last
    assert error in last
    assert not list(tmp_path.glob('run/*'))


@pytest.mark.usefixtures('undrawn')
def test_diverged_training_is_one_line(simple_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ['--data', str(simple_set), '--val', 'train', '--output-dir', str(tmp_path / 'run')]
    assert run(detect, *data, *DETECT, '--learning-rate', '1e30', '--warmup-steps', '0') == 2
    assert 'training diverged: loss' in capsys.readouterr().err.splitlines()[-1]


def test_predictions_of_a_finished_run(finished: Path, simple_set: Path, capsys: pytest.CaptureFixture[str]) -> None:
    photos = finished / 'photos'
    photos.mkdir()
    for name in ('1', '2'):
        Image.open(simple_set / 'train' / f'{name}.png').convert('RGB').resize((90, 70)).save(photos / f'{name}.jpg')
    options = ['--predict', str(photos), '--output-dir', str(finished), '--use-cpu', '--score', '0.05']
    assert run(detect, *options) == 0
    results = json.loads((finished / 'predictions' / 'objects.json').read_text())
    assert [Path(each['file']).name for each in results] == ['1.jpg', '2.jpg']
    objects = [found for each in results for found in each['objects']]
    assert objects
    assert {each['name'] for each in objects} <= {'dark', 'bright'}
    assert min(each['score'] for each in objects) >= 0.05
    assert sorted(path.name for path in (finished / 'predictions').glob('*.png')) == ['1.png', '2.png']
    assert run(detect, '--predict', str(photos), '--output-dir', str(photos)) == 2
    assert 'is not the folder of a run' in capsys.readouterr().err.splitlines()[-1]
    (photos / '1.png').write_bytes(b'')
    for path, more, error in (
        (photos, [], "two images are called '1'"),
        (photos / '1.png', [], 'not an image'),
        (photos, ['--data', str(simple_set)], 'argument --data: not allowed with argument --predict'),
        (photos, ['--learning_rate', '1'], '--learning-rate has no effect on --predict'),
    ):
        assert run(detect, '--predict', str(path), '--output-dir', str(finished), *more) in (1, 2)
        assert error in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.usefixtures('undrawn')
def test_best_model_records_the_function_of_its_backbone(simple_set: Path, tmp_path: Path) -> None:
    data = ['--data', str(simple_set), '--val', 'train', '--output-dir', str(tmp_path)]
    assert run(detect, *data, *DETECT, '--max-steps', '1', '--model-kwargs', 'first_block=paddle') == 0
    backbone = load_model(tmp_path / 'model.safetensors', features_only=True)
    spec = spec_of(backbone)
    assert spec is not None
    assert spec.first_block == 'paddle'
    trained = load_detector(tmp_path).backbone.body.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in backbone.state_dict().items())


def backbone_options(**changed: Any) -> Namespace:
    return Namespace(**dict(weights=None, frozen_stages=-1, frozen_norms=False) | changed)


def test_frozen_stages_and_norms_stay_as_they_are(images: torch.Tensor) -> None:
    body: Any = create_backbone('test_res2net')
    prepare_backbone(body, backbone_options(frozen_stages=1, frozen_norms=True))
    before = {name: value.clone() for name, value in body.state_dict().items()}
    optimizer = torch.optim.SGD([each for each in body.parameters() if each.requires_grad], lr=1.0)
    body.train()
    sum(each.sum() for each in body(images)).backward()
    optimizer.step()
    changed = {name for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split('.')[0] for name in changed} == {'layer2', 'layer3', 'layer4'}
    assert not any('bn' in name.split('.')[2] for name in changed)


@pytest.mark.parametrize(
    ('name', 'stages', 'trained'),
    [
        ('efficientnet_b0', 1, ('blocks.2.', 'blocks.3.', 'blocks.4.', 'blocks.5.', 'blocks.6.')),
        ('convnext_atto', 0, ('stages_1.', 'stages_2.', 'stages_3.')),
        ('dla60_res2net', 1, ('level2.', 'level3.', 'level4.', 'level5.')),
        ('blres2net50_26w_4s', 1, ('layer1.', 'layer2.', 'layer3.', 'layer4.')),
    ],
)
def test_frozen_stages_are_those_of_the_features_of_any_model(name: str, stages: int, trained: tuple[str, ...]) -> None:
    with torch.device('meta'):
        body: Any = timm.create_model(name, features_only=True)
        prepare_backbone(body, backbone_options(frozen_stages=stages))
    left = [name for name, each in body.named_parameters() if each.requires_grad]
    assert {next((start for start in trained if each.startswith(start)), each) for each in left} == set(trained)


def test_weights_of_a_file_arrive_in_the_backbone(tmp_path: Path) -> None:
    model: nn.Module = timm.create_model('test_res2net', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    body = create_backbone('test_res2net')
    prepare_backbone(body, backbone_options(weights=str(tmp_path / 'mine.pth')))
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in body.state_dict().items())


@pytest.mark.slow
def test_two_processes_evaluate_the_model_that_is_saved(simple_set: Path, tmp_path: Path) -> None:
    options = ['--per-device-train-batch-size', '4', '--num-train-epochs', '6', '--load-best-model-at-end', 'false']
    done = torchrun(*command('detect', simple_set, tmp_path / 'run', *options))
    assert done.returncode == 0, done.stderr
    losses = [entry['loss'] for entry in history_of(tmp_path / 'run') if 'loss' in entry]
    assert losses[-1] < losses[0]
    model, dataset = load_detector(tmp_path / 'run'), CocoImages(simple_set, 'train')
    with torch.no_grad():
        packed = [pack_detections(model, dict(image=[dataset[i]['image']]))[0] for i in range(32)]
    found = average_precision(dataset, list(zip(dataset.ids, map(unpack_detections, packed))))
    recorded = last_metrics(tmp_path / 'run')
    assert found == {name: pytest.approx(recorded[f'eval_{name}'], abs=0.02) for name in found}
