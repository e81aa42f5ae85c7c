"""Every trunk behaves like timm's models where programs rely on it, and its docstrings show calls that work."""

import doctest
from contextlib import nullcontext
from typing import Any

import pytest
import timm
import torch
from support import TINY, TRUNKS, small
from timm.layers import DropPath, FrozenBatchNormAct2d
from timm.models import group_parameters
from timm.optim import create_optimizer_v2
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

import timm_res2net
from timm_res2net import res2net
from timm_res2net.deploy.fuse import fuse
from timm_res2net.models.biglittle import Res2NetBigLittle
from timm_res2net.models.block import Bottle2neck
from timm_res2net.models.checks import require_eval_mode
from timm_res2net.models.cifar import Res2NetCifar
from timm_res2net.models.dla import Res2NetDla
from timm_res2net.models.resnet import Res2Net
from timm_res2net.models.spec import NetworkSpec
from timm_res2net.models.trunk import Trunk

DOCUMENTED = (
    *(Bottle2neck, Res2Net, Res2NetDla, Res2NetBigLittle, Res2NetCifar),
    *(NetworkSpec, fuse, getattr(res2net, 'test_res2net')),  # noqa: B009 - made in a loop
)


@pytest.mark.parametrize('thing', DOCUMENTED, ids=lambda thing: thing.__name__)
def test_docstring_example_gives_the_documented_output(thing: Any) -> None:
    names = dict(timm=timm, timm_res2net=timm_res2net, torch=torch, **{each.__name__: each for each in DOCUMENTED})
    (example,) = doctest.DocTestFinder(recurse=False).find(thing, thing.__name__, globs=names)
    assert example.examples
    on_meta = isinstance(thing, type) and issubclass(thing, Trunk)  # where only the shapes of outputs are shown
    with torch.device('meta') if on_meta else nullcontext():
        assert doctest.DocTestRunner().run(example).failed == 0


@pytest.mark.parametrize('name', TRUNKS)
def test_children_without_classifier_run_in_sequence(name: str, images: Tensor, build: Any) -> None:
    model, images = build(name), images[..., :32, :32]
    features = model.forward_features(images)
    pooled, mapped = (nn.Sequential(*list(model.children())[:-count])(images) for count in (1, 2))
    torch.testing.assert_close(mapped, features, rtol=0, atol=0)
    torch.testing.assert_close(pooled, model.forward_head(features, pre_logits=True), rtol=0, atol=0)
    torch.testing.assert_close(nn.Sequential(*model.children())(images), model(images), rtol=0, atol=0)
    assert model(images).shape == (2, model.num_classes)


def test_dla_without_pooling_classifies_every_position(images: Tensor) -> None:
    options = dict(num_classes=7, dtype=torch.float64, **small('dla60_res2net'))
    dense, pooled = (timm.create_model('dla60_res2net', global_pool=pool, **options).eval() for pool in ('', 'avg'))
    pooled.load_state_dict(dense.state_dict())
    torch.testing.assert_close(dense(images.double()).mean((2, 3)), pooled(images.double()))


def test_model_is_made_and_runs_on_fake_tensors() -> None:
    with FakeTensorMode():
        model = timm.create_model('test_res2net', drop_path_rate=0.1, **TINY)
        assert model(torch.empty(2, 3, 64, 64)).shape == (2, 10)


@pytest.mark.parametrize('name', ['res2net50d', 'dla60_res2net'])
def test_layer_decay_gives_every_parameter_the_learning_rate_of_timm(name: str) -> None:
    scales, matchers = [], []
    for make in (getattr(res2net, name), res2net.timm_entrypoint(name)):
        model = make(device='meta')  # type: ignore[misc]
        matchers.append(model.group_matcher(coarse=True))
        groups = create_optimizer_v2(model, opt='adamw', lr=1e-3, weight_decay=0.1, layer_decay=0.75).param_groups
        names = {id(parameter): each for each, parameter in model.named_parameters()}
        scales.append({names[id(p)]: (g['lr_scale'], g['weight_decay']) for g in groups for p in g['params']})
    assert scales[0] == scales[1]
    assert matchers[0] == matchers[1]


def test_coarse_groups_of_parameters_are_stem_stages_and_head() -> None:
    model: Any = timm.create_model('blres2net50_26w_4s', device='meta')  # a trunk that timm lacks
    groups = group_parameters(model, model.group_matcher(coarse=True)).values()
    parts = [{name.partition('.')[0] for name in names} for names in groups]
    assert parts == [{'conv1', 'bn1', 'bl_init'}, {'layer1'}, {'layer2'}, {'layer3'}, {'layer4'}, {'fc'}]


@pytest.mark.parametrize('part', [nn.BatchNorm2d(4), nn.Dropout(), DropPath(0.1)], ids=str)
def test_eval_mode_is_required_of_layers_that_differ_in_training(part: nn.Module) -> None:
    model = nn.Sequential(part, nn.Linear(2, 2), FrozenBatchNormAct2d(4)).eval()
    model[1:].train()
    require_eval_mode(model)
    part.train()
    with pytest.raises(ValueError, match=r'Sequential is in training mode: .*Call its \.eval\(\) first'):
        require_eval_mode(model)


GEOMETRY = 'do not pass output_stride, dilate_pool or'


@pytest.mark.parametrize(
    ('trunk', 'arguments', 'message'),
    [
        (Res2Net, dict(layers=(3, 4, 6)), 'layers='),
        (Res2Net, dict(layers=(3, 4, 0, 3)), 'layers='),
        (Res2Net, dict(scale=0), 'scale=0'),
        (Res2Net, dict(cardinality=0), 'cardinality=0'),
        (Res2Net, dict(base_width=0.5), 'base_width=0.5'),
        (Res2Net, dict(stem_type='wide'), "stem_type='wide' is not known: choose from '', 'deep', 'deep_tiered'"),
        (Res2Net, dict(stem_ceil_mode=True, replace_stem_pool=True), 'stem_ceil_mode=True has no effect'),
        (Res2Net, dict(strides=(1, 2, 2, 1), output_stride=16), GEOMETRY),
        (Res2Net, dict(dilations=(1, 1, 1, 2), dilate_pool=True), GEOMETRY),
        (Res2Net, dict(dilations=(1, 1, 1, 2), down_kernel_size=3), GEOMETRY),
        (Res2Net, dict(dilations=(1, 1, 2, (4, 8))), 'dilations has 2 entries for a stage of 3 blocks'),
        (Res2NetDla, dict(levels=(1, 1, 1)), 'levels='),
        (Res2NetDla, dict(levels=(1, 1, 1, 0, 1, 1)), 'levels='),
        (Res2NetDla, dict(channels=(8, 8)), 'channels='),
        (Res2NetBigLittle, dict(output_stride=8), 'output_stride=8 is not known: choose from 16, 32'),
        (Res2NetBigLittle, dict(layers=(3, 4, 6)), 'layers='),
        (Res2NetBigLittle, dict(layers=(1, 4, 6, 3)), 'layers='),
        (Res2NetCifar, dict(layers=(3, 3)), 'layers='),
        (Res2NetCifar, dict(layers=(3, 0, 3)), 'layers='),
        (Res2NetCifar, dict(channels=(8, 8)), 'channels='),
    ],
)
def test_invalid_argument_raises_value_error_with_its_name(trunk: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trunk(device='meta', **arguments)
