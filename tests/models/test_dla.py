"""The DLA trunk: options that timm's DLA lacks, and the authors' files."""

from typing import Any, cast

import pytest
import timm
import torch
from safetensors.torch import save_file
from support import randomize, small
from timm.layers import apply_test_time_pool
from torch import Tensor, nn

from timm_res2net import load_checkpoint
from timm_res2net.models.dla import DlaBottle2neck, DlaRoot, Res2NetDla
from timm_res2net.models.trunk import TrunkOptions
from timm_res2net.res2net import timm_entrypoint

SMALL: dict[str, Any] = dict(levels=(1, 1, 1, 2, 3, 1), channels=(8, 8, 32, 32, 64, 64))


def test_dla_drop_path_grows_linearly_in_order_of_execution(images: Tensor) -> None:
    model = Res2NetDla(drop_path_rate=0.3, drop_block_rate=0.1, **SMALL).train()
    executed: list[float] = []
    for module in model.modules():
        if isinstance(module, DlaBottle2neck):
            rate = getattr(module.drop_path, 'drop_prob', 0.0)
            module.register_forward_pre_hook(lambda _module, _x, rate=rate: executed.append(rate))
    model(images)
    torch.testing.assert_close(executed, [0.3 * i / 15 for i in range(16)])
    dropping = [type(model.get_submodule(name).drop_block).__name__ for name in ('level3.tree1.tree1', 'level5.tree2')]
    assert dropping == ['Identity', 'DropBlock2d']


# Projections in the authors' files that no block uses, with their channels.
DEAD = {'level3.project': (32, 32), 'level4.project': (32, 64), 'level4.tree1.project': (32, 64)}


def test_dla_official_file_loads_without_its_dead_projections_but_no_other_tensors(tmp_path: Any) -> None:
    torch.manual_seed(0)
    model = randomize(timm.create_model('dla60_res2net', **SMALL))
    state = dict(model.state_dict())
    for name, (in_chs, out_chs) in DEAD.items():
        project = nn.Sequential(nn.Conv2d(in_chs, out_chs, 1, bias=False), nn.BatchNorm2d(out_chs))
        state |= {f'{name}.{key}': tensor for key, tensor in project.state_dict().items()}
    file = tmp_path / 'authors.safetensors'
    options = dict(pretrained=True, **SMALL)
    save_file(state, file)
    for overlay in (dict(file=str(file)), dict(state_dict=state)):
        loaded = timm.create_model('dla60_res2net', pretrained_cfg_overlay=overlay, **options)
        torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    save_file({**state, 'level2.project.2.weight': torch.zeros(1)}, file)
    with pytest.raises(RuntimeError, match='Unexpected'):
        timm.create_model('dla60_res2net', pretrained_cfg_overlay=dict(file=str(file)), **options)


@pytest.mark.parametrize('levels', [(1, 1, 1, 2, 1, 1), (1, 1, 1, 1, 3, 2)])
def test_dla_projections_of_leaves_are_loaded(levels: tuple[int, ...], tmp_path: Any) -> None:
    options = dict(levels=levels, channels=(8, 8, 16, 24, 32, 40), num_classes=3)
    model = randomize(timm.create_model('dla60_res2net', **options))
    save_file(model.state_dict(), tmp_path / 'a.safetensors')
    loaded = timm.create_model('dla60_res2net', **options)
    assert load_checkpoint(loaded, tmp_path / 'a.safetensors').dropped == {}
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)


def test_dla_with_test_time_pooling_computes_what_timms_own_does() -> None:
    options = dict(num_classes=5, **small('dla60_res2net'))
    ours = randomize(timm.create_model('dla60_res2net', **options)).eval()
    theirs = cast(Any, timm_entrypoint('dla60_res2net'))(**options).eval()
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(1, 3, 256, 288)
    pooled = [apply_test_time_pool(model, {'input_size': x.shape[1:]})[0] for model in (ours, theirs)]
    torch.testing.assert_close(pooled[0](x), pooled[1](x), rtol=0, atol=0)


def test_dla_with_checkpointing_can_be_traced(images: Tensor) -> None:
    model = timm.create_model('dla60_res2net', **small('dla60_res2net')).eval()
    model.set_grad_checkpointing()
    torch.testing.assert_close(torch.jit.trace(model, images)(images), model(images))


def test_dla_shortcut_root_adds_the_first_input() -> None:
    root = DlaRoot(TrunkOptions(), 8, 4, shortcut=True)
    nn.init.zeros_(root.conv.weight)
    first, second = torch.rand(2, 1, 4, 5, 5)
    torch.testing.assert_close(root.eval()([first, second]), first, rtol=0, atol=0)
