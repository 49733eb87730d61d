"""Several processes under accelerate's launcher, or the one there usually is."""

import os
from contextlib import AbstractContextManager, nullcontext


def shares() -> tuple[int, int]:
    """This process's number and how many there are."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return 0, 1
    return state().process_index, state().num_processes


def first() -> AbstractContextManager:
    """The first process goes through the block before the others."""
    return state().main_process_first() if shares()[1] > 1 else nullcontext()


def state():
    import torch
    from accelerate import PartialState

    return PartialState(cpu=not torch.cuda.is_available())
