"""A loaded network computes what the file's own code computes, or else there is an error or a single warning."""

import logging
import os
import random
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from formats import save_checkpoint, under
from support import TINY, TRUNKS, randomize, slow_but, small, tiny
from timm.models import save_for_hf
from torch import Tensor, nn

from timm_res2net import CheckpointError, export_checkpoint, load_checkpoint, load_model, push
from timm_res2net.models.block import spec_of
from timm_res2net.models.classifier import as_classifier
from timm_res2net.models.spec import ARGUMENTS
from timm_res2net.models.variants import ARCHS
from timm_res2net.weights.checkpoints import read_checkpoint
from timm_res2net.weights.convert import convert
from timm_res2net.weights.dialects import EXPORTS
from timm_res2net.weights.loading import load_folder

TRUNK = tiny(num_classes=0).state_dict()
STRIDE_16: dict[str, Any] = dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2))


def decoder(*names: str) -> dict[str, Tensor]:
    """Returns tensors of modules next to a network."""
    return {name: torch.ones(4, 4, 1, 1) for name in names or ('decoder.weight',)}


def detector_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Puts the stem in a separate module, as maskrcnn-benchmark does."""
    return {('stem.' if name.startswith(('conv1', 'bn1')) else '') + name: each for name, each in state.items()}


PLAIN = timm.create_model('test_res2net', **{**TINY, 'stem_type': '', 'stem_width': 64}, num_classes=0).state_dict()
PPM = 'backbone_head.weight', 'decode_head.psp_modules.0.1.conv.weight'
# Files that do not record strides and dilations, and the keywords that their only warning must list.
ASSUMED: dict[str, tuple[dict[str, Tensor], tuple[str, ...]]] = {
    'cut from a larger one': (under('model.resnet.', TRUNK), ('first_block=', 'strides=', 'dilations=')),
    'next to a decoder': ({**TRUNK, **decoder()}, ('first_block=', 'strides=', 'dilations=')),
    'mmdet 1 detector': (
        {**under('backbone.', TRUNK), **decoder('rpn_head.rpn_conv.weight', 'bbox_head.fc_cls.weight')},
        ("first_block='official'", 'strides='),
    ),
    'UPerNet': (
        {**under('backbone.', TRUNK), **decoder(*PPM, 'decode_head.fpn_convs.0.conv.weight')},
        ('strides=(1, 2, 2, 2)', 'dilations=(1, 1, 1, 1)'),
    ),
    'maskrcnn-benchmark': (
        {**under('module.backbone.body.', detector_names(PLAIN)), **decoder('module.rpn.head.conv.weight')},
        ("style='caffe'",),
    ),
}


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize(('state', 'keywords'), ASSUMED.values(), ids=[*ASSUMED])
def test_network_inside_another_gets_one_short_warning_that_names_the_keywords(
    state: dict[str, Tensor], keywords: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save_checkpoint(state, tmp_path)
    loaders: list[Callable[[Path], object]] = [load_model, partial(convert, dry_run=True)]
    for load in loaders:
        caplog.clear()
        load(file)
        (message,) = warnings_of(caplog)
        assert all(keyword in message for keyword in keywords)
        assert 'Pass these keywords to change them' in message
        assert len(message) - len(str(file)) < 400


def test_lone_classifier_is_loaded_silently(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = tiny().state_dict()
    optimizer = {'state': {0: {'exp_avg': torch.ones(2)}}}
    load_model(save_checkpoint({'state_dict': under('module.', state), 'optimizer': optimizer}, tmp_path))
    load_model(save_checkpoint({'state_dict': state, 'total': torch.tensor(3)}, tmp_path))
    assert warnings_of(caplog) == []


def test_given_keywords_are_recorded_and_silence_their_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = save_checkpoint({**under('resnet.', TRUNK), **decoder()}, tmp_path)
    assert read_checkpoint(file).provenance['strides'] == 'default'
    assert read_checkpoint(file, strides=(1, 2, 2, 2)).provenance['strides'] == 'recorded'
    load_model(file, strides=(1, 2, 2, 2))
    (message,) = warnings_of(caplog)
    assert 'dilations=' in message
    assert 'strides=' not in message


def test_provenance_distinguishes_recorded_proved_inferred_and_default(tmp_path: Path) -> None:
    def provenance(contents: dict[str, Any]) -> dict[str, str]:
        return dict(read_checkpoint(save_checkpoint(contents, tmp_path)).provenance)

    recorded = provenance(dict(arch='test_res2net', state_dict=tiny().state_dict(), args=Namespace(model_kwargs=TINY)))
    assert {*recorded.values()} == {'recorded'}
    lone = provenance(TRUNK)
    assert (lone['deformable'], lone['strides'], lone['first_block']) == ('proved', 'default', 'default')
    known = provenance({**under('resnet.', TRUNK), **decoder('NCD.conv_upsample1.conv.weight')})
    assert (known['deformable'], known['strides'], known['first_block']) == ('proved', 'inferred', 'inferred')


def test_network_of_unrecorded_dilations_is_refused_by_a_dilated_model_unless_given(tmp_path: Path) -> None:
    file = save_checkpoint({**under('resnet.', TRUNK), **decoder()}, tmp_path)
    model = tiny(num_classes=0, **STRIDE_16)
    with pytest.raises(CheckpointError, match=r'dilations is assumed.* pass strides=\(1, 2, 2, 1\)'):
        load_checkpoint(model, file)
    load_checkpoint(model, file, **STRIDE_16)


# Averaged weights

STEPS = {'steps': torch.tensor(7)}
AVERAGES: dict[str, Callable[[Any, Any], dict[str, Any]]] = {  # how files store latest and averaged weights
    'timm': lambda raw, mean: {'state_dict': raw, 'state_dict_ema': mean},
    'plain': lambda raw, mean: {'model': raw, 'ema': mean},
    'YOLO': lambda raw, mean: {'model': raw, 'ema': {'module': mean, 'updates': 3}},
    'parts': lambda raw, mean: {'model': under('resnet.', raw), 'ema': under('resnet.', mean)},
    'mmengine': lambda raw, mean: {'state_dict': mean, 'ema_state_dict': {**under('module.', raw), **STEPS}},
    'StochasticWeightAveraging': lambda raw, mean: {
        'state_dict': under('model.', raw),
        'callbacks': {'StochasticWeightAveraging': {'average_model_state': under('model.', mean)}},
    },
    'WeightAveraging': lambda raw, mean: {
        'state_dict': under('model.', mean),
        'current_model_state': under('model.', raw),
        'averaging_state': {'n_averaged': torch.tensor(5)},
    },
}


@pytest.mark.parametrize('average', slow_but(['timm', 'mmengine', 'WeightAveraging'], AVERAGES))
def test_weights_from_chooses_between_averaged_and_latest_weights(
    average: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    raw = tiny().state_dict()
    mean = {name: each + 1 if each.is_floating_point() else each for name, each in raw.items()}
    file = save_checkpoint(AVERAGES[average](raw, mean), tmp_path)
    for weights_from, expected, chosen in ((None, mean, 'ema'), ('ema', mean, 'ema'), ('model', raw, 'model')):
        checkpoint = read_checkpoint(file, weights_from=weights_from)
        assert checkpoint.weights_from == chosen
        torch.testing.assert_close(checkpoint.state['fc.weight'], expected['fc.weight'], rtol=0, atol=0)
    load_model(file)
    assert warnings_of(caplog) == []


def test_weights_from_is_refused_if_the_file_has_no_such_weights(tmp_path: Path) -> None:
    file = save_checkpoint(tiny().state_dict(), tmp_path)
    assert read_checkpoint(file).weights_from is None
    with pytest.raises(CheckpointError, match=r'it has no averaged weights\. Leave out weights_from'):
        read_checkpoint(file, weights_from='ema')
    with pytest.raises(ValueError, match="weights_from must be 'ema' or 'model', got 'best'"):
        read_checkpoint(file, weights_from='best')


# Other containers and classifiers


@pytest.mark.parametrize('stem', [{}, dict(stem_type='', stem_width=64)], ids=['deep stem', 'plain stem'])
@pytest.mark.parametrize('dialect', ['numbered', 'layer0', 'd-linknet'])
def test_networks_with_renamed_modules_load(dialect: str, stem: dict[str, Any], tmp_path: Path, images: Tensor) -> None:
    model = tiny(num_classes=0, **stem)
    if dialect == 'numbered':
        state = nn.Sequential(*[*model.children()][:-2]).state_dict()
    else:
        rows = dict(conv1='layer0.0', bn1='layer0.1') if dialect == 'layer0' else dict(conv1='firstconv', bn1='firstbn')
        rows |= {} if dialect == 'layer0' else {f'layer{i}': f'encoder{i}' for i in range(1, 5)}
        parts = ((name.partition('.'), each) for name, each in model.state_dict().items())
        state = {f'{rows.get(first, first)}.{rest}': each for (first, _, rest), each in parts}
    checkpoint = read_checkpoint(save_checkpoint(state, tmp_path))
    assert checkpoint.dialect == dialect
    torch.testing.assert_close(load_model(checkpoint).eval()(images), model(images), rtol=0, atol=0)


@pytest.mark.parametrize(
    'head',
    [
        {'fc.0.weight': torch.ones(5, 32), 'fc.0.bias': torch.ones(5), 'fc.2.weight': torch.ones(3, 5)},
        {'fc.weight': torch.ones(5, 7)},
        {'fc.weight': torch.ones(5)},
    ],
    ids=['Sequential', 'another input', 'a vector'],
)
def test_trunk_with_another_kind_of_classifier_loads_without_it(
    head: dict[str, Tensor], tmp_path: Path, images: Tensor
) -> None:
    checkpoint = read_checkpoint(save_checkpoint({**TRUNK, **head}, tmp_path))
    assert checkpoint.num_classes == 0
    assert checkpoint.dropped == dict.fromkeys(head, 'part of a classifier that is not a single linear layer')
    torch.testing.assert_close(load_model(checkpoint).eval()(images), tiny(num_classes=0)(images), rtol=0, atol=0)


def test_backbone_of_three_stages_loads_with_features_only_and_is_refused_without(tmp_path: Path) -> None:
    file = save_checkpoint({name: each for name, each in TRUNK.items() if 'layer4' not in name}, tmp_path)
    for load in (load_model, lambda file: convert(file, dry_run=True)):
        with pytest.raises(CheckpointError, match=r'stage 4 \(layer4\) is missing. Load .* into .* features_only=True'):
            load(file)
    model = timm.create_model('test_res2net', features_only=True, out_indices=(0, 1, 2, 3), **TINY)
    load_checkpoint(model, file)
    torch.testing.assert_close(model.state_dict()['layer3.0.bn3.weight'], TRUNK['layer3.0.bn3.weight'])


# Every keyword of every trunk, through every writer and reader

COMMON: dict[str, tuple[Any, ...]] = dict(
    scale=(2, 3, 4),
    first_block=('official', 'paddle', 'mmdet', 'group'),
    attn_layer=('se', 'eca', 'ceca', 'cbam', 'gc', 'ese', 'gca'),
    act_layer=('silu', 'leaky_relu', 'prelu', 'hard_swish'),
    norm_eps=(0.0, 1e-3),
    norm_layer=('frozenbatchnorm2d',),
    global_pool=('max', 'avgmax', 'catavgmax', ''),
    num_classes=(0, 1, 7),
    in_chans=(1, 4),
)
KEYWORDS: dict[str, dict[str, tuple[Any, ...]]] = {
    'Res2Net': dict(
        style=('caffe',),
        base_width=(8, 26),
        cardinality=(1, 2),
        strides=((1, 2, 1, 1), (1, 2, 2, 1)),
        dilations=((1, 1, 2, 4), (1, 1, 1, 2), (1, (1, 2), 1, 2)),
        dilate_first=(False,),
        deformable=((None, None, 'v1', 'v2'), ('v2',) * 4),
        stem_ceil_mode=(True,),
        output_stride=(8, 16),
        dilate_pool=(True,),
        stem_type=('', 'deep', 'deep_tiered'),
        stem_width=(8, 24),
        replace_stem_pool=(True,),
        down_kernel_size=(3,),
        avg_down=(True, False),
        layers=((1, 1, 1, 1), (2, 1, 1, 2)),
        channels=((8, 8, 8, 8), (8, 16, 16, 32)),
    ),
    'Res2NetDla': dict(
        base_width=(14, 28),
        cardinality=(1, 4),
        output_stride=(8, 16),
        shortcut_root=(True,),
        levels=((1, 1, 1, 1, 1, 1), (1, 1, 1, 2, 2, 1)),
        channels=((16, 16, 32, 64, 64, 128),),
    ),
    'Res2NetBigLittle': dict(
        base_width=(8, 16),
        cardinality=(1, 2),
        output_stride=(8, 16),
        alpha=(1, 2, 4),
        beta=(2, 4),
        layers=((2, 2, 2, 1),),
    ),
    'Res2NetCifar': dict(
        base_width=(8, 24),
        cardinality=(1, 2, 6),
        layers=((1, 1, 1), (1, 2, 1)),
        channels=((16, 24, 64), (8, 16, 32)),
        output_stride=(1, 2),
    ),
}


def test_every_argument_of_every_trunk_is_among_the_keywords() -> None:
    for trunk in {arch.trunk for arch in ARCHS.values()}:
        tested = {*COMMON, *KEYWORDS[trunk.__name__], *ARGUMENTS['training'], *ARGUMENTS['placement']}
        assert {*trunk.arguments()} <= tested


def written_and_read(model: nn.Module, name: str, args: dict[str, Any], folder: Path) -> Iterator[Callable[[], Any]]:
    """Yields functions that each write a model and its arguments in another way, then load and return it."""
    script = dict(arch=name, state_dict=model.state_dict(), version=2, args=Namespace(model=name, model_kwargs=args))
    torch.save(script, folder / 'last.pth.tar')
    yield lambda: load_model(folder / 'last.pth.tar')
    torch.save({**script, 'args': vars(script['args'])}, folder / 'dict.pth')
    yield lambda: load_model(folder / 'dict.pth')

    def load_timms() -> Any:
        save_for_hf(model, folder / 'hf', model_args=args, safe_serialization=True)
        return load_folder(folder / 'hf')

    yield load_timms

    def load_moved(write: Callable[[Path], object], place: str) -> Any:
        write(folder / place)
        file = (folder / place / 'model.safetensors').rename(folder / f'{place}.safetensors')
        return load_model(file)  # without the config.json

    yield lambda: load_moved(lambda out: convert(folder / 'last.pth.tar', out), 'converted')
    yield lambda: load_moved(lambda out: push(model, 'user/net', dry_run=out), 'pushed')
    for dialect in EXPORTS:

        def load_exported(dialect: str = dialect) -> Any:
            export_checkpoint(model, folder / 'exported', dialect)
            pool = as_classifier(model).global_pool.pool_type  # a file without a classifier does not determine it
            keywords = {} if dialect == 'paddleclas' else spec_keywords(model)
            return load_model(folder / 'exported', global_pool=pool, **keywords)

        yield load_exported


def spec_keywords(model: nn.Module) -> dict[str, Any]:
    """Returns the fields of a model's spec that differ from the default; users must pass them for an exported file."""
    spec = spec_of(model)
    assert spec is not None
    return {name: getattr(spec, name) for name in spec.differing_fields(type(spec)()) if name != 'deformable'}


def random_model(seed: int) -> tuple[nn.Module, str, dict[str, Any]]:
    """Creates a small network with random arguments; raises ValueError if they are impossible."""
    rng = random.Random(seed)
    name = rng.choice(('test_res2net', 'test_res2net', *TRUNKS))
    options = {**COMMON, **KEYWORDS[ARCHS[name].trunk.__name__]}
    args = {key: rng.choice(options[key]) for key in rng.sample([*options], rng.randint(1, 4))}
    if 'dilate_first' in args or 'strides' in args:
        args.setdefault('dilations', (1, 1, 1, 2))
    if args.get('global_pool') == '':
        args['num_classes'] = 0  # a linear classifier needs pooled features, as in timm
    args = {**(TINY if name == 'test_res2net' else small(name)), **args}
    torch.manual_seed(seed)
    try:
        model = randomize(timm.create_model(name, **args)).eval()
    except (TypeError, RuntimeError, AssertionError, ZeroDivisionError) as error:
        raise ValueError(str(error)) from error
    for each, parameter in model.named_parameters():
        if 'conv_offset' in each:
            nn.init.normal_(parameter, std=0.3)
    return model, name, args


# FUZZ_NETWORKS=500 tests more networks; FUZZ_SEED=100 starts at another seed.
FIRST, COUNT = int(os.environ.get('FUZZ_SEED', 0)), int(os.environ.get('FUZZ_NETWORKS', 4))
FAST = 16, 123, 387  # deformable convolutions, circular ECA with dilations, and a DLA with shortcut_root


@pytest.mark.parametrize('seed', slow_but(FAST, [*FAST, *range(FIRST, FIRST + COUNT)]))
def test_random_network_comes_back_equal_or_with_an_error_or_a_warning(
    seed: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    try:
        model, name, args = random_model(seed)
    except ValueError as error:
        pytest.skip(f'impossible arguments: {error}')
    x = torch.randn(1, args.get('in_chans', 3), 65, 65)
    outcomes = []
    with torch.inference_mode():
        expected = model(x)
    for way, load in enumerate(written_and_read(model, name, args, tmp_path)):
        caplog.clear()
        try:
            loaded = load()
        except ValueError as error:  # a CheckpointError is one
            outcomes.append(f'{way} refused: {error}')
            continue
        with torch.inference_mode():
            found = loaded.eval()(x)
        same = found.shape == expected.shape and torch.equal(found, expected)
        assert same or warnings_of(caplog), f'silently different: way {way} of {name}({args})'
        outcomes.append('equal' if same else f'{way} warned')
    assert [each for each in outcomes[:5] if each != 'equal'] == [], (name, args)  # the first five record everything
