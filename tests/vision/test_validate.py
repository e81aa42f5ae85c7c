"""`validate` counts what a model classifies rightly, and names what can't be counted."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from timm_res2net.deploy.images import bundled_digits
from timm_res2net.models.variants import WEIGHTS
from timm_res2net.recipes.digits import split
from timm_res2net.vision.figures import plot_confusion
from timm_res2net.vision.predict import HANDFUL, classify, predict
from timm_res2net.vision.validate import LabelledImages, labelled_images, validate


@pytest.fixture(scope='module')
def digits() -> nn.Module:
    return timm.create_model('test_res2net.digits', pretrained=True).eval()


class Constant(nn.Module):
    """A classifier that always gives the same scores."""

    def __init__(self, scores: list[float]) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.tensor(scores, dtype=torch.float32))
        self.num_classes = len(scores)
        self.pretrained_cfg = dict(input_size=(3, 8, 8), label_names=[f'c{i}' for i in range(len(scores))])

    def forward(self, x: Tensor) -> Tensor:
        return self.scores.expand(len(x), -1)


def write_images(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (10, 10)).save(folder / name)


def test_validate_accuracy_of_digits_is_that_of_the_weights_table(digits: nn.Module, tmp_path: Path) -> None:
    for i, (image, label) in enumerate(zip(*split()['val'])):
        (tmp_path / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(tmp_path / str(label) / f'{i}.png')
    images = labelled_images(tmp_path, [str(i) for i in range(10)])
    found = validate(digits, images)
    assert (found.images, round(found.top1, 3), found.failed) == (599, WEIGHTS['test_res2net.digits'].top1, [])
    assert int(found.confusion.diagonal().sum()) == round(found.top1 * 5.99)
    assert int(found.confusion.sum()) == 599


def test_validate_counts_top1_top5_confusion_and_failures_of_a_known_case(tmp_path: Path) -> None:
    write_images(tmp_path, ['c0/a.png', 'c1/a.png', 'c1/b.png', 'c5/a.png'])
    (tmp_path / 'c1' / 'broken.png').write_bytes(b'no image')
    model = Constant([5, 4, 3, 2, 1, 0]).eval()  # class 0 is the likeliest, class 5 the sixth
    found = validate(model, labelled_images(tmp_path, model.pretrained_cfg['label_names']))
    assert (found.images, found.top1, found.top5) == (4, 25, 75)
    assert found.confusion[:, 0].tolist() == [1, 2, 0, 0, 0, 1]
    assert found.confusion[:, 1:].sum() == 0
    ((file, reason),) = found.failed
    assert (Path(file).name, 'not an image' in reason) == ('broken.png', True)


def test_labelled_images_by_folders_of_other_names_are_in_the_order_of_timm(tmp_path: Path) -> None:
    write_images(tmp_path, ['n10/a.png', 'n2/b.png', '.hidden/c.png'])
    found = labelled_images(tmp_path, ['cat', 'dog'])
    assert [(file.name, index) for file, index in zip(found.files, found.classes)] == [('b.png', 0), ('a.png', 1)]


def test_labelled_images_by_a_file_that_is_no_text_raises_with_its_name(tmp_path: Path) -> None:
    (tmp_path / 'labels.txt').write_bytes(b'\xff\xfe')
    with pytest.raises(ValueError, match=r'labels\.txt is no text in UTF-8'):
        labelled_images(tmp_path, ['cat'], tmp_path / 'labels.txt')


def test_labelled_images_by_a_file_take_names_and_numbers(tmp_path: Path) -> None:
    write_images(tmp_path, ['a.png', 'deep/b.png'])
    (tmp_path / 'labels.txt').write_text('a.png tabby cat\n\ndeep/b.png 0\n')
    found = labelled_images(tmp_path, ['dog', 'tabby cat'], tmp_path / 'labels.txt')
    assert [(file.name, index) for file, index in zip(found.files, found.classes)] == [('a.png', 1), ('b.png', 0)]


def test_labelled_images_by_a_file_take_the_longest_name_with_blanks_that_is_a_file(tmp_path: Path) -> None:
    write_images(tmp_path, ['my.png', 'my.png cat.png'])
    lines = 'my.png cat.png tabby cat', 'my.png cat.png  0', 'my.png dog', 'none.png tabby cat'
    (tmp_path / 'labels.txt').write_text('\n'.join(lines))
    found = labelled_images(tmp_path, ['dog', 'tabby cat'], tmp_path / 'labels.txt')
    assert [file.name for file in found.files] == ['my.png cat.png', 'my.png cat.png', 'my.png', 'none.png']
    assert found.classes == [1, 0, 0, 1]


@pytest.mark.parametrize(
    ('images', 'labels', 'message'),
    [
        (['a/x.png', 'b/x.png', 'c/x.png'], None, '3 folders and the model 2 classes, of which none is a'),
        (['x.png'], None, 'has no folder for a class; give the classes of its images by a file, --truth'),
        (['x.png'], 'x.png 2', "line 1 of .* gives x.png the class '2', which the model lacks"),
        (['x.png'], 'x.png', "the class '', which the model lacks"),
        (['a b.png'], 'a b.png 2', "line 1 of .* gives a b.png the class '2', which the model lacks"),
        (['x.png'], '\n', 'has no line with an image'),
    ],
)
def test_labelled_images_that_do_not_fit_raise_with_reason(
    images: list[str], labels: str | None, message: str, tmp_path: Path
) -> None:
    write_images(tmp_path / 'data', images)
    if labels is not None:
        (tmp_path / 'labels.txt').write_text(labels)
    with pytest.raises(ValueError, match=message):
        labelled_images(tmp_path / 'data', ['cat', 'dog'], tmp_path / 'labels.txt' if labels is not None else None)
    (tmp_path / 'empty' / 'cat').mkdir(parents=True)
    with pytest.raises(ValueError, match='no image in'):
        labelled_images(tmp_path / 'empty', ['cat', 'dog'])
    with pytest.raises(ValueError, match='is no folder'):
        labelled_images(tmp_path / 'none', ['cat', 'dog'])


def test_labelled_images_by_a_name_of_two_classes_raise(tmp_path: Path) -> None:
    names = ['crane', 'dog', 'crane']  # as in ImageNet, the bird and the machine
    write_images(tmp_path / 'data', ['crane/x.png', 'dog/y.png'])
    with pytest.raises(ValueError, match=r"'crane' in .* is the name of several classes; give numbers by a file"):
        labelled_images(tmp_path / 'data', names)
    (tmp_path / 'truth.txt').write_text('crane/x.png crane\n')
    with pytest.raises(ValueError, match=r"line 1 of .*'crane' is the name of several classes; give a number"):
        labelled_images(tmp_path / 'data', names, tmp_path / 'truth.txt')
    (tmp_path / 'truth.txt').write_text('crane/x.png 0\ndog/y.png dog\n')
    assert labelled_images(tmp_path / 'data', names, tmp_path / 'truth.txt').classes == [0, 1]


@pytest.mark.parametrize('score', [float('nan'), float('inf')])
def test_images_for_which_the_model_gives_no_finite_number_are_errors(score: float, tmp_path: Path) -> None:
    write_images(tmp_path, ['c0/a.png'])
    model = Constant([0.0, score]).eval()
    (found,) = predict(model, [tmp_path / 'c0' / 'a.png'])
    assert isinstance(found, ValueError)
    with pytest.raises(ValueError, match='the first one: the model gives no finite number for this image'):
        validate(model, LabelledImages([tmp_path / 'c0' / 'a.png'], classes=[0]))


def test_validate_without_any_readable_image_raises(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match='none of 1 images could be read; the first one: there is no such file'):
        validate(Constant([1.0, 0.0]).eval(), LabelledImages([tmp_path / 'none.png'], classes=[0]))


def test_classify_many_images_by_processes_equals_few_in_order_with_errors(digits: nn.Module, tmp_path: Path) -> None:
    files = []
    for i, (image, _) in enumerate(bundled_digits()[: 2 * HANDFUL]):
        files.append(tmp_path / f'{i}.png')
        image.save(files[-1])
    files[5].write_bytes(b'no image')
    together = list(predict(digits, files, batch_size=4))
    alone = [next(predict(digits, [file])) for file in files]
    for i, (many, one) in enumerate(zip(together, alone, strict=True)):
        if i == 5:
            assert isinstance(many, ValueError)
            assert str(many) == str(one)
        else:
            assert [each.index for each in many] == [each.index for each in one]
            np.testing.assert_allclose([x.probability for x in many], [x.probability for x in one], atol=1e-5)


def test_classify_many_images_by_a_model_without_splits_runs_it_as_it_is() -> None:
    images = [Image.new('RGB', (10, 10))] * (HANDFUL + 1)
    identity: Callable[[Any], Any] = lambda image: image  # noqa: E731
    scores = list(classify(Constant([0.0, 0.0]).eval(), images, identity, 8, False))
    torch.testing.assert_close(torch.stack(scores), torch.full((HANDFUL + 1, 2), 0.5))


@pytest.mark.parametrize('count', [3, 30, 60])
def test_plot_confusion_draws_a_picture_of_any_number_of_classes(count: int, tmp_path: Path) -> None:
    confusion = torch.eye(count, dtype=torch.long) * 3
    plot_confusion(
        confusion, [f'class number {i} of many, many classes' for i in range(count)], 'a', str(tmp_path / 'c.png')
    )
    with Image.open(tmp_path / 'c.png') as image:
        assert min(image.size) > 300
        assert re.match('RGB', image.mode)
