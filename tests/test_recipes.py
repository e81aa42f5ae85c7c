"""What writes the recipes' data."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from timm_res2net.recipes.digits import split


def test_digits_are_split_by_thirds_without_overlap_or_bias() -> None:
    parts = split()
    assert {name: len(labels) for name, (_, labels) in parts.items()} == {'train': 1198, 'val': 599}
    share = np.bincount(parts['val'][1]) / (np.bincount(parts['train'][1]) + np.bincount(parts['val'][1]))
    np.testing.assert_allclose(share, 1 / 3, atol=0.01)


def test_digits_are_written_as_an_image_folder(tmp_path: Path) -> None:
    subprocess.run([sys.executable, '-m', 'timm_res2net.recipes.digits', str(tmp_path)], check=True)
    for part, (images, labels) in split().items():
        assert sorted(path.name for path in (tmp_path / part).iterdir()) == list('0123456789')
        assert sum(1 for _ in (tmp_path / part).rglob('*.png')) == len(images)
        with Image.open(tmp_path / part / str(labels[5]) / '0005.png') as image:
            np.testing.assert_array_equal(np.asarray(image), images[5])
