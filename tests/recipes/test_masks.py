"""Masks of labels and binary masks are read, and those that do not fit are reported."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_res2net.recipes.masks import IGNORED, MaskedImages, augment, require_foreground


def write_pairs(images: Path, masks: Path, count: int = 3, suffix: str = '.png') -> None:
    """Writes images with masks whose first rows have the image's number as label; the last row is ignored."""
    images.mkdir(parents=True)
    masks.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((40, 50, 3), 51 * i, np.uint8)).save(images / f'{i}{suffix}')
        mask = np.zeros((40, 50), np.uint8)
        mask[:10] = i
        mask[-1] = IGNORED
        Image.fromarray(mask).save(masks / f'{i}.png')


def test_three_folder_layouts_are_read_alike(tmp_path: Path) -> None:
    write_pairs(tmp_path / 'plain' / 'images' / 'val', tmp_path / 'plain' / 'masks' / 'val')
    write_pairs(tmp_path / 'inner' / 'deep' / 'val' / 'images', tmp_path / 'inner' / 'deep' / 'val' / 'masks')
    voc = tmp_path / 'voc'
    write_pairs(voc / 'JPEGImages', voc / 'SegmentationClass', suffix='.jpg')
    (voc / 'ImageSets' / 'Segmentation').mkdir(parents=True)
    (voc / 'ImageSets' / 'Segmentation' / 'val.txt').write_text('0\n1\n2\n')
    layouts = (('plain', 'val'), ('inner', 'deep/val'), ('voc', 'val'))
    parts = [MaskedImages(tmp_path / name, part, 3) for name, part in layouts]
    for index in range(3):
        first, *others = (part[index] for part in parts)
        for other in others:
            torch.testing.assert_close(other['image'], first['image'], rtol=0, atol=0.01)
            assert torch.equal(other['mask'], first['mask'])
    assert torch.bincount(parts[0][2]['mask'].flatten())[[0, 2, IGNORED]].tolist() == [29 * 50, 10 * 50, 50]


def test_image_without_a_mask_is_reported_and_other_files_are_left_out(tmp_path: Path) -> None:
    images, masks = tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val'
    write_pairs(images, masks)
    for name in ('.0.png', 'Thumbs.db', '0.txt'):
        (images / name).write_bytes(b'')
        (masks / name).write_bytes(b'')
    (images / 'more.png').mkdir()
    assert [image.name for image, _ in MaskedImages(tmp_path, 'val', 3).pairs] == ['0.png', '1.png', '2.png']
    (masks / '1.png').unlink()
    with pytest.raises(ValueError, match=r'^1 of 3 images have no mask of the same name: .*1\.png'):
        MaskedImages(tmp_path, 'val', 3)


@pytest.mark.parametrize(('levels', 'suffix'), [((0, 255), '.png'), ((10, 240), '.jpg'), ((0, 200), '.gif')])
def test_binary_masks_of_any_format_are_split_at_the_threshold(
    levels: tuple[int, int], suffix: str, tmp_path: Path
) -> None:
    write_pairs(tmp_path / 'val' / 'images', tmp_path / 'val' / 'masks', count=1)
    (tmp_path / 'val' / 'masks' / '0.png').unlink()
    mask = np.full((40, 50), levels[0], np.uint8)
    mask[8:32, 16:32] = levels[1]
    Image.fromarray(mask).convert('RGB' if suffix == '.jpg' else 'L').save(tmp_path / 'val' / 'masks' / f'0{suffix}')
    dataset = MaskedImages(tmp_path, 'val', None, threshold=128)
    assert dataset.names == ['background', 'foreground']
    assert torch.equal(dataset[0]['mask'], torch.from_numpy(mask == levels[1]).long())
    require_foreground(dataset)
    with pytest.raises(ValueError, match=r'no pixel in 1 masks reaches level 256. Use a smaller --threshold'):
        require_foreground(MaskedImages(tmp_path, 'val', None, threshold=256))


def test_threshold_itself_is_foreground(tmp_path: Path) -> None:
    write_pairs(tmp_path / 'val' / 'images', tmp_path / 'val' / 'masks', count=1)
    Image.fromarray(np.arange(200, dtype=np.uint8).reshape(4, 50)).save(tmp_path / 'val' / 'masks' / '0.png')
    Image.new('L', (50, 4)).save(tmp_path / 'val' / 'images' / '0.png')
    assert MaskedImages(tmp_path, 'val', None, threshold=77)[0]['mask'].sum() == 200 - 77


def test_masks_with_only_0_and_255_need_binary(tmp_path: Path) -> None:
    write_pairs(tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val')
    require_foreground(MaskedImages(tmp_path, 'val', 3))  # although the first mask alone has only 0 and 255
    for path in (tmp_path / 'masks').glob('*/*.png'):
        Image.fromarray(np.eye(40, 50, dtype=np.uint8) * 255).save(path)
    with pytest.raises(ValueError, match=r'3 masks have only the levels 0 and 255. For binary masks, use --binary'):
        require_foreground(MaskedImages(tmp_path, 'val', 3))


@pytest.mark.parametrize(
    ('arguments', 'error'),
    [
        (('val', None), 'masks of labels need --classes N, binary masks need --binary. Use one of them'),
        (('val', 3, 128), 'Use one of them'),
        (('test', 3), "has no part 'test': it needs test/images and test/masks"),
        (('val', 300), 'cannot use 300 classes: labels are 0 to 254'),
        (('val', 2), r"mask of '.*2\.png' has label 2, but there are 2 classes"),
    ],
)
def test_part_that_cannot_be_used_is_reported(tmp_path: Path, arguments: tuple[Any, ...], error: str) -> None:
    write_pairs(tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val')
    with pytest.raises(ValueError, match=error):
        MaskedImages(tmp_path, *arguments)[2]


@pytest.mark.parametrize(
    ('mask', 'error'),
    [
        (Image.new('RGB', (50, 40)), r"0\.png' is not a mask: it must have one channel, with integer labels"),
        (Image.new('L', (40, 40)), r"0\.png' has \(40, 50\) pixels, but its mask \(40, 40\)"),
        (Image.fromarray(np.full((40, 50), 256, np.uint16)), r"0\.png' has label 256, but there are 3 classes"),
        (None, r"cannot read '.*0\.png'"),
    ],
    ids=['channels', 'size', 'label', 'damaged'],
)
def test_mask_that_cannot_be_used_is_reported(tmp_path: Path, mask: Image.Image | None, error: str) -> None:
    write_pairs(tmp_path / 'images' / 'val', tmp_path / 'masks' / 'val')
    file = tmp_path / 'masks' / 'val' / '0.png'
    if mask is None:
        file.write_bytes(b'no image')
    else:
        mask.save(file)
    with pytest.raises(ValueError, match=error):
        MaskedImages(tmp_path, 'val', 3)[0]


def test_augmentation_moves_masks_with_images_and_ignores_padding() -> None:
    image, mask = torch.zeros(3, 40, 60), torch.zeros(40, 60, dtype=torch.int64)
    image[:, 10:30, 20:30], mask[10:30, 20:30] = 1.0, 1
    torch.manual_seed(0)
    left = set()
    for _ in range(20):
        shown, labels = augment(64, image, mask)
        assert shown.shape == (3, 64, 64)
        assert labels.dtype == torch.int64
        for label in (0, 1):
            if (labels == label).sum() > 99:
                assert shown[0][labels == label].mean() == pytest.approx(label, abs=0.15)  # edges are interpolated
        assert (shown[0][labels == IGNORED] == 0.5).all()
        if (labels == 1).any():
            left.add(int((labels == 1).nonzero()[:, 1].min()))
    assert len(left) > 5


@pytest.mark.parametrize('side', [60, 200])
def test_augmentation_scales_images_by_a_factor_from_half_to_two(side: int) -> None:
    torch.manual_seed(0)
    mask = torch.zeros(side, side, dtype=torch.int64)
    mask[:, :: side // 10] = 1  # lines that are side // 10 apart
    shown = [augment(64, torch.zeros(3, side, side), mask)[1] for _ in range(100)]
    apart = torch.cat([each[0].eq(1).nonzero().diff(dim=0) for each in shown]).float()
    assert apart.min() < 0.6 * side // 10
    assert apart.max() > 1.7 * side // 10
