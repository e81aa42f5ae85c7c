"""Sets in COCO's format are read as published, and unusable annotations are reported before they do harm."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as coco_mask

from timm_res2net.recipes.coco import IGNORED, CocoImages, decode_runs, semantic_mask

SQUARES = {'big': [0, 0, 40, 40], 'little': [10, 10, 20, 20], 'apart': [50, 50, 10, 10]}
BIG = SQUARES['big']


def square(box: list[int], category: int, **more: Any) -> dict[str, Any]:
    """Annotates a square."""
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return dict(category_id=category, bbox=box, area=width * height, segmentation=[corners], iscrowd=0) | more


def write_set(folder: Path, annotations: list[dict[str, Any]], **image: Any) -> CocoImages:
    """Writes a set of two images, the second of them empty; its categories have the ids 3 and 7."""
    (folder / 'val').mkdir()
    (folder / 'annotations').mkdir(exist_ok=True)
    for i in range(2):
        Image.fromarray(np.full((64, 80), 51 * i, np.uint8)).save(folder / 'val' / f'{i}.png')
    document = dict(
        images=[dict(id=i + 10, file_name=f'{i}.png', width=80, height=64) | image for i in range(2)],
        annotations=[dict(id=i + 1, image_id=10) | each for i, each in enumerate(annotations)],
        categories=[dict(id=7, name='dog'), dict(id=3, name='cat')],
    )
    (folder / 'annotations' / 'instances_val.json').write_text(json.dumps(document))
    return CocoImages(folder, 'val')


def test_items_have_corners_and_labels_from_1_without_crowds_and_empty_boxes(tmp_path: Path) -> None:
    crowd = square(SQUARES['apart'], 3, iscrowd=1)
    dataset = write_set(tmp_path, [square(BIG, 7), crowd, square([5, 5, 0, 9], 3), square([70, 60, 30, 30], 7)])
    assert dataset.names == ['cat', 'dog']
    item = dataset[0]
    assert item['image'].shape == (3, 64, 80)
    assert item['target']['boxes'].tolist() == [[0, 0, 40, 40], [70, 60, 80, 64]]
    assert item['target']['labels'].tolist() == [2, 2]
    assert item['image_id'] == 10
    torch.testing.assert_close(dataset[1]['image'], torch.full((3, 64, 80), 0.2))
    assert dataset[1]['target']['boxes'].shape == (0, 4)


def test_semantic_mask_shows_the_smallest_object_and_ignores_crowds(tmp_path: Path) -> None:
    crowd = square(SQUARES['apart'], 3, iscrowd=1)
    dataset = write_set(tmp_path, [square(SQUARES['little'], 3), square(BIG, 7), crowd])
    mask = semantic_mask(dataset, 0, (64, 80))
    assert [int(mask[at]) for at in ((5, 5), (20, 20), (55, 55), (60, 5))] == [2, 1, IGNORED, 0]
    assert torch.bincount(mask.flatten())[[1, 2]].tolist() == [400, 1600 - 400]


@pytest.mark.parametrize('seed', range(4))
def test_run_lengths_are_decoded_as_pycocotools_does(seed: int, tmp_path: Path) -> None:
    pixels = np.random.default_rng(seed).random((64, 80)) < (0.001, 0.1, 0.5, 1.0)[seed]
    encoded = coco_mask.encode(np.asfortranarray(pixels.astype(np.uint8)))
    text = encoded['counts'].decode()
    listed = decode_runs(text)
    for counts in (text, listed):
        segmentation = dict(size=[64, 80], counts=counts)
        folder = tmp_path / type(counts).__name__
        folder.mkdir()
        dataset = write_set(folder, [square(BIG, 3, segmentation=segmentation)])
        np.testing.assert_array_equal(semantic_mask(dataset, 0, (64, 80)).numpy(), pixels)


@pytest.mark.parametrize(
    ('segmentation', 'error'),
    [
        ([], 'it has no segmentation'),
        ([[0, 0, 9, 9]], 'fewer than three points'),
        ([[0, 0, 9, 0, 9, 9], [0, 0]], 'fewer than three points'),
        ([[0, 0, 9, 0, 9, 9, 5]], 'half a point'),
        ([[0, 0, 9, 0, 9, 'x']], 'far outside'),
        ([[0, 0, 9, 0, 9, 1e9]], 'far outside'),
        ([[0, 0, 9, 0, 9, float('nan')]], 'far outside'),
        (dict(size=[60, 80], counts=[4800]), r'its mask has size \[60, 80\], the image \[64, 80\]'),
        (dict(size=[64, 80], counts=[5119]), 'do not add up'),
        (dict(size=[64, 80], counts=[-1, 5121]), 'do not add up'),
        (dict(size=[64, 80], counts='oooo'), 'run lengths'),
        (dict(size=[64, 80], counts='o' * 99), 'run lengths are damaged'),
        (dict(size=[64, 80]), 'counts'),
        ('outline', ''),
    ],
)
def test_segmentation_that_cannot_be_drawn_is_reported(tmp_path: Path, segmentation: Any, error: str) -> None:
    dataset = write_set(tmp_path, [square(BIG, 3, segmentation=segmentation)])
    with pytest.raises(ValueError, match=rf"cannot draw object 1 of '0\.png': .*{error}"):
        semantic_mask(dataset, 0, (64, 80))


def test_size_of_an_image_in_the_annotations_is_not_trusted(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(BIG, 3)], width=10**12, height=-1)
    assert (semantic_mask(dataset, 0, (64, 80)) == 1).sum() == 1600


@pytest.mark.parametrize(
    ('changed', 'error'),
    [
        (dict(image_id=12), 'unknown image 12'),
        (dict(category_id=4), 'unknown category 4'),
        (dict(bbox=[0, 0, float('nan'), 9]), r'box \[0, 0, nan, 9\] is not four finite numbers'),
        (dict(bbox=[0, 0, float('inf'), 9]), r'box \[0, 0, inf, 9\] is not'),
        (dict(bbox=[0, 0, '9', 9]), r"box \[0, 0, '9', 9\] is not"),
        (dict(bbox=[0, 0, 9]), r'box \[0, 0, 9\] is not'),
        (dict(area='100'), "area '100' is not a finite number"),
        (dict(iscrowd='no'), "iscrowd 'no' is neither 0 nor 1"),
    ],
)
def test_object_that_cannot_be_used_is_reported(tmp_path: Path, changed: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=rf"instances_val\.json': object 1: {error}"):
        write_set(tmp_path, [square(BIG, 7) | changed])


@pytest.mark.parametrize('number', ['one', 2**63, 1.5])
def test_image_id_that_no_tensor_can_hold_is_reported(tmp_path: Path, number: Any) -> None:
    with pytest.raises(ValueError, match=rf"instances_val\.json': image id {number!r} is not"):
        write_set(tmp_path, [], id=number)


@pytest.mark.parametrize(
    ('content', 'error'),
    [
        ('{', 'Expecting property name'),
        ('[]', 'not supported'),
        (f'{{"images": {"[" * 99_999}', ''),
        ('{"images": [{"id": 1}], "annotations": [{}], "categories": []}', 'image_id'),
        ('{"images": [], "annotations": [], "categories": []}', 'no images or no categories'),
        (
            '{"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "cat"}],'
            ' "annotations": [{"id": 1, "image_id": 1, "category_id": 1}]}',
            'object 1: box None is not four finite numbers',
        ),
    ],
)
def test_other_files_are_not_coco_sets(tmp_path: Path, content: str, error: str) -> None:
    with pytest.raises(ValueError, match="has no part 'val' in the COCO format"):
        CocoImages(tmp_path, 'val')
    (tmp_path / 'val').mkdir()
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_val.json').write_text(content)
    with pytest.raises(ValueError, match=f"cannot use the COCO annotations '.*instances_val.json': .*{error}"):
        CocoImages(tmp_path, 'val')


def test_image_that_cannot_be_read_is_reported_in_one_line(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [], file_name='no\nfile\x1b.png')
    with pytest.raises(ValueError, match=r"cannot read '.*no\\nfile\\x1b\.png': no such file$"):
        dataset[1]


def test_16_bits_are_scaled_and_images_are_not_turned_away_from_their_boxes(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(BIG, 3)])
    Image.fromarray(np.full((64, 80), 0.4 * 65535, np.uint16)).save(tmp_path / 'val' / '0.png')
    assert dataset.read(0).unique().tolist() == [pytest.approx(0.4, abs=0.01)]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new('L', (80, 64)).save(tmp_path / 'val' / '0.png', exif=exif)
    assert dataset[0]['image'].shape == (3, 64, 80)
    assert dataset[0]['target']['boxes'].tolist() == [[0, 0, 40, 40]]
