"""The DLA trunk: what timm's lacks."""

from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import randomise
from torch import Tensor, nn

from timm_res2net import load_checkpoint
from timm_res2net.models.dla import DlaBottle2neck, DlaRoot, Res2NetDla
from timm_res2net.models.function import FIRST_BLOCKS

SMALL: dict[str, Any] = dict(levels=(1, 1, 1, 2, 3, 1), channels=(8, 8, 32, 32, 64, 64))


@pytest.mark.parametrize('function', FIRST_BLOCKS)
@pytest.mark.parametrize(('output_stride', 'step'), [(16, 2), (8, 4)])
def test_dla_output_stride_equals_undilated_on_denser_grid(
    function: str, output_stride: int, step: int, images: Tensor
) -> None:
    torch.manual_seed(0)
    model = randomise(Res2NetDla(first_block=function, **SMALL)).double().eval()
    dilated = Res2NetDla(first_block=function, output_stride=output_stride, **SMALL).double().eval()
    dilated.load_state_dict(model.state_dict())
    images = images.double()
    dense = dilated.forward_features(images)
    assert dense.shape[-1] == images.shape[-1] // output_stride
    torch.testing.assert_close(dense[..., ::step, ::step], model.forward_features(images))


@pytest.mark.parametrize('output_stride', [8, 16, 32])
@pytest.mark.parametrize('size', [(65, 97), (63, 64)])
def test_dla_odd_image_sizes_round_up_at_every_level(output_stride: int, size: tuple[int, int]) -> None:
    model = Res2NetDla(output_stride=output_stride, **SMALL).eval()
    _, features = model.forward_intermediates(torch.randn(1, 3, *size))
    for info, feature in zip(model.feature_info, features):
        assert feature.shape[1:] == (info['num_chs'], *(-(-pixels // info['reduction']) for pixels in size))


def test_dla_act_norm_and_attn_layer_reach_every_block(images: Tensor) -> None:
    model = Res2NetDla(act_layer='silu', norm_layer='groupnorm1', attn_layer='eca', **SMALL)
    kinds = [type(module).__name__ for module in model.modules()]
    assert 'ReLU' not in kinds
    assert 'BatchNorm2d' not in kinds
    assert kinds.count('EcaModule') == sum(isinstance(module, DlaBottle2neck) for module in model.modules()) == 16
    assert model(images).isfinite().all()


def test_dla_drop_path_grows_linearly_in_order_of_execution(images: Tensor) -> None:
    model = Res2NetDla(drop_path_rate=0.3, drop_block_rate=0.1, **SMALL).train()
    executed: list[float] = []
    for module in model.modules():
        if isinstance(module, DlaBottle2neck):
            rate = 0.0 if module.drop_path is None else module.drop_path.drop_prob
            module.register_forward_pre_hook(lambda _module, _x, rate=rate: executed.append(rate))
    model(images)
    torch.testing.assert_close(executed, [0.3 * i / 15 for i in range(16)])
    dropping = [type(model.get_submodule(name).drop_block).__name__ for name in ('level3.tree1.tree1', 'level5.tree2')]
    assert dropping == ['Identity', 'DropBlock2d']


@pytest.mark.parametrize('zero', [True, False])
def test_dla_zero_init_last_zeroes_last_norm_of_every_block(zero: bool) -> None:
    model = Res2NetDla(zero_init_last=zero, **SMALL)
    weights = [module.bn3.weight for module in model.modules() if isinstance(module, DlaBottle2neck)]
    assert all((weight == 0).all() for weight in weights) == zero


def test_dla_group_matcher_follows_execution_and_covers_each_parameter_once() -> None:
    model = Res2NetDla(**SMALL)
    matcher = model.group_matcher()
    groups = timm.models.group_parameters(model, matcher)
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())

    executed: list[str] = []
    owners = {id(module): name for name, module in model.named_modules()}
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(lambda module, *_: executed.append(f'{owners[id(module)]}.weight'))
    model.eval()(torch.randn(1, 3, 32, 32))
    group_of = {name: group for group, members in groups.items() for name in members}
    order = [group_of[name] for name in executed]
    assert order == sorted(order)


DEAD = {'level3.project': (128, 256), 'level4.project': (256, 512), 'level4.tree1.project': (256, 512)}


def authors_file(path: str, model: nn.Module) -> dict[str, Tensor]:
    """Writes a model as the authors' files have it: with three projections, 18 tensors, that nothing reads."""
    state = dict(model.state_dict())
    for name, (in_chs, out_chs) in DEAD.items():
        project = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, bias=False), nn.BatchNorm2d(out_chs))
        state |= {f'{name}.{key}': tensor for key, tensor in project.state_dict().items()}
    save_file(state, path)
    return state


def test_dla_official_file_loads_without_its_dead_projections(tmp_path: Any, build: Any) -> None:
    model = build('dla60_res2net', full=True)
    file = str(tmp_path / 'authors.safetensors')
    state = authors_file(file, model)
    assert len(state) - len(model.state_dict()) == 18
    assert (
        sum(state[name].numel() for name in state.keys() - model.state_dict() if 'running' not in name) == 297_472 + 3
    )
    loaded = timm.create_model('dla60_res2net', pretrained=True, pretrained_cfg_overlay=dict(file=file))
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('levels', [(1, 1, 1, 1, 1, 1), (1, 1, 1, 2, 1, 1), (1, 1, 1, 1, 3, 2)])
def test_dla_projections_of_leaves_are_loaded(levels: tuple[int, ...], tmp_path: Any) -> None:
    options = dict(levels=levels, channels=(8, 8, 16, 24, 32, 40), num_classes=3)
    model = randomise(timm.create_model('dla60_res2net', **options))
    save_file(model.state_dict(), tmp_path / 'a.safetensors')
    loaded = timm.create_model('dla60_res2net', **options)
    assert load_checkpoint(loaded, tmp_path / 'a.safetensors').translation.dropped == {}
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    overlay = dict(state_dict=model.state_dict(), num_classes=3)
    loaded = timm.create_model('dla60_res2net', pretrained=True, pretrained_cfg_overlay=overlay, **options)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize('damage', ['missing', 'unexpected'])
def test_dla_missing_or_unexpected_tensor_raises_runtime_error(damage: str, tmp_path: Any, build: Any) -> None:
    file = str(tmp_path / 'authors.safetensors')
    state = authors_file(file, build('dla60_res2net', full=True))
    if damage == 'missing':
        del state['level2.tree1.conv1.weight']
    else:
        state['level2.project.2.weight'] = torch.zeros(1)
    save_file(state, file)
    with pytest.raises(RuntimeError, match=damage.capitalize()):
        timm.create_model('dla60_res2net', pretrained=True, pretrained_cfg_overlay=dict(file=file))


def test_dla_get_classifier_name_only_returns_fc() -> None:
    assert Res2NetDla(**SMALL).get_classifier(name_only=True) == 'fc'


@pytest.mark.parametrize('arguments', [dict(output_stride=4), dict(levels=(1, 1, 1)), dict(channels=(8, 8))])
def test_dla_unsupported_argument_raises_value_error_with_its_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Res2NetDla(**arguments)


@pytest.mark.parametrize('mode', [True, False])
def test_dla_reset_classifier_keeps_training_mode(mode: bool) -> None:
    model = Res2NetDla(**SMALL).train(mode)
    model.reset_classifier(5)
    assert {module.training for module in model.modules()} == {mode}


def test_dla_shortcut_root_adds_the_first_input() -> None:
    root = DlaRoot(8, 4, True, nn.ReLU, nn.BatchNorm2d)
    nn.init.zeros_(root.conv.weight)
    first, second = torch.rand(2, 1, 4, 5, 5)
    torch.testing.assert_close(root.eval()([first, second]), first, rtol=0, atol=0)


def test_dla_dead_projections_in_a_state_dict_are_dropped(tmp_path: Any, build: Any) -> None:
    model = build('dla60_res2net', full=True)
    state = authors_file(str(tmp_path / 'authors.safetensors'), model)
    overlay = dict(state_dict=state)
    loaded = timm.create_model('dla60_res2net', pretrained=True, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
