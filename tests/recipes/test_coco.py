"""Sets in COCO's format are read as published, and average precision is exact on cases worked out by hand."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from timm_res2net.recipes.coco import (
    IGNORED,
    CocoImages,
    average_precision,
    draw,
    require_sheet,
    save_sheet,
    semantic_mask,
)

SQUARES = {'big': [0, 0, 40, 40], 'little': [10, 10, 20, 20], 'apart': [50, 50, 10, 10]}


def square(box: list[int], category: int, **more: Any) -> dict[str, Any]:
    left, top, width, height = box
    corners = [left, top, left + width, top, left + width, top + height, left, top + height]
    return dict(category_id=category, bbox=box, area=width * height, segmentation=[corners], iscrowd=0, **more)


def write_set(folder: Path, annotations: list[dict[str, Any]], name: str = 'val') -> CocoImages:
    """A set of two images, of which the second one is empty; its categories have the ids 3 and 7."""
    (folder / name).mkdir()
    (folder / 'annotations').mkdir(exist_ok=True)
    for i in range(2):
        Image.fromarray(np.full((64, 80), 51 * i, np.uint8)).save(folder / name / f'{i}.png')
    document = dict(
        images=[dict(id=i + 10, file_name=f'{i}.png', width=80, height=64) for i in range(2)],
        annotations=[dict(id=i + 1, image_id=10) | each for i, each in enumerate(annotations)],
        categories=[dict(id=7, name='dog'), dict(id=3, name='cat')],
    )
    (folder / 'annotations' / f'instances_{name}.json').write_text(json.dumps(document))
    return CocoImages(folder, name)


def found(*boxes: tuple[list[int], int, float]) -> dict[str, Tensor]:
    corners = [[left, top, left + width, top + height] for (left, top, width, height), _, _ in boxes]
    return dict(
        boxes=torch.tensor(corners, dtype=torch.float32).reshape(-1, 4),
        labels=torch.tensor([label for _, label, _ in boxes]),
        scores=torch.tensor([score for _, _, score in boxes]),
    )


def test_coco_images_gives_corners_and_labels_from_one_without_crowds_and_empty_boxes(tmp_path: Path) -> None:
    crowd = {**square(SQUARES['apart'], 3), 'iscrowd': 1}
    empty = square([5, 5, 0, 9], 3)
    beyond = square([70, 60, 30, 30], 7)
    dataset = write_set(tmp_path, [square(SQUARES['big'], 7), crowd, empty, beyond])
    assert dataset.names == ['cat', 'dog']
    image, target = dataset[0]
    assert image.shape == (3, 64, 80)
    assert target['boxes'].tolist() == [[0, 0, 40, 40], [70, 60, 80, 64]]
    assert target['labels'].tolist() == [2, 2]
    assert target['image_id'] == 10
    image, target = dataset[1]
    torch.testing.assert_close(image, torch.full((3, 64, 80), 0.2))
    assert target['boxes'].shape == (0, 4)


def test_semantic_mask_shows_the_smallest_object_and_ignores_crowds(tmp_path: Path) -> None:
    crowd = {**square(SQUARES['apart'], 3), 'iscrowd': 1}
    dataset = write_set(tmp_path, [square(SQUARES['little'], 3), square(SQUARES['big'], 7), crowd])
    mask = semantic_mask(dataset, 0, (64, 80))
    assert mask[5, 5] == 2
    assert mask[20, 20] == 1
    assert mask[55, 55] == IGNORED
    assert mask[60, 5] == 0
    assert torch.bincount(mask.flatten())[[1, 2]].tolist() == [400, 1600 - 400]


@pytest.mark.parametrize(
    ('segmentation', 'error'),
    [
        ([[0, 0, 9, 9]], 'a polygon has less than three points'),
        ([[0, 0, 9, 0, 9, 9], [0, 0]], 'a polygon has less than three points'),
        ([[0, 0, 9, 0, 9, 'x']], 'could not convert'),
        (dict(size=[60, 80], counts=[4800]), r'it is of \(60, 80\) pixels, and the image has \(64, 80\)'),
        ('outline', ''),
    ],
)
def test_semantic_mask_of_an_outline_that_can_not_be_drawn_names_it(
    tmp_path: Path, segmentation: Any, error: str
) -> None:
    dataset = write_set(tmp_path, [square(SQUARES['big'], 3) | dict(segmentation=segmentation)])
    with pytest.raises(ValueError, match=rf'0\.png has an object whose segmentation .* drawn, number 1: .*{error}'):
        semantic_mask(dataset, 0, (64, 80))


def test_average_precision_of_a_worked_case(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(SQUARES['big'], 3), square(SQUARES['apart'], 3)])
    # One of two is found, before a false one: precision is 1 up to a recall of 0.5, the first 51 of 101 points.
    boxes = found((SQUARES['big'], 1, 0.9), ([30, 50, 9, 9], 1, 0.8))
    scores = average_precision(dataset, [(10, boxes), (11, found())], areas=(20, 30))
    half = pytest.approx(100 * 51 / 101, abs=1e-3)
    assert scores == {'AP': half, 'AP50': half, 'AP75': half, 'APs': 0.0, 'APm': -1.0, 'APl': 100.0}


def test_average_precision_counts_overlaps_above_each_threshold(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square([0, 0, 40, 40], 3)])
    scores = average_precision(dataset, [(10, found(([0, 0, 40, 26], 1, 0.5)))])  # 0.65 of it
    assert (scores['AP'], scores['AP50'], scores['AP75']) == (40.0, 100.0, 0.0)  # at 0.5, 0.55, 0.6 and 0.65
    wrong_class = average_precision(dataset, [(10, found(([0, 0, 40, 40], 2, 0.5)))])
    nothing = average_precision(dataset, [(10, found()), (11, found())])
    assert wrong_class['AP'] == nothing['AP'] == 0.0


@pytest.mark.parametrize('ids', [(0, 1, 2), (5, 5, 5), ('a', 'b', 'c')], ids=['zero', 'repeated', 'texts'])
def test_average_precision_of_all_objects_is_100_whatever_their_ids(tmp_path: Path, ids: tuple[Any, ...]) -> None:
    boxes = SQUARES.values()
    dataset = write_set(tmp_path, [square(box, 3, id=number) for box, number in zip(boxes, ids)])
    assert average_precision(dataset, [(10, found(*((box, 1, 0.9) for box in boxes)))])['AP'] == 100
    missed = average_precision(dataset, [(10, found((SQUARES['big'], 1, 0.9)))])
    assert missed['AP'] == pytest.approx(100 * 34 / 101, abs=1e-3)


def test_average_precision_leaves_boxes_without_area_out(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(SQUARES['big'], 3), square([5, 5, 0, 9], 3), square([5, 5, 9, -1], 3)])
    assert average_precision(dataset, [(10, found((SQUARES['big'], 1, 0.9)))])['AP'] == 100


@pytest.mark.parametrize(
    ('changed', 'error'),
    [
        (dict(image_id=12), 'an object of image 12, which it does not define, number 1'),
        (dict(category_id=4), 'an object of category 4, which it does not define, number 1'),
        (
            dict(bbox=[0, 0, float('nan'), 9]),
            r'an object whose box is \[0, 0, nan, 9\], not four finite numbers, number 1',
        ),
        (
            dict(bbox=[0, 0, float('inf'), 9]),
            r'an object whose box is \[0, 0, inf, 9\], not four finite numbers, number 1',
        ),
        (dict(bbox=[0, 0, 9]), r'an object whose box is \[0, 0, 9\], not four finite numbers, number 1'),
    ],
)
def test_coco_objects_that_can_not_be_used_are_named(tmp_path: Path, changed: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=rf'instances_val\.json has {error}'):
        write_set(tmp_path, [square(SQUARES['big'], 7) | changed])


@pytest.mark.parametrize('number', ['one', 2**63, 1.5])
def test_coco_image_id_that_no_tensor_can_hold_is_named(tmp_path: Path, number: Any) -> None:
    write_set(tmp_path, [])
    file = tmp_path / 'annotations' / 'instances_val.json'
    document = json.loads(file.read_text())
    document['images'] = [document['images'][0] | dict(id=number)]
    file.write_text(json.dumps(document))
    with pytest.raises(
        ValueError, match=rf'instances_val\.json has an image of id {number!r}; ids of images are integers'
    ):
        CocoImages(tmp_path, 'val')


@pytest.mark.parametrize(
    ('content', 'error'),
    [
        ('{', 'has no annotations in COCO'),
        ('[]', 'has no annotations in COCO'),
        (f'{{"images": {"[" * 99_999}', 'has no annotations in COCO.*RecursionError'),
        ('{"images": [{"id": 1}], "annotations": [{}], "categories": []}', 'has no annotations in COCO'),
        ('{"images": [], "annotations": [], "categories": []}', 'has no images or no categories'),
        (
            '{"images": [{"id": 1, "file_name": "1.png"}], "categories": [{"id": 1, "name": "cat"}],'
            ' "annotations": [{"id": 1, "image_id": 1, "category_id": 2, "bbox": [0, 0, 1, 1]}]}',
            'has an object of category 2, which it does not define',
        ),
    ],
)
def test_coco_images_of_other_files_is_a_value_error(tmp_path: Path, content: str, error: str) -> None:
    with pytest.raises(ValueError, match='with a part val: it has no val/'):
        CocoImages(tmp_path, 'val')
    (tmp_path / 'val').mkdir()
    (tmp_path / 'annotations').mkdir()
    (tmp_path / 'annotations' / 'instances_val.json').write_text(content)
    with pytest.raises(ValueError, match=error):
        CocoImages(tmp_path, 'val')


@pytest.mark.parametrize('key', ['bbox', 'category_id'])
def test_coco_objects_without_what_is_needed_are_no_annotations(tmp_path: Path, key: str) -> None:
    whole = square(SQUARES['big'], 7)
    with pytest.raises(ValueError, match=f"has no annotations in COCO's format: KeyError\\('{key}'\\)"):
        write_set(tmp_path, [{name: value for name, value in whole.items() if name != key}])


def test_coco_objects_without_area_and_crowd_are_evaluated_by_their_boxes(tmp_path: Path) -> None:
    whole = square(SQUARES['big'], 3)
    dataset = write_set(tmp_path, [{name: whole[name] for name in ('category_id', 'bbox')}])
    assert average_precision(dataset, [(10, found((SQUARES['big'], 1, 0.9)))])['APm'] == 100
    with pytest.raises(ValueError, match=r'0\.png has an object without segmentation, number 1'):
        semantic_mask(dataset, 0, (64, 80))


def test_coco_image_that_is_missing_is_named(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [])
    (tmp_path / 'val' / '1.png').unlink()
    with pytest.raises(ValueError, match=r'1\.png: there is no such file'):
        dataset[1]


def test_coco_image_of_16_bits_is_scaled_and_not_turned_away_from_its_boxes(tmp_path: Path) -> None:
    dataset = write_set(tmp_path, [square(SQUARES['big'], 3)])
    Image.fromarray(np.full((64, 80), 0.4 * 65535, np.uint16)).save(tmp_path / 'val' / '0.png')
    assert dataset.image(0).unique().tolist() == [pytest.approx(0.4, abs=0.01)]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.new('L', (80, 64)).save(tmp_path / 'val' / '0.png', exif=exif)
    image, target = dataset[0]
    assert image.shape == (3, 64, 80)
    assert target['boxes'].tolist() == [[0, 0, 40, 40]]


def test_sheet_pads_drawn_images_of_several_sizes(tmp_path: Path) -> None:
    first = draw(torch.zeros(3, 20, 40), torch.tensor([[1.0, 1, 9, 9]]), ['cat 0.90'], width=80)
    second = draw(torch.ones(3, 10, 100), torch.empty(0, 4), [])
    assert (first.shape, second.shape) == ((3, 40, 80), (3, 30, 300))
    assert (first == torch.tensor([255, 255, 0], dtype=torch.uint8)[:, None, None]).all(dim=0).any()  # yellow
    for name in ('sheet.png', 'sheet.JPG', 'sheet'):
        require_sheet(str(tmp_path / name))
        assert not (tmp_path / name).exists()
        save_sheet([first, second], str(tmp_path / name))
        with Image.open(tmp_path / name) as image:
            assert image.size == (2 + 300 + 2 + 300 + 2, 2 + 40 + 2)
    with pytest.raises(ValueError, match=r'sheet\.xyz can not be written: unknown file extension: \.xyz'):
        require_sheet(str(tmp_path / 'sheet.xyz'))
