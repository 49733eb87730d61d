"""Several processes under `accelerate launch` or `torchrun`, or the usual one."""

import atexit
import os
from contextlib import AbstractContextManager, nullcontext
from functools import cache

LAUNCHED = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR")  # a launcher sets them all


def rank_and_count() -> tuple[int, int]:
    """This process's rank and the number of processes. A WORLD_SIZE left behind in the environment does not count."""
    if not all(os.environ.get(name) for name in LAUNCHED) or os.environ["WORLD_SIZE"] == "1":
        return 0, 1
    state = _state()
    return state.process_index, state.num_processes


def main_process_first() -> AbstractContextManager:
    """The main process runs the block before the others."""
    return _state().main_process_first() if rank_and_count()[1] > 1 else nullcontext()


@cache
def _state():
    import torch
    from accelerate import PartialState

    state = PartialState(cpu=not torch.cuda.is_available())
    atexit.register(state.destroy_process_group)  # else the one that ends first may abort another
    return state
