"""What a file of weights holds: a network's tensors under timm's names, and what the network computes."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from ..models.deformable import VERSIONS
from ..models.function import Function, require_one_of
from ..models.variants import ARCHS, Arch
from .dialects import DIALECTS, Translation, flatten, translate
from .errors import CheckpointError
from .files import PathLike
from .projects import find_project
from .readers import Contents, read
from .recorded import Training, config_beside, recorded_training

__all__ = ['Checkpoint', 'read_checkpoint', 'recognise']

# Arguments that change what a model returns and are no part of its function, and their values.
POOLS = 'avg', 'max', 'avgmax', 'catavgmax'
USES: dict[str, tuple[object, ...]] = {
    'output_stride': (1, 2, 4, 8, 16, 32),
    'dilate_pool': (False, True),
    'global_pool': (*POOLS, 'fast', *(f'fast{pool}' for pool in POOLS)),
}


@dataclass(frozen=True, repr=False)
class Checkpoint:
    """A network's weights read from a file, under timm's names, and what the network computes."""

    file: str
    translation: Translation
    function: Function | None  # None if no model here computes what such files are for
    assumed: tuple[str, ...] = ()  # fields of `function` that nothing in the file tells, so they are the usual ones
    project: str | None = None  # the larger network that it is a part of, if that is known
    unknown: str = ''  # why `function` is None
    uses: Mapping[str, Any] = field(default_factory=dict)  # arguments among `USES` that the file states
    training: Training = field(default_factory=Training)

    def __repr__(self) -> str:
        dialect, dropped = self.translation.dialect, len(self.translation.dropped)
        left_out = f', {dropped} dropped' if dropped else ''
        return f'Checkpoint({self.file!r}, {dialect}, {len(self.state)} tensors{left_out}, {self.num_classes} classes)'

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors; floating-point ones are float32."""
        return self.translation.state

    @property
    def num_classes(self) -> int:
        """Classes, 0 without a classifier."""
        return len(self.state.get('fc.weight', ()))

    def stating(self, **fields: Any) -> 'Checkpoint':
        """The same with some fields of the function, which are then not assumed.

        Raises:
            ValueError: For a value that is not possible.
            TypeError: For a field that a function doesn't have.
        """
        if unknown := [name for name in fields if name not in vars(Function())]:
            raise TypeError(f'{unknown[0]} is no argument here; a function has {", ".join(vars(Function()))}')
        if not fields:
            return self
        function = replace(self.function or Function(), **fields)
        return replace(self, function=function, assumed=tuple(name for name in self.assumed if name not in fields))


def read_checkpoint(
    file: PathLike, *, dialect: str | None = None, prefix: str | None = None, **function: Any
) -> Checkpoint:
    """Reads a Res2Net's weights from a file of any known code base.

    Args:
        file: .safetensors, .pth, .pdparams, .pkl, .ckpt of MindSpore, .tar of Paddle or .zip of OneFlow; detected by
            content.
        dialect: Whose tensor names the file has, a key of `DIALECTS`. Detected if None.
        prefix: Before the network's names, for a file with several networks. Detected if None.
        **function: What its network computes, fields of `Function`, for what the file can't tell: `first_block`,
            `style`, `strides`, `dilations` and others. What is left out the file says (those of this package and timm's
            training checkpoints do), or its names decide.

    Raises:
        CheckpointError: If the file can't be read, or holds no Res2Net.
        ValueError: For an argument that is not possible.
        TypeError: For an argument that is no field of `Function`.
    """
    contents, config = read(file), config_beside(file)
    checkpoint = recognise(contents, str(file), dialect, prefix, config).stating(**function)
    return replace(checkpoint, training=recorded_training(contents, file, checkpoint.num_classes, config))


def recognise(
    contents: Contents,
    file: str,
    dialect: str | None = None,
    prefix: str | None = None,
    config: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """Finds the network in the contents of a file, and what it computes, see `read_checkpoint`.

    Args:
        contents: Of the file.
        file: Its name, for messages.
        dialect: See `read_checkpoint`.
        prefix: See `read_checkpoint`.
        config: The `config.json` beside it.
    """
    try:
        translation = translate(contents.nested, dialect, prefix)
        require_unfused(translation.state)
        recorded, uses = recorded_function(contents, config or {}), recorded_uses(contents, config or {})
        if recorded is not None:
            return Checkpoint(file, translation, recorded, uses=uses)
        function, assumed = function_of_names(translation)
        unknown, project = DIALECTS[translation.dialect].unknown, None
        if translation.dialect == 'official':
            shapes = {name: tuple(tensor.shape) for name, tensor in flatten(contents.nested).items()}
            project = find_project(translation.prefix, shapes)
        if project is not None:
            function, assumed, unknown = project.function, (), project.unknown
        if function is not None:
            function = replace(function, deformable=deformable_stages(translation.state))
    except ValueError as error:  # of a dialect that is not known, too
        kind = CheckpointError if isinstance(error, CheckpointError) else ValueError
        raise kind(f'{file} can not be used: {error}') from error
    return Checkpoint(file, translation, function, assumed, project.whose if project else None, unknown, uses)


def function_of_names(translation: Translation) -> tuple[Function | None, tuple[str, ...]]:
    """What a network computes, going by its tensors' names, and the fields of that which they don't tell."""
    dialect = DIALECTS[translation.dialect]
    function, unsaid = dialect.function, dialect.unsaid
    if dialect.in_detector and translation.is_part:
        function, unsaid = dialect.in_detector, tuple(name for name in unsaid if name not in ('first_block', 'style'))
    if convolves_all_splits(translation.state):
        return Function('group'), tuple(name for name in unsaid if name != 'first_block')
    return function, unsaid


def recorded_function(contents: Contents, config: Mapping[str, Any]) -> Function | None:
    """What is stated of a file's network: in its metadata, its training script's arguments, or the file beside it.

    Raises:
        CheckpointError: If it states what is not possible.
    """
    try:
        if 'first_block' in contents.metadata:
            return Function.from_text(contents.metadata)
        for arch, arguments in stated_models(contents, config):
            return Function.from_arguments({**arch.args, **arguments})
    except (TypeError, ValueError) as error:
        raise CheckpointError(f'what it states of its network is not possible: {error}') from error
    return None


def recorded_uses(contents: Contents, config: Mapping[str, Any]) -> dict[str, Any]:
    """What the training script's arguments, or the file beside it, state of how a file's network is used, see `USES`.

    Raises:
        CheckpointError: If that is not possible.
    """
    for arch, arguments in stated_models(contents, config):
        uses = {key: arguments[key] for key in ('global_pool', *arch.trunk.densest) if arguments.get(key)}
        try:
            for key, value in uses.items():
                require_one_of(key, value, USES[key])
        except ValueError as error:
            raise CheckpointError(f'what it states of its network is not possible: {error}') from error
        return uses
    return {}


def stated_models(contents: Contents, config: Mapping[str, Any]) -> Iterator[tuple[Arch, dict[str, Any]]]:
    """The models of this package that may be a file's, with arguments, the likeliest one first."""
    for name, arguments in stated_names(contents, config):
        arch = ARCHS.get(str(name).partition('.')[0])
        if arch is not None:
            yield arch, arguments if isinstance(arguments, dict) else {}


def stated_names(contents: Contents, config: Mapping[str, Any]) -> Iterator[tuple[object, object]]:
    """Names of models that may be a file's, with arguments: of timm's train script, transformers and Lightning."""
    args = contents.nested.get('args')
    arguments, pool = getattr(args, 'model_kwargs', None), getattr(args, 'gp', None)
    yield contents.nested.get('arch'), {'global_pool': pool, **(arguments if isinstance(arguments, dict) else {})}
    yield config.get('architecture'), config.get('model_args')
    parameters = contents.nested.get('hyper_parameters')
    if isinstance(parameters, Mapping):
        names = {value for value in parameters.values() if isinstance(value, str) and value.partition('.')[0] in ARCHS}
        if len(names) == 1:
            yield names.pop(), {key: value for key, value in parameters.items() if key in vars(Function())}


def require_unfused(state: Mapping[str, Tensor]) -> None:
    """Raises a CheckpointError for weights of a model that `fuse` made: biases of convolutions, and no norms."""
    modules = {name.rpartition('.')[0] for name in state if name.endswith('.conv3.bias')}
    if any(f'{module.removesuffix("conv3")}bn3.weight' not in state for module in modules):
        raise CheckpointError('it is of a fused model, whose norms are in its convolutions; save weights before `fuse`')


def convolves_all_splits(state: Mapping[str, Tensor]) -> bool:
    """Whether the first block has as many convolutions as splits, as only `first_block='group'` has."""
    whole, split = (state.get(f'layer1.0.{name}.weight') for name in ('conv1', 'convs.0'))
    if whole is None or split is None or len(whole) == len(split):
        return False
    return f'layer1.0.convs.{len(whole) // len(split) - 1}.weight' in state


def deformable_stages(state: Mapping[str, Tensor]) -> tuple[str | None, ...]:
    """The kind of deformable convolution of each stage, by the channels of what makes the offsets."""
    versions = {channels: version for version, channels in VERSIONS.items()}
    offsets = [state.get(f'layer{stage}.0.convs.0.conv_offset.weight', ()) for stage in (1, 2, 3, 4)]
    return tuple(versions.get(len(each)) for each in offsets)
