"""Cost of a method: U-Net evaluations, counted by a hook rather than by formula; seconds; and peak memory."""

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

POLL_SECONDS = 0.02  # between two readings of the process's memory


@dataclass
class Count:
    """`evaluations`: samples passed through the U-Net, in `calls` forward passes; `with_gradient`: those with autograd on."""

    evaluations: int = 0
    calls: int = 0
    with_gradient: int = 0


@contextmanager
def count_evaluations(unet) -> Iterator[Count]:
    """Count every forward pass of a U-Net inside the block. What gradient checkpointing recomputes is not counted."""
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
class Usage:
    """`seconds`: see `measure`. `peak_mb`: peak memory above that at the start, in megabytes."""

    seconds: float = 0.0
    peak_mb: float = 0.0


@contextmanager
def measure(device) -> Iterator[Usage]:
    """Measure a block's time and peak memory.

    On a GPU, wall-clock seconds and torch's allocations; on a CPU, the process's own seconds, whatever else the machine does,
    and its resident memory. Free memory is first returned to the system, where the C library can, so that the block cannot reuse
    it unseen.
    """
    usage, cuda = Usage(), torch.device(device).type == "cuda"
    gc.collect()
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    else:
        if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        process, done = psutil.Process(), threading.Event()
        peaks = [before := process.memory_info().rss]

        def poll():
            while not done.wait(POLL_SECONDS):
                peaks.append(max(peaks.pop(), process.memory_info().rss))

        poller = threading.Thread(target=poll, daemon=True)
        poller.start()
    clock = time.perf_counter if cuda else time.process_time
    start = clock()
    try:
        yield usage
    finally:
        if cuda:
            torch.cuda.synchronize(device)
        usage.seconds = clock() - start
        if cuda:
            peak = torch.cuda.max_memory_allocated(device)
        else:
            done.set()
            poller.join()
            peak = max(peaks[0], process.memory_info().rss)
        usage.peak_mb = (peak - before) / 1e6
