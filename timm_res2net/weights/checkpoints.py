"""Load, convert and export files of weights: whatever their names are, into a model that computes what they mean."""

import io
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from timm.models import get_pretrained_cfg
from torch import Tensor, nn

from .. import __version__
from ..models.block import FIRST_BLOCKS, Bottle2neck, first_blocks
from ..models.resnet import Res2Net
from ..res2net import ARCHS, WEIGHTS, default_cfg
from .dialects import DIALECTS, Translation, export, recognise, require_same_function, translate
from .files import first_line, replace_file, sha256
from .readers import CheckpointError, read

__all__ = ['Checkpoint', 'Conversion', 'convert', 'export_checkpoint', 'load_checkpoint', 'read_checkpoint']

DEFAULTS: dict[str, Any] = dict(  # of arguments that are not in all rows of ARCHS
    layers=None,
    base_width=None,
    scale=None,
    cardinality=1,
    stem_type='',
    stem_width=64,
    avg_down=False,
    attn_layer=None,
    channels=(64, 128, 256, 512),
    first_block='official',
)


@dataclass(frozen=True)
class Checkpoint:
    """A network's weights out of a file, under timm's names, and what they mean."""

    file: str
    translation: Translation
    first_block: str | None  # what the first block of a stage computes
    certain: bool  # whether the file tells that, or its dialect only suggests it

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors; floating-point ones are float32."""
        return self.translation.state

    @property
    def num_classes(self) -> int:
        """Classes, 0 without a classifier."""
        return len(self.state.get('fc.weight', ()))


def read_checkpoint(
    file: str | os.PathLike[str],
    *,
    dialect: str | None = None,
    first_block: str | None = None,
    prefix: str | None = None,
) -> Checkpoint:
    """Reads a Res2Net's weights from a file that any of the known bodies of code wrote.

    Args:
        file: .safetensors, .pth, .pdparams, .pkl, .ckpt of MindSpore or .tar of Paddle; what is in it tells which.
        dialect: Whose names it has, a key of `dialects.DIALECTS`. Recognised if None.
        first_block: What its network's first blocks compute, a key of `blocks.FIRST_BLOCKS`. If None, the file tells
            (those of this package and timm's training checkpoints do), or its dialect decides.
        prefix: What precedes the network's names, for a file with more than one. Found out if None.

    Raises:
        CheckpointError: If the file can't be read, or holds no Res2Net.
        ValueError: For a `dialect` or `first_block` that is not known.
    """
    if first_block is not None and first_block not in FIRST_BLOCKS:
        raise ValueError(f'first_block={first_block!r} is not known; choose from {", ".join(FIRST_BLOCKS)}')
    contents = read(file)
    try:
        translation = translate(contents.tree, dialect, prefix)
    except CheckpointError as error:
        raise CheckpointError(f'{file} can not be used: {error}') from error
    told = first_block or contents.metadata.get('first_block') or trained_as(contents.tree)
    return Checkpoint(str(file), translation, told or translation.first_block, told is not None or translation.certain)


def trained_as(tree: Mapping[str, Any]) -> str | None:
    """The first block that timm's train script recorded, if it wrote this file and trained a model of ours."""
    arch = ARCHS.get(str(tree.get('arch')).partition('.')[0])
    if arch is None:
        return None
    given = getattr(tree.get('args'), 'model_kwargs', None)
    arguments = {**arch.args, **given} if isinstance(given, dict) else arch.args
    return arguments.get('first_block', 'official')


def load_checkpoint(
    model: nn.Module,
    file: str | os.PathLike[str] | Checkpoint,
    *,
    dialect: str | None = None,
    first_block: str | None = None,
    prefix: str | None = None,
) -> Checkpoint:
    """Loads a file of weights into a model that computes what the weights were trained for.

    Every tensor of the model must be in the file. What the file has beyond is dropped where it belongs to a part that
    the model lacks: a classifier, or the last stages of a feature extractor.

    Args:
        model: A model of this package, also within `features_only`, `torch.compile` or DistributedDataParallel.
        file: A file, or what `read_checkpoint` read from it.
        dialect: See `read_checkpoint`.
        first_block: See `read_checkpoint`.
        prefix: See `read_checkpoint`.

    Returns:
        What was loaded, with what was dropped, filled in and cast.

    Raises:
        CheckpointError: If the file can't be read, doesn't fit, or means another function than the model's. The model
            is then as it was.
        TypeError: If the model holds no Res2Net.
    """
    if not any(isinstance(module, Bottle2neck) for module in model.modules()):
        raise TypeError(
            f'a {type(model).__name__} has no Res2Net block to load weights into; if it was made of a model, load that'
        )
    if isinstance(file, Checkpoint):
        checkpoint = file
    else:
        checkpoint = read_checkpoint(file, dialect=dialect, first_block=first_block, prefix=prefix)
    try:
        require_same_function(model, checkpoint.first_block, checkpoint.file)
    except CheckpointError as error:
        raise CheckpointError(f'{error}. {way_out(checkpoint)}') from None
    wanted = model.state_dict()
    if any(tensor.is_meta for tensor in wanted.values()):
        raise ValueError('the model is on the meta device and has no room for weights; move it by to_empty first')
    _, place, _ = recognise(wanted, 'official')  # body. or module., if something wraps the network
    state = {place + name: tensor for name, tensor in checkpoint.state.items()}
    parts = {name.removeprefix(place).partition('.')[0] for name in wanted}
    state = {name: tensor for name, tensor in state.items() if name.removeprefix(place).partition('.')[0] in parts}
    problems = misfits(wanted, state)
    if problems:
        raise CheckpointError(f'{checkpoint.file} does not fit {name_of(model)}: {problems}. {way_out(checkpoint)}')
    model.load_state_dict({name: state[name] for name in wanted})
    return checkpoint


def misfits(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Says how two sets of tensors differ, empty if they don't; a counter of batches too many is no difference."""
    missing = [name for name in wanted if name not in given]
    unexpected = [name for name in given if name not in wanted and not name.endswith('num_batches_tracked')]
    shapes = [name for name in wanted if name in given and given[name].shape != wanted[name].shape]
    problems = []
    if missing:
        problems.append(f"{len(missing)} of the model's tensors are not in it (first: {missing[0]})")
    if unexpected:
        problems.append(f'{len(unexpected)} in it are unknown to the model (first: {unexpected[0]})')
    if shapes:
        name = shapes[0]
        sizes = f'{tuple(given[name].shape)} for {tuple(wanted[name].shape)}'
        problems.append(f'{len(shapes)} have another shape (first: {name}, {sizes})')
    return ', '.join(problems)


def name_of(model: nn.Module) -> str:
    """The name under which a model is registered, if it is known."""
    cfg: Any = getattr(model, 'pretrained_cfg', None) or {}
    return cfg.get('architecture') or type(model).__name__


def way_out(checkpoint: Checkpoint) -> str:
    """Names the model that a file fits."""
    try:
        name, args = architecture(checkpoint.state, checkpoint.first_block or 'official')
    except CheckpointError:
        return 'No model of this package is like it'
    args = {**args, **({} if checkpoint.num_classes == 1000 else {'num_classes': checkpoint.num_classes})}
    return f'It fits {call(name, args)}'


def call(name: str, args: Mapping[str, Any]) -> str:
    """How to make a model."""
    return f'timm.create_model({", ".join([repr(name), *(f"{key}={value!r}" for key, value in args.items())])})'


def architecture(state: Mapping[str, Tensor], first_block: str, name: str | None = None) -> tuple[str, dict[str, Any]]:
    """Finds the registered model that tensors belong to.

    Args:
        state: Tensors under timm's names.
        first_block: What the network's first blocks compute.
        name: The only model to consider.

    Returns:
        Its name, and the arguments that it needs beyond its own.

    Raises:
        CheckpointError: If there is none.
    """
    on_resnet = {'layer1.0.conv1.weight', 'layer4.0.conv1.weight'} <= state.keys()
    only = '' if name is None else f', or not those of {name}'
    refusal = CheckpointError(f'its tensors are those of no model of this package{only}')
    try:
        found = resnet_arguments(state) if on_resnet else {}
    except LookupError:  # some are missing
        raise refusal from None
    found.update({} if first_block == 'official' else {'first_block': first_block})
    options = []
    for each, arch in ARCHS.items():
        if name not in (None, each) or (arch.trunk is Res2Net) != on_resnet:
            continue
        args = {key: found.get(key, DEFAULTS[key]) for key in DEFAULTS if found.get(key) != arch.args.get(key)}
        first_conv = state.get(f'{arch.cfg.get("first_conv", "conv1")}.weight')
        if first_conv is not None and first_conv.shape[1] != 3:
            args['in_chans'] = first_conv.shape[1]
        options.append((each, args if on_resnet else {key: args[key] for key in args.keys() & {'in_chans'}}))
    options.sort(key=lambda option: len(option[1]))
    for each, args in options[:1] if on_resnet else options:  # with its arguments, any row makes the same ResNet
        model = timm.create_model(each, device='meta', num_classes=len(state.get('fc.weight', ())), **args)
        if not misfits(model.state_dict(), state):
            same = not first_blocks(model) or first_block in first_blocks(model)
            return each, args if same else {**args, 'first_block': first_block}
    raise refusal


def resnet_arguments(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Reads a ResNet-hosted network's arguments, as far as they are not the defaults, off the shapes of its tensors."""
    layers: tuple[int, ...] = ()
    while f'layer{len(layers) + 1}.0.conv1.weight' in state:
        stage = f'layer{len(layers) + 1}'
        layers += (sum(name.startswith(f'{stage}.') and name.endswith('.conv1.weight') for name in state),)
    planes = tuple(len(state[f'layer{stage + 1}.0.conv3.weight']) // 4 for stage in range(len(layers)))
    block = f'layer{len(layers)}.0'
    width, width_of_group = state[f'{block}.convs.0.weight'].shape[:2]
    base_width = width_of_group * 64 / planes[-1]
    found: dict[str, Any] = dict(
        layers=layers,
        base_width=int(base_width) if base_width == int(base_width) else base_width,
        scale=len(state[f'{block}.conv1.weight']) // width,
    )
    if width != width_of_group:
        found['cardinality'] = width // width_of_group
    if 'conv1.0.weight' in state:
        found.update(stem_type='deep', stem_width=len(state['conv1.0.weight']))
    if state.get('layer2.0.downsample.1.weight', torch.empty(0)).ndim == 4:
        found['avg_down'] = True
    if planes != DEFAULTS['channels']:
        found['channels'] = planes
    if f'{block}.se.fc1.weight' in state:
        found['attn_layer'] = 'se'
    elif f'{block}.se.conv.weight' in state:
        found['attn_layer'] = 'eca'
    return found


@dataclass(frozen=True)
class Conversion:
    """A file of weights made into a folder that timm loads."""

    checkpoint: Checkpoint
    name: str  # of the model
    args: dict[str, Any]  # beyond the model's own
    config: dict[str, Any]  # with the hashes of both files
    folder: Path

    def load(self) -> nn.Module:
        """Makes the model with these weights."""
        model = timm.create_model(self.name, num_classes=self.checkpoint.num_classes, **self.args)
        load_checkpoint(model, self.checkpoint)
        return model


def convert(
    file: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    model: str | None = None,
    dialect: str | None = None,
    first_block: str | None = None,
    prefix: str | None = None,
    dry_run: bool = False,
) -> Conversion:
    """Makes a folder of a file of weights: `timm.create_model('local-dir:OUT', pretrained=True)` loads it.

    Args:
        file: See `read_checkpoint`.
        out: The folder, in which there must not be a model yet. Named after the file, in the current folder, if None.
        model: Name of the model. Found out if None.
        dialect: See `read_checkpoint`.
        first_block: See `read_checkpoint`.
        prefix: See `read_checkpoint`.
        dry_run: Write nothing.

    Raises:
        CheckpointError: If the file can't be read, fits no model, or means a function that is not known.
        ValueError: If the model is not known, or the folder can't be written.
    """
    if model is not None and model not in ARCHS:
        raise ValueError(f'{model} is no model of this package; `timm-res2net list` shows them')
    folder = Path(out) if out is not None else Path(Path(file).name.split('.')[0])
    if not dry_run:
        require_no_model(folder)
    checkpoint = read_checkpoint(file, dialect=dialect, first_block=first_block, prefix=prefix)
    try:
        name, args = architecture(checkpoint.state, checkpoint.first_block or 'official', model)
    except CheckpointError as error:
        raise CheckpointError(f'{file} can not be converted: {error}') from error
    made = timm.create_model(name, device='meta', num_classes=checkpoint.num_classes, **args)
    require_same_function(made, checkpoint.first_block, checkpoint.file)
    origin = dict(file=Path(file).name, sha256=sha256(file), dialect=checkpoint.translation.dialect)
    tags = [key for key in WEIGHTS if key.split('.')[0] == name and not args]
    published = [key for key in tags if Path(WEIGHTS[key].cfg.get('url', '')).name == origin['file']]
    cfg = get_pretrained_cfg(published[0]).to_dict(remove_source=True) if published else default_cfg(name)
    config = configuration(made, name, args, cfg, converted_from=origin)
    if not dry_run:
        state = {key: checkpoint.state[key].contiguous() for key in made.state_dict()}
        write_folder(folder, state, config, checkpoint.first_block)
    return Conversion(checkpoint, name, args, config, folder)


def require_no_model(folder: Path) -> None:
    """Raises a ValueError if there is a model in a folder already."""
    present = [name for name in ('model.safetensors', 'config.json') if (folder / name).exists()]
    if present:
        raise ValueError(f'{folder} has a {present[0]} already; name another folder, or move it away')


def configuration(
    model: nn.Module, name: str, args: Mapping[str, Any], cfg: Mapping[str, Any], **record: Any
) -> dict[str, Any]:
    """Makes what timm and transformers read from a `config.json` beside weights.

    Args:
        model: The weights' model.
        name: The name that it is registered under.
        args: What else it takes to make it, without the number of classes, which transformers gives by itself.
        cfg: What timm records of weights.
        **record: What this package records of them, under a key of its own.
    """
    num_classes: Any = model.num_classes
    input_size = (args.get('in_chans', 3), *cfg['input_size'][1:])
    return dict(
        architecture=name,
        num_classes=num_classes,
        num_features=model.num_features,
        **({'model_args': dict(args)} if args else {}),
        pretrained_cfg={**cfg, 'custom_load': False, 'num_classes': num_classes, 'input_size': input_size},
        timm_res2net=dict(version=__version__, **record),
    )


def write_folder(folder: Path, state: dict[str, Tensor], config: dict[str, Any], first_block: str | None) -> None:
    """Writes weights and configuration, both or neither, and puts the hash of the weights into the configuration."""
    metadata = {'format': 'pt', **({'first_block': first_block} if first_block else {})}
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix='.', dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            made = Path(temporary, 'made')
            made.mkdir()
            save_weights(state, made / 'model.safetensors', metadata)
            config['timm_res2net']['sha256'] = sha256(made / 'model.safetensors')
            (made / 'config.json').write_text(json.dumps(config, indent=2) + '\n')
            if folder.exists():
                for file in made.iterdir():
                    os.replace(file, folder / file.name)
            else:
                os.replace(made, folder)
    except OSError as error:
        raise ValueError(f'{folder} can not be written: {first_line(error)}') from error


def save_weights(state: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Saves safetensors, the same bytes for the same weights: the library writes metadata in an order of chance."""
    save_file(state, path, metadata)
    with open(path, 'r+b') as file:
        size = int.from_bytes(file.read(8), 'little')
        header = json.loads(file.read(size))
        header['__metadata__'] = dict(sorted(header['__metadata__'].items()))
        text = json.dumps(header, separators=(',', ':'), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def export_checkpoint(model: nn.Module, file: str | os.PathLike[str], dialect: str) -> None:
    """Saves a model's weights for another body of code, in whose networks they compute the same.

    Args:
        model: A ResNet-hosted model of this package.
        file: To write, `.pdparams` for PaddleClas, `.pth` for the others. It appears whole or not at all.
        dialect: 'official' (the authors' code), 'mmpretrain' or 'paddleclas'.

    Raises:
        ValueError: If that code has no such network, or computes something else with it, or the file can't be written.
    """
    exported = export({name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, dialect)
    theirs, ours = DIALECTS[dialect].first_block, first_blocks(model)
    if ours and theirs not in ours:
        raise ValueError(
            f'{dialect} computes first_block={theirs!r} and the model {ours.pop()!r}: there, its weights would '
            'load and compute something else'
        )
    data = io.BytesIO()
    if dialect == 'paddleclas':
        pickle.dump({name: tensor.numpy() for name, tensor in exported.items()}, data, protocol=4)
    else:
        torch.save({'state_dict': exported} if dialect == 'mmpretrain' else exported, data)
    replace_file(file, lambda path: Path(path).write_bytes(data.getbuffer()))
