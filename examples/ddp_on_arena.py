"""Plain DistributedDataParallel, with shared memory in place of sockets: one word differs from any DDP script.

unisono run -n 2 examples/ddp_on_arena.py         (or: torchrun --nproc-per-node 2 examples/ddp_on_arena.py)
"""

import gc

import torch
import torch.distributed as dist
from torch import nn

import unisono


def main() -> None:
    """Train a small network."""
    dist.init_process_group("arena")  # "gloo" in any other script
    torch.manual_seed(0)
    model = nn.parallel.DistributedDataParallel(nn.Sequential(nn.Linear(20, 200), nn.Tanh(), nn.Linear(200, 1)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(dist.get_rank())
    for step in range(100):
        inputs = torch.randn(32, 20, generator=generator)
        loss = (model(inputs) - inputs.sum(1, keepdim=True).sin()).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19 and dist.get_rank() == 0:
            about = f"{dist.get_backend()}, unisono {unisono.__version__}"
            print(f"step {step + 1}: loss {float(loss.detach()):.4f} ({about})")
    del model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
