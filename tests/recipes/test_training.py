"""Runs of `detect` and `segment` survive a kill, keep their settings, and report bad input in one line."""

import json
import os
import shutil
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import timm
import torch
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from support import torchrun
from torch import nn
from torch._utils import ExceptionWrapper
from transformers import TrainingArguments

from timm_res2net import load_model
from timm_res2net.models.block import spec_of
from timm_res2net.models.spec import NetworkSpec
from timm_res2net.recipes import detect, segment
from timm_res2net.recipes.arguments import make_parser, report_errors
from timm_res2net.recipes.coco import CocoImages, read_image
from timm_res2net.recipes.detect import create_backbone, load_detector
from timm_res2net.recipes.metrics import AREAS, compute_precision, pack_detections
from timm_res2net.recipes.training import MarkComplete, RecipeTrainer, find_checkpoint, prepare_backbone

TINY = [
    *('--backbone', 'test_res2net', '--use-cpu', '--disable-tqdm', 'true', '--per-device-train-batch-size', '8'),
    *('--learning-rate', '0.005', '--num-train-epochs', '2'),
]
DETECT = [*TINY, '--channels', '64', '--detector-kwargs', 'min_size=64', 'max_size=64']
SEGMENT = [*TINY, '--size', '64', '--architecture-kwargs', 'decoder_channels=(32,16,16,8,8)']
LEARN = [  # evaluates rarely
    *('--num-train-epochs', '12', '--eval-strategy', 'steps', '--save-strategy', 'steps'),
    *('--eval-steps', '24', '--save-steps', '24'),
]


def run(recipe: Any, *arguments: str) -> Any:
    """Runs a recipe in this process, with one example in its picture, and returns its exit status."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recipe, 'SHOWN', 1)
        try:
            recipe.main(list(arguments))
        except SystemExit as stopped:
            return stopped.code
    return 0


def options_of(data: Path, folder: Path) -> list[str]:
    """Returns the options of a tiny run of `detect` that evaluates on its training images."""
    options = ['--data', str(data), '--val', 'train', '--output-dir', str(folder), *DETECT]
    return [*options, '--model-kwargs', 'first_block=paddle']


def history_of(folder: Path) -> list[dict[str, Any]]:
    """Returns the log of the newest checkpoint."""
    newest = max(folder.glob('checkpoint-*'), key=lambda path: int(path.name.removeprefix('checkpoint-')))
    history: list[dict[str, Any]] = json.loads((newest / 'trainer_state.json').read_text())['log_history']
    return history


def last_metrics(folder: Path) -> dict[str, float]:
    return [entry for entry in history_of(folder) if 'eval_runtime' in entry][-1]


@pytest.fixture(scope='module')
def finished(simple_set: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of `detect`, made once for all processes: do not change it."""
    root = tmp_path_factory.getbasetemp()
    folder = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / 'finished'
    with FileLock(f'{folder}.lock'):
        if not folder.exists():
            assert run(detect, *options_of(simple_set, folder)) == 0
    return folder


@pytest.mark.slow
def test_killed_run_continues_to_the_same_weights_and_losses(
    finished: Path, simple_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 8:  # in the middle of a save
            shutil.copytree(folder, tmp_path / 'killed')
            raise KeyboardInterrupt
        on_save(self, args, state, control, **kwargs)

    on_save, folder = MarkComplete.on_save, tmp_path / 'run'
    options = options_of(simple_set, folder)
    with monkeypatch.context() as patched:
        patched.setattr(MarkComplete, 'on_save', interrupt)
        assert run(detect, *options) == 130
    shutil.rmtree(folder)
    (tmp_path / 'killed').rename(folder)
    assert find_checkpoint(folder) == str(folder / 'checkpoint-4')
    assert not (folder / 'model.safetensors').exists()
    assert run(detect, *options) == 0
    weights = [(each / 'checkpoint-8' / 'model.safetensors').read_bytes() for each in (folder, finished)]
    assert weights[0] == weights[1]
    losses = [[entry.get('loss') for entry in history_of(each)] for each in (folder, finished)]
    assert losses[0] == losses[1]


def test_run_keeps_its_best_model_curves_and_examples(finished: Path) -> None:
    scores = {entry['step']: entry['eval_AP'] for entry in history_of(finished) if 'eval_AP' in entry}
    best = finished / f'checkpoint-{max(scores, key=lambda step: scores[step])}' / 'model.safetensors'
    kept = load_file(finished / 'model.safetensors')
    assert all(torch.equal(value, kept[name]) for name, value in load_file(best).items())
    for name in ('curves.png', 'examples.png'):
        with Image.open(finished / name) as picture:
            assert picture.width > 500


def test_newest_complete_checkpoint_is_found(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / 'nowhere') is None
    for step in (4, 10, 9, 12):
        (tmp_path / f'checkpoint-{step}').mkdir()
        if step != 12:
            (tmp_path / f'checkpoint-{step}' / 'complete').touch()
    assert find_checkpoint(tmp_path) == str(tmp_path / 'checkpoint-10')


def test_run_with_other_settings_is_refused_and_unchanged(
    finished: Path, simple_set: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished.rglob('*') if path.is_file()}
    options = options_of(simple_set, finished)
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
        (detect, ['--val', 'test'], "has no part 'test' in the COCO format"),
        (detect, ['--backbone', 'res2net5O'], 'Unknown model (res2net5O)'),
        (detect, ['--weights', 'nowhere.pth'], 'nowhere.pth'),
        (detect, ['--frozen-stages', '9'], 'cannot freeze stage 9: the last one is 4'),
        (detect, ['--detector-kwargs', 'nms=0.5'], "torchvision's FCOS has no argument 'nms'"),
        (detect, ['--model', 'res2net50d'], 'not used by the HfArgumentParser'),
        (detect, ['--label-smoothing-factor', '0.1'], 'has no effect on these losses'),
        (detect, ['--per-device-train-batch-size', '999'], '32 images do not fill one batch'),
        (segment, [], 'masks of labels need --classes N, binary masks need --binary'),
        (segment, ['--classes', '3', '--architecture', 'unett'], 'unett'),
        (segment, ['--classes', '3', '--size', '100'], 'cannot use --size 100: it must be a multiple of 32'),
    ],
)
def test_bad_input_is_reported_in_one_line_and_writes_nothing(
    recipe: Any, arguments: list[str], error: str, simple_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = ['--data', str(simple_set), '--val', 'train', '--output-dir', str(tmp_path / 'run')]
    assert run(recipe, *data, *(DETECT if recipe is detect else SEGMENT), *arguments) in (1, 2)
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in last
    assert error in last
    assert not list(tmp_path.glob('run/*'))


def test_error_in_a_worker_of_a_dataloader_is_reported_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        read_image(Path('absent.png'))
    except ValueError:
        caught = ExceptionWrapper(where='in DataLoader worker process 0')  # as a DataLoader does
    with pytest.raises(SystemExit, match='2'), report_errors(make_parser(None)):
        caught.reraise()
    assert capsys.readouterr().err.endswith(": error: cannot read 'absent.png': no such file\n")


def test_diverged_training_is_reported_in_one_line(
    simple_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(detect, *options_of(simple_set, tmp_path), '--learning-rate', '1e30', '--warmup-steps', '0') == 2
    assert 'training diverged: loss' in capsys.readouterr().err.splitlines()[-1]


def test_finished_run_predicts_new_images(
    finished: Path, simple_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, finished = tmp_path / 'photos', shutil.copytree(finished, tmp_path / 'finished')
    photos.mkdir()
    for name in ('00001', '00002'):
        Image.open(simple_set / 'train' / 'images' / f'{name}.png').convert('RGB').resize((90, 70)).save(
            photos / f'{name}.jpg'
        )
    options = ['--predict', str(photos), '--output-dir', str(finished), '--use-cpu', '--score', '0.05']
    assert run(detect, *options) == 0
    (photos / '00000.jpg').write_bytes(b'')
    assert run(detect, *options) == 2
    assert "1 images were left out. The first: cannot read '" in capsys.readouterr().err
    results = json.loads((finished / 'predictions' / 'objects.json').read_text())
    assert [Path(each['file']).name for each in results] == ['00001.jpg', '00002.jpg']
    objects = [found for each in results for found in each['objects']]
    assert objects
    assert {each['name'] for each in objects} <= {'dark', 'bright'}
    assert min(each['score'] for each in objects) >= 0.05
    assert sorted(path.name for path in (finished / 'predictions').glob('*.png')) == ['00001.png', '00002.png']
    assert run(detect, '--predict', str(photos), '--output-dir', str(photos)) == 2
    assert 'is not the folder of a run' in capsys.readouterr().err.splitlines()[-1]
    (photos / '00001.png').write_bytes(b'')
    for path, more, error in (
        (photos, [], "two images are called '00001'"),
        (photos / '00001.png', [], 'not an image in'),
        (photos, ['--data', str(simple_set)], 'argument --data: not allowed with argument --predict'),
        (photos, ['--learning_rate', '1'], 'cannot use --learning-rate with --predict'),
    ):
        assert run(detect, '--predict', str(path), '--output-dir', str(finished), *more) in (1, 2)
        assert error in capsys.readouterr().err.splitlines()[-1]


def test_best_model_records_the_function_of_its_backbone(finished: Path) -> None:
    backbone = load_model(finished / 'model.safetensors', features_only=True)
    assert spec_of(backbone) == NetworkSpec(first_block='paddle')
    trained = load_detector(finished).backbone.body.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in backbone.state_dict().items())


def test_evaluation_keeps_the_last_batch_although_training_drops_it(simple_set: Path, tmp_path: Path) -> None:
    sizes: Any = dict(per_device_train_batch_size=5, per_device_eval_batch_size=5, dataloader_drop_last=True)
    dataset, args = CocoImages(simple_set, 'train'), TrainingArguments(str(tmp_path), use_cpu=True, **sizes)
    trainer = RecipeTrainer(len, len, model=nn.Linear(1, 1), args=args, train_dataset=dataset, eval_dataset=dataset)
    assert len(trainer.get_train_dataloader()) == 6
    assert [len(batch['index']) for batch in trainer.get_eval_dataloader()] == [5] * 6 + [2]


def backbone_options(**changed: Any) -> Namespace:
    return Namespace(**dict(weights=None, frozen_stages=-1, frozen_norms=False) | changed)


def test_frozen_stages_and_norms_do_not_change(images: torch.Tensor) -> None:
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


def test_weights_file_is_loaded_into_the_backbone(tmp_path: Path) -> None:
    model: nn.Module = timm.create_model('test_res2net', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    body = create_backbone('test_res2net')
    prepare_backbone(body, backbone_options(weights=str(tmp_path / 'mine.pth')))
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in body.state_dict().items())


@pytest.mark.slow
def test_two_processes_evaluate_the_model_that_is_saved(simple_set: Path, tmp_path: Path) -> None:
    more = ['--per-device-train-batch-size', '4', '--num-train-epochs', '1', '--load-best-model-at-end', 'false']
    done = torchrun('-m', 'timm_res2net.recipes.detect', *options_of(simple_set, tmp_path), *more)
    assert done.returncode == 0, done.stderr
    model, dataset = load_detector(tmp_path), CocoImages(simple_set, 'train')
    with torch.no_grad():
        packed = pack_detections(model, dict(image=[dataset[i]['image'] for i in range(len(dataset))]))
    evaluation = SimpleNamespace(predictions=packed, label_ids=range(len(dataset)))
    recorded = last_metrics(tmp_path)
    for name, value in compute_precision(dataset, AREAS, evaluation).items():
        assert value == pytest.approx(recorded[f'eval_{name}'], abs=0.02)
