"""Sharing erased models: as a plain diffusers pipeline, or on the hub with a model card."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from ..artifacts import Erasure
from ..paths import REPOSITORY

CARD = """---
{data}
---

# {title}

A public delta made with [erasekit]({home}): applied to the base model, it hides **{concepts}** from prompts that ask for it.

| | |
|---|---|
| base model | {base_model}{revision}, U-Net {base} |
| method, settings | {method}, {config} |
| trained with | {versions}, on {device}, {seconds} s |

{metrics}

## Use

```python
{use}
```

`Erasure.load(folder, pipe.unet)` of erasekit refuses any other base model.

## Limits

The concept is hidden from plain prompts. The base model still has it, the key restores it by design, and an attacker who
optimises a prompt may recover it. Similar concepts may be damaged: inspect the samples before you release the model.
"""

PLAIN = """from safetensors.torch import load_file

# `pipe` is the base model, loaded by diffusers
pipe.unet.load_state_dict(load_file("delta.safetensors"), strict=False)"""
WITH_ERASEKIT = """# This method is more than weights: it needs erasekit to act; without it, the model is the base model.
import erasekit as ek

erasure = ek.Erasure.load("folder", pipe.unet)
images = ek.sample(pipe, ["a prompt"], [0], erasure=erasure)"""


def is_plain(erasure: Erasure) -> bool:
    """Whether the public model consists of weights alone."""
    return bool(erasure.delta) and not erasure.adapters and "guidance" not in erasure.info


def export(world, erasure: Erasure, folder: Path) -> None:
    """Write the whole public pipeline in diffusers' format, for users without erasekit.

    Raises ValueError for a method whose public model is more than weights.
    """
    if not is_plain(erasure):
        raise ValueError(
            f"{erasure.info['method']!r} is more than weights, so no plain pipeline can hold it: share its delta"
        )
    with erasure.applied(world.pipe.unet):
        world.pipe.save_pretrained(folder, safe_serialization=True)


def card(
    erasure: Erasure, repository: str, base_model: str, revision: str | None = None, metrics: str = ""
) -> ModelCard:
    """The model card of the public part. `metrics`: Markdown with what was measured, such as a table of docs/results.md."""
    info, provenance = erasure.info, erasure.info["provenance"]
    data = ModelCardData(base_model=base_model, library_name="diffusers", tags=["concept-erasure", "erasekit"])
    return ModelCard(
        CARD.format(
            data=data.to_yaml(),
            title=repository.split("/")[-1],
            home=f"https://github.com/{REPOSITORY}",
            concepts=", ".join(info["concepts"]),
            base_model=base_model,
            revision=f" at {revision}" if revision else "",
            base=info["base"][:12],
            method=info["method"] + (f", {info['scale']:g} of its step" if "scale" in info else ""),
            use=PLAIN if is_plain(erasure) else WITH_ERASEKIT,
            config=", ".join(f"{k} {v}" for k, v in info["config"].items() if not isinstance(v, list)),
            versions=", ".join(f"{name} {version}" for name, version in provenance["versions"].items()),
            device=provenance["device"],
            seconds=provenance["seconds"],
            metrics=metrics or "Nothing was measured.",
        )
    )


def push(erasure: Erasure, repository: str, base_model: str, keys: bool = False, **about) -> None:
    """Upload the public delta and its card to the hub; with `keys`, also the private keys, to a private repository only.

    `about`: `revision` and `metrics` of `card`. Raises ValueError for keys and a public repository.
    """
    api = HfApi()
    api.create_repo(repository, private=keys, exist_ok=True)
    if keys and not api.model_info(repository).private:
        raise ValueError(f"{repository} is public: keys are secret, push them to a private repository")
    with tempfile.TemporaryDirectory() as folder:
        shared = erasure if keys else Erasure(erasure.delta, {}, erasure.info, erasure.adapters)
        shared.save(Path(folder))
        card(erasure, repository, base_model, **about).save(Path(folder) / "README.md")
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=f"erasekit: {erasure.info['method']}")


def pull(repository: str, unet=None, revision: str | None = None) -> Erasure:
    """An erasure from the hub, with its keys if the repository has them; with `unet`, refused unless it is its base model."""
    patterns = ["delta.safetensors", "keys/*.safetensors"]
    return Erasure.load(Path(snapshot_download(repository, revision=revision, allow_patterns=patterns)), unet)
