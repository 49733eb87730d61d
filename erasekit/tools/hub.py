"""Sharing erased models: as a plain diffusers pipeline, or on the hub with a model card."""

import tempfile
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData, snapshot_download

from ..artifacts import Erasure
from ..base import changed_encoders
from ..paths import REPOSITORY
from ..pipelines.files import check_plain, is_plain, save_pipeline, to_single_file

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

{limits}
`Erasure.load(folder, pipe.unet)` of erasekit refuses any other base model.

## Limits

The concept is hidden from plain prompts. The base model still has it, the key restores it by design, and an attacker who
optimises a prompt may recover it. Similar concepts may be damaged: inspect the samples before you release the model.
"""

# Also in docs/stable_diffusion.md.
PLAIN = """from safetensors.torch import load_file

# `pipe` is the base model, loaded by diffusers
delta = load_file("delta.safetensors")
unfit = pipe.unet.load_state_dict(delta, strict=False).unexpected_keys
fused = [n for n, p in pipe.unet.attn_processors.items() if type(p).__name__.startswith("Fused")]
if unfit or fused or not delta:
    raise RuntimeError(f"not erased: {len(unfit)} of {len(delta)} tensors unmatched, {len(fused)} layers fused")"""
PLAIN_LIMITS = """The check matters: diffusers skips names that do not match, without a word. Load the delta before
`fuse_qkv_projections` (fused layers hold copies of the weights), before a LoRA, and before `torch.compile` or `DataParallel` wrap
the U-Net (all three rename its weights).
"""
WITH_ERASEKIT = """# This is more than weights of the U-Net: it needs erasekit to act; without it, the model is the base model.
import erasekit as ek

erasure = ek.Erasure.load("folder", pipe)
images = ek.sample(pipe, ["a prompt"], [0], erasure=erasure)"""


def export(model, erasure: Erasure, path: Path) -> None:
    """Write the whole public pipeline of `model` (a world or a pipeline) for users without erasekit.

    `path`: a folder in diffusers' format, or a checkpoint in the original layout if it ends in .safetensors. Raises ValueError
    for a method whose public model is more than weights.
    """
    pipe, single = getattr(model, "pipe", model), Path(path).suffix == ".safetensors"
    check_plain(erasure, "plain pipeline")
    with erasure.applied(pipe):
        (to_single_file if single else save_pipeline)(pipe, path)


def card(
    erasure: Erasure, repository: str, base_model: str, revision: str | None = None, metrics: str = ""
) -> ModelCard:
    """The model card of the public part. `metrics`: Markdown with what was measured, such as a table of docs/results.md."""
    info, provenance, before = erasure.info, erasure.info["provenance"], erasure.info.get("chain", ())
    plain = is_plain(erasure) and not changed_encoders(erasure.delta)
    before = [f"{link['method']} of {', '.join(link['concepts'])}" for link in before]
    # Laid over the base alone, a later erasure would bring the earlier concepts back.
    deltas = " | ".join([*(f'load_file("delta of {link}")' for link in before), 'load_file("delta.safetensors")'])
    data = ModelCardData(base_model=base_model, library_name="diffusers", tags=["concept-erasure", "erasekit"])
    return ModelCard(
        CARD.format(
            data=data.to_yaml(),
            title=repository.split("/")[-1],
            home=f"https://github.com/{REPOSITORY}",
            concepts=", ".join(info["concepts"]),
            base_model=base_model,
            revision=(f" at {revision}" if revision else "") + "".join(f", after {link}" for link in before),
            base=info["base"][:12],
            method=info["method"] + (f", {info['scale']:g} of its step" if "scale" in info else ""),
            use=PLAIN.replace('load_file("delta.safetensors")', deltas) if plain else WITH_ERASEKIT,
            limits=PLAIN_LIMITS if plain else "",
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
