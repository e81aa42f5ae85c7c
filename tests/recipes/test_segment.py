"""A segmenter learns; masks are read from sets of three kinds; mean intersection over union is exact."""

import json
import pickle
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import resolve_model_data_config
from torch import Tensor, nn
from torchvision.tv_tensors import Image as ImageTensor
from torchvision.tv_tensors import Mask

from timm_res2net.recipes.coco import IGNORED
from timm_res2net.recipes.segment import (
    Masked,
    create_segmenter,
    evaluate,
    loss,
    main,
    open_part,
    require_foreground,
    train_augmentation,
)

QUICK = [
    *('--backbone', 'test_res2net', '--workers', '0', '--size', '64'),
    *('--batch-size', '8', '--opt', 'adamw', '--lr', '0.01', '--warmup-epochs', '1'),
    *('--architecture-kwargs', 'decoder_channels=(64,32,16,16,8)'),
]


def run(*arguments: str) -> int | str | None:
    try:
        main(list(arguments))
    except SystemExit as stopped:
        return stopped.code
    return 0


def write_pairs(images: Path, masks: Path, count: int = 3, suffix: str = '.png') -> None:
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((40, 50, 3), 51 * i, np.uint8)).save(images / f'{i}{suffix}')
        mask = np.zeros((40, 50), np.uint8)
        mask[:10] = i
        mask[-1] = IGNORED
        Image.fromarray(mask).save(masks / f'{i}.png')


def test_masks_of_folders_and_of_voc_are_read_alike(tmp_path: Path) -> None:
    write_pairs(tmp_path / 'plain' / 'images' / 'val', tmp_path / 'plain' / 'masks' / 'val')
    voc = tmp_path / 'voc'
    write_pairs(voc / 'JPEGImages', voc / 'SegmentationClass', suffix='.jpg')
    (voc / 'ImageSets' / 'Segmentation').mkdir(parents=True)
    (voc / 'ImageSets' / 'Segmentation' / 'val.txt').write_text('0\n1\n2\n')
    plain, named = open_part(tmp_path / 'plain', 'val', 3), open_part(voc, 'val', 3)
    assert len(plain) == len(named) == 3
    for (image, mask), (other, other_mask) in zip(plain, named):  # type: ignore[call-overload]
        torch.testing.assert_close(image, other, rtol=0, atol=0.01)
        assert torch.equal(mask, other_mask)
    assert torch.bincount(plain[2][1].flatten())[[0, 2, IGNORED]].tolist() == [29 * 50, 10 * 50, 50]


def test_image_without_a_mask_is_named_and_what_is_no_image_is_left_out(tmp_path: Path) -> None:
    images, masks = tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val'
    write_pairs(images, masks)
    for name in ('.0.png', 'Thumbs.db', '0.txt'):
        (images / name).write_bytes(b'')
        (masks / name).write_bytes(b'')
    (images / 'more.png').mkdir()
    assert [Path(name).name for name in open_part(tmp_path, 'val', 3).names] == ['0.png', '1.png', '2.png']
    assert len(open_part(tmp_path, 'val', 3)[0][1]) == 40
    (masks / '1.png').unlink()
    with pytest.raises(ValueError, match=r'^1 of 3 images have no mask in masks/val \(.*1\.png first\)$'):
        open_part(tmp_path, 'val', 3)


def test_masks_of_a_coco_set_have_the_labels_of_its_objects(detection_set: Path) -> None:
    dataset = open_part(detection_set, 'val', None)
    assert dataset.classes == 11
    document = json.loads((detection_set / 'annotations' / 'instances_val.json').read_text())
    for index in range(3):
        image, mask = dataset[index]
        assert image.shape == (3, 96, 96)
        objects = [each for each in document['annotations'] if each['image_id'] == index]
        assert set(mask.unique().tolist()) == {0} | {each['category_id'] for each in objects}
        assert (mask > 0).sum() == sum(each['area'] for each in objects)


def test_augmentation_moves_masks_with_images_and_ignores_what_it_fills_in() -> None:
    image = torch.zeros(3, 40, 60)
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    image[:, 10:30, 20:30], mask[10:30, 20:30] = 1.0, 1
    dataset = Masked(lambda index: (image, mask), ['one'], 2, train_augmentation(64))
    torch.manual_seed(0)
    left = set()
    for _ in range(20):
        shown, labels = dataset[0]
        assert shown.shape == (3, 64, 64)
        assert labels.dtype == torch.int64
        for label in (0, 1):
            if (labels == label).sum() > 99:
                assert shown[0][labels == label].mean() == pytest.approx(label, abs=0.15)  # edges are interpolated
        assert (shown[0][labels == IGNORED] == 0.5).all()
        if (labels == 1).any():
            left.add(int((labels == 1).nonzero()[:, 1].min()))
    assert len(left) > 5


def test_mean_intersection_over_union_of_a_worked_case() -> None:
    masks = [torch.tensor([[0, 0, 1, 1], [0, 0, 1, IGNORED]]), torch.tensor([[0, 1], [1, 1]])]
    found = [torch.tensor([[0, 1, 1, 1], [0, 0, 0, 0]]), torch.tensor([[0, 1], [1, 0]])]

    class Prepared(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            index = int(x[0, 0, 0, 0])
            return torch.nn.functional.one_hot(found[index], 3).permute(2, 0, 1)[None].float()

    images = [torch.full((3, *mask.shape), float(i)) for i, mask in enumerate(masks)]
    dataset = Masked(lambda index: (images[index], masks[index]), ['first', 'second'], 3)
    scores = evaluate(dataset, 0, torch.device('cpu'), Prepared())
    # Of 0: 3 + 1 hits, and 1 + 2 others. Of 1: 2 + 2 hits, and 2 + 1 others. 2 is nowhere.
    assert scores == {'mIoU': pytest.approx(100 * 4 / 7, abs=1e-3), 'pixels': pytest.approx(100 * 8 / 11, abs=1e-3)}


def test_pixels_that_do_not_count_add_nothing_to_the_loss() -> None:
    model = nn.Conv2d(3, 2, 1)
    images, masks = torch.rand(2, 3, 8, 8), torch.full((2, 8, 8), IGNORED)
    nothing = loss(torch.device('cpu'), model, (images, masks))
    nothing.backward()
    assert nothing == 0
    assert all(not parameter.grad.any() for parameter in model.parameters())
    masks[0, :4] = 1
    some = loss(torch.device('cpu'), model, (images, masks))
    torch.testing.assert_close(some, nn.functional.cross_entropy(model(images)[:1, :, :4], masks[:1, :4]))


def test_evaluation_without_a_pixel_that_counts_is_an_error() -> None:
    ignored = torch.zeros(3, 8, 8), torch.full((8, 8), IGNORED)
    with pytest.raises(ValueError, match='no pixel of the 2 images to evaluate with counts: all have label 255'):
        evaluate(Masked(lambda index: ignored, ['a', 'b'], 3), 0, torch.device('cpu'), nn.Conv2d(3, 3, 1))


def test_segmenter_takes_images_of_any_size_and_normalises_them(images: Tensor) -> None:
    model = create_segmenter('fpn', 'test_res2net', 5).eval()
    with torch.no_grad():
        assert model(torch.rand(1, 3, 50, 70)).shape == (1, 5, 50, 70)
        logits = model(images)
        config = resolve_model_data_config(timm.create_model('test_res2net'))
        mean, std = (torch.tensor(config[name])[:, None, None] for name in ('mean', 'std'))
        torch.testing.assert_close(logits, model.model((images - mean) / std))


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (['--val', 'test'], 'with a part test'),
        (['--classes', '9'], 'has 10 categories and the background; leave --classes out'),
        (['--architecture', 'unett'], 'unett'),
        (['--architecture-kwargs', 'widths=3'], 'widths'),
        (['--lr', 'nan'], '--lr nan is no finite number'),
        (['--size', '100'], '--size 100 is no multiple of 32'),
        (['--batch-size', '999'], '48 images are less than a batch of 999'),
    ],
)
def test_segment_with_bad_input_is_one_line_and_writes_nothing(
    detection_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], error: str
) -> None:
    assert run(str(detection_set), str(tmp_path / 'run'), *QUICK, *arguments) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert 'error: ' in last
    assert error in last
    assert not (tmp_path / 'run').exists()


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    write_pairs(tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val')
    with pytest.raises(ValueError, match='does not say how many classes its masks have; give --classes'):
        open_part(tmp_path, 'val', None)
    with pytest.raises(ValueError, match='has no part test'):
        open_part(tmp_path, 'test', 3)
    with pytest.raises(ValueError, match=r'the mask of .*2\.png has label 2, of 2 classes'):
        open_part(tmp_path, 'val', 2)[2]
    Image.new('RGB', (50, 40)).save(tmp_path / 'masks' / 'val' / '0.png')
    with pytest.raises(ValueError, match=r'0\.png has colours or fractions; a mask has one channel'):
        open_part(tmp_path, 'val', 3)[0]
    Image.new('L', (40, 40)).save(tmp_path / 'masks' / 'val' / '0.png')
    with pytest.raises(ValueError, match=r'0\.png has \(40, 50\) pixels, and its mask \(40, 40\)'):
        open_part(tmp_path, 'val', 3)[0]


def test_masks_of_0_and_255_only_are_an_error_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in ('train', 'val'):
        write_pairs(tmp_path / 'images' / part, tmp_path / 'masks' / part)
    require_foreground(open_part(tmp_path, 'val', 3))  # whose first mask has no other label either
    for path in (tmp_path / 'masks').glob('*/*.png'):
        Image.fromarray(np.eye(40, 50, dtype=np.uint8) * 255).save(path)
    assert run(str(tmp_path), str(tmp_path / 'run'), *QUICK, '--batch-size', '2', '--classes', '2') == 2
    text = 'hold 0 and 255 only; 255 counts for nothing; save labels 0, 1 and so on'
    assert text in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / 'run').exists()


def test_masks_of_16_bits_are_not_cut_to_8(tmp_path: Path) -> None:
    write_pairs(tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val', count=1)
    Image.fromarray(np.full((40, 50), 256, np.uint16)).save(tmp_path / 'masks' / 'val' / '0.png')
    with pytest.raises(ValueError, match=r'0\.png has label 256, of 3 classes'):
        open_part(tmp_path, 'val', 3)[0]
    with pytest.raises(ValueError, match='there are 300 classes, and labels are 0 to 254'):
        open_part(tmp_path, 'val', 300)


def test_augmentation_is_half_to_twice_the_own_size_of_an_image() -> None:
    change = train_augmentation(64)
    torch.manual_seed(0)
    for side in (60, 200):
        image, mask = torch.zeros(3, side, side), torch.zeros(side, side, dtype=torch.uint8)
        mask[:, :: side // 10] = 1  # lines, so many pixels apart
        apart = [change(ImageTensor(image), Mask(mask))[1][0].eq(1).nonzero().diff(dim=0) for _ in range(100)]
        found = torch.cat(apart).float()
        assert found.min() < 0.6 * side // 10
        assert found.max() > 1.7 * side // 10


def test_datasets_go_to_workers_that_are_spawned(detection_set: Path) -> None:
    dataset = pickle.loads(pickle.dumps(open_part(detection_set, 'val', None, train_augmentation(64))))
    assert dataset[0][0].shape == (3, 64, 64)


def test_image_that_a_worker_can_not_read_is_one_line(
    detection_set: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(detection_set, tmp_path / 'set')
    for path in (tmp_path / 'set' / 'train').iterdir():
        path.write_bytes(b'no image')
    assert run(str(tmp_path / 'set'), str(tmp_path / 'run'), *QUICK, '--workers', '1') == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if 'error: ' in line]
    assert re.search(r'error: ValueError: .*train/\d+\.png: this is not an image', lines[-1])


@pytest.mark.slow
def test_segmenter_learns_resumes_and_draws_what_it_finds(simple_set: Path, tmp_path: Path) -> None:
    folder, picture = tmp_path / 'run', tmp_path / 'found.png'
    arguments = [str(simple_set), str(folder), '--val', 'train', *QUICK, '--epochs', '12', '--seed', '1']
    assert run(*arguments) == 0
    history = json.loads((folder / 'history.json').read_text())
    assert history[-1]['mIoU'] > 80  # all ground is 28
    whole = torch.load(folder / 'last.pth')
    (folder / 'last.pth').unlink()  # as if it was killed in the first epoch
    assert run(*arguments, '--resume', '--show', str(picture)) == 0
    resumed = torch.load(folder / 'last.pth')
    assert all(torch.equal(value, resumed['model'][name]) for name, value in whole['model'].items())
    with Image.open(picture) as image:
        assert image.size == (6 * (2 * 256 + 2) + 2, 2 * (256 + 2) + 2)
