"""Turns a weights file into a `Checkpoint`: a network's tensors under timm's names, and what the network computes."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from .._errors import CheckpointError, first_line
from .._files import PathLike, sha256
from ..models.layers import VERSIONS
from ..models.spec import ARGUMENTS, NetworkSpec
from .config import (
    CONFIG_FILE,
    RECORD,
    WEIGHTS_FILE,
    read_config,
    recorded_images,
    recorded_labels,
    recorded_model,
    recorded_spec,
    warn_of_class_map,
)
from .dialects import DIALECTS
from .projects import find_project
from .readers import RawFile, read_file
from .renaming import as_before_compile, find_network, has_modules_around, rename_tensors, to_weight

FIELDS = ARGUMENTS['spec']
Provenance = Literal['recorded', 'proved', 'inferred', 'default']


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A network read from a weights file: tensors under timm's names, what it computes, and how each fact is known.

    Attributes:
        file: Path of the file, as messages show it.
        dialect: Naming scheme of the file's tensors, a key of `DIALECTS`.
        prefix: Prefix of the network's tensor names in the file.
        state: Tensors keyed by timm's names; floating-point tensors are float32, on the CPU.
        spec: What the network computes; None if no model in this package computes it.
        provenance: How each field of `spec` is known. 'recorded': specified by the file, by the `config.json` next to
            it or by the caller. 'proved': names and shapes leave no other possibility. 'inferred': the other tensors in
            the file are those of a known project. 'default': not specified anywhere.
        is_part: Whether the network is part of a larger one, judging by its prefix and the file's other tensors.
        project: Name of the larger network, if it is a known one.
        unsupported: Why no model in this package computes the network; '' if one does.
        weights_from: 'ema' if averaged weights were chosen, 'model' if the latest; None if the file has only one kind.
        name: Name of the recorded model, a key of `ARCHS`; None if none is recorded.
        model_args: Recorded arguments of that model.
        dropped: Tensors of the file that were left out: the reason, keyed by name.
        filled: Names in `state` of tensors that are missing from the file, and were filled with zeros.
        cast: Number of tensors that were cast to float32, keyed by their type in the file.
        images: Recorded image preprocessing settings, as in timm's `pretrained_cfg`.
        labels: Class names recorded in `config.json`.
        record: Results, license and other facts recorded by `push`.
    """

    file: str
    dialect: str
    prefix: str
    state: dict[str, Tensor]
    spec: NetworkSpec | None
    provenance: Mapping[str, Provenance]
    is_part: bool = False
    project: str | None = None
    unsupported: str = ''
    weights_from: str | None = None
    name: str | None = None
    model_args: Mapping[str, Any] = field(default_factory=dict)
    dropped: Mapping[str, str] = field(default_factory=dict)
    filled: tuple[str, ...] = ()
    cast: Mapping[str, int] = field(default_factory=dict)
    images: Mapping[str, Any] = field(default_factory=dict)
    labels: tuple[str, ...] = ()
    record: Mapping[str, Any] = field(default_factory=dict)

    def __repr__(self) -> str:
        left_out = f', {len(self.dropped)} dropped' if self.dropped else ''
        tensors = f'{len(self.state)} tensors{left_out}'
        return f'Checkpoint({self.file!r}, {self.dialect}, {tensors}, {self.num_classes} classes)'

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without a classifier."""
        return len(self.state.get('fc.weight', ()))

    @property
    def in_chans(self) -> int:
        """Number of image channels."""
        return self.state[first_convolution(self.state)].shape[1]

    @property
    def assumed(self) -> tuple[str, ...]:
        """Fields of `spec` that are inferred or default."""
        return tuple(name for name, known in self.provenance.items() if known in ('inferred', 'default'))

    @property
    def function(self) -> NetworkSpec | None:
        """The former name of `spec`."""
        return self.spec

    def with_spec(self, **fields: Any) -> 'Checkpoint':
        """Returns a copy in which these fields of the spec are set, and marked as recorded; TypeError for others."""
        if unknown := [name for name in fields if name not in FIELDS]:
            raise TypeError(f'unknown argument {unknown[0]!r}. Choose from {", ".join(FIELDS)}')
        if not fields:
            return self
        recorded: dict[str, Provenance] = dict.fromkeys(fields, 'recorded')
        spec = replace(self.spec or NetworkSpec(), **fields)
        return replace(self, spec=spec, provenance={**self.provenance, **recorded})


def read_checkpoint(
    file: PathLike,
    *,
    dialect: str | None = None,
    prefix: str | None = None,
    weights_from: str | None = None,
    **spec: Any,
) -> Checkpoint:
    """Reads a Res2Net's weights from a file of any known code base, without running code from the file.

    Args:
        file: A .safetensors, .pth, .pdparams, .pkl, MindSpore .ckpt, PaddlePaddle .tar or OneFlow .zip file, detected
            by content; or a folder with `config.json` and `model.safetensors`.
        dialect: Naming scheme of the file's tensors, a key of `DIALECTS`; detected if None.
        prefix: Prefix of the network's tensor names, for a file with several networks; detected if None.
        weights_from: 'ema' (averaged) or 'model' (latest), for a file that has both kinds; None means 'ema'.
        **spec: Fields of `NetworkSpec` that the file does not record, such as `first_block` or `dilations`.

    Returns:
        The checkpoint. `.assumed` lists the fields of its spec that are neither recorded nor proved by tensors.

    Raises:
        CheckpointError: If the file cannot be read, or does not contain exactly one Res2Net.
        ValueError: If an argument has an impossible value.
        TypeError: If a keyword is not a field of `NetworkSpec`.

    Example:
        >>> checkpoint = timm_res2net.read_checkpoint('res2net50_v1b_26w_4s-3cf99910.pth')
        >>> checkpoint.dialect, checkpoint.num_classes, checkpoint.spec.first_block
        ('official', 1000, 'official')
    """
    path, config = Path(file), {}
    if path.is_dir():
        path, config = path / WEIGHTS_FILE, read_config(path)
    elif path.name == WEIGHTS_FILE and path.with_name(CONFIG_FILE).is_file():
        config = read_config(path.parent)
    checkpoint = identify(read_file(path), str(path), dialect, prefix, weights_from, config).with_spec(**spec)
    return with_record(checkpoint, path, config)


def with_record(checkpoint: Checkpoint, path: Path, config: Mapping[str, Any]) -> Checkpoint:
    """Adds the facts that `push` recorded in `config.json`, if the recorded checksum is that of the file."""
    if 'sha256' not in config.get(RECORD, {}) or config[RECORD]['sha256'] != sha256(path):
        return checkpoint
    return replace(checkpoint, record={'tag': config['pretrained_cfg'].get('tag'), **config[RECORD]})


def identify(
    raw: RawFile,
    file: str,
    dialect: str | None = None,
    prefix: str | None = None,
    weights_from: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Finds the network in a file and determines what it computes; `config` is the parsed `config.json`."""
    if dialect is not None and dialect not in DIALECTS:
        raise ValueError(f'unknown dialect {dialect!r}. Choose from {", ".join(DIALECTS)}')
    if weights_from not in (None, 'ema', 'model'):
        raise ValueError(f"weights_from must be 'ema' or 'model', got {weights_from!r}")
    config = config or {}
    try:
        named, unreadable = as_before_compile(raw.tensors), as_before_compile(raw.unsupported)
        raw = replace(raw, tensors=named, unsupported=unreadable)
        key, prefix, rows, chosen = find_network(raw.tensors, dialect, prefix, weights_from)
        state, dropped = rename_tensors(raw.tensors, raw.unsupported, key, prefix, rows)
        require_unfused(state)
        first_convolution(state)
        cast: Counter[str] = Counter()
        state = {name: to_weight(name, tensor, cast) for name, tensor in state.items()}
        filled = zeros_for(state)
        part = has_modules_around(prefix, dropped, raw.tensors, 'fc.weight' in state)
        labels = recorded_labels(config, len(state.get('fc.weight', ())))
        if not labels:
            warn_of_class_map(raw, file)
        return Checkpoint(
            file,
            key,
            prefix,
            {**state, **filled},
            **specify(raw, file, key, prefix, state, part, config),
            is_part=part,
            weights_from=chosen,
            dropped=dropped,
            filled=tuple(filled),
            cast=dict(cast),
            images=recorded_images(raw, config, file),
            labels=labels,
        )
    except Exception as error:  # a hostile file can record anything, and have tensors of any shape
        raise CheckpointError(f'cannot use {file}: {first_line(error)}') from error


def specify(
    raw: RawFile,
    file: str,
    dialect: str,
    prefix: str,
    state: Mapping[str, Tensor],
    is_part: bool,
    config: Mapping[str, Any],
) -> dict[str, Any]:
    """Returns the fields of a `Checkpoint` about its spec: the recorded, the known project's, or the dialect's."""
    try:
        name, args = recorded_model(raw, config, file)
        recorded = recorded_spec(raw, name, args)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f'it records an impossible network: {first_line(error)}') from error
    if recorded is not None:
        return dict(spec=recorded, provenance=dict.fromkeys(FIELDS, 'recorded'), name=name, model_args=args)

    names = DIALECTS[dialect]
    spec, ambiguous, unsupported, project = names.spec, {*names.ambiguous}, names.unsupported, None
    is_detector = names.detector_spec is not None and is_part
    if is_detector:
        spec = names.detector_spec
    if dialect == 'official':
        project = find_project(prefix, {each: tuple(tensor.shape) for each, tensor in raw.tensors.items()})
    if project is not None:
        spec, unsupported = project.spec, project.unsupported
    ambiguous -= irrelevant_fields(state, spec or NetworkSpec())
    if convolves_all_splits(state):
        spec = replace(spec or NetworkSpec(), first_block='group')
        ambiguous -= {'first_block'}
    if spec is not None:
        spec = replace(spec, deformable=deformable_stages(state))
    assumed = 'default' if project is None else 'inferred'
    provenance = {field: assumed if field in ambiguous else 'proved' for field in FIELDS}
    if is_detector and 'first_block' in ambiguous:
        provenance['first_block'] = 'inferred'
    return dict(spec=spec, provenance=provenance, project=project and project.name, unsupported=unsupported)


def first_convolution(state: Mapping[str, Tensor]) -> str:
    """Returns the name of the weight of a network's first convolution."""
    for stem, _ in DIALECTS['official'].stems:
        if stem in state and state[stem].ndim == 4:
            return stem
    raise CheckpointError("the network's first convolution is missing")


def require_unfused(state: Mapping[str, Tensor]) -> None:
    """Raises CheckpointError if weights are from a fused model, whose convolutions have biases and no norms."""
    modules = {name.rpartition('.')[0] for name in state if name.endswith('.conv3.bias')}
    if any(f'{module.removesuffix("conv3")}bn3.weight' not in state for module in modules):
        raise CheckpointError('it holds a fused model, without norms. Save the model before calling `fuse`')


def zeros_for(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns zeros for tensors that some code bases do not have: batch counters, and biases of offset convolutions."""
    zeros = {}
    for name, tensor in state.items():
        module, _, last = name.rpartition('.')
        if last == 'running_var':
            zeros[f'{module}.num_batches_tracked'] = torch.tensor(0)
        elif name.endswith('.conv_offset.weight'):
            zeros[f'{module}.bias'] = torch.zeros(len(tensor))
    return {name: tensor for name, tensor in zeros.items() if name not in state}


def irrelevant_fields(state: Mapping[str, Tensor], spec: NetworkSpec) -> set[str]:
    """Returns the fields of a spec that have no effect on a network with these tensors."""
    has_effect = {
        'dilate_first': spec.dilations != NetworkSpec.dilations,
        'shortcut_root': any('.root.' in name for name in state),
        'attn_layer': any('.se.conv.' in name for name in state),
    }
    return {name for name, effect in has_effect.items() if not effect}


def convolves_all_splits(state: Mapping[str, Tensor]) -> bool:
    """Whether the first block has as many convolutions as splits, which only `first_block='group'` has."""
    whole, split = (state.get(f'layer1.0.{name}.weight') for name in ('conv1', 'convs.0'))
    if whole is None or split is None or len(whole) == len(split):
        return False
    return f'layer1.0.convs.{len(whole) // len(split) - 1}.weight' in state


def deformable_stages(state: Mapping[str, Tensor]) -> tuple[str | None, ...]:
    """Returns the version of each stage's deformable convolutions, proved by the number of their offset channels."""
    versions = {channels: version for version, channels in VERSIONS.items()}
    offsets = [state.get(f'layer{stage}.0.convs.0.conv_offset.weight', ()) for stage in (1, 2, 3, 4)]
    return tuple(versions.get(len(each)) for each in offsets)
