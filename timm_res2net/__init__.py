"""The Res2Net family for timm.

Importing this package registers its models: `timm.create_model('res2net50d')` then makes ours.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .res2net import register, unregister
from .weights.readers import CheckpointError

if TYPE_CHECKING:
    from .deploy.optimize import fuse, optimize
    from .hub.cards import card
    from .hub.client import pull, push
    from .vision.explain import class_activation_map, receptive_field
    from .weights.checkpoints import export_checkpoint, load_checkpoint

__version__ = '0.1.0'

__all__ = [
    'CheckpointError',
    'card',
    'class_activation_map',
    'export_checkpoint',
    'fuse',
    'load_checkpoint',
    'optimize',
    'pull',
    'push',
    'receptive_field',
    'register',
    'unregister',
]

# Imported when first used: who imports the package to have its models doesn't wait for the rest.
HOMES = {
    'card': 'hub.cards',
    'class_activation_map': 'vision.explain',
    'export_checkpoint': 'weights.checkpoints',
    'fuse': 'deploy.optimize',
    'load_checkpoint': 'weights.checkpoints',
    'optimize': 'deploy.optimize',
    'pull': 'hub.client',
    'push': 'hub.client',
    'receptive_field': 'vision.explain',
}


def __getattr__(name: str) -> Any:
    if name not in HOMES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'.{HOMES[name]}', __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *HOMES})
