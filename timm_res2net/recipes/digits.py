"""Writes scikit-learn's handwritten digits as an image folder for timm's train script.

    python -m timm_res2net.recipes.digits data/digits

The data are the test part of `Optical Recognition of Handwritten Digits` (CC BY 4.0,
https://archive.ics.uci.edu/dataset/80): 1797 images of 8x8 pixels with 17 gray levels, light strokes on a dark
background. A third of each class is held out.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from .arguments import make_parser, report_errors


def split() -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Returns images, (N, 8, 8) uint8 in 0..255, and labels, (N,), of 'train' (1198) and 'val' (599 held out)."""
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
    parser.add_argument('folder', type=Path, help='folder to write')
    folder = parser.parse_args(argv).folder
    with report_errors(parser):
        for part, (images, labels) in split().items():
            for i, (image, label) in enumerate(zip(images, labels)):
                path = folder / part / str(label) / f'{i:04}.png'
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
            print(f'{len(images)} images in {folder / part}')


if __name__ == '__main__':
    main()
