"""Other projects' artefacts as erasures: edited weights, edited U-Nets, checkpoints and LoRAs, from safetensors alone."""

import json
import re
import warnings
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..artifacts import Erasure
from ..base import TEXT_ENCODERS, networks_of, part_hash, weights_of
from ..checks import as_texts, check_unet, unet_of
from ..provenance import provenance
from ..world import as_world
from .files import kohya_names, original_tensors, original_unet_names

# Part of a tensor's name -> what such a file is, where it cannot be an erasure of a U-Net's weights.
OTHERS = {
    "hada_w": "a LoHa",
    "lokr_w": "a LoKr",
    "lora_mid": "a LoRA in three factors",
    "dora_scale": "a DoRA",
    "lora_magnitude_vector": "a DoRA",
    "emb_params": "a textual inversion",
    "control_model.": "a ControlNet",
    "controlnet_": "a ControlNet",
    "adapter:": "an erasekit delta with adapters, which has to be named delta.safetensors",
}
TEXT_LORA = ("lora_te_", "lora_te1_", "lora_te2_", "te1_text_model.")
# Of a text encoder's tensors, under the names of any transformers: the encoder and the name.
TEXT = re.compile(
    r"(?:(text_encoder(?:_2)?)\.)?(?:text_model\.)?((?:embeddings|encoder|final_layer_norm|text_projection)\..+)"
)
LORA = re.compile(r"(.+?)(?:\.lora_(A|B|down|up)(?:\.\w+)?\.weight|[._]lora\.(down|up)\.weight|\.alpha)")
BF16_ROUNDING = 2**-8 + 2**-11, 2**-24  # largest relative and absolute step from bf16 to fp16 or fp32
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
ACCEPTED = "edited weights of the U-Net or a text encoder, either whole, a pipeline, a checkpoint, a LoRA of the U-Net"


def read(path: Path, base, method: str = "theirs", concepts=()) -> Erasure:
    """Another project's erasure of `base` (a world, a pipeline or a U-Net), with everything it changes as the delta.

    Read are weights under diffusers' names, with or without "unet." (ESD, UCE); a folder of a pipeline or a U-Net in diffusers'
    format (MACE); a text encoder, in a file or a folder (AdvUnlearn); a checkpoint in the original layout; a LoRA in kohya's,
    peft's or diffusers' layout, at full strength for every prompt (SPM's without its gate). `method` names it in tables and
    cards. Raises ValueError, in one sentence that says what the file is, for all else: pickles, damaged files, other bases.
    """
    path, unet, concepts = Path(path), unet_of(base), as_texts("concepts", concepts)
    check_unet(unet)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if _is_ours(path if path.is_file() else path / "delta.safetensors"):
        return Erasure.load(path.parent if path.is_file() else path, base)
    kind, tensors = _read_folder(path, base) if path.is_dir() else _read_file(path, base)
    if base is unet and kind in ("checkpoint", "pipeline", "text encoder"):
        raise ValueError(
            f"{path} is a {kind}, which is, or has, a text encoder: give the base as a pipeline or a world"
        )
    theta = weights_of(networks_of(base, tensors))
    strange = sorted(set(tensors) - set(theta))
    if strange:
        raise ValueError(
            f"{path} does not fit this base: it has {len(strange)} tensors that the base lacks, first {strange[0]!r}; "
            f"accepted are {ACCEPTED}"
        )
    delta = {}
    for name, tensor in tensors.items():
        tensor, own = tensor.detach().to("cpu", torch.float32), theta[name].detach()
        if tensor.squeeze().shape != theta[name].squeeze().shape:
            shapes = f"{tuple(tensor.shape)} in place of {tuple(theta[name].shape)}"
            raise ValueError(f"{path} does not fit this base: {name} is {shapes}, so it was made for another model")
        if not torch.isfinite(tensor).all():
            raise ValueError(
                f"{path} has values that are not finite, first in {name}: its training failed, or it is damaged"
            )
        if not _same(tensor, own.view_as(tensor)):
            delta[name] = tensor.reshape(theta[name].shape).contiguous()
    if not delta:
        raise ValueError(f"{path} changes nothing: its {len(tensors)} tensors are those of the base")
    matrices = {name for name, p in unet.named_parameters() if p.ndim > 1}  # others may be as they were initialised
    if matrices <= set(delta):
        warnings.warn(
            f"{path} differs from the base in every layer: it may have been made from another base", stacklevel=2
        )
    alone = {"world": "custom", "base": part_hash(unet), "bf16": {"unet": part_hash(unet, torch.bfloat16)}}
    info = alone if base is unet else as_world(base).identity
    info |= {"method": method, "concepts": list(concepts), "config": {}, "seed": None, "history": []}
    info["source"] = {"file": path.name, "kind": kind, "tensors": len(tensors), "changed": len(delta)}
    info["provenance"] = provenance("cpu", 0.0) | {"device": "another project's machine"}
    return Erasure(delta, {}, info)


def _same(one: Tensor, own: Tensor) -> bool:
    """Whether a tensor is the base's own, or one is the other in half precision; in bf16, as far as its rounding shows."""
    one, other = one.float().cpu(), own.detach().float().cpu()
    if torch.equal(one, other) or (own.dtype == torch.bfloat16 and torch.allclose(one, other, *BF16_ROUNDING)):
        return True
    for half in (torch.float16, torch.bfloat16):
        a, b = one.to(half).float(), other.to(half).float()
        if torch.equal(a, b) and (torch.equal(a, one) or torch.equal(b, other)):
            return True
    return False


def _is_ours(path: Path) -> bool:
    if path.name != "delta.safetensors" or not path.is_file():
        return False
    return "meta" in open_tensors(path)[1]


# --------------------------------------------------------------------------------------------------------------- files


def open_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of any safetensors file. Raises ValueError that says what else the file is, and what is wrong."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(64)
        length = int.from_bytes(head[:8], "little")
        header = file.read(0) if head[8:9] != b"{" else (head[8:] + file.read(max(0, min(length, size) - 56)))[:length]
    if not size:
        raise ValueError(f"{path} is empty: copy it again")
    if head[8:9] != b"{":
        if head.startswith((b"PK\x03\x04", b"\x80")):
            raise ValueError(
                f"{path} is a pickle, which can run any code when it is loaded: convert it to safetensors where that "
                "does no harm, or ask its authors for a .safetensors file"
            )
        if head.startswith(b"version https://git-lfs"):
            raise ValueError(f"{path} is a pointer of Git LFS, not the file itself: fetch it with `git lfs pull`")
        what = "a web page" if head.lstrip().lower().startswith((b"<!doc", b"<html")) else "not a safetensors file"
        raise ValueError(f"{path} is {what}: accepted are .safetensors files and folders in diffusers' format")
    try:
        entries = json.loads(header).items() if len(header) == length else None
        needed = entries and max((e["data_offsets"][1] for n, e in entries if n != "__metadata__"), default=0)
        if entries is None or 8 + length + needed > size:
            raise ValueError(f"{path} is a safetensors file cut short at {size} bytes: copy it again")
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is a damaged safetensors file ({error}): copy it again") from None


def _read_file(path: Path, base, config: dict | None = None) -> tuple[str, dict[str, Tensor]]:
    """What a file is, and the U-Net's changed tensors under diffusers' names."""
    tensors, metadata = open_tensors(path)
    if "meta" in metadata and '"kind": "key"' in metadata["meta"]:
        raise ValueError(f"{path} is an erasekit key, not a public model: read it with ek.load_key")
    for part, what in OTHERS.items():
        if any(part in name for name in tensors):
            raise ValueError(f"{path} is {what}: accepted are {ACCEPTED}")
    if any(name.startswith("model.diffusion_model.") for name in tensors):
        return "checkpoint", _checkpoint(path, tensors, base)
    if any(name.startswith(TEXT_LORA) or (TEXT.fullmatch(name) and LORA.fullmatch(name)) for name in tensors):
        raise ValueError(
            f"{path} has a LoRA of a text encoder: fuse it into a pipeline, and read that, saved as a folder"
        )
    if any(LORA.fullmatch(name) and not name.endswith(".alpha") for name in tensors):
        if "lora_adapter_metadata" in metadata:
            theirs = json.loads(metadata["lora_adapter_metadata"]).items()
            config = {name.removeprefix("unet."): value for name, value in theirs if name.startswith("unet.")}
        return "LoRA", _lora(path, tensors, unet_of(base), config or {})
    text = {name: match for name in tensors if (match := TEXT.fullmatch(name))}
    named = {name: re.sub(r"^(model\.)?unet\.", "", name) for name in tensors if not name.endswith(".position_ids")}
    named |= {name: f"{match[1] or 'text_encoder'}.{match[2]}" for name, match in text.items() if name in named}
    kind = "text encoder" if named.keys() <= text.keys() else "weights"
    return kind, {new: tensors[name] for name, new in named.items()}


def _checkpoint(path: Path, tensors: dict[str, Tensor], base) -> dict[str, Tensor]:
    """The U-Net of a checkpoint in the original layout. Raises ValueError if its other parts are not the base's."""
    pipe, prefix = getattr(base, "pipe", base), "model.diffusion_model."
    if hasattr(pipe, "unet"):
        for name, tensor in original_tensors(pipe).items():
            if name.startswith(prefix) or name not in tensors:
                continue
            theirs, ours = tensors[name].squeeze(), tensor.squeeze()
            if theirs.shape != ours.shape or not _same(theirs, ours):
                vae = name.startswith("first_stage_model.")
                raise ValueError(
                    f"{path} has another {'VAE' if vae else 'text encoder'} than the base: load it as a pipeline, and "
                    + ("study that as a world" if vae else "save that as a folder, which can be read")
                )
    names = {new: old for old, new in original_unet_names(unet_of(base)).items()}
    own = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    return {names.get(name, name): tensor for name, tensor in own.items()}


# --------------------------------------------------------------------------------------------------------------- folders


def _read_folder(path: Path, base) -> tuple[str, dict[str, Tensor]]:
    if (path / "adapter_config.json").is_file():
        config = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            raise ValueError(
                f"{path} is peft's {config.get('peft_type')!r}, or a DoRA: accepted is 'LORA' without DoRA"
            )
        return _read_file(_one_file(path), base, config)
    pipe = getattr(base, "pipe", base)
    parts = {n: p for n, p in getattr(pipe, "components", {"unet": base}).items() if isinstance(p, torch.nn.Module)}
    if (path / "unet").is_dir() or (path / "text_encoder").is_dir():
        tensors = {}
        for name, part in parts.items():
            if (path / name).is_dir():
                theirs, ours = _load_part(path / name, part), part.state_dict()
                if name in ("unet", *TEXT_ENCODERS):
                    tensors |= theirs if name == "unet" else _as_text(name, theirs)
                elif any(n not in ours or not _same(t, ours[n]) for n, t in theirs.items()):
                    raise ValueError(
                        f"{path} has another {name} than the base: load it with ek.load, as a world of its own"
                    )
        return "pipeline", tensors
    if (path / "config.json").is_file():
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        kind = config.get("_class_name") or ", ".join(config.get("architectures") or ["different"])
        if kind.startswith("CLIPText") and base is unet_of(base):
            return "text encoder", {}
        for name in TEXT_ENCODERS:
            if kind == type(parts.get(name)).__name__:
                return "text encoder", _as_text(name, _load_part(path, parts[name]))
        if kind != type(unet_of(base)).__name__:
            raise ValueError(f"{path} is a {kind}: accepted are {ACCEPTED}")
        return "U-Net", _load_part(path, unet_of(base))
    return _read_file(_one_file(path), base)


def _as_text(part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{part}.{name.removeprefix('text_model.')}": tensor for name, tensor in tensors.items()}


def _one_file(path: Path) -> Path:
    files = sorted(path.glob("*.safetensors"))
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(file.name for file in files[:4])
        raise ValueError(f"{path} has {len(files)} safetensors files, such as {names}: give the path of one")
    if pickles := [file for file in sorted(path.rglob("*")) if file.suffix in PICKLES]:
        raise ValueError(
            f"{path} has pickles alone, such as {pickles[0].name}, which can run any code when they are loaded: convert "
            "them to safetensors where that does no harm"
        )
    raise ValueError(f"{path} has no safetensors file: accepted are {ACCEPTED}")


def _load_part(folder: Path, like) -> dict[str, Tensor]:
    """Weights in a part's folder, through the library's own reader, which knows older names. `like`: the base's part."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        _one_file(folder)
    for file in files:
        open_tensors(file)
    half = all(".fp16" in file.name for file in files)
    try:
        part = type(like).from_pretrained(folder, use_safetensors=True, variant="fp16" if half else None)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"{folder} does not load as a {type(like).__name__}: {str(error).splitlines()[0]}") from error
    return dict(part.named_parameters())


# ------------------------------------------------------------------------------------------------------------------ LoRA


def _lora(path: Path, tensors: dict[str, Tensor], unet, config: dict) -> dict[str, Tensor]:
    """The base's weights plus scale * up @ down, for each layer of a LoRA; `config` as in peft."""
    factors: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = LORA.fullmatch(name.removeprefix("base_model.model.").removeprefix("unet.").replace(".processor.", "."))
        if not match:
            raise ValueError(
                f"{path} is a LoRA with a tensor of another kind, {name!r}: accepted are factors and alpha"
            )
        layer = re.sub(r"to_out$", "to_out.0", match[1])
        part = {"A": "down", "B": "up", None: "alpha"}.get(match[2] or match[3], match[2] or match[3])
        factors.setdefault(layer, {})[part] = tensor.detach().cpu().float()
    weights = {
        n.removesuffix(".weight"): p.detach().cpu().float() for n, p in unet.named_parameters() if n.endswith(".weight")
    }
    names = {layer: layer for layer in weights} | {new: old for old, new in kohya_names(unet, original=False).items()}
    if not set(factors) <= set(names):
        names = {new: old for old, new in kohya_names(unet, original=True).items()} | names
    merged = {}
    for layer, own in factors.items():
        if layer not in names:
            raise ValueError(f"{path} does not fit this base: its U-Net has no layer {layer!r}")
        if not {"up", "down"} <= set(own):
            raise ValueError(f"{path} is a LoRA that lacks a factor of {layer!r}: it is damaged")
        theta, up, down = weights[names[layer]], own["up"].flatten(1), own["down"].flatten(1)
        if up.shape[1] != down.shape[0] or len(up) * down.shape[1] != theta.numel() or len(up) != len(theta):
            shapes = f"{tuple(own['up'].shape)} and {tuple(own['down'].shape)} for {tuple(theta.shape)}"
            raise ValueError(f"{path} does not fit this base: the factors of {layer!r} are {shapes}")
        scale = _scale(layer, len(down), own.get("alpha"), config)
        merged[f"{names[layer]}.weight"] = theta + scale * (up @ down).view_as(theta)
    return merged


def _scale(layer: str, rank: int, alpha: Tensor | None, config: dict) -> float:
    """alpha / rank; alpha is the file's own, else the config's, else the rank."""
    if alpha is None:
        patterns = config.get("alpha_pattern") or {}
        own = next((a for p, a in patterns.items() if re.fullmatch(rf"(.*\.)?({p})", layer)), config.get("lora_alpha"))
        alpha = rank if own is None else own
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)
