"""The Res2Net family for timm.

Importing this package registers its models: `timm.create_model('res2net50d')` then makes ours.
"""

from .deploy.export import export
from .deploy.fuse import fuse
from .deploy.optimize import optimize
from .hub.cards import card
from .hub.pull import pull
from .hub.push import push
from .res2net import register, unregister
from .version import __version__
from .vision.explain import class_activation_map, receptive_field
from .weights.checkpoints import read_checkpoint
from .weights.convert import export_checkpoint
from .weights.errors import CheckpointError, UnknownModelError
from .weights.loading import load_checkpoint, load_model

__all__ = [
    'CheckpointError',
    'UnknownModelError',
    '__version__',
    'card',
    'class_activation_map',
    'export',
    'export_checkpoint',
    'fuse',
    'load_checkpoint',
    'load_model',
    'optimize',
    'pull',
    'push',
    'read_checkpoint',
    'receptive_field',
    'register',
    'unregister',
]
