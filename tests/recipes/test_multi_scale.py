"""The multi-scale set is always the same, and its boxes and masks match the visible items exactly."""

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from timm_res2net.recipes import multi_scale
from timm_res2net.recipes.coco import CocoImages
from timm_res2net.recipes.masks import MaskedImages
from timm_res2net.recipes.multi_scale import CLASSES, COUNTS, ITEM, MAGNIFICATIONS, SIDE, draw_canvases, main, write

FEW = {'train': 3, 'val': 2, 'unseen': 2}
photographs = cache(multi_scale.photographs)


@pytest.fixture(autouse=True)
def read_photographs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(multi_scale, 'photographs', photographs)


def test_multi_scale_set_is_the_same_bit_for_bit(fashion_mnist: Path, tmp_path: Path) -> None:
    for name in ('first', 'again'):
        write(tmp_path / name, fashion_mnist, FEW)
    first, again = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob('*.*')}
        for name in ('first', 'again')
    )
    assert first == again
    assert len(first) == 2 * sum(FEW.values()) + 3


def test_multi_scale_boxes_and_areas_are_those_of_the_masks(fashion_mnist: Path, tmp_path: Path) -> None:
    write(tmp_path / 'set', fashion_mnist, {'val': 16})
    objects, masks = CocoImages(tmp_path / 'set', 'val'), MaskedImages(tmp_path / 'set', 'val', 1 + len(CLASSES))
    assert objects.names == list(CLASSES)
    assert len(objects) == len(masks) == 16
    for index in range(len(masks)):
        image, mask = masks.read(index)
        assert image.shape == (3, SIDE, SIDE)
        assert mask.any()  # no canvas is empty
        boxes = np.zeros((SIDE, SIDE), bool)
        areas = np.zeros(1 + len(CLASSES), int)
        for each in objects.coco.imgToAnns[index]:
            left, top, width, height = each['bbox']
            box = slice(top, top + height), slice(left, left + width)
            for edge in (mask[box][0], mask[box][-1], mask[box][:, 0], mask[box][:, -1]):
                assert each['category_id'] in edge
            boxes[box] = True
            areas[each['category_id']] += each['area']
        assert not mask[~boxes].any()
        assert areas[1:].tolist() == np.bincount(mask.flatten(), minlength=1 + len(CLASSES))[1:].tolist()


def test_canvas_shows_items_within_masks_and_background_elsewhere(
    fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(multi_scale, 'cut_background', lambda rng, photographs: np.full((SIDE, SIDE), 7, np.uint8))
    for canvas in draw_canvases(fashion_mnist, 'train', 20):
        assert np.sum(canvas.masks, axis=0).max() == 1  # no pixel belongs to two items
        items = np.any(canvas.masks, axis=0)
        assert (canvas.image[~items] == 7).all()
        assert (canvas.image[items] != 7).mean() > 0.99
        assert 1 <= len(canvas.masks) == len(canvas.labels) == len(canvas.sizes) <= 6


def test_item_that_would_vanish_gets_the_smallest_visible_size(
    fashion_mnist: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = np.zeros((2, ITEM, ITEM), np.uint8)
    images[0, 14, 4:24] = 255  # a line; the other item is empty and cannot be shown at all
    monkeypatch.setattr(multi_scale, 'fashion_mnist', lambda folder, train: (images, np.zeros(2, np.int64)))
    monkeypatch.setattr(multi_scale, 'random_size', lambda rng, ranges: 10)
    drawn = list(draw_canvases(fashion_mnist, 'unseen', 20))
    sizes = {size for canvas in drawn for size in canvas.sizes}
    assert len(sizes) == 1
    assert 10 < sizes.pop() < ITEM
    assert all(mask.any() for canvas in drawn for mask in canvas.masks)


@pytest.mark.parametrize('part', COUNTS)
def test_canvas_items_have_the_sizes_of_their_part(fashion_mnist: Path, part: str) -> None:
    drawn = list(draw_canvases(fashion_mnist, part, 100, items=(1, 1)))
    sizes = [canvas.sizes[0] / ITEM for canvas in drawn]
    ranges = MAGNIFICATIONS[part]
    assert all(any(low - 0.02 <= size <= high + 0.02 for low, high in ranges) for size in sizes)
    assert min(sizes) < ranges[0][0] * 1.2
    assert max(sizes) > ranges[-1][1] * 0.9
    assert {len(canvas.labels) for canvas in drawn} == {1}
    assert {canvas.labels[0] for canvas in drawn} == set(range(10))


def test_items_leave_nine_tenths_of_each_other_visible(fashion_mnist: Path) -> None:
    crowded = list(draw_canvases(fashion_mnist, 'train', 20, items=(6, 6)))
    assert max(len(canvas.masks) for canvas in crowded) >= 5
    for canvas in crowded:
        for mask, size, label in zip(canvas.masks, canvas.sizes, canvas.labels):
            if label == 8:  # a square, 24 of 28 pixels across
                assert mask.sum() > 0.9**5 * (size * 24 / 28 - 2) ** 2


def test_backgrounds_for_training_and_testing_share_no_pixel(monkeypatch: pytest.MonkeyPatch) -> None:
    def right_third_is_white(file: Any) -> Image.Image:
        pixels = np.zeros((50, 90), np.uint8)
        pixels[:, 60:] = 255
        return Image.fromarray(pixels)

    monkeypatch.setattr(Image, 'open', right_third_is_white)
    whole = photographs.__wrapped__
    assert all(np.asarray(each).max() == 0 for each in whole(train=True))
    assert all(np.asarray(each).min() == 255 for each in whole(train=False))


def test_failed_download_of_fashion_mnist_is_reported_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError('Error downloading train-images-idx3-ubyte.gz')

    monkeypatch.setattr(torchvision.datasets.FashionMNIST, 'download', offline)
    with pytest.raises(SystemExit, match='2'):
        main([str(tmp_path / 'new'), '--fashion-mnist', str(tmp_path / 'nowhere')])
    assert capsys.readouterr().err.endswith('unpack its four files into FashionMNIST/raw/ there\n')
    assert not (tmp_path / 'new').exists()


def test_multi_scale_refuses_a_folder_that_is_not_empty(
    fashion_mnist: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / 'mine.txt').write_text('mine')
    with pytest.raises(SystemExit, match='2'):
        main([str(tmp_path), '--fashion-mnist', str(fashion_mnist)])
    assert 'is not empty. Choose another folder' in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ['mine.txt']


def test_interrupted_multi_scale_leaves_nothing_and_can_be_written_again(
    fashion_mnist: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*args: Any) -> dict[str, Any]:
        raise KeyboardInterrupt

    (tmp_path / 'set').mkdir()
    with monkeypatch.context() as patched:
        patched.setattr(multi_scale, 'annotate', interrupted)
        with pytest.raises(SystemExit, match='130'):
            main([str(tmp_path / 'set'), '--fashion-mnist', str(fashion_mnist)])
    assert capsys.readouterr().err.splitlines()[-1].endswith(': interrupted')
    assert list((tmp_path / 'set').iterdir()) == []
    write(tmp_path / 'set', fashion_mnist, FEW)
    assert sorted(path.name for path in (tmp_path / 'set').iterdir()) == ['annotations', 'train', 'unseen', 'val']
    assert [path.name for path in tmp_path.iterdir()] == ['set']
