"""Python imports a module of this name when it starts; `timm_res2net.run` has its child processes find this one.

It registers the family when timm is imported, and not before, as most processes never do that.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

HERE = Path(__file__).parent


class WithFamily(importlib.abc.Loader):
    """Loads timm, then this package."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__.loader = module.__loader__ = self.loader  # type: ignore[union-attr]
        self.loader.exec_module(module)
        importlib.import_module('timm_res2net')


class Finder(importlib.abc.MetaPathFinder):
    """Finds timm, once."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if name != 'timm':
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec('timm')
        if spec is not None:
            spec.loader = WithFamily(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())

# Only one module of this name is imported, so the one that is hidden behind this has to be.
others = [entry for entry in sys.path if Path(entry or '.').resolve() != HERE]
hidden = importlib.machinery.PathFinder.find_spec('sitecustomize', others)
if hidden is not None and hidden.loader is not None:
    hidden.loader.exec_module(importlib.util.module_from_spec(hidden))
