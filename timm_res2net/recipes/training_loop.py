"""The loop that the recipes train by: resumable, in one process or several.

It is made of torch's parts and timm's optimizers and schedulers. A run lives in a folder:

    settings.json  how it was started
    last.pth       after the last epoch: model, optimizer and history
    best.pth       the model of the best epoch
    history.json   learning rate, loss and metrics of each epoch

All that is random in an epoch follows from the seed, the epoch's number, and the numbers of processes and of workers
that read, so a run that was killed at any moment and resumed ends at the very same weights.
"""

import argparse
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, DistributedSampler, RandomSampler, Subset
from tqdm import tqdm

from ..weights.files import atomic_write_text, make_folder, read_text
from .arguments import positive
from .states import damaged, load_states, save_states

__all__ = [
    'Batches',
    'Settings',
    'add_settings',
    'batches_of',
    'best_weights',
    'fit',
    'gather',
    'join_processes',
    'rank',
    'report',
    'settings_of',
    'share_of',
    'world_size',
]

DTYPES = {'float32': None, 'bfloat16': torch.bfloat16, 'float16': torch.float16}


def setting(default: Any, text: str, **options: Any) -> Any:
    """A field of settings; the options are argparse's."""
    return field(default=default, metadata=dict(help=f'{text} (default: %(default)s)', **options))


@dataclass(frozen=True)
class Settings:
    """How to train. Each is an option of the same name.

    Raises:
        ValueError: If one is not finite.
    """

    epochs: int = setting(12, 'passes over the training images', type=positive)
    batch_size: int = setting(16, 'images in a step, for each process', type=positive)
    opt: str = setting('sgd', "timm's name of the optimizer")
    lr: float = setting(0.01, 'learning rate after the warm-up')
    momentum: float = setting(0.9, "the optimizer's")
    weight_decay: float = setting(1e-4, 'of weights, not of norms and biases')
    sched: str = setting('cosine', 'schedule of the learning rate', choices=['cosine', 'multistep', 'poly'])
    decay_milestones: tuple[int, ...] = setting((8, 11), 'epochs after which multistep decays', nargs='+')
    decay_rate: float = setting(0.1, 'what multistep multiplies by then; the power of poly')
    warmup_epochs: float = setting(0.5, 'in which the learning rate grows')
    clip_grad: float = setting(0.0, 'largest norm of the gradient, 0 for any')
    amp: str = setting('float32', 'data type of autocast', choices=list(DTYPES))
    seed: int = setting(0, 'of all that is random')

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, float) and not math.isfinite(value):
                raise ValueError(f'--{name.replace("_", "-")} {value} is no finite number')


class Batches(Sized, Iterable[Any], Protocol):
    """A DataLoader, or what can be used like one."""


def add_settings(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Adds an option for each of the settings, with defaults of the recipe's own."""
    group = parser.add_argument_group('training')
    for each in fields(Settings):
        default = defaults.get(each.name, each.default)
        kind = int if isinstance(default, tuple) else type(default)
        options: dict[str, Any] = dict(type=kind) | dict(each.metadata)
        group.add_argument(f'--{each.name.replace("_", "-")}', default=default, **options)


def settings_of(args: argparse.Namespace) -> Settings:
    """The settings among parsed arguments."""
    values: dict[str, Any] = {each.name: getattr(args, each.name) for each in fields(Settings)}
    values['decay_milestones'] = tuple(values['decay_milestones'])
    return Settings(**values)


def rank() -> int:
    """The number of this process."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def join_processes(device: torch.device) -> None:
    """Joins the processes that torchrun has started, if it has; `device` is that of this one."""
    if 'LOCAL_RANK' not in os.environ or dist.is_initialized():
        return
    if device.type == 'cuda':
        torch.cuda.set_device(device)
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')


def gather(found: list[Any]) -> list[Any]:
    """What all processes have found, in each of them."""
    if world_size() == 1:
        return found
    parts: list[Any] = [None] * world_size()
    dist.all_gather_object(parts, found)
    return [each for part in parts for each in part]


def batches_of(
    images: Dataset[Any], settings: Settings, workers: int, collate_fn: Callable[[Any], Any] | None = None
) -> DataLoader[Any]:
    """Batches to train with, in an order of chance; each process has its own.

    Raises:
        ValueError: If there are too few images for one.
    """
    sampler = DistributedSampler(images, seed=settings.seed) if world_size() > 1 else RandomSampler(images)  # type: ignore[arg-type]
    batches = DataLoader(
        images, settings.batch_size, sampler=sampler, num_workers=workers, collate_fn=collate_fn, drop_last=True
    )
    if not len(batches):
        count = len(images)  # type: ignore[arg-type]
        raise ValueError(f'{count} images are less than a batch of {settings.batch_size} for each process')
    return batches


def share_of(dataset: Dataset[Any]) -> Subset[Any]:
    """The part of a set that this process evaluates."""
    return Subset(dataset, range(rank(), len(dataset), world_size()))  # type: ignore[arg-type]


def fit(
    model: nn.Module,
    batches: Batches,
    loss: Callable[[nn.Module, Any], Tensor],
    evaluate: Callable[[nn.Module], dict[str, Any]],
    settings: Settings,
    folder: Path,
    *,
    about: Mapping[str, Any] | None = None,
    resume: bool = False,
    progress: bool = True,
    device: torch.device | None = None,
) -> list[dict[str, Any]]:
    """Trains a model, evaluates it after each epoch, and keeps the best and the last.

    Args:
        model: On its device; it ends with the weights of the last epoch.
        batches: Of an epoch, the same number in each.
        loss: Of the model, wrapped where there are several processes, on a batch; it moves the batch to the device.
        evaluate: Metrics of the model, the one that counts first; the more the better.
        settings: How to train.
        folder: Where the run lives.
        about: More to remember, that a resumed run has to agree with.
        resume: Go on with the run in the folder, if there is one.
        progress: Show a bar in a terminal.
        device: Where the model is, the CPU if None.

    Returns:
        Learning rate, loss and metrics of each epoch.

    Raises:
        ValueError: If the folder has a run and shall not be resumed, or with other settings, or that is damaged; or if
            the loss is not finite.
        OSError: If the folder can't be written.
    """
    device = device or torch.device('cpu')
    first = rank() == 0
    optimizer = create_optimizer_v2(
        model, settings.opt, lr=settings.lr, weight_decay=settings.weight_decay, momentum=settings.momentum
    )
    scheduler: Any
    scheduler, _ = create_scheduler_v2(
        optimizer,
        settings.sched,
        num_epochs=settings.epochs,
        decay_milestones=list(settings.decay_milestones),
        decay_rate=settings.decay_rate,
        warmup_epochs=settings.warmup_epochs,  # type: ignore[arg-type]  # any number
        warmup_lr=settings.lr * 1e-3,
        step_on_epochs=False,
        updates_per_epoch=len(batches),
    )
    if settings.sched == 'multistep':
        scheduler.decay_t = [each + 1 for each in scheduler.decay_t]  # timm decays one update before a milestone
    scaler = torch.amp.GradScaler(device.type, enabled=settings.amp == 'float16')
    history: list[dict[str, Any]] = []
    last = open_run(folder, {**asdict(settings), 'processes': world_size(), **(about or {})}, resume)
    if last is not None:
        saved = load_states(last, device, 'model', 'optimizer', 'scaler', 'history')
        model.load_state_dict(saved['model'])
        optimizer.load_state_dict(saved['optimizer'])
        scaler.load_state_dict(saved['scaler'])
        history = saved['history']
    wrapped = DistributedDataParallel(model) if world_size() > 1 else model
    for epoch in range(len(history), settings.epochs):
        torch.manual_seed(settings.seed * 10_000 + epoch * world_size() + rank())
        if isinstance(sampler := getattr(batches, 'sampler', None), DistributedSampler):
            sampler.set_epoch(epoch)
        wrapped.train()
        total = 0.0
        hidden = None if progress and first else True
        bar = tqdm(batches, desc=f'epoch {epoch + 1} of {settings.epochs}', disable=hidden, leave=False)
        for step, batch in enumerate(bar):
            scheduler.step_update(epoch * len(batches) + step)
            with torch.autocast(device.type, DTYPES[settings.amp], enabled=settings.amp != 'float32'):
                value = loss(wrapped, batch)
            if not value.isfinite():
                raise ValueError(f'the loss of step {step} of epoch {epoch + 1} is {value:.1f}; try a smaller --lr')
            optimizer.zero_grad()
            scaler.scale(value).backward()
            if settings.clip_grad:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), settings.clip_grad)
            scaler.step(optimizer)
            scaler.update()
            total += value.item()
            bar.set_postfix(loss=f'{value:.3f}')
        model.eval()
        for buffer in model.buffers() if world_size() > 1 else ():
            dist.broadcast(buffer, 0)  # as before each step of training: all evaluate the model that is saved
        with torch.no_grad():
            metrics = evaluate(model)
        mean = sum(gather([total])) / len(batches) / world_size()
        history.append(dict(epoch=epoch + 1, lr=optimizer.param_groups[0]['lr'], loss=round(mean, 5), **metrics))
        if first:
            states = dict(optimizer=optimizer.state_dict(), scaler=scaler.state_dict(), history=history)
            save_epoch(folder, model, states, next(iter(metrics)), about or {})
    return history


def report(history: Sequence[dict[str, Any]]) -> str:
    """A line for each epoch with its loss and metrics."""
    texts = [', '.join(f'{name} {each[name]:.2f}' for name in each if name not in ('epoch', 'lr')) for each in history]
    return '\n'.join(f'epoch {each["epoch"]}: {text}' for each, text in zip(history, texts))


def open_run(folder: Path, wanted: dict[str, Any], resume: bool) -> Path | None:
    """Begins a run in a folder, or finds the one that is there; one without an epoch that ended is begun anew.

    Returns:
        Its last epoch, None if there is none.

    Raises:
        ValueError: If there is a run that shall not be resumed, has other settings, or whose settings are damaged.
        OSError: If the folder can't be written.
    """
    file, last = folder / 'settings.json', folder / 'last.pth'
    wanted = json.loads(json.dumps(wanted))  # lists for tuples
    begun = last.exists()
    if begun and not resume:
        raise ValueError(f'{folder} holds a run; add --resume to go on with it, or name another folder')
    text = read_text(file) if begun else '{}'
    try:
        found: dict[str, Any] = json.loads(text) | ({} if begun else wanted)
    except (ValueError, TypeError, RecursionError) as error:
        raise damaged(file, error) from error
    for name in found | wanted:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f'{folder} holds a run with {name} {found.get(name)}, not {wanted.get(name)}; name another folder'
            )
    if world_size() > 1:
        dist.barrier()  # all have looked before the first one writes
    if not begun and rank() == 0:
        atomic_write_text(make_folder(folder) / file.name, json.dumps(wanted, indent=1) + '\n')
    return last if begun else None


def save_epoch(folder: Path, model: nn.Module, states: dict[str, Any], metric: str, about: Mapping[str, Any]) -> None:
    """Writes what an epoch has led to. The last epoch comes last: killed before, it is run again.

    The best model has the name and arguments of its backbone where Lightning has them, for names of weights don't tell
    what it computes.
    """
    history, weights = states['history'], model.state_dict()
    if history[-1][metric] >= max(each[metric] for each in history):
        backbone = {'backbone': about.get('backbone'), **about.get('model_kwargs', {})}
        save_states(dict(state_dict=weights, hyper_parameters=backbone), folder / 'best.pth')
    atomic_write_text(folder / 'history.json', json.dumps(history, indent=1) + '\n')
    save_states(dict(model=weights, **states), folder / 'last.pth')


def best_weights(folder: str | Path) -> dict[str, Tensor]:
    """The weights of a run's best epoch; ValueError if the file is damaged."""
    weights: dict[str, Tensor] = load_states(Path(folder, 'best.pth'), torch.device('cpu'), 'state_dict')['state_dict']
    return weights
