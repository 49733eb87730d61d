"""Stopping and going on: a training state in one safetensors file, written whole or not at all."""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def seeded(*parts) -> torch.Generator:
    """A CPU generator whose stream depends on `parts` alone, so that step n draws the same after any interruption."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def write_tensors(path: Path, tensors: dict[str, torch.Tensor], meta: dict, private: bool = False) -> None:
    """Write `tensors` and the JSON-able `meta` to `path`; an interruption leaves the old file.

    `private` files are readable by their owner only, from their first byte on. Raises OSError with one sentence
    when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600 if private else 0o666))
        mode = part.stat().st_mode & 0o777
        save_file(tensors, part, metadata={"meta": json.dumps(meta)})
        part.chmod(mode)  # save_file makes every file private
        os.replace(part, path)
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"could not write {path}: {error}; free some space or set ERASEKIT_BUILD to another disk"
        ) from error
    finally:
        part.unlink(missing_ok=True)


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and meta of a file from `write_tensors`. Raises ValueError if it is damaged or something else."""
    try:
        with safe_open(path, "pt") as file:
            meta = json.loads((file.metadata() or {})["meta"])
            return {name: file.get_tensor(name) for name in file.keys()}, meta  # noqa: SIM118
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a complete erasekit file ({error}); it may be truncated, so copy or make it again"
        ) from None


def optimizer_state(optimizer: torch.optim.Optimizer, prefix: str) -> dict[str, torch.Tensor]:
    """The optimiser's per-parameter tensors, flattened to `prefix.index.name`."""
    state = optimizer.state_dict()["state"]
    return {f"{prefix}.{i}.{name}": torch.as_tensor(value) for i, s in state.items() for name, value in s.items()}


def restore_optimizer(optimizer: torch.optim.Optimizer, prefix: str, tensors: dict[str, torch.Tensor]) -> None:
    """Undo `optimizer_state`."""
    state: dict[int, dict] = {}
    for key, value in tensors.items():
        if key.startswith(prefix + "."):
            index, name = key[len(prefix) + 1 :].split(".", 1)
            state.setdefault(int(index), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
