"""Writes a data set of objects that differ in size: items of Fashion-MNIST on cluttered photographs.

    python -m timm_res2net.recipes.multi_scale data/multi_scale --fashion-mnist data

A canvas has 96 x 96 pixels and shows one to six items, at half to three times their size of 28 x 28 pixels. They
overlap little. The background is cut from one of scikit-image's photographs. The folder has boxes for `detect` and
masks for `segment`; both mark the visible part of each item:

    {train,val,unseen}/images/NUMBER.png
    {train,val,unseen}/masks/NUMBER.png                labels of the items from 1, and 0 for the background
    annotations/instances_{train,val,unseen}.json      boxes in COCO's format

No item and no background of `train` occurs in the other parts, and items in `unseen` have sizes that occur in no other
part. Every run writes the same bytes.

Fashion-MNIST (MIT, https://github.com/zalandoresearch/fashion-mnist) is read by torchvision from `FashionMNIST/raw/` in
the given folder, and downloaded if it is not there. Offline, unpack the files of Debian's package
`dataset-fashion-mnist` there with gunzip.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from .._errors import first_line
from .._files import make_folder, temporary_folder
from .arguments import make_parser, report_errors

Bytes = NDArray[np.uint8]

CLASSES = 'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'
SIDE = 96  # width and height of a canvas, in pixels
ITEM = 28  # width and height of an original item, in pixels
SEEN = ((0.5, 3.0),)
MAGNIFICATIONS = {'train': SEEN, 'val': SEEN, 'unseen': ((0.36, 0.5), (3.0, 3.4))}  # ranges of item sizes
COUNTS = {'train': 10_000, 'val': 2_000, 'unseen': 2_000}  # canvases in each part
COVERED = 0.1  # largest part of an item that another one may cover
TRIES = 20  # attempts to place an item
EMPTY = 15  # highest gray level of Fashion-MNIST's background, which has JPEG artefacts around the items

PHOTOGRAPHS = (
    'astronaut.png', 'brick.png', 'camera.png', 'cell.png', 'chelsea.png', 'coffee.png', 'coins.png', 'grass.png',
    'gravel.png', 'hubble_deep_field.jpg', 'ihc.png', 'moon.png', 'motorcycle_left.png', 'page.png', 'retina.jpg',
    'rocket.jpg',
)  # fmt: skip


@dataclass(frozen=True)
class Canvas:
    """An image with its items."""

    image: Bytes  # (H, W)
    labels: list[int]  # of each item, an index of CLASSES
    masks: list[NDArray[np.bool_]]  # (H, W), the visible part of each item
    sizes: list[int]  # width and height of each item with its empty margin, in pixels


def fashion_mnist(folder: Path, train: bool) -> tuple[Bytes, NDArray[np.int64]]:
    """Reads images, (N, 28, 28), and labels, (N,), of Fashion-MNIST; OSError if they are missing or damaged."""
    from torchvision.datasets import FashionMNIST

    try:
        dataset = FashionMNIST(str(folder), train, download=True)
    except Exception as error:  # damaged files cause errors of many types
        problem = f'cannot read or download Fashion-MNIST in {str(folder)!r}: {first_line(error)}'
        raise OSError(f'{problem}. If you are offline, unpack its four files into FashionMNIST/raw/ there') from error
    return dataset.data.numpy(), dataset.targets.numpy()


def whole_photographs(mode: str) -> Iterator[Image.Image]:
    """Yields scikit-image's photographs in one of Pillow's modes; ImportError if it is not installed."""
    for name in PHOTOGRAPHS:
        with (files('skimage.data') / name).open('rb') as file:
            yield Image.open(file).convert(mode)


def photographs(train: bool) -> list[Image.Image]:
    """Returns the left two thirds of each photograph for training, else the right third, in gray."""
    parts = []
    for photograph in whole_photographs('L'):
        cut = photograph.width * 2 // 3
        box = (0, 0, cut, photograph.height) if train else (cut, 0, photograph.width, photograph.height)
        parts.append(photograph.crop(box))
    return parts


def draw_canvases(folder: Path, part: str, count: int, items: tuple[int, int] = (1, 6)) -> Iterator[Canvas]:
    """Draws the first `count` canvases of a part. The same arguments always give the same canvases.

    `folder` contains Fashion-MNIST; `items` is the smallest and largest number of items on a canvas.
    """
    images, labels = fashion_mnist(folder, train=part == 'train')
    backgrounds, ranges = photographs(train=part == 'train'), MAGNIFICATIONS[part]
    for index in range(count):
        rng = np.random.default_rng([0, list(MAGNIFICATIONS).index(part), index])
        pixels = cut_background(rng, backgrounds)
        canvas = Canvas(pixels, [], [], [])
        wanted = int(rng.integers(items[0], items[1] + 1))
        for size in sorted((random_size(rng, ranges) for _ in range(wanted)), reverse=True):  # small ones fill gaps
            item = int(rng.integers(len(images)))
            gray, silhouette = magnify(images[item], size)
            while not silhouette.any() and size < ITEM:  # thin items vanish when shrunk
                size += 1
                gray, silhouette = magnify(images[item], size)
            if silhouette.any() and (place := find_place(rng, silhouette, canvas.masks)):
                pixels[place][silhouette] = gray[silhouette]
                mask = np.zeros((SIDE, SIDE), bool)
                mask[place] = silhouette
                for covered in canvas.masks:
                    covered &= ~mask
                canvas.masks.append(mask)
                canvas.labels.append(int(labels[item]))
                canvas.sizes.append(size)
        yield canvas


def cut_background(rng: np.random.Generator, photographs: Sequence[Image.Image]) -> Bytes:
    """Cuts a random square from a random photograph, and mirrors half of the squares."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    across = int(rng.integers(SIDE // 2, min(photograph.size) + 1))
    left, top = (int(rng.integers(length - across + 1)) for length in photograph.size)
    square = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + across, top + across))
    pixels = np.array(square)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


def random_size(rng: np.random.Generator, ranges: Sequence[tuple[float, float]]) -> int:
    """Draws the size of an item in pixels, log-uniform within one of the ranges of magnification."""
    low, high = ranges[int(rng.integers(len(ranges)))]
    return round(ITEM * float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def magnify(item: Bytes, size: int) -> tuple[Bytes, NDArray[np.bool_]]:
    """Resizes an item, and returns it with its silhouette, both (size, size)."""
    gray = Image.fromarray(item).resize((size, size), Image.Resampling.BILINEAR)
    silhouette = Image.fromarray((item > EMPTY).astype(np.uint8) * 255).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(gray), np.asarray(silhouette) > 127


def find_place(
    rng: np.random.Generator, silhouette: NDArray[np.bool_], masks: Sequence[NDArray[np.bool_]]
) -> tuple[slice, slice] | None:
    """Finds rows and columns where an item covers little of any other; None if all attempts fail."""
    size = len(silhouette)
    for _ in range(TRIES):
        top, left = (int(start) for start in rng.integers(SIDE - size + 1, size=2))
        rows, columns = slice(top, top + size), slice(left, left + size)
        if all((mask[rows, columns] & silhouette).sum() <= COVERED * mask.sum() for mask in masks):
            return rows, columns
    return None


def annotate(label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Returns the COCO annotation of an object, whose category is the label + 1."""
    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    box = [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top]
    return dict(category_id=label + 1, bbox=box, area=int(mask.sum()), iscrowd=0)


def write(folder: Path, source: Path, counts: Mapping[str, int]) -> None:
    """Writes the whole set or nothing; FileExistsError if the folder is not empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f'{str(folder)!r} is not empty. Choose another folder.')
    with temporary_folder(make_folder(folder.parent)) as parent:
        temporary = parent / 'set'
        (temporary / 'annotations').mkdir(parents=True)
        for part, count in counts.items():
            drawn = tqdm(draw_canvases(source, part, count), desc=part, total=count, disable=None)
            document = write_part(temporary / part, drawn)
            (temporary / 'annotations' / f'instances_{part}.json').write_text(json.dumps(document))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)


def write_part(folder: Path, drawn: Iterable[Canvas]) -> dict[str, Any]:
    """Writes images and masks of canvases, and returns their annotations in COCO's format."""
    for kind in ('images', 'masks'):
        (folder / kind).mkdir(parents=True)
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index, canvas in enumerate(drawn):
        name = f'{index:05}.png'
        labels = np.zeros_like(canvas.image)
        for label, mask in zip(canvas.labels, canvas.masks):
            labels[mask] = label + 1
            annotations.append(dict(id=len(annotations) + 1, image_id=index, **annotate(label, mask)))
        Image.fromarray(canvas.image).save(folder / 'images' / name)
        Image.fromarray(labels).save(folder / 'masks' / name)
        height, width = canvas.image.shape
        images.append(dict(id=index, file_name=f'images/{name}', width=width, height=height))
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    return dict(images=images, annotations=annotations, categories=categories)


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--fashion-mnist', type=Path, required=True, help='folder with Fashion-MNIST', metavar='DIR')
    args = parser.parse_args(argv)
    with report_errors(parser):
        write(args.folder, args.fashion_mnist, COUNTS)


if __name__ == '__main__':
    main()
