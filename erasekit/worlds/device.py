"""Where a world is loaded, and in which precision it trains and samples."""

import torch

from ..checks import check_choice
from ..world import PRECISIONS
from .distributed import rank_and_count


def choose_device(given=None) -> str:
    """The name of a device that this machine has; None for a GPU if there is one. Raises ValueError for any other."""
    try:
        device = default_device() if given is None else str(torch.device(given))
        torch.empty(1, device=device).item()
    except (AssertionError, RuntimeError, TypeError, NotImplementedError):
        gpus = ", cuda" * torch.cuda.is_available()
        raise ValueError(f"device {given!r} is not possible: this machine has cpu{gpus}") from None
    return device


def default_device() -> str:
    """A GPU if there is one; each of several processes has its own."""
    if not torch.cuda.is_available():
        return "cpu"
    rank, count = rank_and_count()
    return f"cuda:{rank % torch.cuda.device_count()}" if count > 1 else "cuda"


def choose_precision(device: str, precision: str = "auto") -> str:
    """ "auto" is bf16 where the processor multiplies it natively, else fp16 on a GPU and fp32 on a CPU.

    Raises ValueError for an unknown precision, and for fp16 on a CPU.
    """
    check_choice("precision", precision, ("auto", *PRECISIONS))
    if precision == "fp16" and not device.startswith("cuda"):
        raise ValueError(f"precision 'fp16' needs a GPU, not {device!r}: accepted there are auto, fp32, bf16")
    if precision != "auto":
        return precision
    return "bf16" if fast_bf16(device) else "fp16" if device.startswith("cuda") else "fp32"


def fast_bf16(device: str) -> bool:
    """Whether the processor multiplies bf16 matrices natively; where it does not, bf16 is 20 to 40 times slower than fp32."""
    if device.startswith("cuda"):
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()
