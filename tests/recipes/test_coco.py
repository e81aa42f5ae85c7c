"""Sets in COCO's format are read as published, and unusable annotations are reported when a set is opened."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from timm_res2net.recipes.coco import CocoImages, read_image

SQUARES = {'big': [0, 0, 40, 40], 'little': [10, 10, 20, 20], 'apart': [50, 50, 10, 10]}
BIG = SQUARES['big']


def square(box: list[int], category: int, **more: Any) -> dict[str, Any]:
    """Annotates a square."""
    return dict(category_id=category, bbox=box, area=box[2] * box[3], iscrowd=0) | more


def write_set(folder: Path, annotations: list[dict[str, Any]], **image: Any) -> CocoImages:
    """Writes a set of two images, the second of them empty; its categories have the ids 3 and 7."""
    (folder / 'val').mkdir()
    (folder / 'annotations').mkdir()
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
    assert item['index'] == 0
    torch.testing.assert_close(dataset[1]['image'], torch.full((3, 64, 80), 0.2))
    assert dataset[1]['target']['boxes'].shape == (0, 4)


def test_annotations_for_an_image_of_another_size_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"0\.png' has \(64, 80\) pixels, but its annotations are for \(80, 64\)"):
        write_set(tmp_path, [square(BIG, 7)], width=64, height=80)[0]


@pytest.mark.parametrize(
    ('changed', 'error'),
    [
        (dict(image_id=12), 'unknown image 12'),
        (dict(category_id=4), 'unknown category 4'),
        (dict(bbox=[0, 0, float('nan'), 9]), r'box \[0, 0, nan, 9\] is not four finite numbers'),
        (dict(bbox=None), 'box None is not'),
        (dict(bbox=[0, 0, '9', 9]), r"box \[0, 0, '9', 9\] is not"),
        (dict(bbox=[0, 0, 9]), r'box \[0, 0, 9\] is not'),
        (dict(area='100'), "area '100' is not a finite number"),
        (dict(iscrowd='no'), "iscrowd 'no' is neither 0 nor 1"),
    ],
)
def test_object_that_cannot_be_used_is_reported(tmp_path: Path, changed: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=rf"instances_val\.json': object 1: {error}"):
        write_set(tmp_path, [square(BIG, 7) | changed])


@pytest.mark.parametrize(
    ('content', 'error'),
    [
        ('{', 'Expecting property name'),
        ('[]', 'not supported'),
        (f'{{"images": {"[" * 99_999}', ''),
        ('{"images": [{"id": 1}], "annotations": [{}], "categories": []}', 'image_id'),
        ('{"images": [], "annotations": [], "categories": []}', 'no images or no categories'),
    ],
)
def test_missing_or_invalid_annotation_file_is_reported(tmp_path: Path, content: str, error: str) -> None:
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


def test_16_bit_images_are_scaled_and_exif_orientation_is_ignored(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(BIG, 3)])
    Image.fromarray(np.full((64, 80), 0.4 * 65535, np.uint16)).save(tmp_path / 'val' / '0.png')
    assert read_image(tmp_path / 'val' / '0.png').unique().tolist() == [pytest.approx(0.4, abs=0.01)]
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new('L', (80, 64)).save(tmp_path / 'val' / '0.png', exif=exif)
    assert dataset[0]['image'].shape == (3, 64, 80)
    assert dataset[0]['target']['boxes'].tolist() == [[0, 0, 40, 40]]
