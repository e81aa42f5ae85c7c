"""Compares scales at equal numbers of parameters, as table 1 of the Res2Net paper does, at the size of two CPU cores.

    python -m timm_res2net.recipes.small_study study

trains a small network with bottlenecks (scale 1) and with Res2Net blocks at scales 2, 4 and 8, by one recipe, with five
seeds each, on two tasks: scikit-learn's handwritten digits, and telling from which of eighteen photographs of
scikit-image and scikit-learn a patch is. Run again, it goes on where it was stopped. The folder then holds `study.json`
with top-1 of every run, `study.png`, and a file for each run.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from torch import Tensor, nn
from tqdm import tqdm

from ..deploy.bench import environment
from ..vision.explain import radius, receptive_field
from ..vision.figures import new_figure, save
from ..weights.files import atomic_write_text
from . import digits
from .arguments import positive

TASKS = 'digits', 'photographs'
BASE_WIDTHS = {1: 64, 2: 44, 4: 25, 8: 15}  # of each scale, for the number of parameters nearest to that of scale 1
SEEDS = 5
EPOCHS = 20
BATCH = 64
SIDE = 24  # pixels of a patch

PHOTOGRAPHS = {
    'skimage.data': [
        *('astronaut.png', 'brick.png', 'camera.png', 'cell.png', 'chelsea.png', 'coffee.png', 'coins.png'),
        *('grass.png', 'gravel.png', 'hubble_deep_field.jpg', 'ihc.png', 'moon.png', 'motorcycle_left.png'),
        *('page.png', 'retina.jpg', 'rocket.jpg'),
    ],
    'sklearn.datasets.images': ['china.jpg', 'flower.jpg'],
}
CELLS = 4  # a photograph is cut in 4 x 4; patches of the 4 cells on a diagonal are held out
PATCHES = 8  # of each cell

Part = tuple[Tensor, Tensor]  # images (N, 1, H, W), labels (N,)


def network(scale: int, num_classes: int) -> nn.Module:
    """Makes the network of the paper's table 4 with fewer and narrower blocks, for grey images."""
    return timm.create_model(
        'res2next29_6c_24w_4s',
        layers=(2, 2, 2),
        channels=(16, 32, 64),
        cardinality=1,
        scale=scale,
        base_width=BASE_WIDTHS[scale],
        in_chans=1,
        num_classes=num_classes,
    )


def parameters_of(model: Any) -> int:
    """The number of parameters without the classifier, so that it is the same for all tasks."""
    return sum(parameter.numel() for parameter in set(model.parameters()) - set(model.get_classifier().parameters()))


def data(task: str) -> tuple[Part, Part]:
    """Training and held-out images of a task, each of mean 0 and deviation 1, and their labels."""
    if task == 'digits':
        parts = digits.split()
        pairs = [(np.repeat(np.repeat(x, 2, axis=1), 2, axis=2), y) for x, y in (parts['train'], parts['val'])]
    else:
        pairs = list(patches())
    train, test = ((normalised(torch.as_tensor(x)), torch.as_tensor(y)) for x, y in pairs)
    return train, test


def normalised(images: Tensor) -> Tensor:
    """(N, H, W) of grey levels to (N, 1, H, W) of mean 0 and deviation 1, as brightness shall tell nothing."""
    x = images[:, None].float()
    return (x - x.mean((2, 3), keepdim=True)) / x.std((2, 3), keepdim=True).clamp(min=1.0)


def patches() -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Patches of photographs and the indices of these, first for training, then held out from other places.

    A patch is 24 to 96 pixels of its photograph across, and more or less blurred: its size tells nothing.
    """
    from importlib.resources import files

    rng = np.random.default_rng(0)
    paths = [files(package) / name for package, names in PHOTOGRAPHS.items() for name in names]
    found: dict[bool, list[tuple[np.ndarray, int]]] = {False: [], True: []}
    for label, path in enumerate(paths):
        with path.open('rb') as file:
            photograph = Image.open(file).convert('L')
        width, height = photograph.width // CELLS, photograph.height // CELLS
        for row, column in np.ndindex(CELLS, CELLS):
            for _ in range(PATCHES):
                side = round(np.exp(rng.uniform(np.log(SIDE), np.log(min(96, width, height)))))
                left = column * width + rng.integers(width - side + 1)
                top = row * height + rng.integers(height - side + 1)
                patch = photograph.resize((SIDE, SIDE), Image.Resampling.BOX, (left, top, left + side, top + side))
                patch = patch.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1)))
                found[row == column].append((np.asarray(patch), label))
    for part in found.values():
        images, labels = zip(*part)
        yield np.stack(images), np.array(labels)


def run(task: str, scale: int, seed: int, epochs: int) -> dict[str, Any]:
    """Trains one network and tests it after the last epoch."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    (images, labels), (test_images, test_labels) = data(task)
    torch.manual_seed(seed)
    model = network(scale, int(labels.max()) + 1).to(memory_format=torch.channels_last)
    steps = len(images) // BATCH
    optimizer = create_optimizer_v2(model, 'sgd', lr=0.1, weight_decay=5e-4, momentum=0.9)  # Nesterov's
    warmup = min(2, epochs - 1) * steps
    scheduler = CosineLRScheduler(optimizer, epochs * steps, warmup_t=warmup, warmup_lr_init=1e-3, t_in_epochs=False)
    model.train()
    step = 0
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: steps * BATCH].split(BATCH):
            scheduler.step_update(step)
            loss = F.cross_entropy(model(shifted(images[batch])), labels[batch], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    model.eval()
    with torch.no_grad():
        predicted = torch.cat([model(part).argmax(dim=1) for part in test_images.split(256)])
    noise = torch.randn(8, 1, 64, 64, generator=torch.Generator().manual_seed(0))
    field = receptive_field(model, 'layer3.1', noise).mean(axis=0)  # of all splits
    return dict(
        task=task,
        scale=scale,
        seed=seed,
        epochs=epochs,
        params=parameters_of(model),
        top1=round(100 * (predicted == test_labels).float().mean().item(), 3),
        radius=round(radius(field), 3),
        seconds=round(time.perf_counter() - start, 1),
        field=np.round(field / field.max(), 4).tolist(),
    )


def shifted(images: Tensor, by: int = 2) -> Tensor:
    """Moves a batch by up to 2 pixels each way, the same for all, and fills in the border's value."""
    down, right = torch.randint(0, 2 * by + 1, (2,)).tolist()
    height, width = images.shape[-2:]
    return F.pad(images, [by] * 4, mode='replicate')[..., down : down + height, right : right + width]


def study(
    folder: Path, tasks: Sequence[str], scales: Sequence[int], seeds: int, epochs: int, workers: int
) -> list[Any]:
    """Runs what the folder does not hold yet, and returns all runs in order.

    Raises:
        ValueError: If the folder holds runs of another number of epochs.
    """
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [(task, scale, seed, epochs) for seed in range(seeds) for task in tasks for scale in scales]
    paths = {each: folder / f'{each[0]}_scale{each[1]}_seed{each[2]}.json' for each in wanted}
    done = {each: json.loads(path.read_text()) for each, path in paths.items() if path.exists()}
    for each, record in done.items():
        if record['epochs'] != epochs:
            raise ValueError(f'{paths[each]} is of {record["epochs"]} epochs, not {epochs}; choose another folder')
    missing = [each for each in wanted if each not in done]
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context('spawn'))
    with pool, tqdm(total=len(wanted), initial=len(done), unit='run', disable=None) as bar:
        futures = {pool.submit(run, *each): each for each in missing}
        for future in as_completed(futures):
            each, record = futures[future], future.result()
            done[each] = record
            atomic_write_text(paths[each], json.dumps(record) + '\n')
            bar.update()
    return sorted(done.values(), key=lambda record: (record['task'], record['scale'], record['seed']))


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and its standard error; 0 for one value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.mean(values), error


def arm_of(runs: Sequence[dict[str, Any]], task: str, scale: int) -> list[dict[str, Any]]:
    """The runs of a task at a scale."""
    return [record for record in runs if (record['task'], record['scale']) == (task, scale)]


def table(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Lines of a Markdown table: parameters, and for each task mean and standard error of top-1 and of the radius."""
    tasks = list(dict.fromkeys(record['task'] for record in runs))
    heads = [f'{task}: {what}' for task in tasks for what in ('top-1, %', 'radius, pixels')]
    lines = [f'| scale | parameters | {" | ".join(heads)} |', '|---:' * (2 + len(heads)) + '|']
    for scale in sorted({record['scale'] for record in runs}):
        cells = [str(scale)]
        for task in tasks:
            arm = arm_of(runs, task, scale)
            cells += [f'{arm[0]["params"]:,}'] if len(cells) == 1 else []
            for key in ('top1', 'radius'):
                mean, error = mean_and_error([record[key] for record in arm])
                cells.append(f'{mean:.2f} ± {error:.2f}')
        lines.append(f'| {" | ".join(cells)} |')
    return lines


def plot(runs: Sequence[dict[str, Any]], out: str) -> None:
    """Draws top-1 over scale for each task, and below it the mean effective receptive field of each scale.

    Raises:
        ImportError: If matplotlib is missing.
    """
    tasks = list(dict.fromkeys(record['task'] for record in runs))
    scales = sorted({record['scale'] for record in runs})
    figure = new_figure(2.2 * len(scales) * len(tasks), 6)
    parts: Any = np.ravel(figure.subfigures(1, len(tasks)))  # type: ignore[arg-type]  # a figure, or an array of them
    for part, task in zip(parts, tasks):
        upper, lower = part.subfigures(2, 1, height_ratios=(1.4, 1))
        panel, fields = upper.subplots(), np.atleast_1d(lower.subplots(1, len(scales)))
        for i, scale in enumerate(scales):
            arm = arm_of(runs, task, scale)
            top1 = [record['top1'] for record in arm]
            mean, error = mean_and_error(top1)
            panel.scatter([i] * len(top1), top1, color='C0', alpha=0.35, linewidths=0)
            panel.errorbar(i, mean, error, color='C0', marker='_', markersize=22, capsize=5)
            fields[i].imshow(np.sqrt(np.mean([record['field'] for record in arm], axis=0)), cmap='magma')
            mean, error = mean_and_error([record['radius'] for record in arm])
            fields[i].set_title(f'scale {scale}\nradius {mean:.1f} ± {error:.1f}', fontsize=9)
            fields[i].axis('off')
        panel.set_xticks(range(len(scales)), [str(scale) for scale in scales])
        panel.set(xlabel='scale, at equal parameters', ylabel='top-1, %', title=task)
        lower.suptitle('effective receptive field of the last block, pixels', fontsize=9)
    save(figure, out)


def main(argv: list[str] | None = None) -> None:
    """Runs the study, and writes its figures and their plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('folder', type=Path, help='where to write')
    parser.add_argument('--tasks', nargs='+', choices=TASKS, default=TASKS)
    parser.add_argument('--scales', nargs='+', type=int, choices=BASE_WIDTHS, default=list(BASE_WIDTHS))
    parser.add_argument('--seeds', type=positive, default=SEEDS, help=f'runs of each (default: {SEEDS})')
    parser.add_argument('--epochs', type=positive, default=EPOCHS, help=f'of a run (default: {EPOCHS})')
    parser.add_argument('--workers', type=positive, default=os.cpu_count(), help='runs at a time (default: one a core)')
    args = parser.parse_args(argv)
    try:
        runs = study(args.folder, args.tasks, args.scales, args.seeds, args.epochs, args.workers)
    except ValueError as error:
        parser.error(str(error))
    except ImportError as error:
        parser.error(f'{error}; the images come with it: pip install "timm_res2net[recipes]"')
    command = ' '.join(['python -m timm_res2net.recipes.small_study', *(sys.argv[1:] if argv is None else argv)])
    shown = [{key: value for key, value in record.items() if key != 'field'} for record in runs]
    document = dict(command=command, environment=environment(), runs=shown)
    atomic_write_text(args.folder / 'study.json', json.dumps(document, indent=1) + '\n')
    plot(runs, str(args.folder / 'study.png'))
    print('\n'.join(table(runs)))


if __name__ == '__main__':
    main()
