"""What a method costs: evaluations of the U-Net, counted by a hook and not by formula; seconds; and memory."""

import ctypes
import gc
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import torch

LOOK_EVERY = 0.02  # seconds between looks at a process's memory


@dataclass
class Count:
    """`evaluations`: samples the U-Net was asked about, each latent and text pair one; `calls`: how many times it was called.

    `with_gradient`: those of the evaluations that were made with gradients on, and so have a way back to be paid for.
    """

    evaluations: int = 0
    calls: int = 0
    with_gradient: int = 0


@contextmanager
def counted(unet) -> Iterator[Count]:
    """Count every forward pass of a U-Net inside the block, whoever makes it; what checkpointing computes again is not one."""
    count = Count()

    def hook(module, inputs):
        count.evaluations += len(inputs[0])
        count.calls += 1
        count.with_gradient += len(inputs[0]) if torch.is_grad_enabled() else 0

    handle = unet.register_forward_pre_hook(hook)
    try:
        yield count
    finally:
        handle.remove()


@dataclass
class Spent:
    """`seconds` of wall time, and `peak_mb`: the most memory above what was held at the start, in megabytes."""

    seconds: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def spending(device) -> Iterator[Spent]:
    """Measure a block's time and memory: on a GPU what torch allocates there, elsewhere what the process has resident.

    Freed memory is given back to the system first, where the C library can, so that the block cannot hide in it.
    """
    spent, cuda = Spent(), torch.device(device).type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        process, done = psutil.Process(), threading.Event()
        seen = [before := process.memory_info().rss]

        def watch():
            while not done.wait(LOOK_EVERY):
                seen.append(max(seen.pop(), process.memory_info().rss))

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
    began = time.perf_counter()
    try:
        yield spent
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        spent.seconds = time.perf_counter() - began
        if cuda:
            peak = torch.cuda.max_memory_allocated(device)
        else:
            done.set()
            watcher.join()
            peak = max(seen[0], process.memory_info().rss)
        spent.peak_mb = (peak - before) / 1e6
