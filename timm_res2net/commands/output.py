"""Prints the reports of commands: escaped lines, tables, JSON, files left out, and facts about weights."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from timm.data import infer_imagenet_subset
from tqdm import tqdm

from .._errors import sanitize
from .._images import IMAGE_SETTINGS
from ..vision.predict import Prediction
from ..weights.checkpoints import Checkpoint
from ..weights.loading import describe_assumptions
from ..weights.matching import format_create_model


def print(*values: object, end: str = '\n', file: TextIO | None = None) -> None:
    """Prints above any progress bar. Escapes control characters, which names from files or the Hub can contain."""
    lines = ' '.join(map(str, values)).split('\n')
    tqdm.write('\n'.join(sanitize(line, len(line)) for line in lines), file=file, end=end)


def print_table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> None:
    """Prints rows in columns, right-aligned except the columns with an index in `left`."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        columns = enumerate(zip(row, widths))
        cells = [cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in columns]
        print('  '.join(cells).rstrip())


def print_predictions(predictions: Sequence[Prediction]) -> None:
    for each in predictions:
        print(f'  {each.probability:7.2%}  {each.label}')


def print_json(results: list[Any], failed: Sequence[tuple[str, str]], skipped: Sequence[str], **more: Any) -> None:
    """Prints JSON: the results, and the files that were not classified."""
    errors = [dict(file=file, error=error) for file, error in failed]
    print(json.dumps(dict(**more, results=results, failed=errors, skipped=skipped), indent=2))


def report_left_out(failed: Sequence[tuple[str, str]], skipped: Sequence[str]) -> int:
    """Prints to stderr which files were not classified; returns the exit status: 1 if any failed, else 0."""
    if skipped:
        what = f'{len(skipped)} files that Pillow does not read: {first_names(skipped)}'
        print(f'timm-res2net: skipped {what}', file=sys.stderr)
    for file, error in failed:
        print(f'timm-res2net: {file}: {error}', file=sys.stderr)
    return 1 if failed else 0


def first_names(names: Sequence[str]) -> str:
    return ', '.join([*names[:3], '...'] if len(names) > 3 else names)


def describe_training(cfg: Mapping[str, Any], num_classes: int, checkpoint: Checkpoint | None) -> list[str]:
    """Describes image settings and classes, and how each is known. Without a checkpoint, all are recorded."""
    size = ' x '.join(map(str, cfg['input_size'][1:]))
    mean, std = (', '.join(f'{value:g}' for value in cfg[key]) for key in ('mean', 'std'))
    shown = f'{size}, {cfg["interpolation"]}, crop {cfg["crop_pct"]:g}, mean {mean}, std {std}'
    defaults = [] if checkpoint is None else [key for key in IMAGE_SETTINGS if key not in checkpoint.images]
    how = 'recorded in the file'
    if len(defaults) == len(IMAGE_SETTINGS):
        how = 'defaults, not recorded in the file'
    elif defaults:
        how += f', except {", ".join(defaults)} (defaults)'
    named = 'without names'
    if names := cfg.get('label_names'):
        named = f'named {first_names(names)}'
    elif infer_imagenet_subset({'num_classes': num_classes}):
        named = f'named as in ImageNet: assumed, because there are {num_classes}'
    lines = [f'images       {shown}: {how}', f'classes      {num_classes}, {named}']
    if checkpoint is None:
        return lines
    if chosen := checkpoint.weights_from:
        other = 'model' if chosen == 'ema' else 'ema'
        lines.append(f'taken from   {chosen}: the file also has other weights (--weights-from {other})')
    if assumptions := describe_assumptions(checkpoint):
        lines.append(f'assumed      {assumptions.removeprefix("assumed ")}')
    return lines


def load_call(folder: str | Path) -> str:
    """Returns the Python code that loads a model from a folder."""
    return format_create_model(f'local-dir:{folder}', dict(pretrained=True))
