"""Models run no more operators and allocate no more memory than timm's own, and fused ones far less."""

from typing import Any

import pytest
import timm
import torch
from support import shallow
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from timm_res2net import fuse
from timm_res2net.models.variants import ARCHS
from timm_res2net.res2net import timm_entrypoint


class Counter(TorchDispatchMode):
    """Counts operators except views while it is active, and the bytes of their new tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators = 0
        self.allocated = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        before, after = find_storages([args, list(kwargs.values())]), find_storages(outputs)
        self.operators += not func.is_view
        self.allocated += sum(after[pointer].nbytes() for pointer in after.keys() - before.keys())
        return outputs


def find_storages(values: Any) -> dict[int, Any]:
    """Returns the storages of tensors, also of those in lists and tuples, by address."""
    if isinstance(values, Tensor):
        storage = values.untyped_storage()
        return {storage.data_ptr(): storage}
    found: dict[int, Any] = {}
    for value in values if isinstance(values, list | tuple) else ():
        found |= find_storages(value)
    return found


def count(model: nn.Module, x: Tensor, train: bool = False) -> tuple[int, int]:
    """Returns the operators and allocated bytes of a forward pass."""
    with Counter() as counter, torch.set_grad_enabled(train):
        model(x)
    return counter.operators, counter.allocated


def count_saved_bytes(model: nn.Module, x: Tensor) -> int:
    """Returns the bytes that a forward pass keeps for the backward pass, without images, parameters and buffers."""
    saved: dict[int, Any] = {}  # references keep the memory, so that no address is reused

    def keep(tensor: Tensor) -> Tensor:
        saved.update(find_storages(tensor))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(x)
    del output
    known = find_storages([x, *model.parameters(), *model.buffers()])
    return sum(saved[pointer].nbytes() for pointer in saved.keys() - known.keys())


def make_timms(name: str, **arguments: Any) -> nn.Module:
    """Makes timm's own model."""
    entrypoint = timm_entrypoint(name)
    assert entrypoint is not None
    return entrypoint(**arguments)


TIMMS = [name for name in ARCHS if timm_entrypoint(name)]
FULL = [pytest.param(name, True, marks=pytest.mark.slow) for name in ('res2net50_26w_4s', 'dla60_res2net')]


@pytest.mark.parametrize(('name', 'full'), [*((name, False) for name in TIMMS), *FULL])
def test_model_does_no_more_work_than_timm_and_fused_39_percent_less(name: str, full: bool, images: Tensor) -> None:
    arguments = {} if full else shallow(name)
    theirs, ours = make_timms(name, **arguments), timm.create_model(name, **arguments)
    for training in (True, False):
        pairs = zip(*(count(model.train(training), images, training) for model in (ours, theirs)))
        assert all(mine <= timms for mine, timms in pairs)
    operators, allocated = count(fuse(ours), images)
    timms_operators, timms_allocated = count(theirs, images)
    assert operators < 0.61 * timms_operators
    assert allocated < 0.61 * timms_allocated


@pytest.mark.parametrize('name', ['res2net50_26w_4s', 'dla60_res2net'])
def test_training_saves_no_more_bytes_than_timm(name: str, images: Tensor) -> None:
    ours, theirs = timm.create_model(name, **shallow(name)).train(), make_timms(name, **shallow(name)).train()
    assert 0 < count_saved_bytes(ours, images) <= count_saved_bytes(theirs, images)
