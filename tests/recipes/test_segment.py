"""Segmenters learn labels and binary masks, and segment new images."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from test_training import LEARN, SEGMENT, last_metrics, run
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from timm_res2net.recipes import segment
from timm_res2net.recipes.coco import read_image
from timm_res2net.recipes.masks import IGNORED
from timm_res2net.recipes.segment import compute_loss, create_segmenter, load_segmenter

POLYPS = [*SEGMENT, '--train', 'TrainDataset', '--val', 'TestDataset/CVC', '--binary']


def write_polyps(folder: Path, count: int = 16) -> Path:
    """Writes bright rectangles on gray noise with binary JPEG masks, in PraNet's layout."""
    rng = np.random.default_rng(0)
    for part in ('TrainDataset', 'TestDataset/CVC'):
        for kind in ('images', 'masks'):
            (folder / part / kind).mkdir(parents=True)
        for i in range(count):
            mask = np.zeros((48, 70), np.uint8)
            top, left = rng.integers(0, 20), rng.integers(0, 40)
            mask[top : top + 24, left : left + 26] = 255
            image = rng.integers(60, 120, mask.shape, dtype=np.uint8) + mask // 3
            Image.fromarray(image).save(folder / part / 'images' / f'{i}.png')
            Image.fromarray(mask).save(folder / part / 'masks' / f'{i}.jpg')
    return folder


def test_segmenter_takes_images_of_any_size_and_normalizes_them(images: Tensor) -> None:
    model = create_segmenter('fpn', 'test_res2net', 5).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 50, 70)).shape == (1, 5, 50, 70)
        logits = model(images)
        config = resolve_model_data_config(timm.create_model('test_res2net'))
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
        torch.testing.assert_close(logits, model.model((images - mean) / std))


@pytest.mark.parametrize('binary', [False, True])
def test_ignored_pixels_add_nothing_to_the_loss(binary: bool) -> None:
    model = nn.Conv2d(3, 2, 1)
    images, masks = torch.rand(2, 3, 8, 8), torch.full((2, 8, 8), IGNORED)
    nothing = compute_loss(binary, model, dict(image=list(images), mask=list(masks)))
    nothing.backward()
    assert nothing == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())
    masks[0, :4] = 1
    some = compute_loss(False, model, dict(image=list(images), mask=list(masks)))
    torch.testing.assert_close(some, nn.functional.cross_entropy(model(images)[:1, :, :4], masks[:1, :4]))


@pytest.mark.slow
def test_binary_run_computes_metrics_and_segments_new_images(tmp_path: Path) -> None:
    data, out = write_polyps(tmp_path / 'polyps', count=8), tmp_path / 'run'
    assert run(segment, *POLYPS, '--data', str(data), '--output-dir', str(out), '--num-train-epochs', '1') == 0
    metrics = last_metrics(out)
    assert 0 <= metrics['eval_mIoU'] <= metrics['eval_mDice'] <= 1
    assert 0 < metrics['eval_MAE'] < 1
    images = data / 'TestDataset' / 'CVC' / 'images'
    assert run(segment, '--predict', str(images), '--output-dir', str(out), '--use-cpu') == 0
    assert {path.name for path in (out / 'predictions').iterdir()} == {path.name for path in images.iterdir()}
    with Image.open(out / 'predictions' / '3.png') as picture:
        assert (picture.size, picture.mode) == ((70, 48), 'L')
        gray = torch.from_numpy(np.array(picture))
    pixels = read_image(images / '3.png')
    with torch.no_grad():
        probability = load_segmenter(out)(pixels[None])[0].softmax(dim=0)[1]
    torch.testing.assert_close(gray / 255, probability, rtol=0, atol=1 / 255)


@pytest.mark.slow
@pytest.mark.parametrize('binary', [False, True])
def test_segmenter_learns(binary: bool, simple_set: Path, tmp_path: Path) -> None:
    parts = [*SEGMENT, '--data', str(simple_set), '--val', 'train', '--classes', '3']
    if binary:
        parts = [*POLYPS, '--data', str(write_polyps(tmp_path / 'polyps'))]
    options = [*LEARN, '--learning-rate', '0.01', '--seed', '1']
    assert run(segment, *parts, *options, '--output-dir', str(tmp_path / 'run')) == 0
    assert last_metrics(tmp_path / 'run')['eval_mIoU'] > (0.8 if binary else 80)
