"""Writes a detection set of objects that differ in size: items of Fashion-MNIST on cluttered photographs.

    python -m timm_res2net.recipes.multi_scale data/multi_scale --fashion-mnist data/fashion-mnist --show some.png

A canvas has 96 x 96 pixels and shows one to six items, at half to three times their size of 28 x 28 pixels, hardly
covered by each other. The ground is a piece of one of scikit-image's photographs. In the folder are, in COCO's format,

    {train,val,unseen}/NUMBER.png and annotations/instances_{train,val,unseen}.json

with boxes and masks of what is to be seen of each item. `train` has items and grounds that the others don't have. In
`unseen` items have sizes that are not in the others. The same seed makes the same bytes.

Fashion-MNIST - https://github.com/zalandoresearch/fashion-mnist (MIT) - is read from its four files, packed or not,
and downloaded by torchvision to a folder without them. On Debian the package `dataset-fashion-mnist` has them, in
/usr/share/datasets/fashion-mnist.
"""

import gzip
import json
import os
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image
from tqdm import tqdm

from ..weights.files import make_folder, temporary_folder
from .arguments import make_parser, positive, reported
from .coco import SHOWN, CocoImages, draw, require_sheet, save_sheet

__all__ = [
    'CLASSES',
    'PARTS',
    'SEEN',
    'SIDE',
    'UNSEEN',
    'Canvas',
    'canvases',
    'fashion_mnist',
    'whole_photographs',
    'write',
]

Bytes = npt.NDArray[np.uint8]

CLASSES = 'T-shirt/top', 'Trouser', 'Pullover', 'Dress', 'Coat', 'Sandal', 'Shirt', 'Sneaker', 'Bag', 'Ankle boot'
SIDE = 96  # pixels of a canvas
ITEM = 28  # pixels of an item as it is
SEEN = ((0.5, 3.0),)  # ranges of an item's magnification
UNSEEN = ((0.36, 0.5), (3.0, 3.4))
PARTS = {'train': (10_000, SEEN), 'val': (2_000, SEEN), 'unseen': (2_000, UNSEEN)}  # canvases, ranges
COVERED = 0.1  # the largest part of an item that another one may cover
TRIES = 20  # to find a place for an item
EMPTY = 15  # grey levels up to which a pixel of Fashion-MNIST is ground: JPEG left some around the items

PHOTOGRAPHS = (
    *('astronaut.png', 'brick.png', 'camera.png', 'cell.png', 'chelsea.png', 'coffee.png', 'coins.png', 'grass.png'),
    *('gravel.png', 'hubble_deep_field.jpg', 'ihc.png', 'moon.png', 'motorcycle_left.png', 'page.png', 'retina.jpg'),
    'rocket.jpg',
)


@dataclass(frozen=True)
class Canvas:
    """An image, and what is to be seen on it."""

    image: Bytes  # (SIDE, SIDE)
    labels: list[int]  # of the items, indices of CLASSES
    masks: list[npt.NDArray[np.bool_]]  # (SIDE, SIDE), of what is to be seen of each item
    sizes: list[int]  # pixels across, of the item with its empty margin


def fashion_mnist(folder: Path, train: bool) -> tuple[Bytes, Bytes]:
    """Reads Fashion-MNIST, which torchvision downloads if it isn't there.

    Args:
        folder: Where its files are, or torchvision's `FashionMNIST/raw` with them.
        train: The 60,000 images to train with, else the 10,000 to test.

    Returns:
        Images, (N, 28, 28), and labels, (N,).

    Raises:
        ValueError: If a file is damaged.
        OSError: If there is none, and none can be downloaded.
    """
    part, count = ('train', 60_000) if train else ('t10k', 10_000)
    names = f'{part}-images-idx3-ubyte', f'{part}-labels-idx1-ubyte'
    folders = folder, folder / 'FashionMNIST' / 'raw'
    if not any((each / f'{names[0]}{suffix}').is_file() for each in folders for suffix in ('', '.gz')):
        from torchvision.datasets import FashionMNIST

        try:
            FashionMNIST(str(folder), download=True)  # checks what it gets
        except (RuntimeError, OSError) as error:
            raise OSError(f'{folder} has no {names[0]}, and it can not be downloaded: {error}') from error
    found = []
    for name, header, size in zip(names, (16, 8), (count * ITEM**2, count)):
        paths = [each / f'{name}{suffix}' for each in folders for suffix in ('', '.gz')]
        path = next((path for path in paths if path.is_file()), paths[0])
        try:
            content = gzip.decompress(path.read_bytes()) if path.suffix == '.gz' else path.read_bytes()
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise ValueError(f'{path} is damaged: {error}') from error
        if len(content) != header + size:
            raise ValueError(f'{path} has {len(content)} bytes instead of {header + size}; fetch it again')
        found.append(np.frombuffer(content, np.uint8, offset=header))
    return found[0].reshape(count, ITEM, ITEM), found[1]


def whole_photographs(mode: str) -> Iterator[Image.Image]:
    """scikit-image's photographs, in one of Pillow's modes.

    Raises:
        ImportError: If scikit-image is not installed.
    """
    for name in PHOTOGRAPHS:
        with (files('skimage.data') / name).open('rb') as file:
            yield Image.open(file).convert(mode)


def photographs(train: bool) -> list[Image.Image]:
    """The left two thirds of each photograph to train, else the right third, in grey.

    Raises:
        ImportError: If scikit-image is not installed.
    """
    parts = []
    for photograph in whole_photographs('L'):
        cut = photograph.width * 2 // 3
        box = (0, 0, cut, photograph.height) if train else (cut, 0, photograph.width, photograph.height)
        parts.append(photograph.crop(box))
    return parts


def canvases(folder: Path, part: str, items: tuple[int, int] = (1, 6), seed: int = 0) -> Callable[[int], Canvas]:
    """Makes a function that draws the canvas of an index, always the same.

    Args:
        folder: Where Fashion-MNIST is.
        part: A key of PARTS: which items and grounds, at which sizes.
        items: The smallest and largest number of items on a canvas.
        seed: Of all that is random.

    Raises:
        ImportError: If scikit-image is not installed.
        ValueError: If a file of Fashion-MNIST is damaged.
        OSError: If it can't be found or downloaded.
    """
    train = part == 'train'
    images, labels = fashion_mnist(folder, train)
    grounds, (_, ranges) = photographs(train), PARTS[part]
    number_of_part = list(PARTS).index(part)

    def draw(index: int) -> Canvas:
        rng = np.random.default_rng([seed, number_of_part, index])
        canvas = ground(rng, grounds)
        chosen: list[int] = []
        masks: list[npt.NDArray[np.bool_]] = []
        sizes = []
        wanted = int(rng.integers(items[0], items[1] + 1))
        for size in sorted((random_size(rng, ranges) for _ in range(wanted)), reverse=True):  # small ones fit between
            item = int(rng.integers(len(images)))
            grey, silhouette = magnified(images[item], size)
            while not silhouette.any() and size < ITEM:  # thin items vanish when they are small
                size += 1
                grey, silhouette = magnified(images[item], size)
            if silhouette.any() and (placed := place(rng, silhouette, masks)):
                rows, columns = placed
                mask = np.zeros((SIDE, SIDE), bool)
                mask[rows, columns] = silhouette
                canvas[rows, columns][silhouette] = grey[silhouette]
                masks = [before & ~mask for before in masks] + [mask]
                chosen.append(item)
                sizes.append(size)
        return Canvas(canvas, [int(labels[item]) for item in chosen], masks, sizes)

    return draw


def ground(rng: np.random.Generator, photographs: Sequence[Image.Image]) -> Bytes:
    """A random square of a random photograph, mirrored or not."""
    photograph = photographs[int(rng.integers(len(photographs)))]
    across = int(rng.integers(SIDE // 2, min(photograph.size) + 1))
    left, top = (int(rng.integers(length - across + 1)) for length in photograph.size)
    square = photograph.resize((SIDE, SIDE), Image.Resampling.BILINEAR, (left, top, left + across, top + across))
    pixels = np.array(square)
    return pixels[:, ::-1].copy() if rng.random() < 0.5 else pixels


def random_size(rng: np.random.Generator, ranges: Sequence[tuple[float, float]]) -> int:
    """Pixels across of an item, log-uniform within one of the ranges."""
    low, high = ranges[int(rng.integers(len(ranges)))]
    return round(ITEM * float(np.exp(rng.uniform(np.log(low), np.log(high)))))


def magnified(item: Bytes, size: int) -> tuple[Bytes, npt.NDArray[np.bool_]]:
    """An item at a size, (size, size), and its silhouette."""
    grey = Image.fromarray(item).resize((size, size), Image.Resampling.BILINEAR)
    silhouette = Image.fromarray((item > EMPTY).astype(np.uint8) * 255).resize((size, size), Image.Resampling.BILINEAR)
    return np.asarray(grey), np.asarray(silhouette) > 127


def place(
    rng: np.random.Generator, silhouette: npt.NDArray[np.bool_], masks: Sequence[npt.NDArray[np.bool_]]
) -> tuple[slice, slice] | None:
    """Rows and columns where an item covers not more than a tenth of any other; None if there seem to be none."""
    size = len(silhouette)
    for _ in range(TRIES):
        top, left = (int(start) for start in rng.integers(SIDE - size + 1, size=2))
        rows, columns = slice(top, top + size), slice(left, left + size)
        if all((mask[rows, columns] & silhouette).sum() <= COVERED * mask.sum() for mask in masks):
            return rows, columns
    return None


def annotation(label: int, mask: npt.NDArray[np.bool_]) -> dict[str, Any]:
    """COCO's description of an object; its category is the label + 1."""
    from pycocotools.mask import encode

    rows, columns = (np.flatnonzero(mask.any(axis=axis)) for axis in (1, 0))
    top, left = int(rows[0]), int(columns[0])
    encoded = encode(np.asfortranarray(mask.astype(np.uint8)))
    return dict(
        category_id=label + 1,
        bbox=[left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
        area=int(mask.sum()),
        segmentation=dict(size=encoded['size'], counts=encoded['counts'].decode()),
        iscrowd=0,
    )


def write(folder: Path, source: Path, counts: dict[str, int], seed: int = 0) -> None:
    """Writes the set, all of it or nothing.

    Args:
        folder: Where to write; it must be empty or not there.
        source: Where Fashion-MNIST is, or shall be.
        counts: Canvases of each part.
        seed: Of all that is random.

    Raises:
        ImportError: If scikit-image or pycocotools is not installed.
        ValueError: If a file of Fashion-MNIST is damaged.
        OSError: If the folder isn't empty or can't be written, or Fashion-MNIST can't be had.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f'{folder} is not empty; name another folder')
    with temporary_folder(make_folder(folder.parent)) as parent:
        temporary = parent / 'set'
        (temporary / 'annotations').mkdir(parents=True)
        for part, count in counts.items():
            draw = canvases(source, part, seed=seed)
            (temporary / part).mkdir()
            images: list[dict[str, Any]] = []
            annotations: list[dict[str, Any]] = []
            for index in tqdm(range(count), desc=part, disable=None):
                canvas = draw(index)
                name = f'{index:05}.png'
                Image.fromarray(canvas.image).save(temporary / part / name)
                images.append(dict(id=index, file_name=name, width=SIDE, height=SIDE))
                for label, mask in zip(canvas.labels, canvas.masks):
                    annotations.append(dict(id=len(annotations) + 1, image_id=index, **annotation(label, mask)))
            categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
            document = dict(images=images, annotations=annotations, categories=categories)
            (temporary / 'annotations' / f'instances_{part}.json').write_text(json.dumps(document))
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)


def show(folder: Path, out: str) -> None:
    """Draws the first canvases to train with, and the boxes and classes of their items."""
    dataset = CocoImages(folder, 'train')
    pictures = []
    for index in range(min(SHOWN, len(dataset))):
        image, target = dataset[index]
        pictures.append(draw(image, target['boxes'], [dataset.names[label - 1] for label in target['labels'].tolist()]))
    save_sheet(pictures, out)


def main(argv: list[str] | None = None) -> None:
    """Writes the set."""
    parser = make_parser(__doc__)
    parser.add_argument('folder', type=Path, help='where to write')
    parser.add_argument('--fashion-mnist', type=Path, required=True, help='folder of Fashion-MNIST', metavar='DIR')
    for part, (count, _) in PARTS.items():
        parser.add_argument(f'--{part}', type=positive, default=count, help=f'canvases (default: {count})')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--show', metavar='PNG', help='draw the first dozen canvases')
    args = parser.parse_args(argv)
    with reported(parser):
        if args.show is not None:
            require_sheet(args.show)
        write(args.folder, args.fashion_mnist, {part: getattr(args, part) for part in PARTS}, args.seed)
        if args.show is not None:
            show(args.folder, args.show)


if __name__ == '__main__':
    main()
