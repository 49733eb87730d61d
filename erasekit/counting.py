"""What a method costs, in evaluations of the U-Net: counted by a hook, not by formula."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Count:
    """`evaluations`: samples the U-Net was asked about, each latent and text pair one; `calls`: how many times it was called."""

    evaluations: int = 0
    calls: int = 0


@contextmanager
def counted(unet) -> Iterator[Count]:
    """Count every forward pass of a U-Net inside the block, whoever makes it; what checkpointing computes again is not one."""
    count = Count()

    def hook(module, inputs):
        count.evaluations += len(inputs[0])
        count.calls += 1

    handle = unet.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()
