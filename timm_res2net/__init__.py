"""The Res2Net family for timm.

Importing this package registers its models: `timm.create_model('res2net50d')` then makes ours.
"""

__version__ = '0.1.0'

from .cards import card
from .checkpoints import export_checkpoint, load_checkpoint
from .explain import class_activation_map, receptive_field
from .hub import pull, push
from .inference import fuse, optimize
from .readers import CheckpointError
from .res2net import register, unregister

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
