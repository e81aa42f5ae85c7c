"""`validate` counts the images that a model classifies correctly, and lists those that it cannot read."""

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from test_predict import constant

from timm_res2net.models.variants import WEIGHTS
from timm_res2net.recipes.digits import split
from timm_res2net.vision.figures import plot_confusion
from timm_res2net.vision.predict import FEW_IMAGES, classify
from timm_res2net.vision.validate import LabeledImages, decided_classes, labeled_images, validate


def write_images(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (10, 10)).save(folder / name)


def test_validate_finds_the_accuracy_of_digits_in_the_weights_table() -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True).eval()
    pixels, classes = split()['val']
    held_out: Any = LabeledImages(files=list(pixels), classes=classes.tolist())
    found = validate(model, held_out, batch_size=64, read=lambda image: Image.fromarray(image).convert('RGB'))
    assert (found.images, round(found.top1, 3), found.unread) == (599, WEIGHTS['test_res2net.digits'].top1, [])


def test_validate_counts_top1_top5_confusion_and_failures_of_a_known_case(tmp_path: Path) -> None:
    write_images(tmp_path, ['class 0/a.png', 'class 1/a.png', 'class 1/b.png', 'class 5/a.png'])
    (tmp_path / 'class 1' / 'broken.png').write_bytes(b'no image')
    model = constant([5, 4, 3, 2, 1, 0])
    found = validate(model, labeled_images(tmp_path, decided_classes(model)))
    assert (found.images, found.top1, found.top5) == (4, 25, 75)
    assert found.confusion[:, 0].tolist() == [1, 2, 0, 0, 0, 1]
    assert found.confusion[:, 1:].sum() == 0
    ((file, reason),) = found.unread
    assert (Path(file).name, 'not an image' in reason) == ('broken.png', True)


@pytest.mark.parametrize(
    ('order', 'classes', 'warnings'), [(None, [0, 2, 1], 1), ('natural', [0, 2, 1], 0), ('lexicographic', [0, 1, 2], 0)]
)
def test_folders_that_sort_differently_follow_the_given_order_or_log_the_default_one(
    order: str | None, classes: list[int], warnings: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_images(tmp_path, ['1/a.png', '2/b.png', '10/c.png', '.hidden/d.png'])
    found = labeled_images(tmp_path, ['cat', 'dog', 'fox'], class_order=order)
    assert [found.classes[found.files.index(tmp_path / name)] for name in ('1/a.png', '10/c.png', '2/b.png')] == classes
    assert len(caplog.records) == warnings
    assert all("natural order ('2' before '10')" in message for message in caplog.messages)


def test_synset_folders_are_classes_of_imagenet(tmp_path: Path) -> None:
    write_images(tmp_path, ['n02102040/b.png', 'n01440764/a.png'])
    names = [f'class {i}' for i in range(1000)]
    assert labeled_images(tmp_path, names).classes == [0, 217]
    (tmp_path / 'truth.txt').write_text('n01440764/a.png n02102040\n')
    assert labeled_images(tmp_path, names, tmp_path / 'truth.txt').classes == [217]


@pytest.mark.parametrize(
    ('labels', 'folders', 'classes'),
    [(['cat'], ['cat', 'dog'], [1, 0]), ([], ['healthy', 'ill'], [0, 1]), ([], ['negative', 'positive'], [0, 1])],
)
def test_validate_one_logit_decides_between_two_folders_at_one_half(
    labels: list[str], folders: list[str], classes: list[int], tmp_path: Path
) -> None:
    write_images(tmp_path, [f'{name}/a.png' for name in folders])
    for logit, predicted in ((0.1, [0, 2]), (-0.1, [2, 0])):
        model = constant([logit])
        model.pretrained_cfg['label_names'] = labels
        images = labeled_images(tmp_path, decided_classes(model))
        assert images.classes == classes
        found = validate(model, images)
        assert (found.top1, found.confusion.sum(dim=0).tolist()) == (50, predicted)


def test_truth_file_may_have_spaces_in_paths_and_names_or_numbers_of_classes(tmp_path: Path) -> None:
    write_images(tmp_path, ['my.png', 'my.png cat.png', 'deep/b.png'])
    lines = 'my.png cat.png tabby cat', '', 'my.png cat.png  0', 'my.png dog', 'none.png tabby cat', 'deep/b.png 1'
    (tmp_path / 'labels.txt').write_text('\n'.join(lines))
    found = labeled_images(tmp_path, ['dog', 'tabby cat'], tmp_path / 'labels.txt')
    assert [file.name for file in found.files] == ['my.png cat.png', 'my.png cat.png', 'my.png', 'none.png', 'b.png']
    assert found.classes == [1, 0, 0, 1, 1]


@pytest.mark.parametrize(
    ('images', 'truth', 'message'),
    [
        (['a/x.png', 'b/x.png', 'c/x.png'], None, "3 folders of .* with 2 classes: 'a' is not the name"),
        (['dog/a.png', 'wolf/b.png'], None, "'wolf' is not the name of exactly one"),
        (['x.png'], None, 'no images in the subfolders of .*list images with --truth'),
        (['x.png'], b'x.png 2', "line 1 of .*: '2', the class of x.png, is not the name or number of exactly one"),
        (['x.png'], b'x.png', "'', the class of x.png"),
        (['x.png'], b'\n', 'no images in .*truth'),
        (['x.png'], b'\xff\xfe', r'truth\.txt: it is not UTF-8 text'),
        ([], None, 'is not a folder'),
    ],
)
def test_images_that_do_not_match_the_classes_raise_with_reason(
    images: list[str], truth: bytes | None, message: str, tmp_path: Path
) -> None:
    for name in images:
        (tmp_path / 'data' / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / 'data' / name).touch()
    if truth is not None:
        (tmp_path / 'truth.txt').write_bytes(truth)
    with pytest.raises(ValueError, match=message):
        labeled_images(tmp_path / 'data', ['cat', 'dog'], truth and tmp_path / 'truth.txt')


def test_name_shared_by_two_classes_is_refused_but_their_numbers_are_not(tmp_path: Path) -> None:
    names = ['crane', 'dog', 'crane']  # as in ImageNet, the bird and the machine
    write_images(tmp_path / 'data', ['crane/x.png', 'dog/y.png'])
    with pytest.raises(ValueError, match=r"'crane' is not the name of exactly one"):
        labeled_images(tmp_path / 'data', names)
    truth = tmp_path / 'truth.txt'
    truth.write_text('crane/x.png crane\n')
    with pytest.raises(ValueError, match=r"line 1 of .*: 'crane', the class of crane/x\.png, is not"):
        labeled_images(tmp_path / 'data', names, truth)
    truth.write_text('crane/x.png 0\ndog/y.png dog\n')
    assert labeled_images(tmp_path / 'data', names, truth).classes == [0, 1]


@pytest.mark.parametrize(
    ('scores', 'name', 'message'),
    [
        ([0.0, float('inf')], 'a.png', 'The first: the model returns NaN or infinity for this image'),
        ([1.0, 0.0], 'none.png', 'could not classify any of 1 images. The first: no such file'),
    ],
)
def test_validate_without_any_result_raises(scores: list[float], name: str, message: str, tmp_path: Path) -> None:
    write_images(tmp_path, ['a.png'])
    with pytest.raises(ValueError, match=message):
        validate(constant(scores), LabeledImages([tmp_path / name], classes=[0]))


def test_classify_runs_a_model_without_splits_unchanged() -> None:
    overlay = dict(input_size=(3, 32, 32))
    model = timm.create_model('test_resnet', num_classes=2, pretrained_cfg_overlay=overlay).eval()
    images = [Image.new('RGB', (10, 10))] * (FEW_IMAGES + 1)
    found: Any = classify(model, images, Image.Image.copy, batch_size=8)
    scores = torch.stack([*found])
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(FEW_IMAGES + 1))


@pytest.mark.parametrize('count', [3, 60])
def test_plot_confusion_draws_any_number_of_classes(count: int, tmp_path: Path) -> None:
    names = [rf'class $\frac{i}$ of many, many classes' for i in range(count)]
    plot_confusion(torch.eye(count, dtype=torch.long) * 3, names, 'a', str(tmp_path / 'c.png'))
    with Image.open(tmp_path / 'c.png') as image:
        assert min(image.size) > 300
