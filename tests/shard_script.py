"""Takes a step of training with stages sharded over two processes (FSDP2) and compares it with one that is whole.

torchrun --nproc-per-node 2 tests/shard_script.py
"""

from typing import Any

import torch
import torch.distributed as dist
from support import tiny
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from timm_res2net.models.recompute import Stage


def step(model: torch.nn.Module) -> None:
    """Takes a step on images that all processes share, so that a mean over processes changes nothing."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    model.train()
    model(images).square().sum().backward()
    optimizer.step()


def main() -> None:
    """Prints 'equal' if both end with the same parameters."""
    dist.init_process_group('gloo')
    whole, sharded = tiny(), tiny()
    step(whole)
    mesh = init_device_mesh('cpu', (dist.get_world_size(),))
    for module in sharded.modules():
        if isinstance(module, Stage):
            module.grad_checkpointing = True
            fully_shard(module, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    step(sharded)
    parameters: Any = zip(sharded.parameters(), whole.parameters())
    for parameter, expected in parameters:
        torch.testing.assert_close(parameter.full_tensor(), expected.data)
    print('equal')
    dist.barrier()
    dist.destroy_process_group()


if __name__ == '__main__':
    main()
