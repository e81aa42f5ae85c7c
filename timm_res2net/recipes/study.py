"""Tests the Res2Net paper's claim on two CPU cores: do cascaded splits help where objects differ in size?

    python -m timm_res2net.recipes.study runs/study --fashion-mnist data

This trains networks with the same number of parameters (within 1 %) in the same way: bottlenecks (scale 1) and Res2Net
blocks of scale 4 and 8 in the paper's trunk, narrow and eight blocks deep. There are three parts:

    sizes          one item of Fashion-MNIST on a canvas of 96 pixels, at half to three times its size, and at sizes
                   never seen in training
    detection      the set of `multi_scale`: one to six items on a canvas, found by `detect`
    fashion_mnist  Fashion-MNIST as published, cropped with a padding of 4 and mirrored; each pixel is shown as 2 x 2

The criteria were written down before the first run. A part supports the claim if the 95 % intervals of the paired
differences, scale 4 minus scale 1 and scale 8 minus scale 1, both lie above zero (a pair has the same seed, and with it
the same order of images). The paper's explanation, receptive fields of several sizes, is supported if in `sizes` and
`detection` the same holds for large objects, with a larger difference than for small ones, as in the paper's COCO table
(AP of small, medium and large objects: +0.5, +2.9, +4.9). All results are from the last epoch, so no test image
influences a choice. The optimizer and its learning rate were chosen on bottlenecks alone, with a seed that is not in
the study.

To continue after an interruption, run the same command again. The folder gets a file for each run, `study.json` with
all runs, and `study.md` with tables.
"""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.fcos import FCOSHead
from torchvision.transforms import v2
from transformers import TrainingArguments

from .._files import atomic_write_text, make_folder
from ..deploy.bench import environment
from ..vision.explain import radius, receptive_field
from . import detect, multi_scale
from .arguments import make_parser, report_errors
from .coco import CocoImages
from .metrics import compute_precision
from .multi_scale import ITEM, SIDE
from .training import RecipeTrainer

TRUNK: dict[str, Any] = dict(layers=(2, 2, 2, 2), channels=(16, 32, 64, 96))
BASE_WIDTHS = {1: 64, 4: 26.2, 8: 14.75}  # for each scale, so that all have as many parameters as scale 1
CANVASES = {'train': 20_000, 'val': 4_000, 'unseen': 4_000}  # canvases of one item each
# Ranges of item sizes, in pixels, for which accuracy is computed; small, medium and large are thirds of the range.
SIZES: dict[str, dict[str, tuple[float, float]]] = {
    'val': dict(top1=(0, math.inf), small=(0, 25), medium=(25, 46), large=(46, math.inf)),
    'unseen': dict(smaller=(0, ITEM), larger=(ITEM, math.inf)),
}
AREAS = 16, 32  # for COCO's AP, where the size of an object is the root of its area
CLASSIFYING: dict[str, Any] = dict(per_device_train_batch_size=64, learning_rate=3e-3, weight_decay=0.05)
DETECTING: dict[str, Any] = dict(
    per_device_train_batch_size=16, optim='sgd', optim_args='momentum=0.9', learning_rate=0.02, max_grad_norm=5.0
)


@dataclass(frozen=True)
class Part:
    args: dict[str, Any]  # passed to TrainingArguments
    epochs: int
    seeds: int
    metrics: dict[str, str]  # names, and headings in the table


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
    """Images, (N, H, W) of bytes, with their labels and the sizes of their items, (N,) each."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    sizes: NDArray[np.int64]
    change: Callable[[Tensor], Tensor]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.change(torch.from_numpy(self.images[index])[None])
        return dict(image=(image.float() / 255 - 0.5) / 0.25, label=int(self.labels[index]), index=index)


@cache
def load_items(part: str, source: Path) -> dict[str, Items]:
    """Draws canvases of one item each, or reads Fashion-MNIST; returns the items of each part."""
    flip, double = v2.RandomHorizontalFlip(), v2.Resize(2 * ITEM, v2.InterpolationMode.NEAREST)
    loaded = {}
    if part == 'fashion_mnist':
        crop = v2.Compose([v2.RandomCrop(ITEM, padding=4), flip, double])
        for name, change in (('train', crop), ('val', double)):
            images, labels = multi_scale.fashion_mnist(source, train=name == 'train')
            loaded[name] = Items(images, labels, np.full_like(labels, ITEM), change)
    else:
        for name, count in CANVASES.items():
            drawn = list(multi_scale.draw_canvases(source, name, count, items=(1, 1)))
            labels, sizes = (np.array([getattr(each, key)[0] for each in drawn]) for key in ('labels', 'sizes'))
            change = flip if name == 'train' else v2.Identity()
            loaded[name] = Items(np.stack([each.image for each in drawn]), labels, sizes, change)
    return loaded


def compute_loss(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    return F.cross_entropy(model(torch.stack(batch['image'])), torch.tensor(batch['label']))


def measure(model: nn.Module, batch: dict[str, Any]) -> Tensor:
    """Returns 100 for each image that is classified correctly, else 0."""
    return 100.0 * (model(torch.stack(batch['image'])).argmax(dim=1) == torch.tensor(batch['label']))


def accuracy(sizes: NDArray[np.int64], ranges: dict[str, tuple[float, float]], evaluation: Any) -> dict[str, float]:
    """Computes the accuracy, in %, for each range of item sizes that occurs."""
    masks = {name: (sizes >= low) & (sizes < high) for name, (low, high) in ranges.items()}
    return {name: float(evaluation.predictions[mask].mean()) for name, mask in masks.items() if mask.any()}


Tests = list[tuple[Any, Callable[[Any], dict[str, float]]]]  # data sets, and functions that compute their metrics


def prepare_classifier(model: nn.Module, part: str, args: Any, source: Path) -> tuple[RecipeTrainer, Tests]:
    """Makes the Trainer of a classifier, and tests of its accuracy by size."""
    items = load_items(part, source)
    trainer = RecipeTrainer(compute_loss, measure, model=model, args=args, train_dataset=items['train'])
    return trainer, [
        (items[name], partial(accuracy, items[name].sizes, ranges)) for name, ranges in SIZES.items() if name in items
    ]


def prepare_detector(body: nn.Module, args: Any, source: Path) -> tuple[RecipeTrainer, Tests]:
    """Makes the Trainer of a detector over a backbone, and tests of its AP by size."""
    train_set = CocoImages(source, 'train', v2.RandomHorizontalFlip())
    val, unseen = (CocoImages(source, name) for name in ('val', 'unseen'))
    model = detect.create_detector(body, len(train_set.names), 64, min_size=SIDE, max_size=SIDE)
    model.head = FCOSHead(64, 1, len(train_set.names) + 1, num_convs=2)
    return detect.make_trainer(model, args, train_set, val, AREAS), [
        (val, partial(compute_precision, val, AREAS)),
        (unseen, lambda evaluation: {'unseen': compute_precision(unseen, AREAS, evaluation)['AP']}),
    ]


def run(part: str, scale: int, seed: int, source: Path, folder: Path) -> dict[str, Any]:
    """Trains and tests one network."""
    args: Any = TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=PARTS[part].epochs,
        seed=seed,
        per_device_eval_batch_size=64,
        save_strategy='no',
        lr_scheduler_type='cosine',
        warmup_steps=0.05,
        remove_unused_columns=False,
        dataloader_drop_last=True,
        use_cpu=True,
        bf16=True,
        **PARTS[part].args,
    )
    torch.manual_seed(seed)
    if part == 'detection':
        model = network(scale, features_only=True, out_indices=(2, 3, 4))
        trainer, tests = prepare_detector(model, args, source)
    else:
        model = network(scale, in_chans=1, num_classes=10)
        trainer, tests = prepare_classifier(model, part, args, source)
    trainer.train()
    metrics: dict[str, float] = {}
    for dataset, compute_metrics in tests:
        trainer.compute_metrics = compute_metrics
        metrics |= trainer.evaluate(dataset)

    model.eval()
    shape = (3 if part == 'detection' else 1), *[2 * ITEM if part == 'fashion_mnist' else SIDE] * 2
    noise = torch.randn(8, *shape, generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(noise[:1])
    return dict(
        part=part,
        scale=scale,
        seed=seed,
        epochs=PARTS[part].epochs,
        params=count_parameters(model),
        mmacs=round(counter.get_total_flops() / 2e6, 2),
        radius=round(radius(receptive_field(model, 'layer4.1', noise).mean(axis=0)), 3),  # mean of all splits
        **{name: round(metrics[f'eval_{name}'], 3) for name in PARTS[part].metrics},
    )


def count_parameters(model: nn.Module) -> int:
    """Counts parameters without the classifier, which backbones do not have."""
    return sum(parameter.numel() for name, parameter in model.named_parameters() if not name.startswith('fc.'))


def study(folder: Path, source: Path) -> list[dict[str, Any]]:
    """Runs the networks that have no result in the folder yet, and returns all results."""
    data = make_folder(folder) / 'multi_scale'
    if 'detection' in PARTS and not data.exists():
        multi_scale.write(data, source, multi_scale.COUNTS)
    runs = []
    for part in PARTS:
        for seed, scale in product(range(PARTS[part].seeds), BASE_WIDTHS):
            result = folder / f'{part}_scale{scale}_seed{seed}.json'
            if not result.exists():
                record = run(part, scale, seed, data if part == 'detection' else source, folder)
                atomic_write_text(result, json.dumps(record) + '\n')
            runs.append(json.loads(result.read_text()))
    return runs


def values_of(runs: Sequence[dict[str, Any]], part: str, scale: int, metric: str) -> list[float]:
    return [each[metric] for each in runs if (each['part'], each['scale']) == (part, scale)]


def difference(runs: Sequence[dict[str, Any]], part: str, scale: int, metric: str) -> tuple[float, float]:
    """Returns the mean of the paired differences to scale 1, and half the width of its 95 % interval (Student's t)."""
    from scipy.stats import sem, t  # comes with scikit-image

    pairs = np.subtract(values_of(runs, part, scale, metric), values_of(runs, part, 1, metric))
    return float(pairs.mean()), float(sem(pairs) * t.ppf(0.975, len(pairs) - 1))


def table(runs: Sequence[dict[str, Any]], part: str) -> list[str]:
    """Returns a Markdown table: mean and standard error for each scale, then the differences to scale 1."""
    from scipy.stats import sem

    names = PARTS[part].metrics
    rows = [['scale', 'parameters', 'MMACs', 'receptive field, pixels', *names.values()]]
    for scale in BASE_WIDTHS:
        params, mmacs = (values_of(runs, part, scale, name)[0] for name in ('params', 'mmacs'))
        values = [values_of(runs, part, scale, name) for name in ('radius', *names)]
        means = [f'{statistics.mean(each):.2f} ± {sem(each):.2f}' for each in values]
        rows.append([str(scale), f'{params:,}', f'{mmacs:.1f}', *means])
    for scale in list(BASE_WIDTHS)[1:]:
        differences = [difference(runs, part, scale, name) for name in names]
        intervals = [f'{mean:+.2f} [{mean - half:+.2f}, {mean + half:+.2f}]' for mean, half in differences]
        rows.append([f'{scale} - 1', '', '', '', *intervals])
    lines = [f'| {" | ".join(cells)} |' for cells in rows]
    return [lines[0], '|---:' * len(rows[0]) + '|', *lines[1:]]


def main(argv: list[str] | None = None) -> None:
    parser = make_parser(__doc__)
    parser.add_argument('folder', type=Path, help='folder to write')
    parser.add_argument('--fashion-mnist', type=Path, required=True, help='folder with Fashion-MNIST', metavar='DIR')
    args = parser.parse_args(argv)
    with report_errors(parser):
        runs = study(args.folder, args.fashion_mnist)
        document = dict(environment=environment(), runs=runs)
        atomic_write_text(args.folder / 'study.json', json.dumps(document, indent=1) + '\n')
        text = '\n\n'.join('\n'.join([part, '', *table(runs, part)]) for part in PARTS)
        atomic_write_text(args.folder / 'study.md', text + '\n')
        print(text)


if __name__ == '__main__':
    main()
