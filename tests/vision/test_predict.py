"""Images of every kind are read correctly or refused in one line; predictions and figures are correct."""

import io
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from support import tiny
from timm.data import create_transform, resolve_model_data_config

from timm_res2net import CheckpointError, load_model
from timm_res2net.deploy.images import bundled_digits, find_images, preprocess, read_image
from timm_res2net.models.block import function_of
from timm_res2net.models.classifier import class_names
from timm_res2net.models.variants import WEIGHTS
from timm_res2net.recipes.digits import split
from timm_res2net.vision.figures import plot_pyramid
from timm_res2net.vision.predict import feature_pyramid, predict, pretrained_model
from timm_res2net.weights.errors import UnknownModelError


@pytest.fixture
def digits_model() -> Any:
    return pretrained_model('test_res2net.digits')


def as_image(pixels: np.ndarray) -> Image.Image:
    return Image.fromarray(pixels).convert('RGB')


def test_predict_embedded_model_has_published_accuracy(digits_model: Any) -> None:
    pixels, truth = split()['val']
    found = list(predict(digits_model, pixels, read=as_image, topk=1, batch_size=100))
    right = sum(prediction[0].label == str(label) for prediction, label in zip(found, truth))
    assert len(truth) == 599
    accuracy = 100 * right / len(truth)
    assert accuracy >= 99.0
    assert accuracy == pytest.approx(
        WEIGHTS['test_res2net.digits'].top1, abs=0.2
    )  # another processor may round otherwise


def test_predict_in_training_mode_raises_and_changes_nothing() -> None:
    model = timm.create_model('test_res2net')
    images = [image for image, _ in bundled_digits()]
    for some in (images[:2], images):
        with pytest.raises(ValueError, match=r'is in training mode.*; call its \.eval\(\) first'):
            next(predict(model, some, read=lambda image: image))
    assert model.get_buffer('bn1.num_batches_tracked') == 0


def test_predict_few_images_by_a_model_of_half_precision(digits_model: Any) -> None:
    images = [image for image, _ in bundled_digits()[:3]]
    expected = list(predict(digits_model, images, read=lambda image: image, topk=1))
    found = list(predict(digits_model.bfloat16(), images, read=lambda image: image, topk=1))
    assert [each[0].label for each in found] == [each[0].label for each in expected]


def test_bundled_digits_are_held_out_digits_with_their_labels() -> None:
    pixels, truth = split()['val']
    held_out = {(image.tobytes(), str(label)) for image, label in zip(pixels, truth)}
    digits = bundled_digits()
    assert len(digits) == 60
    assert {(image.convert('L').tobytes(), label) for image, label in digits} <= held_out


def test_predict_batch_size_keeps_predictions(digits_model: Any) -> None:
    digits = [image for image, _ in bundled_digits()]
    for batch_size in (1, 7):
        found = predict(digits_model, digits[:9], lambda image: image, batch_size=batch_size)
        x = torch.stack([create_transform(**resolve_model_data_config(digits_model))(digit) for digit in digits[:9]])
        expected = digits_model(x).softmax(1).max(1)
        for prediction, value, index in zip(found, *expected):
            assert prediction[0].index == index
            assert prediction[0].probability == pytest.approx(value.item(), abs=1e-5)
            assert sum(other.probability for other in prediction) <= 1.0001


GREY = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)
GREY_16 = GREY.astype(np.uint16) * 257 + 5 * (GREY < 255).astype(np.uint16)  # with other lower bytes


@pytest.mark.parametrize(
    ('saved', 'suffix'),
    [
        (Image.fromarray(GREY), 'png'),
        (Image.fromarray(GREY_16), 'png'),
        (Image.fromarray(GREY_16), 'tiff'),
        (Image.fromarray(GREY).convert('RGB'), 'png'),
        (Image.fromarray(GREY).convert('RGBA'), 'png'),
        (Image.fromarray(GREY).convert('LA'), 'png'),
        (Image.fromarray(GREY).convert('P'), 'png'),
        (Image.fromarray(GREY).convert('CMYK'), 'tiff'),
    ],
    ids=['L', '16-bit-png', '16-bit-tiff', 'RGB', 'RGBA', 'LA', 'P', 'CMYK'],
)
def test_read_image_every_mode_gives_same_rgb_pixels(saved: Image.Image, suffix: str, tmp_path: Path) -> None:
    path = tmp_path / f'image.{suffix}'
    saved.save(path)
    image = read_image(path)
    assert image.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(image), np.stack([GREY] * 3, axis=-1))


def test_read_image_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new('RGBA', (4, 4), (10, 20, 30, 0)).save(tmp_path / 'clear.png')
    assert read_image(tmp_path / 'clear.png').getpixel((1, 1)) == (255, 255, 255)


def test_read_image_applies_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise by a quarter
    Image.fromarray(GREY).save(tmp_path / 'turned.png', exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / 'turned.png').convert('L')), np.rot90(GREY, -1))


def test_predict_image_of_one_pixel_gives_predictions(tmp_path: Path, digits_model: Any) -> None:
    Image.new('L', (1, 1)).save(tmp_path / 'pixel.png')
    (found,) = predict(digits_model, [tmp_path / 'pixel.png'])
    assert not isinstance(found, ValueError)
    assert len(found) == 5


def png(width: int, height: int) -> bytes:
    """A PNG that claims these dimensions and holds next to nothing."""
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save(buffer, 'jpeg')
    return buffer.getvalue()


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'', 'not an image'),
        (b'some text', 'not an image'),
        (jpeg()[:900], 'truncated'),
        (png(60000, 60000), 'bomb'),
        (png(8, 8), 'can not be read'),
    ],
    ids=['empty', 'text', 'truncated', 'bomb', 'short'],
)
def test_read_image_bad_file_raises_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / 'bad.jpg').write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_image(tmp_path / 'bad.jpg')
    assert '\n' not in str(error.value)


@pytest.mark.parametrize(
    ('image', 'reason'),
    [
        (Image.new('F', (4, 4)), 'floating-point'),
        (Image.new('I', (4, 4), 1 << 20), 'beyond 16 bits'),
        (Image.new('L', (1, 300)), 'narrow'),
    ],
    ids=['float', '32-bit', 'narrow'],
)
def test_read_image_unsupported_pixels_or_shape_raises_value_error(
    image: Image.Image, reason: str, tmp_path: Path
) -> None:
    image.save(tmp_path / 'bad.tiff')
    with pytest.raises(ValueError, match=reason):
        read_image(tmp_path / 'bad.tiff')


def test_find_images_expands_folders_and_globs_and_lists_failures(tmp_path: Path) -> None:
    for name in ('a.png', 'b/c.jpg', 'b/d.txt', 'e/f.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'empty').mkdir()
    named = [f'{tmp_path}/{name}' for name in ('a.png', 'b', 'e/*.png', 'nothing*', 'empty', 'absent.png')]
    found = find_images(named)
    assert [str(file.relative_to(tmp_path)) for file in found.files] == ['a.png', 'b/c.jpg', 'e/f.png', 'absent.png']
    assert [Path(name).name for name, _ in found.failed] == ['nothing*', 'empty']
    assert [Path(name).name for name, _ in found.skipped] == ['d.txt']


def test_find_images_follows_linked_folders_once(tmp_path: Path) -> None:
    (tmp_path / 'real').mkdir()
    (tmp_path / 'real' / 'a.png').touch()
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'linked').symlink_to(tmp_path / 'real')
    (tmp_path / 'photos' / 'upwards').symlink_to(tmp_path / 'photos')
    assert find_images([str(tmp_path / 'photos')]).files == [tmp_path / 'photos' / 'linked' / 'a.png']


def test_find_images_in_unreadable_folder_keeps_those_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / 'a.png').touch()
    (tmp_path / 'closed').mkdir()
    scandir = os.scandir

    def refuse(path: str) -> Any:
        if path.endswith('closed'):
            raise PermissionError(13, 'Permission denied', path)
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    found = find_images([str(tmp_path)])
    assert found.files == [tmp_path / 'a.png']
    assert found.failed == [(str(tmp_path / 'closed'), 'this folder can not be read: Permission denied')]


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('res2nt50_26w_4s', 'res2net50_26w_4s'),
        ('resnet5O', 'resnet50'),
        ('zzzzzz', 'timm-res2net list'),
        ('res2net50d.in22k', 'res2net50d.in1k'),
    ],
)
def test_pretrained_model_and_load_model_of_unknown_name_raise_with_suggestion(
    name: str, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(UnknownModelError, match=hint):
        pretrained_model(name)
    save_file(timm.create_model('test_res2net').state_dict(), tmp_path / 'weights.safetensors')
    with pytest.raises(UnknownModelError, match=hint):
        load_model(tmp_path / 'weights.safetensors', name)


def test_pretrained_model_takes_number_of_classes_from_file(tmp_path: Path) -> None:
    expected = timm.create_model('test_res2net', num_classes=3).eval()
    file = str(tmp_path / 'fine-tuned.safetensors')
    save_file(expected.state_dict(), file)
    model = pretrained_model('test_res2net', file)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(model(x), expected(x), rtol=0, atol=0)
    assert class_names(model) == ['class 0', 'class 1', 'class 2']


def test_pretrained_model_weights_of_plain_resnet_are_refused(tmp_path: Path) -> None:
    file = str(tmp_path / 'other.safetensors')
    save_file(timm.create_model('test_resnet').state_dict(), file)
    with pytest.raises(CheckpointError, match='the names of a plain ResNet'):
        pretrained_model('test_res2net', file)


def test_pretrained_model_file_without_weights_raises_one_line(tmp_path: Path) -> None:
    (tmp_path / 'bad.pth').write_bytes(b'no pickle')
    with pytest.raises(CheckpointError, match='is no file of weights') as error:
        pretrained_model('test_res2net', str(tmp_path / 'bad.pth'))
    assert '\n' not in str(error.value)


def test_pretrained_model_computes_the_function_that_the_file_states_and_else_its_own(tmp_path: Path) -> None:
    file = str(tmp_path / 'other.safetensors')
    state = timm.create_model('test_res2net').state_dict()
    save_file(state, file, {'first_block': 'paddle'})
    assert function_of(pretrained_model('test_res2net', file)).first_block == 'paddle'
    save_file(state, file)
    vd = timm.create_model('res2net50_vd_26w_4s', layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))
    save_file(vd.state_dict(), file)
    with pytest.raises(CheckpointError, match="does not tell whether its network has first_block='official'"):
        pretrained_model('res2net50_vd_26w_4s', file, layers=(1, 1, 1, 1), channels=(8, 8, 8, 8))


def test_class_names_of_imagenet_are_words() -> None:
    labels = class_names(timm.create_model('res2net50d', device='meta'))
    assert len(labels) == 1000
    assert 'tabby' in labels[281]


def test_plot_pyramid_has_panel_for_image_and_each_stride(tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True, features_only=True).eval()
    shown, features = feature_pyramid(model, bundled_digits()[0][0])
    assert shown.shape == (3, 32, 32)
    assert [tuple(feature.shape) for feature in features] == [
        (16, 16, 16),
        (32, 8, 8),
        (64, 4, 4),
        (128, 2, 2),
        (256, 1, 1),
    ]
    out = tmp_path / 'pyramid.png'
    plot_pyramid(shown, features, model.feature_info.reduction(), str(out))
    with Image.open(out) as image:
        panels = np.asarray(image.convert('L'))[60:-10].std(axis=0) > 0  # columns that are not blank
    starts = np.flatnonzero(np.diff(panels.astype(int)) == 1)
    assert len(starts) + panels[0] >= 5  # the last panel is one pixel, so of one colour
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize('name', ['absent/pyramid.png', 'pyramid.xyz'])
def test_plot_pyramid_unwritable_path_raises_and_leaves_no_file(name: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, OSError), match='pyramid'):
        plot_pyramid(torch.zeros(3, 4, 4), [torch.zeros(2, 2, 2)], [2], str(tmp_path / name))
    assert list(tmp_path.iterdir()) == []


def test_read_image_16_bit_greys_keep_their_upper_byte(tmp_path: Path) -> None:
    greys = np.array([[0, 256, 257, 513], [32767, 32896, 65278, 65535]], np.uint16)
    Image.fromarray(greys).save(tmp_path / 'a.png')
    assert np.asarray(read_image(tmp_path / 'a.png'))[..., 0].tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]


def test_preprocess_returns_the_image_as_it_looks(digits_model: Any) -> None:
    image = bundled_digits()[20][0].resize((32, 32))
    _, visible = preprocess(digits_model, image)
    torch.testing.assert_close(visible, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, rtol=0, atol=1e-6)


def test_preprocess_for_one_channel_returns_greys() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    x, visible = preprocess(tiny(in_chans=1), Image.fromarray(pixels))
    greys = torch.from_numpy(np.array(Image.fromarray(pixels).convert('L')))[None] / 255
    torch.testing.assert_close(x, (greys - 0.5) / 0.5)
    torch.testing.assert_close(visible, greys.expand(3, -1, -1))


def test_predict_by_a_model_of_four_channels_raises_with_reason() -> None:
    with pytest.raises(ValueError, match='test_res2net takes images of 4 channels, and files have 3, or 1'):
        next(predict(tiny(in_chans=4), [Image.new('RGB', (8, 8))], read=lambda image: image))


def test_predict_topk_beyond_the_classes_returns_all(digits_model: Any) -> None:
    (found,) = predict(digits_model, [bundled_digits()[0][0]], read=lambda image: image, topk=99)
    assert len(found) == 10
