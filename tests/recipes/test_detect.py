"""A detector learns, on any backbone; a killed run ends where another does; bad input is one line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from support import torchrun
from torch import nn

from timm_res2net import load_model
from timm_res2net.models.block import function_of
from timm_res2net.recipes import detect
from timm_res2net.recipes.backbones import prepare
from timm_res2net.recipes.coco import AREAS, CocoImages, draw
from timm_res2net.recipes.detect import Mirrored, create_backbone, create_detector, evaluate, main
from timm_res2net.recipes.training_loop import save_epoch

QUICK = [
    *('--backbone', 'test_res2net', '--channels', '64', '--workers', '0'),
    *('--batch-size', '8', '--lr', '0.05', '--clip-grad', '5'),
]
SMALL = ['--detector-kwargs', 'min_size=64', 'max_size=64']


def run(*arguments: str) -> int | str | None:
    try:
        main(list(arguments))
    except SystemExit as stopped:
        return stopped.code
    return 0


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'dla60_res2net', 'blres2net50_26w_4s', 'resnet18'])
def test_backbone_has_strides_8_16_32(name: str) -> None:
    small: dict[str, Any] = dict(channels=(8, 8, 8, 8)) if name == 'res2net50_26w_4s' else {}
    with torch.device('meta'):
        body: Any = create_backbone(name, **small)
        assert [each.shape[-1] for each in body(torch.empty(1, 3, 64, 64))] == [8, 4, 2]
    assert body.feature_info.reduction() == [8, 16, 32]


def test_backbone_without_a_stride_is_an_error() -> None:
    with (
        torch.device('meta'),
        pytest.raises(ValueError, match=r'has features of strides .*; a pyramid needs \[8, 16, 32\]'),
    ):
        create_backbone('res2next29_6c_24w_4s')


def test_frozen_stages_and_norms_stay_as_they_are(images: torch.Tensor) -> None:
    body: Any = create_backbone('test_res2net')
    prepare(body, frozen_stages=1, frozen_norms=True)
    trained = {name.split('.')[0] for name, each in body.named_parameters() if each.requires_grad}
    assert trained == {'layer2', 'layer3', 'layer4'}
    before = {name: value.clone() for name, value in body.state_dict().items()}
    optimizer = torch.optim.SGD(body.parameters(), lr=1.0)
    body.train()
    sum(each.sum() for each in body(images)).backward()
    optimizer.step()
    changed = {name for name, value in body.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith(('layer2', 'layer3', 'layer4')) for name in changed)
    assert not any('bn' in name.split('.')[2] for name in changed)
    with pytest.raises(ValueError, match='there is no stage 5 to freeze; the last one is 4'):
        prepare(body, frozen_stages=5)


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
        prepare(body, frozen_stages=stages)
    left = [name for name, each in body.named_parameters() if each.requires_grad]
    assert {next((start for start in trained if each.startswith(start)), each) for each in left} == set(trained)


def test_weights_of_a_file_arrive_in_the_backbone(tmp_path: Path) -> None:
    model: nn.Module = timm.create_model('test_res2net', num_classes=3)
    torch.save(model.state_dict(), tmp_path / 'mine.pth')
    body = create_backbone('test_res2net')
    prepare(body, str(tmp_path / 'mine.pth'))
    theirs = model.state_dict()
    assert all(torch.equal(value, theirs[name]) for name, value in body.state_dict().items())


def test_best_model_tells_what_its_backbone_computes(tmp_path: Path) -> None:
    arguments = dict(first_block='paddle')
    model = create_detector(create_backbone('test_res2net', **arguments), 2, 64)
    about = dict(backbone='test_res2net', model_kwargs=arguments)
    save_epoch(tmp_path, model, dict(history=[dict(AP=1.0)]), 'AP', about)
    backbone = load_model(tmp_path / 'best.pth', features_only=True)
    function = function_of(backbone)
    assert function is not None
    assert function.first_block == 'paddle'
    weights = model.backbone.body.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in backbone.state_dict().items())


def test_mirrored_moves_boxes_with_their_pixels() -> None:
    image = torch.zeros(3, 4, 10)
    image[:, 1:3, 2:5] = 1
    target = dict(boxes=torch.tensor([[2.0, 1, 5, 3]]), labels=torch.tensor([1]))
    mirrored = Mirrored([(image, target)])  # type: ignore[arg-type]
    torch.manual_seed(0)
    seen = set()
    for _ in range(20):
        shown, new = mirrored[0]
        left, top, right, bottom = (int(edge) for edge in new['boxes'][0])
        assert shown[:, top:bottom, left:right].min() == 1
        assert shown.sum() == image.sum()
        seen.add(left)
    assert seen == {2, 5}
    assert target['boxes'].tolist() == [[2, 1, 5, 3]]


def test_detector_takes_normalisation_of_the_backbone_and_keywords_of_fcos() -> None:
    body: Any = create_backbone('test_res2net')
    body.pretrained_cfg = {**body.pretrained_cfg, 'mean': (0.1, 0.2, 0.3)}
    model: Any = create_detector(body, 4, channels=64, nms_thresh=0.4)
    assert model.transform.image_mean == (0.1, 0.2, 0.3)
    assert (model.nms_thresh, model.score_thresh) == (0.4, 0.05)
    assert model.head.classification_head.num_classes == 5


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['--val', 'test'], 'with a part test'),
        (['--backbone', 'res2net5O'], 'Unknown model (res2net5O)'),
        (['--weights', 'nowhere.pth'], 'nowhere.pth'),
        (['--frozen-stages', '9'], 'there is no stage 9 to freeze'),
        (['--detector-kwargs', 'nms=0.5'], 'nms'),
        (['--channels', '32'], 'channels=32 is not possible'),
        (['--batch-size', '999'], '48 images are less than a batch of 999'),
        (['--show', 'no/folder/found.png'], 'there is no folder no/folder'),
        (['--show', 'found.xyz'], 'found.xyz can not be written: unknown file extension'),
        (['--lr', 'nan'], '--lr nan is no finite number'),
        (['--opt', 'sdg'], 'sdg'),
        (['--epochs', '0'], '0 is not above zero'),
        (['--sched', 'plateau'], 'plateau'),
        (['--device', 'warp'], 'warp can not be used here'),
    ],
)
def test_detect_with_bad_input_is_one_line_and_writes_nothing(
    detection_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert run(str(detection_set), str(tmp_path / 'run'), '--workers', '0', *QUICK, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith('test_detect') or 'error: ' in last
    assert error in last
    assert not (tmp_path / 'run').exists()


def test_show_draws_the_surest_object_of_a_place_and_none_that_is_unsure(
    simple_set: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    boxes = torch.tensor([[1.0, 1, 20, 20], [2, 1, 20, 21], [30, 30, 40, 40], [40, 1, 60, 20], [1, 1, 20, 20]])
    scores = torch.tensor([0.7, 0.8, 0.2, 0.4, 0.9])
    found = dict(boxes=boxes, scores=scores, labels=torch.tensor([1, 2, 1, 1, 0]))  # 0 is the background
    drawn: list[list[str]] = []

    def drawing(image: torch.Tensor, boxes: torch.Tensor, texts: list[str]) -> torch.Tensor:
        drawn.append(texts)
        return draw(image, boxes, texts)

    monkeypatch.setattr(detect, 'draw', drawing)
    images = CocoImages(simple_set, 'train')
    detect.show(images, lambda images: [found], str(tmp_path / 'found.png'), torch.device('cpu'))
    assert drawn == [[f'{images.names[1]} 0.80', f'{images.names[0]} 0.40']] * 12


@pytest.mark.slow
def test_detector_learns_and_draws_what_it_finds(simple_set: Path, tmp_path: Path) -> None:
    folder, picture = tmp_path / 'run', tmp_path / 'found.png'
    arguments = [str(simple_set), str(folder), '--val', 'train', *QUICK, *SMALL, '--epochs', '12']
    assert run(*arguments) == 0
    history = json.loads((folder / 'history.json').read_text())
    assert history[-1]['AP50'] > 80
    assert run(*arguments, '--resume', '--show', str(picture)) == 0  # nothing is left to train
    assert json.loads((folder / 'history.json').read_text()) == history
    with Image.open(picture) as image:
        assert image.size == (6 * (256 + 2) + 2, 2 * (256 + 2) + 2)


@pytest.mark.slow
def test_detector_killed_and_resumed_ends_at_the_same_weights(simple_set: Path, tmp_path: Path) -> None:
    command = [sys.executable, '-m', 'timm_res2net.recipes.detect', str(simple_set)]
    options = [*QUICK, *SMALL, '--val', 'train', '--epochs', '3', '--workers', '1']
    subprocess.run([*command, str(tmp_path / 'whole'), *options], check=True, capture_output=True)
    killed = subprocess.Popen([*command, str(tmp_path / 'parts'), *options], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (tmp_path / 'parts' / 'last.pth').exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    subprocess.run([*command, str(tmp_path / 'parts'), *options, '--resume'], check=True, capture_output=True)
    whole, parts = (torch.load(tmp_path / name / 'last.pth')['model'] for name in ('whole', 'parts'))
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert (tmp_path / 'whole' / 'history.json').read_bytes() == (tmp_path / 'parts' / 'history.json').read_bytes()


@pytest.mark.slow
def test_detector_trains_in_two_processes(simple_set: Path, tmp_path: Path) -> None:
    options = [*QUICK, *SMALL, '--val', 'train', '--epochs', '6', '--batch-size', '4']
    done = torchrun('-m', 'timm_res2net.recipes.detect', str(simple_set), str(tmp_path / 'run'), *options)
    assert done.returncode == 0, done.stderr
    history = json.loads((tmp_path / 'run' / 'history.json').read_text())
    assert len(history) == 6
    assert history[-1]['loss'] < history[0]['loss']
    assert done.stdout.count(f'epoch 6: loss {history[-1]["loss"]:.2f}, AP ') == 1
    model = create_detector(create_backbone('test_res2net'), 2, 64, min_size=64, max_size=64)
    model.load_state_dict(torch.load(tmp_path / 'run' / 'last.pth')['model'])
    with torch.no_grad():  # the metrics are of the model that was saved
        found = evaluate(CocoImages(simple_set, 'train'), AREAS, 4, 0, torch.device('cpu'), model.eval())
    assert found == {name: pytest.approx(history[-1][name], abs=0.02) for name in found}


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--model', 'res2net50d'], 'unrecognized arguments: --model res2net50d'),  # and not --model-kwargs
        (['--model-kwargs', 'scale'], "argument --model-kwargs: 'scale' is no KEY=VALUE"),
    ],
    ids=['abbreviated', 'no value'],
)
def test_detect_argument_that_it_does_not_have_is_named(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match='2'):
        main(['data', 'run', *options])
    assert capsys.readouterr().err.splitlines()[-1].endswith(message)
