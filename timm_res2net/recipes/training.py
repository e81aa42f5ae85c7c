"""Shared by `detect` and `segment`: their command line, a Trainer for any model, and the folder of a run.

run.json                    settings of the run, to continue it and to build the model for predictions
checkpoint-N/               the Trainer's checkpoints; checksums.json is written last, so one without is incomplete
model.safetensors           the best model
curves.png, examples.png    loss and metrics over epochs, and predictions next to the truth
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast
from safetensors.torch import load_file, save_file
from timm.utils.model import freeze, freeze_batch_norm_2d
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments

from .._errors import first_line
from .._files import atomic_write, atomic_write_text, make_folder, read_text, sha256
from .._images import find_images
from ..models.block import spec_of
from ..vision.figures import new_figure, save
from ..weights.loading import load_checkpoint
from .arguments import report_errors

CHECKSUMS, RUN, WEIGHTS = 'checksums.json', 'run.json', 'model.safetensors'
DEFAULTS: dict[str, Any] = dict(  # where they differ from the Trainer's
    **dict(eval_strategy='epoch', save_strategy='epoch', logging_strategy='epoch', save_total_limit=2),
    **dict(load_best_model_at_end=True, dataloader_drop_last=True, remove_unused_columns=False),
    **dict(num_train_epochs=12, learning_rate=5e-4, lr_scheduler_type='cosine', warmup_steps=0.05),
    dataloader_pin_memory=torch.cuda.is_available(),
)
FIXED = (  # the Trainer's options that a run keeps when it is continued
    *('num_train_epochs', 'max_steps', 'learning_rate', 'lr_scheduler_type', 'warmup_steps', 'optim', 'weight_decay'),
    *('per_device_train_batch_size', 'gradient_accumulation_steps', 'max_grad_norm', 'bf16', 'fp16', 'seed'),
)


class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and keeps the line breaks of the description."""


def option(default: Any, help: str) -> Any:
    """Returns a dataclass field with a help text; a list is the default of an option with several values."""
    if isinstance(default, list):
        return field(default_factory=lambda: default, metadata=dict(help=help))
    return field(default=default, metadata=dict(help=help))


@dataclass
class TrainOptions:
    """Options of both recipes for training, besides the Trainer's own."""

    data: str = field(metadata=dict(help='folder of the data set'))
    train: str = option('train', 'part to train on')
    val: str = option('val', 'part to evaluate on')
    backbone: str = option('res2net50d', "timm's name of the backbone")
    pretrained: bool = option(False, 'start from the pretrained weights of that name')
    weights: str | None = option(None, 'start from the backbone weights in this file, of any code base')
    frozen_stages: int = option(-1, 'freeze the backbone up to this feature: 0 is the stem, 1 the first stage, -1 none')
    frozen_norms: bool = option(False, "freeze the backbone's batch norms")


@dataclass
class PredictOptions:
    """Options of both recipes for predicting."""

    predict: str = field(metadata=dict(help='image, or folder of images'))
    output_dir: str = field(metadata=dict(help='folder of the run; predictions go to predictions/ inside it'))
    use_cpu: bool = option(False, 'do not use a GPU')

    @property
    def device(self) -> torch.device:
        return torch.device('cuda' if torch.cuda.is_available() and not self.use_cpu else 'cpu')


def run_recipe(argv: Sequence[str] | None, description: str | None, train: Any, predict: Any, metric: str) -> None:
    """Runs the command line of a recipe.

    Args:
        argv: Arguments, by default those of the process.
        description: Help text.
        train: Class of the options for training, and the function that takes them and the TrainingArguments.
        predict: Class of the options for predicting, and the function that takes them; used with `--predict`.
        metric: Name of the metric by which the best model is chosen.
    """
    argv = sys.argv[1:] if argv is None else argv
    is_prediction = any(each.partition('=')[0] == '--predict' for each in argv)
    options, run = predict if is_prediction else train
    kinds = [options] if is_prediction else [options, TrainingArguments]
    parser: Any = HfArgumentParser(kinds, description=description, formatter_class=Formatter, allow_abbrev=False)
    if not is_prediction:
        parser.set_defaults(**DEFAULTS, metric_for_best_model=metric)
    with report_errors(parser):
        run(*parser.parse_args_into_dataclasses(argv))


def collate(samples: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Collects items of data sets, with images of any sizes, as lists; Trainer gathers their `image_id`."""
    batch: dict[str, Any] = {name: [each[name] for each in samples] for name in samples[0]}
    return {**batch, 'image_id': torch.tensor(batch['image_id'])}


def find_pictures(path: str) -> list[Path]:
    """Finds an image, or all in a folder; ValueError if there are none, or two would have the same output."""
    found = find_images([path])
    if found.failed:
        raise ValueError(f'cannot read {found.failed[0][0]!r}: {found.failed[0][1]}')
    stems = [file.stem for file in found.files]
    if twice := {stem for stem in stems if stems.count(stem) > 1}:
        raise ValueError(f'two images are called {min(twice)!r}. Predict one folder at a time.')
    return found.files


def prepare_backbone(
    body: Any, weights: str | None = None, frozen_stages: int = -1, frozen_norms: bool = False
) -> None:
    """Loads weights into a backbone of timm's `features_only`, then freezes it up to a feature, and its norms.

    Raises:
        ValueError: If there is no such feature, or the weights do not fit (CheckpointError).
        TypeError: If weights are given for a backbone of another family.
    """
    if weights is not None:
        load_checkpoint(body, weights)
    root = getattr(body, 'model', body)  # depends on how timm takes features out of the model
    if frozen_stages >= 0:
        features = [each['module'] for each in body.feature_info.info]
        if frozen_stages >= len(features):
            raise ValueError(f'cannot freeze stage {frozen_stages}: the last one is {len(features) - 1}')
        freeze(root, modules_up_to(root, features[frozen_stages]))
    if frozen_norms:
        freeze_batch_norm_2d(root)


def modules_up_to(root: nn.Module, last: str) -> list[str]:
    """Lists the modules that run no later than `last`, by the order of definition."""
    names = [name for name, _ in root.named_modules() if name]
    flat = [f'{name.replace(".", "_")}_' for name in names]  # timm joins some names by underscores
    end = f'{last.replace(".", "_")}_'
    stop = max(i for i, name in enumerate(flat) if name.startswith(end))
    parents = {name for name in flat if end.startswith(name) and name != end}  # they also contain later modules
    return [name for name, key in zip(names[: stop + 1], flat) if key not in parents]


class RecipeTrainer(Trainer):
    """A Trainer of any model, given functions for its loss and its evaluation.

    Args:
        loss: Computes the loss of a model on a batch.
        measure: Computes a tensor (N, ...) for the N images of a batch, of one shape for all batches. `compute_metrics`
            gets those of all images as `predictions`, and their `image_id` as `label_ids`.
        **kwargs: Passed to Trainer.
    """

    def __init__(
        self, loss: Callable[[Any, Any], Tensor], measure: Callable[[Any, Any], Tensor], **kwargs: Any
    ) -> None:
        super().__init__(**kwargs, data_collator=collate, callbacks=[WriteChecksums()])
        self.loss, self.measure = loss, measure

    def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        return self.loss(model, inputs)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)
        if not loss.isfinite():  # the Trainer would go on
            where = f'the loss is {loss.item()} at step {self.state.global_step + 1}'
            raise ValueError(f'training diverged: {where}. Use a smaller --learning-rate.')
        return loss

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """Keeps the last batch, which `dataloader_drop_last` would drop here, too."""
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
            return None, self.measure(model, inputs), inputs['image_id']


class WriteChecksums(TrainerCallback):
    """Completes a checkpoint by the checksums of its files, so that a later run trusts no other."""

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        args.distributed_state.wait_for_everyone()  # each process writes files of its own
        if state.is_world_process_zero:
            folder = Path(args.output_dir, f'checkpoint-{state.global_step}')
            atomic_write_text(folder / CHECKSUMS, json.dumps(checksums_of(folder)))


def checksums_of(checkpoint: Path) -> dict[str, str]:
    """Computes the checksums of the files in a checkpoint; that of anything else, such as a pipe, is empty."""
    # A process that is killed while it writes the checksums leaves a hidden temporary folder.
    paths = [path for path in sorted(checkpoint.glob('[!.]*')) if path.name != CHECKSUMS]
    return {path.name: sha256(path) if path.is_file() else '' for path in paths}


def find_checkpoint(folder: Path) -> str | None:
    """Finds the newest complete checkpoint; ValueError if a file in it is not the one that was written."""
    steps = [path.name.removeprefix('checkpoint-') for path in folder.glob('checkpoint-*')]
    for step in sorted((int(step) for step in steps if step.isdecimal()), reverse=True):
        checkpoint = folder / f'checkpoint-{step}'
        if not os.path.lexists(checkpoint / CHECKSUMS):  # the process was killed while it wrote this one
            continue
        try:
            expected = dict(json.loads(read_text(checkpoint / CHECKSUMS)))
            found = checksums_of(checkpoint)
        except (ValueError, TypeError, RecursionError) as error:
            raise damaged(checkpoint, first_line(error)) from error
        if changed := sorted(name for name in expected | found if expected.get(name) != found.get(name)):
            raise damaged(checkpoint, f'{changed[0]!r} was changed')
        return str(checkpoint)
    return None


def damaged(checkpoint: Path, reason: str) -> ValueError:
    """Returns the error of a damaged checkpoint."""
    advice = 'Delete this folder to continue from the checkpoint before it.'
    return ValueError(f'cannot continue from {str(checkpoint)!r}: {reason}. {advice}')


def train(trainer: Any, options: Any, backbone: nn.Module, **more: Any) -> bool:
    """Trains to the end, from the last checkpoint if there is one, and saves the best model with its curves.

    Args:
        trainer: RecipeTrainer with the model and the data.
        options: Options of the recipe.
        backbone: Part of the model whose spec is recorded with the weights.
        **more: Recorded in addition to the options, so that `--predict` can build the model.

    Returns:
        Whether this is the first process, which may go on to draw.

    Raises:
        ValueError: If the folder has a run with other settings or a damaged checkpoint, or training diverges.
        OSError: If the folder cannot be written.
    """
    args, folder, count = trainer.args, Path(trainer.args.output_dir), len(trainer.train_dataset)
    if args.train_batch_size * args.world_size > count:
        raise ValueError(f'{count} images do not fill one batch. Use a smaller --per-device-train-batch-size.')
    if args.save_total_limit == 1:
        raise ValueError('--save-total-limit 1 leaves nothing to continue from if a save is interrupted. Use 2.')
    settings = {**vars(options), **more, 'images': count, 'processes': args.world_size}
    settings |= {name: getattr(args, name) for name in FIXED}
    del settings['data']  # it may move
    settings = json.loads(json.dumps(settings))  # lists for tuples
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
    return bool(trainer.is_world_process_zero())


def require_same_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Raises ValueError if a run has other settings than those that it is to be continued with."""
    recorded = read_run(folder)
    for name in recorded | settings:
        if recorded.get(name) != settings.get(name):
            difference = f'{name} {recorded.get(name)!r}, not {settings.get(name)!r}'
            raise ValueError(f'{str(folder)!r} holds a run with {difference}. Choose another --output-dir.')


def read_run(folder: str | Path) -> dict[str, Any]:
    """Reads the settings of a run; ValueError if the folder has none."""
    try:
        return dict(json.loads(read_text(Path(folder, RUN))))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f'{str(folder)!r} is not the folder of a run: {first_line(error)}') from error


def load_best(model: nn.Module, folder: str | Path) -> Any:
    """Loads the best weights of a finished run; ValueError if there are none or they do not fit."""
    file = Path(folder, WEIGHTS)
    if not file.is_file():
        raise ValueError(f'{str(folder)!r} has no {WEIGHTS}: the run is not finished. Run its command again.')
    try:
        model.load_state_dict(load_file(file))
    except Exception as error:  # of safetensors, or torch's
        raise ValueError(f'cannot load {str(file)!r}: {first_line(error)}') from error
    return model.eval()


def plot_curves(history: Sequence[dict[str, Any]], out: Path) -> None:
    """Draws the training loss and the metrics over epochs; metrics below zero are undefined."""
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
