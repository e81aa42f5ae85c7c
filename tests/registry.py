"""A copy of timm's registry from before this package changes it: conftest.py imports this file before any test."""

import copy
from typing import Any

from timm.models import _registry


def copy_registry() -> dict[str, Any]:
    """Copies every table of timm's registry, with the lists and sets in it."""
    tables = {name: table for name, table in vars(_registry).items() if name.startswith(('_model', '_module_'))}
    copies: dict[str, Any] = {name: {*table} for name, table in tables.items() if isinstance(table, set)}
    dicts = {name: table for name, table in tables.items() if isinstance(table, dict)}
    return copies | {name: {key: copy.copy(each) for key, each in table.items()} for name, table in dicts.items()}


ORIGINAL = copy_registry()
