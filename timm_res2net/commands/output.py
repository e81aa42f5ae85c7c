"""What commands print: lines without what a terminal obeys, tables, and what was left out or taken from a file."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from timm.data import infer_imagenet_subset
from tqdm import tqdm

from ..weights.errors import printable
from ..weights.loading import format_create_model
from ..weights.recorded import IMAGES, Training

__all__ = ['describe_training', 'left_out', 'load_call', 'print', 'print_table', 'report_left_out', 'summarize_names']


def print(*values: object, end: str = '\n', file: TextIO | None = None) -> None:
    """Prints beside any progress bar; what a terminal would obey in a name from a file or the Hub is escaped."""
    lines = ' '.join(map(str, values)).split('\n')
    tqdm.write('\n'.join(printable(line, len(line)) for line in lines), file=file, end=end)


def print_table(rows: Sequence[Sequence[str]], left: Sequence[int]) -> None:
    """Prints rows in columns, of which some are aligned to the left and the others, with numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    for row in rows:
        cells = [
            cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width) in enumerate(zip(row, widths))
        ]
        print('  '.join(cells).rstrip())


def left_out(failed: Sequence[tuple[str, str]], skipped: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Files that were not looked at, for JSON."""
    return dict(
        failed=[dict(file=file, error=error) for file, error in failed],
        skipped=[dict(file=file, reason=reason) for file, reason in skipped],
    )


def report_left_out(failed: Sequence[tuple[str, str]], skipped: Sequence[tuple[str, str]]) -> int:
    """Names files that were not looked at, with the reasons; 1 if one of them should have been."""
    for reason in dict.fromkeys(reason for _, reason in skipped):
        names = [file for file, why in skipped if why == reason]
        print(f'timm-res2net: skipped, {reason}: {summarize_names(names)}', file=sys.stderr)
    for file, error in failed:
        print(f'timm-res2net: {file}: {error}', file=sys.stderr)
    return 1 if failed else 0


def summarize_names(names: Sequence[str]) -> str:
    """The number of names, and the first ones."""
    more = ', ...' if len(names) > 3 else ''
    return f'{len(names)}' + (f': {", ".join(names[:3])}{more}' if names else '')


def describe_training(training: Training, cfg: Mapping[str, Any], num_classes: int) -> list[str]:
    """Says how images are prepared and what classes are called, and whether a file tells that or it is assumed.

    Args:
        training: What the file tells.
        cfg: What is used: timm's configuration, with `label_names`.
        num_classes: Classes.
    """
    size = ' x '.join(map(str, cfg['input_size'][1:]))
    mean, std = (', '.join(f'{value:g}' for value in cfg[key]) for key in ('mean', 'std'))
    shown = f'{size}, {cfg["interpolation"]}, crop {cfg["crop_pct"]:g}, mean {mean}, std {std}'
    unsaid = [key for key in IMAGES if key not in training.images]
    how = 'as the file says' + (f', but for {", ".join(unsaid)}: assumed, the usual' if unsaid else '')
    if not training.images:
        how = 'assumed, the usual; the file does not tell'
    names = tuple(cfg.get('label_names') or ())
    named = ', without names'
    if names:
        source = f'named in {training.labels_from}' if training.labels == names else 'named as given'
        named = f', {source}: {", ".join(names[:3])}{", ..." if len(names) > 3 else ""}'
    elif infer_imagenet_subset({'num_classes': num_classes}):
        named = ", named as ImageNet's: assumed, there are as many"
    return [f'images       {shown}: {how}', f'classes      {num_classes}{named}']


def load_call(folder: str | Path) -> str:
    """The Python code that loads a model from a folder."""
    return format_create_model(f'local-dir:{folder}', dict(pretrained=True))
