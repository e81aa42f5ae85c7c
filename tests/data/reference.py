"""Helpers for the scripts in this folder, which make reference files with the code of other projects.

For each of its networks, an archive has a weights file as the project writes it, and NAME.npz with images of an even
and an odd size and the logits, or four feature maps, that the project's code computes for them. Most backbone files
also have a tensor of another part. Where these images are too small to reveal all dilations, wide.npz has a wide image
and its last map.

To keep archives small, the networks are thin, and their weights are sparse and rounded, or repeated; statistics of
norms are random. Networks of one archive may share values.
"""

import contextlib
import lzma
import sys
import tarfile
import types
from collections.abc import Callable, Iterable
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import numpy as np


def bare(name: str) -> types.ModuleType:
    """Makes a package importable without running its `__init__`, which may import more than its other files need."""
    top, *below = name.split('.')
    module = types.ModuleType(name)
    module.__path__ = [str(Path(PathFinder.find_spec(top).submodule_search_locations[0], *below))]
    sys.modules[name] = module
    return module


def stub(name: str, **names: Any) -> types.ModuleType:
    """Makes a module that contains only the given names importable."""
    module = types.ModuleType(name)
    vars(module).update(names)
    sys.modules[name] = module
    return module


def random_value(shape: tuple[int, ...], positive: bool, rng: np.random.Generator) -> np.ndarray:
    """Returns a random tensor: each filter has at most four nonzero weights; vectors are dense."""
    if len(shape) == 1:
        vector = rng.uniform(0.5, 2, shape) if positive else rng.normal(0, 0.3, shape)
        return (np.round(vector * 16) / 16).astype('float32')
    filters = np.zeros((shape[0], int(np.prod(shape[1:]))), 'float32')
    count = min(4, filters.shape[1])
    for row in filters:
        row[rng.choice(len(row), count, replace=False)] = np.round(rng.normal(0, count**-0.5, count) * 16) / 16
    return filters.reshape(shape)


def randomize_state(model: Any, rng: np.random.Generator) -> None:
    """Fills a torch network with random values; variances and weights of norms are positive."""
    import torch  # not installed for all frameworks

    norms = {id(norm.weight) for norm in model.modules() if isinstance(norm, torch.nn.BatchNorm2d)}
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            positive = key.endswith('running_var') or id(tensor) in norms
            tensor.copy_(torch.from_numpy(random_value(tuple(tensor.shape), positive, rng)))


def save_reference(
    run: Callable[[np.ndarray], Any],
    path: Path,
    rng: np.random.Generator,
    shape: tuple[int, int] = (2, 3),  # images and channels
    compress: bool = True,
) -> None:
    """Saves images of an even and of an odd size, and a network's logits or feature maps for them.

    To save space, keeps only every eighth channel of the first image's maps. Without `compress`, keeps only the first
    image, and leaves compression to the archive, which stores equal arrays of several files once.
    """
    arrays = {}
    for size in (64, 65):
        arrays[f'images{size}'] = images((*shape, size, size), rng)
        computed = run(arrays[f'images{size}'])
        if isinstance(computed, np.ndarray):
            arrays[f'logits{size}'] = computed
        else:
            arrays.update({f'map{size}_{i}': feature[:1, ::8] for i, feature in enumerate(computed)})
    if compress:
        np.savez_compressed(f'{path}.npz', **arrays)
    else:
        np.savez(f'{path}.npz', **{key: array[:1] for key, array in arrays.items()})


def images(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Returns images (N, C, H, W) in -1..1, of 256 shades."""
    return (rng.integers(0, 256, shape) / 128 - 1).astype('float32')


def stage_maps(stages: Iterable[Any], run: Callable[[Any], Any], x: np.ndarray, divisor: int = 1) -> list[np.ndarray]:
    """Runs a torch network and returns the outputs of its four stages.

    Some networks concatenate maps after the stages, which fails unless the image's sides are multiples of `divisor`:
    this error is ignored.
    """
    import torch

    maps: list[np.ndarray] = []
    hooks = [stage.register_forward_hook(lambda *call: maps.append(call[-1].numpy().copy())) for stage in stages]
    fails = any(side % divisor for side in x.shape[2:])
    with contextlib.suppress(RuntimeError) if fails else contextlib.nullcontext():
        run(torch.from_numpy(x))
    for hook in hooks:
        hook.remove()
    assert len(maps) == 4
    return maps


def pack(folder: str, name: str) -> None:
    """Packs a folder's files into an archive next to this script, sorted so that similar ones compress well."""
    filters = [{'id': lzma.FILTER_LZMA2, 'preset': 9 | lzma.PRESET_EXTREME, 'dict_size': 1 << 26}]
    with (
        lzma.open(Path(__file__).with_name(name), 'w', filters=filters) as file,
        tarfile.open(fileobj=file, mode='w') as archive,
    ):
        for path in sorted(Path(folder).iterdir()):
            archive.add(path, path.name)
