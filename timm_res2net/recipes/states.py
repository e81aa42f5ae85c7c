"""Files of torch that a run lives in: written whole or not at all, and named when they are damaged."""

from pathlib import Path
from typing import Any

import torch

from ..weights.errors import first_line
from ..weights.files import atomic_write

__all__ = ['damaged', 'load_states', 'save_states']


def save_states(states: dict[str, Any], file: Path) -> None:
    """Writes a file of torch; OSError if it can't be written."""
    try:
        atomic_write(file, lambda path: torch.save(states, path))
    except RuntimeError as error:  # torch's for a disk that is full
        raise OSError(f'{file} can not be written: {first_line(error)}') from error


def load_states(file: Path, device: torch.device, *names: str) -> dict[str, Any]:
    """Reads what `save_states` has written.

    Args:
        file: To read.
        device: Where tensors shall be.
        *names: What has to be in it; nothing else is returned.

    Raises:
        ValueError: If it is damaged.
        OSError: If it can't be opened.
    """
    with open(file, 'rb') as opened:
        try:
            saved = torch.load(opened, map_location=device, weights_only=True)
            return {name: saved[name] for name in names}
        except Exception as error:  # which one depends on where the damage is
            raise damaged(file, error) from error


def damaged(file: Path, error: Exception) -> ValueError:
    """The error of a file of a run that can't be read."""
    return ValueError(f'{file} is damaged ({type(error).__name__}); restore a copy of it, or delete {file.parent}')
