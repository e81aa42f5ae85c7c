"""Data that the tests of recipes share."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from timm_res2net.recipes import multi_scale


@pytest.fixture(scope='session')
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder like that of Fashion-MNIST, whose classes are discs, rings, bars, ..., each in ten brightnesses."""
    folder = tmp_path_factory.mktemp('fashion-mnist')
    y, x = np.mgrid[-13.5:14, -13.5:14]
    radius = np.hypot(x, y)
    shapes = [
        *(radius < 13, (radius < 13) & (radius > 7), abs(x) < 5, abs(y) < 5, (abs(x) < 4) | (abs(y) < 4)),
        *(abs(x - y) < 5, (abs(x - y) < 5) | (abs(x + y) < 5), x + y < 0, np.maximum(abs(x), abs(y)) < 12),
        (np.maximum(abs(x), abs(y)) < 12) & (np.maximum(abs(x), abs(y)) > 7),
    ]
    brightness = np.linspace(120, 255, 10).astype(np.uint8)[:, None, None, None]
    images = (np.stack(shapes) * brightness).reshape(100, 28, 28).astype(np.uint8)
    labels = np.tile(np.arange(10, dtype=np.uint8), 10)
    for part, count in (('train', 60_000), ('t10k', 10_000)):
        content = bytes(16) + images.tobytes() * (count // 100)
        (folder / f'{part}-images-idx3-ubyte').write_bytes(content)
        packed = gzip.compress(bytes(8) + labels.tobytes() * (count // 100), compresslevel=1)
        (folder / f'{part}-labels-idx1-ubyte.gz').write_bytes(packed)
    return folder


@pytest.fixture(scope='session')
def detection_set(fashion_mnist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small set of `multi_scale`."""
    folder = tmp_path_factory.mktemp('sets') / 'detection'
    multi_scale.write(folder, fashion_mnist, {'train': 48, 'val': 16, 'unseen': 16})
    return folder


@pytest.fixture(scope='session')
def simple_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A set that is quickly learnt: a bright or a dark square on each image of grey noise."""
    folder = tmp_path_factory.mktemp('sets') / 'simple'
    (folder / 'train').mkdir(parents=True)
    (folder / 'annotations').mkdir()
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for index in range(32):
        pixels = rng.integers(90, 160, (64, 64), dtype=np.uint8)
        mask = np.zeros((64, 64), bool)
        side = int(rng.integers(16, 40))
        top, left = (int(start) for start in rng.integers(64 - side, size=2))
        mask[top : top + side, left : left + side] = True
        pixels[mask] = 255 * (index % 2)
        Image.fromarray(pixels).save(folder / 'train' / f'{index}.png')
        images.append(dict(id=index, file_name=f'{index}.png', width=64, height=64))
        annotations.append(dict(id=index + 1, image_id=index, **multi_scale.annotation(index % 2, mask)))
    categories = [dict(id=1, name='dark'), dict(id=2, name='bright')]
    document = dict(images=images, annotations=annotations, categories=categories)
    (folder / 'annotations' / 'instances_train.json').write_text(json.dumps(document))
    return folder
