"""Tests the claim of the Res2Net paper at the size of two CPU cores: do cascaded splits help where sizes differ?

    python -m timm_res2net.recipes.study runs/study --fashion-mnist data

trains networks of equally many parameters (to 1 %) with one recipe: bottlenecks (scale 1) and Res2Net blocks at scales
4 and 8 in the paper's trunk, narrow and eight blocks deep. There are three parts:

    sizes          one item of Fashion-MNIST on a canvas of 96 pixels, at half to three times its size, and at sizes
                   never seen
    detection      the set of `multi_scale`: one to six items on a canvas, found by `detect`
    fashion_mnist  Fashion-MNIST as published, cropped with a padding of 4 and mirrored; each pixel is shown as 2 x 2

The criteria for support were written down before the first run. For a part: the 95 % interval of the paired
differences between scale 4 and scale 1, and of those between scale 8 and scale 1, lies above zero (pairs have the same
seed, and with it the same order of images). For the paper's explanation, receptive fields of several sizes: in `sizes`
and `detection` the same holds for large objects, by a larger difference than for small ones, as in the paper's COCO
table (AP of small, medium and large objects: +0.5, +2.9, +4.9). Figures are those of the last epoch: none is chosen by
the test images. The optimizer and its learning rate were chosen on bottlenecks alone, with a seed that is not in the
study.

Run again, it continues where it was stopped, also in the middle of a run. To use more cores, start it several times
with different parts or scales. The folder then holds `study.json` with all runs, `study.md` with tables, and a
picture of each part.
"""

import json
import math
import shutil
import statistics
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, Subset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.fcos import FCOSHead
from torchvision.transforms import v2
from transformers import TrainingArguments

from .._files import atomic_write_text, make_folder
from ..deploy.bench import environment
from ..vision.explain import radius, receptive_field
from ..vision.figures import new_figure, save
from . import detect, multi_scale, training
from .arguments import make_parser, positive, report_errors
from .coco import CocoImages
from .metrics import compute_precision

TRUNK: dict[str, Any] = dict(layers=(2, 2, 2, 2), channels=(16, 32, 64, 96))
BASE_WIDTHS = {1: 64, 4: 26.2, 8: 14.75}  # of each scale, so that all have as many parameters as scale 1
# Item sizes, in pixels, for which accuracy is computed; small, medium and large are thirds of the range.
SIZES: dict[str, tuple[float, float]] = dict(top1=(0, math.inf), small=(0, 25), medium=(25, 46), large=(46, math.inf))
UNSEEN_SIZES: dict[str, tuple[float, float]] = dict(smaller=(0, multi_scale.ITEM), larger=(multi_scale.ITEM, math.inf))
AREAS = 16, 32  # for COCO's AP, whose sizes are roots of the areas of the silhouettes
CANVASES = 20_000, 4_000  # of one item: for training, and for testing on each range of sizes
CLASSIFYING: dict[str, Any] = dict(per_device_train_batch_size=64, learning_rate=3e-3, weight_decay=0.05)
DETECTING: dict[str, Any] = dict(
    per_device_train_batch_size=16, optim='sgd', optim_args='momentum=0.9', learning_rate=0.02, max_grad_norm=5.0
)


@dataclass(frozen=True)
class Part:
    """A part of the study."""

    args: dict[str, Any]  # of TrainingArguments
    epochs: int
    seeds: int
    metrics: dict[str, str]  # headings of the metrics that are compared


TOP1 = {'top1': 'top-1, %'}
BY_SIZE = dict(small='small', medium='medium', large='large', smaller='smaller than seen', larger='larger than seen')
PRECISION = dict(AP='AP', APs='small', APm='medium', APl='large', unseen='AP at sizes never seen')
PARTS = {
    'sizes': Part(CLASSIFYING, 6, 5, TOP1 | BY_SIZE),
    'detection': Part(DETECTING, 4, 3, PRECISION),
    'fashion_mnist': Part(CLASSIFYING, 3, 5, TOP1),
}


def network(scale: int, **kwargs: Any) -> nn.Module:
    """Makes the paper's ImageNet trunk with fewer and narrower blocks."""
    return timm.create_model('res2net50_26w_4s', scale=scale, base_width=BASE_WIDTHS[scale], **TRUNK, **kwargs)


@dataclass(frozen=True)
class Items(Dataset[dict[str, Any]]):
    """Images, (N, H, W) of bytes, with their labels and sizes, (N,) each; changed at random."""

    data: Sequence[Tensor]
    zoom: int = 1  # each pixel is shown as zoom x zoom
    change: Callable[[Tensor], Tensor] | None = None

    def __len__(self) -> int:
        return len(self.data[0])

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.data[0][index][None]
        image = image if self.change is None else self.change(image)
        image = image.repeat_interleave(self.zoom, 1).repeat_interleave(self.zoom, 2)
        return dict(image=(image.float() / 255 - 0.5) / 0.25, label=self.data[1][index], image_id=index)


@cache
def single_items(source: Path, part: str, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """Draws canvases of one item each: images, labels and sizes."""
    draw = multi_scale.canvases(source, part, items=(1, 1))
    drawn = [draw(index) for index in range(count)]
    images = torch.from_numpy(np.stack([canvas.image for canvas in drawn]))
    labels, sizes = ([getattr(canvas, name)[0] for canvas in drawn] for name in ('labels', 'sizes'))
    return images, torch.tensor(labels), torch.tensor(sizes)


@cache
def published_items(source: Path, train: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Reads Fashion-MNIST: images, labels and sizes."""
    images, labels = (torch.from_numpy(each) for each in multi_scale.fashion_mnist(source, train))
    return images, labels, torch.full_like(labels, multi_scale.ITEM)


def compute_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Computes the cross entropy of a classifier."""
    return F.cross_entropy(model(torch.stack(batch['image'])), torch.stack(batch['label']))


def measure(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Returns 100 for each image that is classified correctly, else 0."""
    return 100.0 * (model(torch.stack(batch['image'])).argmax(dim=1) == torch.stack(batch['label']))


def accuracy(items: Items, ranges: dict[str, tuple[float, float]], evaluation: Any) -> dict[str, float]:
    """Computes the accuracy for items of each range of sizes, in %."""
    sizes, correct = items.data[2].numpy(), evaluation.predictions
    masks = {name: (sizes >= low) & (sizes < high) for name, (low, high) in ranges.items()}
    return {name: round(float(correct[mask].mean()), 3) for name, mask in masks.items()}


def classifier_trainer(part: str, scale: int, args: Any, limit: int | None, source: Path) -> tuple[Any, nn.Module, Any]:
    """Makes the Trainer of a classifier; returns it with its network, and the test sets with their metrics."""
    flip = v2.RandomHorizontalFlip()
    if part == 'fashion_mnist':
        train, test = ([x[:limit] for x in published_items(source, is_train)] for is_train in (True, False))
        images = Items(train, zoom=2, change=v2.Compose([v2.RandomCrop(28, padding=4), flip]))
        tests = [(Items(test, zoom=2), {'top1': SIZES['top1']})]
    else:
        counts = [min(count, limit or count) for count in CANVASES]
        images = Items(single_items(source, 'train', counts[0]), change=flip)
        seen, unseen = (Items(single_items(source, name, counts[1])) for name in ('val', 'unseen'))
        tests = [(seen, SIZES), (unseen, UNSEEN_SIZES)]
    model = network(scale, in_chans=1, num_classes=10)
    trainer = training.RecipeTrainer(compute_loss, measure, model=model, args=args, train_dataset=images)
    return trainer, model, [(items, partial(accuracy, items, ranges)) for items, ranges in tests]


def detector_trainer(part: str, scale: int, args: Any, limit: int | None, source: Path) -> tuple[Any, nn.Module, Any]:
    """Makes the Trainer of a detector; returns it with its backbone, and the test sets with their metrics."""
    images = CocoImages(source, 'train', v2.RandomHorizontalFlip())
    val, unseen = (CocoImages(source, name) for name in ('val', 'unseen'))
    body, side = network(scale, features_only=True, out_indices=(2, 3, 4)), multi_scale.SIDE
    model = detect.create_detector(body, len(images.names), 64, min_size=side, max_size=side)
    model.head = FCOSHead(64, 1, len(images.names) + 1, num_convs=2)
    some = Subset(images, range(min(len(images), limit or len(images))))
    trainer = detect.make_trainer(model, args, some, val, AREAS)

    def unseen_precision(evaluation: Any) -> dict[str, float]:
        return dict(unseen=compute_precision(unseen, AREAS, evaluation)['AP'])

    return trainer, body, [(val, trainer.compute_metrics), (unseen, unseen_precision)]


def run(
    part: str, scale: int, seed: int, epochs: int | None, limit: int | None, source: Path, folder: Path
) -> dict[str, Any]:
    """Trains and tests one network, for the part's epochs and with all images unless given.

    Args:
        part: Key of PARTS.
        scale: Key of BASE_WIDTHS.
        seed: Determines the weights and the order of images.
        epochs: Number of epochs.
        limit: Largest number of images to train on, and to test on.
        source: Folder of Fashion-MNIST; for detection that of the set.
        folder: Folder of the unfinished run.
    """
    start, epochs = time.perf_counter(), epochs or PARTS[part].epochs
    args: Any = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        seed=seed,
        per_device_eval_batch_size=64,
        save_strategy='epoch',
        save_total_limit=2,
        logging_strategy='epoch',
        lr_scheduler_type='cosine',
        warmup_steps=0.05,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        use_cpu=True,
        bf16=True,
        **PARTS[part].args,
    )
    torch.manual_seed(seed)
    make = detector_trainer if part == 'detection' else classifier_trainer
    trainer, model, tests = make(part, scale, args, limit, source)
    training.train(trainer, Namespace(data=source, part=part, scale=scale, limit=limit), model)
    metrics: dict[str, Any] = {}
    for data, trainer.compute_metrics in tests:
        metrics |= {name.removeprefix('eval_'): value for name, value in trainer.evaluate(data).items()}
    model.eval()
    shape = (1 if part != 'detection' else 3), *[56 if part == 'fashion_mnist' else multi_scale.SIDE] * 2
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, *shape))
    noise = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    return dict(
        **dict(part=part, scale=scale, seed=seed, epochs=epochs, images=limit, params=count_parameters(model)),
        mmacs=round(counter.get_total_flops() / 2e6, 2),
        radius=round(radius(receptive_field(model, 'layer4.1', noise).mean(axis=0)), 3),  # of all splits
        seconds=round(time.perf_counter() - start),
        **{name: metrics[name] for name in PARTS[part].metrics},
    )


def count_parameters(model: nn.Module) -> int:
    """Counts parameters without the classifier, so that the number is the same for all parts."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith('fc.'))


def study(folder: Path, source: Path, chosen: Namespace) -> list[dict[str, Any]]:
    """Runs what the folder lacks of the chosen parts and scales, and returns all runs in the folder, in order."""
    data = make_folder(folder) / ('multi_scale' if chosen.images is None else f'multi_scale_{chosen.images}')
    if 'detection' in chosen.part and not data.exists():
        counts = {part: min(count, chosen.images or count) for part, (count, _) in multi_scale.PARTS.items()}
        multi_scale.write(data, source, counts)
    for part in chosen.part:
        for seed in range(chosen.seeds or PARTS[part].seeds):
            for scale in chosen.scales:
                unfinished = folder / f'{part}_scale{scale}_seed{seed}'
                result, length = unfinished.with_suffix('.json'), (chosen.epochs or PARTS[part].epochs, chosen.images)
                if not result.exists():
                    where = data if part == 'detection' else source
                    record = run(part, scale, seed, chosen.epochs, chosen.images, where, unfinished)
                    atomic_write_text(result, json.dumps(record) + '\n')
                    shutil.rmtree(unfinished)
                record = json.loads(result.read_text())
                if (record['epochs'], record['images']) != length:
                    raise ValueError(f'{str(result)!r} has other epochs or images. Choose another folder.')
    runs = [json.loads(path.read_text()) for path in folder.glob('*_scale*_seed*.json')]
    return sorted(runs, key=lambda run: (run['part'], run['scale'], run['seed']))


def values_of(runs: Sequence[dict[str, Any]], part: str, scale: int, metric: str) -> dict[int, float]:
    """Returns a metric of a part at a scale, by seed."""
    return {each['seed']: each[metric] for each in runs if (each['part'], each['scale']) == (part, scale)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Returns the mean and its standard error, which is NaN for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else math.nan
    return statistics.mean(values), error


def difference(runs: Sequence[dict[str, Any]], part: str, scale: int, metric: str) -> tuple[float, float]:
    """Returns the mean of the paired differences to scale 1, and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import t  # comes with scikit-image

    plain, others = (values_of(runs, part, each, metric) for each in (1, scale))
    pairs = [others[seed] - plain[seed] for seed in sorted(plain.keys() & others.keys())]
    mean, error = mean_and_error(pairs)
    return mean, error * float(t.ppf(0.975, max(1, len(pairs) - 1)))


def table(runs: Sequence[dict[str, Any]], part: str) -> list[str]:
    """Returns a Markdown table: mean and standard error for each scale, then the differences to scale 1.

    A single seed has neither error nor interval: '-'.
    """
    names, first = PARTS[part].metrics, {each['scale']: each for each in runs if each['part'] == part}
    heads = ['scale', 'parameters', 'MMACs', 'receptive field, pixels', *names.values()]
    rows = [heads]
    for scale, record in sorted(first.items()):
        cells = [str(scale), f'{record["params"]:,}', f'{record["mmacs"]:.1f}']
        for metric in ('radius', *names):
            mean, error = mean_and_error(list(values_of(runs, part, scale, metric).values()))
            cells.append(f'{mean:.2f} ± -' if math.isnan(error) else f'{mean:.2f} ± {error:.2f}')
        rows.append(cells)
    for scale in sorted(first.keys() - {1}) if 1 in first else ():
        cells = [f'{scale} - 1', '', '', '']
        for metric in names:
            mean, half = difference(runs, part, scale, metric)
            interval = '-' if math.isnan(half) else f'[{mean - half:+.2f}, {mean + half:+.2f}]'
            cells.append(f'{mean:+.2f} {interval}')
        rows.append(cells)
    lines = [f'| {" | ".join(cells)} |' for cells in rows]
    return [lines[0], '|---:' * len(heads) + '|', *lines[1:]]


def plot(runs: Sequence[dict[str, Any]], part: str, out: str) -> None:
    """Draws each metric of a part over scale: each run, the mean, and its standard error."""
    names, scales = PARTS[part].metrics, sorted({each['scale'] for each in runs if each['part'] == part})
    figure = new_figure(max(5, 0.8 + 2.2 * len(names)), 3.6)
    panels = np.atleast_1d(figure.subplots(1, len(names)))
    for panel, (metric, name) in zip(panels, names.items()):
        for i, scale in enumerate(scales):
            values = list(values_of(runs, part, scale, metric).values())
            panel.scatter([i] * len(values), values, color='C0', alpha=0.35, linewidths=0)
            panel.errorbar(i, *mean_and_error(values), color='C0', marker='_', markersize=18, capsize=5)
        panel.set_xticks(range(len(scales)), [str(scale) for scale in scales])
        panel.set(xlabel='scale', title=name)
        panel.margins(x=0.2)
    figure.suptitle(f'{part}: networks of equally many parameters\nruns, mean and standard error')
    save(figure, out)


def main(argv: list[str] | None = None) -> None:
    """Runs the study, writes its figures and pictures, and prints its tables."""
    parser = make_parser(__doc__)
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--fashion-mnist', type=Path, required=True, help='folder of Fashion-MNIST', metavar='DIR')
    parser.add_argument('--part', nargs='+', choices=PARTS, default=list(PARTS), help='(default: all)')
    parser.add_argument('--scales', nargs='+', type=int, choices=BASE_WIDTHS, default=list(BASE_WIDTHS))
    parser.add_argument('--seeds', type=positive, help='runs of each (default: 5, of detection 3)')
    parser.add_argument('--epochs', type=positive, help='of a run (default: 6, of detection 4, of fashion_mnist 3)')
    parser.add_argument('--images', type=positive, help='use only the first images, for a quick look')
    args = parser.parse_args(argv)
    with report_errors(parser):
        runs = study(args.folder, args.fashion_mnist, args)
        command = ' '.join(['python -m timm_res2net.recipes.study', *(sys.argv[1:] if argv is None else argv)])
        document = dict(command=command, environment=environment(), runs=runs)
        atomic_write_text(args.folder / 'study.json', json.dumps(document, indent=1) + '\n')
        for part in args.part:
            plot(runs, part, str(args.folder / f'{part}.png'))
        text = '\n\n'.join('\n'.join([part, '', *table(runs, part)]) for part in args.part)
        atomic_write_text(args.folder / 'study.md', text + '\n')
        print(text)


if __name__ == '__main__':
    main()
