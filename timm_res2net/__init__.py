"""The Res2Net family for timm.

Importing this package registers its models, so that `timm.create_model('res2net50d')` builds the one in this package.
"""

from ._errors import CheckpointError, Res2NetError, UnknownModelError
from .deploy.export import Export, export
from .deploy.exported import load_exported
from .deploy.fuse import fuse
from .deploy.optimize import optimize
from .hub.cards import card
from .hub.facts import ModelFacts
from .hub.pull import pull
from .hub.push import Push, push
from .models.spec import NetworkSpec
from .res2net import register, unregister
from .version import __version__
from .vision.explain import class_activation_map, receptive_field
from .weights.checkpoints import Checkpoint, read_checkpoint
from .weights.convert import export_checkpoint
from .weights.loading import load_checkpoint, load_model

__all__ = [
    'Checkpoint',
    'CheckpointError',
    'Export',
    'ModelFacts',
    'NetworkSpec',
    'Push',
    'Res2NetError',
    'UnknownModelError',
    '__version__',
    'card',
    'class_activation_map',
    'export',
    'export_checkpoint',
    'fuse',
    'load_checkpoint',
    'load_exported',
    'load_model',
    'optimize',
    'pull',
    'push',
    'read_checkpoint',
    'receptive_field',
    'register',
    'unregister',
]
