"""Stopping and going on: a training state in one safetensors file, written whole or not at all."""

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# Settings that came later, with the values that leave a method as it was: early files and cached numbers lack them.
LATER = {"diverse_prompts": False, "anchors": 1, "neutral_share": 0.0, "secret": None}
LATER |= {"robust_every": 0, "robust_steps": 10}


def seeded(*parts) -> torch.Generator:
    """A CPU generator whose stream depends on `parts` alone, so that step n draws the same after any interruption."""
    digest = hashlib.sha256(json.dumps(parts).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def write_tensors(
    path: Path, tensors: dict[str, torch.Tensor], meta: dict, private: bool = False, together: list | None = None
) -> None:
    """Write `tensors` and the JSON-able `meta` to `path`; an interruption leaves the old file.

    `private` files are readable by their owner only, from their first byte on. `together`: the list of `all_or_none`, which
    puts the file in its place later; such a file carries a SHA-256 that `read_tensors` checks. Raises OSError with one sentence
    when the disk is full.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"meta": json.dumps(meta)}
    metadata |= {} if together is None else {"sha256": checksum(tensors, metadata["meta"])}
    try:
        os.close(os.open(part, os.O_CREAT | os.O_WRONLY, 0o600 if private else 0o666))
        mode = part.stat().st_mode & 0o777
        save_file(tensors, part, metadata=metadata)
        part.chmod(mode)  # save_file makes every file private
        if together is None:
            os.replace(part, path)
        else:
            together.append((part, path))
    except BaseException as error:
        part.unlink(missing_ok=True)
        if isinstance(error, OSError | SafetensorError):
            sentence = f"could not write {path}: {error}; free some space or set ERASEKIT_BUILD to another disk"
            raise OSError(sentence) from error
        raise


@contextmanager
def all_or_none(folder: Path) -> Iterator[list]:
    """Files written inside the block, by `write_tensors(..., together=)`, take their places at its end, or none does.

    One process or thread at a time is inside for a folder, where the system can lock one.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written, lock = [], None
    with suppress(ImportError, OSError):  # Windows, and some network disks
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        yield written
        if folders := [path for _, path in written if path.is_dir()]:
            raise OSError(f"could not write {folders[0]}: it is a folder")
        for part, path in written:
            os.replace(part, path)
    finally:
        for part, _ in written:
            part.unlink(missing_ok=True)
        if lock is not None:
            os.close(lock)


def checksum(tensors: dict[str, torch.Tensor], meta: str) -> str:
    """SHA-256 of everything in a file: names, types, shapes and bytes of its tensors, and its metadata."""
    digest = hashlib.sha256(meta.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and meta of a file from `write_tensors`. Raises ValueError if it is damaged or something else."""
    if Path(path).is_dir():
        raise ValueError(f"{path} is a folder: give the file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        meta = json.loads(metadata.get("meta", "null"))
    except FileNotFoundError:
        raise FileNotFoundError(f"there is no file {path}") from None
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(
            f"{path} is not a complete erasekit file ({error}); it may be truncated, so copy or make it again"
        ) from None
    if not isinstance(meta, dict):
        raise ValueError(
            f"{path} is not a complete erasekit file: another program wrote it, or saved it again without metadata"
        )
    if metadata.get("sha256") not in (None, checksum(tensors, metadata["meta"])):  # older files have none
        raise ValueError(f"{path} is damaged: its content is not what was saved, so copy or make it again")
    return tensors, meta


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
