"""Where a result comes from: commit, versions, device, and hashes of the models it was computed with."""

import datetime
import hashlib
import importlib.metadata
import json
import platform
import subprocess
from functools import cache
from pathlib import Path

from .paths import DATA, MODELS, ROOT

PACKAGES = ("torch", "diffusers", "transformers", "open_clip_torch", "numpy")


def provenance(device, seconds: float) -> dict:
    """Commit, versions, device, wall time in seconds and date of a result just computed."""
    return {
        "commit": commit(),
        "versions": {"python": platform.python_version()} | {p: importlib.metadata.version(p) for p in PACKAGES},
        "device": device_name(device),
        "seconds": round(seconds, 1),
        "date": datetime.date.today().isoformat(),
    }


def commit() -> str:
    """The checkout's commit, with "+" if tracked files differ from it; "unknown" outside a checkout."""
    try:
        sha = _git("rev-parse", "--short=12", "HEAD")
        return sha + ("+" if _git("status", "--porcelain", "--", "erasekit", "models", "data") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()


def device_name(device) -> str:
    """The GPU's name, or the processor's with the number of threads torch uses."""
    import torch

    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        model = platform.processor() or platform.machine()
    return f"{model}, {torch.get_num_threads()} threads"


def fingerprint(network, dtype=None) -> str:
    """SHA-256 of a network's weight names and half-precision values: equal in fp32 and fp16, on any device.

    With `dtype`, that of the network in this precision: bf16 rounds more coarsely than fp16.
    """
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        if name.split(".")[-2:-1] in (["to_qkv"], ["to_kv"]):
            continue  # copies that fusing leaves behind
        tensor = tensor.detach().to(dtype if tensor.is_floating_point() else None)
        digest.update(name.encode())
        digest.update(tensor.to("cpu", torch.float16).contiguous().numpy().tobytes())
    return digest.hexdigest()


@cache
def bundled_hash(world: str = "emojinette") -> str:
    """Hash of a bundled world's weights, their configurations and the art. JSON counts as parsed, so line endings do not.

    Oracles do not belong to it, nor what a training.json says of the time a training took.
    """
    digest = hashlib.sha256()
    parts = (f"{world}-{part}/**/*.{kind}" for part in ("sd", "judge", "clip") for kind in ("safetensors", "json"))
    files = [path for part in parts for path in MODELS.glob(part) if path.name != "training.json"]
    for path in sorted([*files, DATA / f"{world}.parquet"]):
        content = path.read_bytes()
        if path.suffix == ".json":
            content = json.dumps(json.loads(content), sort_keys=True).encode()
        digest.update(path.relative_to(ROOT).as_posix().encode() + content)
    return digest.hexdigest()[:16]
