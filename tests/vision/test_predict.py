"""Images of every kind are read correctly or refused in one line; predictions and pictures are correct."""

import io
import os
import struct
import zlib
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

from timm_res2net import load_model
from timm_res2net._errors import UnknownModelError
from timm_res2net._images import bundled_digits, find_images, preprocess, read_image
from timm_res2net.models.classifier import class_names
from timm_res2net.recipes.digits import split
from timm_res2net.vision.figures import plot_pyramid
from timm_res2net.vision.predict import feature_pyramid, label_classes, name_classes, predict, pretrained_model


def constant(logits: list[float]) -> Any:
    """Makes a classifier of images of 32 x 32 that returns the same logits for every image."""
    model: Any = tiny(num_classes=len(logits), pretrained_cfg_overlay=dict(input_size=(3, 32, 32)))
    torch.nn.init.zeros_(model.fc.weight)
    model.fc.bias.data = torch.tensor(logits, dtype=torch.float32)
    return model


GRAY = np.linspace(0, 255, 48, dtype=np.uint8).reshape(6, 8)


@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'LA', 'P', 'CMYK'])
def test_read_image_every_mode_gives_same_rgb_pixels(mode: str, tmp_path: Path) -> None:
    file = tmp_path / f'image.{"tiff" if mode == "CMYK" else "png"}'
    Image.fromarray(GRAY).convert(mode).save(file)
    image = read_image(file)
    assert image.mode == 'RGB'
    np.testing.assert_array_equal(np.asarray(image), np.stack([GRAY] * 3, axis=-1))


def test_read_image_16_bit_grays_are_scaled_to_8_bits(tmp_path: Path) -> None:
    grays = np.array([[0, 256, 257, 513], [32767, 32896, 65278, 65535]], np.uint16)
    Image.fromarray(grays).save(tmp_path / 'a.png')
    found = np.asarray(read_image(tmp_path / 'a.png'))[..., 0]
    assert found.tolist() == [[0, 0, 1, 1], [127, 128, 254, 255]]


def test_read_image_transparency_becomes_white(tmp_path: Path) -> None:
    Image.new('RGBA', (4, 4), (10, 20, 30, 0)).save(tmp_path / 'clear.png')
    assert read_image(tmp_path / 'clear.png').getpixel((1, 1)) == (255, 255, 255)


def test_read_image_applies_exif_rotation(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by a quarter turn clockwise
    Image.fromarray(GRAY).save(tmp_path / 'turned.png', exif=exif)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / 'turned.png').convert('L')), np.rot90(GRAY, -1))


def test_read_image_never_opens_postscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr('PIL.EpsImagePlugin.EpsImageFile._open', lambda self: pytest.fail('opened PostScript'))
    (tmp_path / 'photo.png').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n')
    with pytest.raises(ValueError, match='not an image in a format that Pillow reads'):
        read_image(tmp_path / 'photo.png')
    (tmp_path / 'drawing.eps').touch()
    assert find_images([str(tmp_path)]).files == [tmp_path / 'photo.png']


def png(width: int, height: int) -> bytes:
    """Returns a PNG that claims these dimensions and has hardly any pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(b'\0')) + chunk(b'IEND', b'')


def saved(image: Image.Image, suffix: str = 'tiff') -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, suffix)
    return buffer.getvalue()


NOISE = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    ('content', 'reason'),
    [
        (b'some text', 'not an image'),
        (saved(NOISE, 'jpeg')[:900], 'cannot read this image: .*truncated'),
        (png(60000, 60000), 'exceed|bomb'),
        (png(8000, 7000), '8000 x 7000 pixels exceed 50,000,000.*--max-pixels'),
        (saved(Image.new('F', (4, 4))), 'floating-point'),
        (saved(Image.new('I', (4, 4), 1 << 20)), '32-bit integers of unknown range'),
        (saved(Image.new('I', (4, 4), 200), 'tiff'), '32-bit integers of unknown range'),
        (saved(Image.new('L', (1, 300))), 'narrow'),
    ],
    ids=['text', 'truncated', 'bomb', 'large', 'float', '32-bit', '8 bits in 32', 'narrow'],
)
def test_read_image_bad_file_raises_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    (tmp_path / 'bad.jpg').write_bytes(content)
    with pytest.raises(ValueError, match=reason) as error:
        read_image(tmp_path / 'bad.jpg')
    assert '\n' not in str(error.value)


def test_read_image_accepts_exactly_max_pixels(tmp_path: Path) -> None:
    Image.new('L', (30, 20)).save(tmp_path / 'small.png')
    assert read_image(tmp_path / 'small.png', max_pixels=600).size == (30, 20)
    with pytest.raises(ValueError, match='exceed 599'):
        read_image(tmp_path / 'small.png', max_pixels=599)


def test_find_images_expands_folders_and_globs_and_lists_failures(tmp_path: Path) -> None:
    for name in ('a.png', 'b/c.jpg', 'b/d.txt', 'e/f.png'):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / 'empty').mkdir()
    named = [f'{tmp_path}/{name}' for name in ('a.png', 'b', 'e/*.png', 'nothing*', 'empty', 'absent.png')]
    found = find_images(named)
    assert [str(file.relative_to(tmp_path)) for file in found.files] == ['a.png', 'b/c.jpg', 'e/f.png', 'absent.png']
    assert [Path(name).name for name, _ in found.failed] == ['nothing*', 'empty']
    assert [Path(name).name for name in found.skipped] == ['d.txt']


def test_find_images_follows_linked_folders_once(tmp_path: Path) -> None:
    for folder in ('photos', 'real'):
        (tmp_path / folder).mkdir()
        (tmp_path / 'photos' / folder).symlink_to(tmp_path / folder)
    (tmp_path / 'real' / 'a.png').touch()
    assert find_images([str(tmp_path / 'photos')]).files == [tmp_path / 'photos' / 'real' / 'a.png']


def test_find_images_in_unreadable_folder_keeps_its_neighbors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
    assert found.failed == [(str(tmp_path / 'closed'), 'cannot read this folder: Permission denied')]


def test_preprocess_returns_the_image_as_it_looks() -> None:
    image = bundled_digits()[20][0].resize((32, 32))
    _, visible = preprocess(timm.create_model('test_res2net.digits'), image)
    torch.testing.assert_close(visible, torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255, rtol=0, atol=1e-6)


def test_preprocess_for_one_channel_returns_gray_images() -> None:
    x, visible = preprocess(tiny(in_chans=1), NOISE.resize((32, 32)))
    grays = torch.from_numpy(np.array(NOISE.resize((32, 32)).convert('L')))[None] / 255
    torch.testing.assert_close(x, (grays - 0.5) / 0.5)
    torch.testing.assert_close(visible, grays.expand(3, -1, -1))


def test_bundled_digits_are_held_out_digits_with_their_labels() -> None:
    held_out = {(image.tobytes(), str(label)) for image, label in zip(*split()['val'])}
    digits = bundled_digits()
    assert len(digits) == 60
    assert {(image.convert('L').tobytes(), label) for image, label in digits} <= held_out


@pytest.mark.parametrize('count', [9, 20])  # for many images, the model is fused
def test_predict_equals_the_model_with_timm_preprocessing_and_yields_errors(count: int) -> None:
    def read(index: int) -> Image.Image:
        if index == 5:
            raise ValueError('not an image')
        return digits[index]

    model = pretrained_model('test_res2net.digits')
    digits = [image for image, _ in bundled_digits()[::3][:count]]
    x = torch.stack([create_transform(**resolve_model_data_config(model))(digit) for digit in digits])
    expected = zip(*model(x).softmax(1).max(1))
    found: Any = list(predict(model, range(count), read, batch_size=7))
    assert str(found[5]) == 'not an image'
    for i, (prediction, (value, index)) in enumerate(zip(found, expected, strict=True)):
        if i != 5:
            assert prediction[0].index == index
            assert prediction[0].probability == pytest.approx(value.item(), abs=1e-5)


def test_predict_with_a_model_of_four_channels_raises_with_reason() -> None:
    with pytest.raises(ValueError, match='test_res2net takes images with 4 channels, but image files have 3, or 1'):
        next(predict(tiny(in_chans=4), [NOISE], Image.Image.copy))


@pytest.mark.parametrize(
    ('logits', 'options', 'expected'),
    [
        ([-2.0], {}, [('positive', 0.1192)]),
        ([-2.0, 0.0, 2.0], dict(topk=99), [('class 2', 0.8668), ('class 1', 0.1173), ('class 0', 0.0159)]),
        ([-2.0, 0.0, 2.0], dict(threshold=0.5), [('class 2', 0.8668)]),
        ([-2.0, 0.0, 2.0], dict(multi_label=True, topk=2), [('class 2', 0.8808), ('class 1', 0.5)]),
        ([-2.0, 0.0, 2.0], dict(multi_label=True, threshold=0.5), [('class 2', 0.8808), ('class 1', 0.5)]),
    ],
)
def test_predict_uses_a_softmax_or_a_sigmoid_for_one_logit_and_multi_label(
    logits: list[float], options: dict[str, Any], expected: list[tuple[str, float]]
) -> None:
    pixel = Image.new('RGB', (1, 1))
    (found,) = predict(constant(logits).bfloat16(), [pixel], Image.Image.copy, **options)
    assert [(each.label, round(each.probability, 4)) for each in found] == expected  # type: ignore[union-attr]


@pytest.mark.parametrize('labels', [['cat'], ['dog', 'cat']])
def test_name_classes_of_one_logit_uses_the_last_name(labels: list[str]) -> None:
    model = constant([0.0])
    name_classes(model, labels)
    assert label_classes(model) == ['cat']


@pytest.mark.parametrize(
    ('name', 'hint'),
    [
        ('res2nt50_26w_4s', 'res2net50_26w_4s'),
        ('zzzzzz', 'timm-res2net list'),
        ('res2net50d.in22k', 'res2net50d.in1k'),
    ],
)
def test_pretrained_model_and_load_model_of_unknown_name_suggest_one(name: str, hint: str, tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match=hint):
        pretrained_model(name)
    save_file(tiny().state_dict(), tmp_path / 'weights.safetensors')
    with pytest.raises(UnknownModelError, match=hint):
        load_model(tmp_path / 'weights.safetensors', name)


def test_class_names_of_imagenet_are_words() -> None:
    assert 'tabby' in class_names(timm.create_model('res2net50d', device='meta'))[281]


def test_plot_pyramid_has_panel_for_image_and_each_stride(tmp_path: Path) -> None:
    model = timm.create_model('test_res2net.digits', pretrained=True, features_only=True).eval()
    shown, features = feature_pyramid(model, bundled_digits()[0][0])
    assert shown.shape == (3, 32, 32)
    assert [tuple(feature.shape) for feature in features] == [(256 >> i, 1 << i, 1 << i) for i in range(4, -1, -1)]
    plot_pyramid(shown, features, model.feature_info.reduction(), str(tmp_path / 'pyramid.png'))
    with Image.open(tmp_path / 'pyramid.png') as image:
        panels = np.asarray(image.convert('L'))[60:-10].std(axis=0) > 0  # columns that are not blank
    starts = np.flatnonzero(np.diff(panels.astype(int)) == 1)
    assert len(starts) + panels[0] >= 5  # the last panel shows a single pixel, hence no contrast
