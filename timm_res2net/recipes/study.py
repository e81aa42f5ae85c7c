"""Tests the claim of the Res2Net paper at the size of two CPU cores: do splits in a cascade help where sizes differ?

    python -m timm_res2net.recipes.study runs/study --fashion-mnist data/fashion-mnist

trains networks of equally many parameters (to 1 %) by one recipe: bottlenecks (scale 1) and Res2Net blocks at scales 4
and 8 in the paper's trunk, narrow and eight blocks deep. There are three parts:

    sizes          one item of Fashion-MNIST on a canvas of 96 pixels, at half to three times its size, and at sizes
                   never seen
    detection      the set of `multi_scale`: one to six items on a canvas, found by `detect`
    fashion_mnist  Fashion-MNIST as it is published, cropped with a padding of 4 and mirrored; 28 pixels shown as 56

What would count as support, written down before the first run. Of a part: the 95 % interval of the paired differences
between scale 4 and scale 1, and of those between scale 8 and scale 1, lies above zero (pairs have the same seed, and
with it the same order of images). Of the reason that the paper gives, receptive fields of several sizes: in `sizes` and
`detection` the same holds for large objects, by a larger difference than for small ones, as in the paper's COCO table
(AP of small, medium and large objects: +0.5, +2.9, +4.9). Figures are of the last epoch: none is chosen by the test
images. The optimizer and its learning rate were chosen on bottlenecks alone, with a seed that is not in the study.

Run again, it goes on where it was stopped, in the middle of a run, too. The folder then holds `study.json` with all
runs, and a picture of each part.
"""

import json
import math
import multiprocessing
import os
import shutil
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.fcos import FCOSHead
from tqdm import tqdm

from ..deploy.bench import environment
from ..vision.explain import radius, receptive_field
from ..vision.figures import new_figure, save
from ..weights.files import atomic_write_text, make_folder
from . import detect, multi_scale
from .arguments import make_parser, positive, reported
from .coco import CocoImages
from .training_loop import Settings, fit

__all__ = ['BASE_WIDTHS', 'PARTS', 'network', 'plot', 'run', 'study', 'table']

TRUNK: dict[str, Any] = dict(layers=(2, 2, 2, 2), channels=(16, 32, 64, 96))
BASE_WIDTHS = {1: 64, 4: 26.2, 8: 14.75}  # of each scale, for the number of parameters of scale 1
CLASSIFICATION = Settings(epochs=6, batch_size=64, opt='adamw', lr=3e-3, weight_decay=0.05, amp='bfloat16')
DETECTION = Settings(epochs=4, batch_size=16, lr=0.02, clip_grad=5.0, amp='bfloat16')
EDGES = 25, 46  # pixels across at which medium and large items begin; thirds of the range of sizes
AREAS = 16, 32  # the same for COCO's AP, whose sizes are those of the silhouettes: roots of their areas
CANVASES = 20_000, 4_000  # of one item, to train with, and to test with for each range of sizes


@dataclass(frozen=True)
class Part:
    """A part of the study."""

    settings: Settings
    seeds: int
    metrics: dict[str, str]  # what is compared, and how it is called


PARTS = {
    'sizes': Part(
        CLASSIFICATION,
        5,
        {
            'top1': 'top-1, %',
            'small': 'small',
            'medium': 'medium',
            'large': 'large',
            'smaller': 'smaller than seen',
            'larger': 'larger than seen',
        },
    ),
    'detection': Part(
        DETECTION,
        3,
        {'AP': 'AP', 'APs': 'small', 'APm': 'medium', 'APl': 'large', 'unseen': 'AP at sizes never seen'},
    ),
    'fashion_mnist': Part(replace(CLASSIFICATION, epochs=3), 5, {'top1': 'top-1, %'}),
}


def network(scale: int, **kwargs: Any) -> nn.Module:
    """Makes the paper's ImageNet trunk with fewer and narrower blocks."""
    return timm.create_model('res2net50_26w_4s', scale=scale, base_width=BASE_WIDTHS[scale], **TRUNK, **kwargs)


@dataclass(frozen=True)
class Shuffled:
    """Batches of images that are in memory, in another order in each epoch."""

    images: Tensor  # (N, H, W) of bytes
    labels: Tensor  # (N,)
    batch_size: int
    augment: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.images) // self.batch_size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        for batch in torch.randperm(len(self.images))[: len(self) * self.batch_size].split(self.batch_size):
            yield normalised(mirrored(self.augment(self.images[batch]))), self.labels[batch]


def normalised(images: Tensor) -> Tensor:
    """(N, H, W) of bytes to (N, 1, H, W) of numbers around zero."""
    return (images[:, None].float() / 255 - 0.5) / 0.25


def mirrored(images: Tensor) -> Tensor:
    """Mirrors half of the images."""
    return torch.where(torch.rand(len(images), 1, 1) < 0.5, images.flip(-1), images)


def cropped(images: Tensor) -> Tensor:
    """Moves each image by up to 4 pixels, and fills in black."""
    (count, height, width), padding = images.shape, 4
    padded = F.pad(images, [padding] * 4)
    rows = torch.randint(2 * padding + 1, (count, 1, 1)) + torch.arange(height)[:, None]
    columns = torch.randint(2 * padding + 1, (count, 1, 1)) + torch.arange(width)
    return doubled(padded[torch.arange(count)[:, None, None], rows, columns])


def doubled(images: Tensor) -> Tensor:
    """Shows each pixel as two by two."""
    return images.repeat_interleave(2, 1).repeat_interleave(2, 2)


def unchanged(images: Tensor) -> Tensor:
    """The images."""
    return images


@cache
def single_items(source: Path, part: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Canvases of one item each: images (N, H, W) of bytes, labels, and sizes in pixels."""
    draw = multi_scale.canvases(source, part, items=(1, 1))
    drawn = [draw(index) for index in range(count)]
    images = torch.from_numpy(np.stack([canvas.image for canvas in drawn]))
    labels, sizes = (
        torch.tensor([values[0] for values in column]) for column in zip(*((c.labels, c.sizes) for c in drawn))
    )
    return images, labels, sizes


@cache
def fashion_mnist(source: Path, train: bool) -> tuple[Tensor, Tensor]:
    """Images (N, 28, 28) of bytes, and labels."""
    images, labels = multi_scale.fashion_mnist(source, train)
    return torch.from_numpy(images.copy()), torch.from_numpy(labels.astype(np.int64))


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Whether each image is classified correctly, (N,) of 0 and 100."""
    found = torch.cat([model(normalised(part)).argmax(dim=1) for part in images.split(256)])
    return 100.0 * (found == labels)


def rounded_mean(values: Tensor) -> float:
    """The mean, to three places."""
    return round(values.mean().item(), 3)


def top1(images: Tensor, labels: Tensor, model: nn.Module) -> dict[str, float]:
    """Accuracy on a test set."""
    return dict(top1=rounded_mean(correct(model, images, labels)))


def top1_by_size(
    seen: tuple[Tensor, Tensor, Tensor], unseen: tuple[Tensor, Tensor, Tensor], model: nn.Module
) -> dict[str, float]:
    """Accuracy on canvases of one item, by its size."""
    values, sizes = correct(model, *seen[:2]), seen[2]
    small, large = sizes < EDGES[0], sizes >= EDGES[1]
    others, smaller = correct(model, *unseen[:2]), unseen[2] < multi_scale.ITEM
    return dict(
        top1=rounded_mean(values),
        small=rounded_mean(values[small]),
        medium=rounded_mean(values[~small & ~large]),
        large=rounded_mean(values[large]),
        smaller=rounded_mean(others[smaller]),
        larger=rounded_mean(others[~smaller]),
    )


def cross_entropy(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of a classifier."""
    return F.cross_entropy(model(batch[0]), batch[1])


def train_classifier(
    part: str, scale: int, settings: Settings, images: int | None, source: Path, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a classifier; it and its metrics after the last epoch."""
    check: Callable[[nn.Module], dict[str, Any]]
    if part == 'fashion_mnist':
        train, augment = fashion_mnist(source, True), cropped
        test_images, test_labels = fashion_mnist(source, False)
        check = partial(top1, doubled(test_images[:images]), test_labels[:images])
    else:
        counts = [min(count, images or count) for count in CANVASES]
        train, augment = single_items(source, 'train', counts[0])[:2], unchanged
        seen, unseen = (single_items(source, name, counts[1]) for name in ('val', 'unseen'))
        check = partial(top1_by_size, seen, unseen)
    batches = Shuffled(train[0][:images], train[1][:images], settings.batch_size, augment)
    model = network(scale, in_chans=1, num_classes=10).to(memory_format=torch.channels_last)
    options: dict[str, Any] = dict(about=dict(images=images), resume=True, progress=False)
    history = fit(model, batches, cross_entropy, check, settings, folder, **options)
    return model, history[-1]


def train_detector(
    part: str, scale: int, settings: Settings, images: int | None, source: Path, folder: Path
) -> tuple[nn.Module, dict[str, Any]]:
    """Trains a detector; its backbone and its average precisions after the last epoch."""
    data, side = source, multi_scale.SIDE
    train, val, unseen = (CocoImages(data, name) for name in ('train', 'val', 'unseen'))
    body = network(scale, features_only=True, out_indices=(2, 3, 4))
    channels = 64
    model = detect.create_detector(body, len(train.names), channels, min_size=side, max_size=side)
    model.head = FCOSHead(channels, 1, len(train.names) + 1, num_convs=2)
    some = Subset(train, range(min(len(train), images or len(train))))
    options: dict[str, Any] = dict(areas=AREAS, about=dict(images=images), resume=True, progress=False)
    history = detect.train(model.to(memory_format=torch.channels_last), some, val, settings, folder, **options)
    model.eval()
    with torch.no_grad():
        found = detect.evaluate(unseen, AREAS, settings.batch_size, 0, torch.device('cpu'), model)
    return body, {**history[-1], 'unseen': found['AP'], 'unseen_small': found['APs'], 'unseen_large': found['APl']}


def run(
    part: str, scale: int, seed: int, epochs: int | None, images: int | None, source: Path, folder: Path
) -> dict[str, Any]:
    """Trains and tests one network.

    Args:
        part: A key of PARTS.
        scale: A key of BASE_WIDTHS.
        seed: Of the weights and of the order of images.
        epochs: Others than the part's.
        images: Train and test with the first ones only.
        source: Where Fashion-MNIST is, for detection the set.
        folder: Where the run lives while it isn't done.
    """
    torch.set_num_threads(1)
    start = time.perf_counter()
    settings = replace(PARTS[part].settings, seed=seed, epochs=epochs or PARTS[part].settings.epochs)
    torch.manual_seed(seed)
    train = train_detector if part == 'detection' else train_classifier
    model, metrics = train(part, scale, settings, images, source, folder)
    model.eval()
    shape = (1 if part != 'detection' else 3), *[56 if part == 'fashion_mnist' else multi_scale.SIDE] * 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    noise = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    return dict(
        part=part,
        scale=scale,
        seed=seed,
        epochs=settings.epochs,
        images=images,
        params=parameters_of(model),
        mmacs=round(counter.get_total_flops() / 2e6, 2),
        radius=round(radius(receptive_field(model, 'layer4.1', noise).mean(axis=0)), 3),  # of all splits
        seconds=round(time.perf_counter() - start),
        **metrics,
    )


def parameters_of(model: nn.Module) -> int:
    """The number of parameters without the classifier, so that it is the same for all parts."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith('fc.'))


def study(
    folder: Path,
    source: Path,
    parts: Sequence[str],
    scales: Sequence[int],
    seeds: int | None = None,
    epochs: int | None = None,
    images: int | None = None,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Runs what the folder does not hold yet, and returns all runs that it holds, in order.

    Args:
        folder: Where to write.
        source: Where Fashion-MNIST is, or shall be.
        parts: Keys of PARTS.
        scales: Keys of BASE_WIDTHS.
        seeds: Runs of each, the part's number if None.
        epochs: Of a run, the part's number if None.
        images: Train and test with the first ones only.
        workers: Runs at a time.

    Raises:
        ValueError: If the folder holds runs of other lengths.
        ImportError: If a package is missing.
        OSError: If the folder can't be written.
    """
    make_folder(folder)
    data = folder / ('multi_scale' if images is None else f'multi_scale_{images}')
    if 'detection' in parts and not data.exists():
        multi_scale.write(
            data, source, {part: min(count, images or count) for part, (count, _) in multi_scale.PARTS.items()}
        )
    multi_scale.fashion_mnist(source, train=True)  # before several processes download it
    wanted = [
        (part, scale, seed)
        for seed in range(max(seeds or PARTS[part].seeds for part in parts))
        for part in parts
        if seed < (seeds or PARTS[part].seeds)
        for scale in scales
    ]
    paths = {each: folder / f'{each[0]}_scale{each[1]}_seed{each[2]}.json' for each in wanted}
    done = {each: json.loads(path.read_text()) for each, path in paths.items() if path.exists()}
    for each, record in done.items():
        found, length = (record['epochs'], record['images']), (epochs or PARTS[each[0]].settings.epochs, images)
        if found != length:
            raise ValueError(
                f'{paths[each]} is of {found[0]} epochs and {found[1] or "all"} images, not of {length[0]} and '
                f'{images or "all"}; name another folder, or remove it'
            )
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'), initializer=end_with_parent)
    with pool, ended_on_error(), tqdm(total=len(wanted), initial=len(done), unit='run', disable=None) as bar:
        futures = {}
        for each in wanted:
            if each not in done:
                where = data if each[0] == 'detection' else source
                futures[pool.submit(run, *each, epochs, images, where, paths[each].with_suffix(''))] = each
        for future in as_completed(futures):
            path = paths[futures[future]]
            atomic_write_text(path, json.dumps(future.result()) + '\n')
            shutil.rmtree(path.with_suffix(''))
            bar.update()
    records = [json.loads(path.read_text()) for path in folder.glob('*_scale*_seed*.json')]
    return sorted(records, key=lambda record: (record['part'], record['scale'], record['seed']))


@contextmanager
def ended_on_error() -> Iterator[None]:
    """Ends the workers if one fails, or the study is interrupted: what they have is resumed when it is run again."""
    try:
        yield
    except BaseException:
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise


def end_with_parent() -> None:
    """Has a worker end when the study is killed, instead of running what it was given, beside the resumed study."""

    def wait() -> None:
        if (parent := multiprocessing.parent_process()) is not None:
            parent.join()
        os._exit(1)

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of Ctrl-C, which the study hears, too
    threading.Thread(target=wait, daemon=True).start()


def values_of(runs: Sequence[dict[str, Any]], part: str, scale: int, metric: str) -> dict[int, float]:
    """A metric of a part at a scale, by seed."""
    return {each['seed']: each[metric] for each in runs if (each['part'], each['scale']) == (part, scale)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; NaN for one value, which tells nothing of it."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error


def difference(runs: Sequence[dict[str, Any]], part: str, scale: int, metric: str) -> tuple[float, float]:
    """The mean of the paired differences to scale 1, and half the width of its 95 % interval by Student's t."""
    from scipy.stats import t  # comes with scikit-image

    plain, others = (values_of(runs, part, each, metric) for each in (1, scale))
    mean, error = mean_and_error([others[seed] - plain[seed] for seed in sorted(plain.keys() & others.keys())])
    return mean, error * float(t.ppf(0.975, max(1, len(plain.keys() & others.keys()) - 1)))


def scales_of(runs: Sequence[dict[str, Any]], part: str) -> list[int]:
    """The scales that a part has runs of."""
    return sorted({each['scale'] for each in runs if each['part'] == part})


def table(runs: Sequence[dict[str, Any]], part: str) -> list[str]:
    """Lines of a Markdown table: of each scale the mean and its standard error, then the differences to scale 1.

    One seed has neither error nor interval: '-'.
    """
    names = PARTS[part].metrics
    heads = ['scale', 'parameters', 'MMACs', 'receptive field, pixels', *names.values()]
    lines = [f'| {" | ".join(heads)} |', '|---:' * len(heads) + '|']
    for scale in scales_of(runs, part):
        first = next(each for each in runs if (each['part'], each['scale']) == (part, scale))
        cells = [str(scale), f'{first["params"]:,}', f'{first["mmacs"]:.1f}']
        for metric in ('radius', *names):
            mean, error = mean_and_error(list(values_of(runs, part, scale, metric).values()))
            cells.append(f'{mean:.2f} ± -' if math.isnan(error) else f'{mean:.2f} ± {error:.2f}')
        lines.append(f'| {" | ".join(cells)} |')
    for scale in scales_of(runs, part):
        if scale != 1 and 1 in scales_of(runs, part):
            cells = [f'{scale} - 1', '', '', '']
            for metric in names:
                mean, half = difference(runs, part, scale, metric)
                interval = '-' if math.isnan(half) else f'[{mean - half:+.2f}, {mean + half:+.2f}]'
                cells.append(f'{mean:+.2f} {interval}')
            lines.append(f'| {" | ".join(cells)} |')
    return lines


def plot(runs: Sequence[dict[str, Any]], part: str, out: str) -> None:
    """Draws each metric of a part over scale: each run, the mean, and its standard error.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the file can't be written.
    """
    names, scales = PARTS[part].metrics, scales_of(runs, part)
    figure = new_figure(max(5, 0.8 + 2.2 * len(names)), 3.6)
    panels = np.atleast_1d(figure.subplots(1, len(names)))
    for panel, (metric, name) in zip(panels, names.items()):
        for i, scale in enumerate(scales):
            values = list(values_of(runs, part, scale, metric).values())
            mean, error = mean_and_error(values)
            panel.scatter([i] * len(values), values, color='C0', alpha=0.35, linewidths=0)
            panel.errorbar(i, mean, error, color='C0', marker='_', markersize=18, capsize=5)
        panel.set_xticks(range(len(scales)), [str(scale) for scale in scales])
        panel.set(xlabel='scale', title=name)
        panel.margins(x=0.2)
    figure.suptitle(f'{part}: networks of equally many parameters\nruns, mean and standard error')
    save(figure, out)


def main(argv: list[str] | None = None) -> None:
    """Runs the study, writes its figures and pictures, and prints its tables."""
    parser = make_parser(__doc__)
    parser.add_argument('folder', type=Path, help='where to write')
    parser.add_argument('--fashion-mnist', type=Path, required=True, help='folder of Fashion-MNIST', metavar='DIR')
    parser.add_argument('--part', nargs='+', choices=PARTS, default=list(PARTS), help='(default: all)')
    parser.add_argument('--scales', nargs='+', type=int, choices=BASE_WIDTHS, default=list(BASE_WIDTHS))
    parser.add_argument('--seeds', type=positive, help='runs of each (default: 5, of detection 3)')
    parser.add_argument('--epochs', type=positive, help='of a run (default: 6, of detection 4, of fashion_mnist 3)')
    parser.add_argument('--images', type=positive, help='train and test with the first ones only, for a quick look')
    parser.add_argument('--workers', type=positive, default=os.cpu_count(), help='runs at a time (default: one a core)')
    args = parser.parse_args(argv)
    with reported(parser):
        runs = study(
            args.folder, args.fashion_mnist, args.part, args.scales, args.seeds, args.epochs, args.images, args.workers
        )
        command = ' '.join(['python -m timm_res2net.recipes.study', *(sys.argv[1:] if argv is None else argv)])
        document = dict(command=command, environment=environment(), runs=runs)
        atomic_write_text(args.folder / 'study.json', json.dumps(document, indent=1) + '\n')
        for part in args.part:
            plot(runs, part, str(args.folder / f'{part}.png'))
            print('\n'.join([f'\n{part}\n', *table(runs, part)]))


if __name__ == '__main__':
    main()
