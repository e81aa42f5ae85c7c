"""Shared by `detect` and `segment`: their command line, a Trainer for any model, and the output folder.

run.json             settings, to continue the run and to rebuild its model
checkpoint-N/        the Trainer's checkpoints; those without a file `complete` are ignored
model.safetensors    the best model
curves.png           loss and metrics over epochs
examples.png         predictions next to the truth
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from timm.utils import ParseKwargs
from timm.utils.model import freeze, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed

from .._errors import first_line
from .._files import atomic_write, atomic_write_text, make_folder, read_text, sync
from .._images import find_images
from ..models.block import spec_of
from ..vision.figures import new_figure, save
from ..weights.loading import load_checkpoint
from .arguments import report_errors
from .coco import read_image

RUN, COMPLETE, WEIGHTS = 'run.json', 'complete', 'model.safetensors'
DEFAULTS: dict[str, Any] = dict(  # defaults that differ from the Trainer's
    eval_strategy='epoch',
    save_strategy='epoch',
    logging_strategy='epoch',
    save_total_limit=2,
    load_best_model_at_end=True,
    num_train_epochs=12,
    learning_rate=5e-4,
    lr_scheduler_type='cosine',
    warmup_steps=0.05,
    dataloader_drop_last=True,
    dataloader_pin_memory=torch.cuda.is_available(),
    remove_unused_columns=False,
)
FIXED = (  # the Trainer's options that must not change when a run is continued
    'num_train_epochs', 'max_steps', 'learning_rate', 'lr_scheduler_type', 'warmup_steps', 'optim', 'weight_decay',
    'per_device_train_batch_size', 'gradient_accumulation_steps', 'max_grad_norm', 'bf16', 'fp16', 'seed',
)  # fmt: skip
PREDICTING = {'--predict', '--output-dir', '--score', '--use-cpu'}  # options that --predict uses
KEYWORDS: Any = dict(nargs='*', action=ParseKwargs, default={}, metavar='KEY=VALUE')  # for add_argument


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description."""


def make_parser(description: str | None, metric: str) -> Any:
    """Makes a parser of the Trainer's options and those of both recipes; the best model has the highest `metric`."""
    kinds: Any = [TrainingArguments]
    parser: Any = HfArgumentParser(kinds, description=description, formatter_class=Formatter, allow_abbrev=False)
    parser.set_defaults(**DEFAULTS, metric_for_best_model=metric)
    work = parser.add_mutually_exclusive_group(required=True)
    work.add_argument('--data', type=Path, help='folder of the data set to train on')
    work.add_argument('--predict', help='image or folder of images to predict with the model in --output-dir')
    parser.add_argument('--train', default='train', help='part to train on')
    parser.add_argument('--val', default='val', help='part to evaluate on')
    parser.add_argument('--backbone', default='res2net50d', help='timm model to use as backbone')
    parser.add_argument('--pretrained', action='store_true', help='start from the pretrained weights of that name')
    parser.add_argument('--weights', help='start from the backbone weights in this file, from any known code base')
    parser.add_argument(
        '--frozen-stages', type=int, default=-1, help='freeze the stem (0) and the first N stages of the backbone'
    )
    parser.add_argument('--frozen-norms', action='store_true', help="freeze the backbone's batch norms")
    return parser


def run(parser: Any, argv: Sequence[str] | None, train: Any, predict: Any) -> None:
    """Parses the command line, then calls `train(options, args)` or `predict(images, options, args)`.

    `args` are the TrainingArguments, `options` all other options, `images` yields files with their images.
    """
    argv = sys.argv[1:] if argv is None else argv
    with report_errors(parser):
        args, options = parser.parse_args_into_dataclasses(argv)
        if options.predict is not None:
            given = {each.partition('=')[0].replace('_', '-') for each in argv if each.startswith('--')}
            if unused := sorted(given - PREDICTING):
                raise ValueError(f'cannot use {unused[0]} with --predict. Leave it out.')
            failed: list[str] = []
            predict(read_pictures(find_pictures(options.predict), failed), options, args)
            if failed:
                raise ValueError(f'{len(failed)} images were left out. The first: {failed[0]}')
        else:
            if args.label_smoothing_factor:
                raise ValueError('--label-smoothing-factor has no effect on these losses. Leave it out.')
            set_seed(args.seed)
            train(options, args)


def find_pictures(path: str) -> list[Path]:
    """Finds one image, or all in a folder; ValueError if there are none, or two would have the same output file."""
    found = find_images([path])
    if found.failed:
        raise ValueError(f'cannot read {found.failed[0][0]!r}: {found.failed[0][1]}')
    stems = [file.stem for file in found.files]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise ValueError(f'two images are called {min(twice)!r}, and so would be their outputs. Predict one at a time.')
    return found.files


def read_pictures(files: Sequence[Path], failed: list[str]) -> Iterator[tuple[Path, Tensor]]:
    """Yields files with their images, (3, H, W) in 0..1; adds the errors of those that cannot be read to `failed`."""
    for file in files:
        try:
            image = read_image(file)
        except ValueError as error:
            failed.append(str(error))
        else:
            yield file, image


def prepare_backbone(body: Any, options: argparse.Namespace) -> None:
    """Loads weights into a `features_only` model of timm, and freezes stages and norms."""
    if options.weights is not None:
        load_checkpoint(body, options.weights)
    root = getattr(body, 'model', body)  # timm has several kinds of feature extractors
    if options.frozen_stages >= 0:
        stages = [each['module'] for each in body.feature_info.info]
        if options.frozen_stages >= len(stages):
            raise ValueError(f'cannot freeze stage {options.frozen_stages}: the last one is {len(stages) - 1}')
        freeze_up_to(root, stages[options.frozen_stages])
    if options.frozen_norms:
        freeze_batch_norm_2d(root)


def freeze_up_to(root: nn.Module, last: str) -> None:
    """Freezes the modules of a model, in their order of definition, up to and including the module named `last`."""
    last = last.replace('_', '.')  # timm joins some names with underscores
    for name, child in root.named_children():
        prefix = f'{name.replace("_", ".")}.'
        if last.startswith(prefix):
            freeze_up_to(child, last.removeprefix(prefix))
        else:
            freeze(root, [name])
        if f'{last}.'.startswith(prefix):
            break


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Batches items as lists because their images can have any size; only `index` becomes a tensor."""
    batch: dict[str, Any] = {name: [each[name] for each in samples] for name in samples[0]}
    return {**batch, 'index': torch.tensor(batch['index'])}


class RecipeTrainer(Trainer):
    """A Trainer for any model.

    `loss` and `measure` take the model and a batch. `measure` returns a tensor (N, ...) for the N images of the batch,
    with the same shape (...) in all batches. `compute_metrics` gets the measurements of all images as `predictions`,
    and their indices in the data set as `label_ids`.
    """

    def __init__(
        self, loss: Callable[[Any, Any], Tensor], measure: Callable[[Any, Any], Tensor], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs, data_collator=collate, callbacks=[MarkComplete()])
        self.loss, self.measure = loss, measure

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return self.loss(model, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not loss.isfinite():  # the Trainer would continue
            step = self.state.global_step + 1
            raise ValueError(f'training diverged: loss {loss.item()} at step {step}. Use a smaller --learning-rate.')
        return loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Keeps the last batch, although `dataloader_drop_last` is set for training."""
        dataset: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        size, workers = self.args.eval_batch_size, self.args.dataloader_num_workers
        return self.accelerator.prepare(DataLoader(dataset, size, num_workers=workers, collate_fn=collate))

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        model: Any = self.model
        for buffer in model.buffers():  # so that all processes evaluate the model that the first one saves
            broadcast(buffer)
        metrics: dict[str, float] = super().evaluate(*args, **kwargs)
        return metrics

    @torch.no_grad()
    def prediction_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        inputs = self._prepare_inputs(inputs)
        with self.compute_loss_context_manager():
            return None, self.measure(model, inputs), inputs['index']


class MarkComplete(TrainerCallback):
    """Marks a checkpoint as complete once all its files are on the disk."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes its own files
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f'checkpoint-{state.global_step}')
            for path in folder.iterdir():
                sync(path)
            (folder / COMPLETE).touch()


def find_checkpoint(folder: Path) -> str | None:
    complete = [mark.parent for mark in folder.glob(f'checkpoint-*/{COMPLETE}')]
    return str(max(complete, key=lambda path: int(path.name.removeprefix('checkpoint-')))) if complete else None


def train(trainer: Any, options: argparse.Namespace, backbone: nn.Module, draw_examples: Any) -> None:
    """Trains from the last checkpoint, if any, and saves the settings, the best model, curves and examples."""
    args, folder, names = trainer.args, Path(trainer.args.output_dir), trainer.train_dataset.names
    if names != trainer.eval_dataset.names:
        raise ValueError(f'{options.train!r} and {options.val!r} have different categories')
    count = len(trainer.train_dataset)
    if args.train_batch_size * args.world_size > count:
        raise ValueError(f'{count} images do not fill one batch. Use a smaller --per-device-train-batch-size.')
    settings = {**vars(options), 'names': names, 'images': count, 'processes': args.world_size}
    settings |= {name: getattr(args, name) for name in FIXED}
    del settings['data']  # it may move
    settings = json.loads(json.dumps(settings))  # turns tuples into lists
    checkpoint = args.resume_from_checkpoint or find_checkpoint(folder)
    if checkpoint is not None:
        require_same_settings(folder, settings)
    args.distributed_state.wait_for_everyone()  # all have read the folder before the first one writes
    if trainer.is_world_process_zero():
        atomic_write_text(make_folder(folder) / RUN, json.dumps(settings, indent=1) + '\n')
    trainer.train(resume_from_checkpoint=checkpoint)
    if trainer.is_world_process_zero():
        spec = spec_of(backbone)
        state = {name: value.detach().cpu().contiguous() for name, value in trainer.model.state_dict().items()}
        atomic_write(folder / WEIGHTS, lambda path: save_file(state, path, spec.as_text() if spec else None))
        plot_curves(trainer.state.log_history, folder / 'curves.png')
        draw_examples(trainer.model.eval(), trainer.eval_dataset, folder / 'examples.png')


def require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    recorded = read_run(folder)
    for name in recorded | settings:
        if recorded.get(name) != settings.get(name):
            difference = f'{name} {recorded.get(name)!r}, not {settings.get(name)!r}'
            raise ValueError(f'{str(folder)!r} holds a run with {difference}. Choose another --output-dir.')


def read_run(folder: str | Path) -> dict[str, Any]:
    try:
        return dict(json.loads(read_text(Path(folder, RUN))))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{str(folder)!r} is not the folder of a run: {first_line(error)}') from error


def load_best(model: nn.Module, folder: str | Path) -> Any:
    file = Path(folder, WEIGHTS)
    if not file.is_file():
        raise ValueError(f'{str(folder)!r} has no {WEIGHTS}: the run is not finished. Run its command again.')
    try:
        model.load_state_dict(load_file(file))
    except Exception as error:  # from safetensors or torch
        raise ValueError(f'cannot load {str(file)!r}: {first_line(error)}') from error
    return model.eval()


def plot_curves(history: Sequence[dict[str, Any]], out: Path) -> None:
    """Draws the training loss and the metrics over epochs; leaves out metrics below zero, which are undefined."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2)
    names = dict.fromkeys(name for entry in history for name in entry if name == 'loss' or name.startswith('eval_'))
    for name in names:
        points = [(each['epoch'], each[name]) for each in history if each.get(name, -1) >= 0]
        if points and not name.endswith(('_runtime', '_per_second', '_time')):
            panel = left if name == 'loss' else right
            panel.plot(*zip(*points), marker='.', label=name.removeprefix('eval_'))
    left.set(xlabel='epoch', ylabel='training loss')
    right.set(xlabel='epoch', ylabel='validation metrics')
    if right.lines:
        right.legend()
    save(figure, str(out))
