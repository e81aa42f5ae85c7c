"""Writes scikit-learn's handwritten digits as an image folder for timm's train script.

    python -m timm_res2net.recipes.digits data/digits

The data are the test part of `Optical Recognition of Handwritten Digits` - https://archive.ics.uci.edu/dataset/80,
1797 images of 8x8 pixels with 17 grey levels, light strokes on dark ground (CC BY 4.0). A third of each class is held
out.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .arguments import make_parser, reported


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Splits the digits into 'train' (1198) and 'val' (599, the held-out third).

    Returns:
        For each part the images, (N, 8, 8) uint8 in 0..255, and the labels, (N,) in 0..9.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = np.round(digits.images * (255 / 16)).astype(np.uint8)
    x, x_val, y, y_val = train_test_split(
        images, digits.target, test_size=1 / 3, stratify=digits.target, random_state=0
    )
    return {'train': (x, y), 'val': (x_val, y_val)}


def main(argv: list[str] | None = None) -> None:
    """Writes `FOLDER/{train,val}/LABEL/NUMBER.png`."""
    parser = make_parser(__doc__)
    parser.add_argument('folder', type=Path, help='where to write')
    folder = parser.parse_args(argv).folder
    with reported(parser):
        for part, (images, labels) in split().items():
            for i, (image, label) in enumerate(zip(images, labels)):
                path = folder / part / str(label) / f'{i:04}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
            print(f'{len(images)} images in {folder / part}')


if __name__ == '__main__':
    main()
