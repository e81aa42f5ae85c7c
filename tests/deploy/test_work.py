"""Models run no more operators and allocate no more memory than timm's own, and fused ones far less."""

from typing import Any

import pytest
import timm
import torch
from support import small
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from timm_res2net import fuse
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
        before, after = find_storages((args, kwargs)), find_storages(outputs)
        self.operators += not func.is_view
        self.allocated += sum(after[pointer].nbytes() for pointer in after.keys() - before.keys())
        return outputs


def find_storages(values: Any) -> dict[int, Any]:
    """Returns the storages of all tensors in nested values, by address."""
    storages = [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]
    return {storage.data_ptr(): storage for storage in storages}


def count(model: nn.Module, x: Tensor, train: bool = False) -> tuple[int, int]:
    """Returns the operators and allocated bytes of a forward pass."""
    with Counter() as counter, torch.set_grad_enabled(train):
        model(x)
    return counter.operators, counter.allocated


# One for each kind of stem, convolution and trunk that timm has.
KINDS = 'res2net50_26w_4s', 'res2net50d', 'res2next50', 'dla60_res2net'


@pytest.mark.parametrize('name', KINDS)
def test_model_does_no_more_work_than_timm_and_fused_39_percent_less(name: str, images: Tensor) -> None:
    make_timms: Any = timm_entrypoint(name)
    theirs, ours = make_timms(**small(name)), timm.create_model(name, **small(name))
    for training in (True, False):
        pairs = zip(*(count(model.train(training), images, training) for model in (ours, theirs)))
        assert all(mine <= timms for mine, timms in pairs)
    operators, allocated = count(fuse(ours), images)
    timms_operators, timms_allocated = count(theirs, images)
    assert operators < 0.61 * timms_operators
    assert allocated < 0.61 * timms_allocated
