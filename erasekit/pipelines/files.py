"""Files that others read: a diffusers folder for any transformers, a checkpoint in the original layout, a LoRA."""

import json
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from ..artifacts import Erasure
from ..base import changed_encoders
from ..checks import check_choice, check_number, unet_of
from ..provenance import fingerprint

LAYOUTS = ("peft", "kohya")  # of a LoRA's names
# Classes that transformers 5.6 flattened -> how its names become those of before.
PREFIXES = {
    "CLIPTextModel": (r"^(?!text_model\.)", "text_model."),
    "StableDiffusionSafetyChecker": (r"^vision_model\.(?!vision_model\.)", "vision_model.vision_model."),
}
# Parts of names, diffusers' and the original's.
RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "norm2": "out_layers.0", "conv2": "out_layers.3"}
RESNET |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
UNET = {"time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2"}
UNET |= {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}
UNET |= {"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"}
VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
OPEN_CLIP = {
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "embeddings.position_embedding.weight": "positional_embedding",
    "final_layer_norm": "ln_final",
    "encoder.layers": "transformer.resblocks",
    "self_attn.out_proj": "attn.out_proj",
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}


def is_plain(erasure: Erasure) -> bool:
    """Whether the public model consists of weights alone."""
    return bool(erasure.delta) and not erasure.adapters and "guidance" not in erasure.info


def check_plain(erasure: Erasure, what: str) -> None:
    """Raise ValueError for a method whose public model is more than weights, which `what` cannot hold."""
    if not is_plain(erasure):
        raise ValueError(f"{erasure.info['method']!r} is more than weights, so no {what} can hold it: share its delta")


def save_pipeline(pipe, folder: Path) -> None:
    """Write a pipeline in diffusers' format as every transformers from 4 to 5 reads it.

    transformers 5.6 dropped a prefix of CLIP's names, without which earlier ones initialise the encoder at random; later ones
    read both. Tokenisers get vocab.json and merges.txt, which 4 needs, beside tokenizer.json.
    """
    folder = Path(folder)
    pipe.save_pretrained(folder, safe_serialization=True)
    for name, part in pipe.components.items():
        _complete(part, folder / name)


def save_part(part, folder: Path) -> None:
    """Write one component, such as a text encoder or a tokeniser, as `save_pipeline` does."""
    part.save_pretrained(folder)
    _complete(part, Path(folder))


def _complete(part, folder: Path) -> None:
    if type(part).__name__ in PREFIXES:
        _restore_prefix(folder, *PREFIXES[type(part).__name__])
    elif hasattr(part, "backend_tokenizer"):
        _save_vocabulary(part, folder)


def _restore_prefix(folder: Path, pattern: str, prefix: str) -> None:
    for path in folder.glob("*.safetensors"):
        write(path, {re.sub(pattern, prefix, n): t for n, t in load_file(path).items()}, {"format": "pt"})
    for path in folder.glob("*.safetensors.index.json"):  # of a model in several files
        index = json.loads(path.read_text())
        index["weight_map"] = {re.sub(pattern, prefix, n): file for n, file in index["weight_map"].items()}
        path.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _save_vocabulary(tokenizer, folder: Path) -> None:
    tokenizer.backend_tokenizer.model.save(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    if added := {token: n for token, n in tokenizer.get_added_vocab().items() if token not in vocabulary}:
        (folder / "added_tokens.json").write_text(json.dumps(added, indent=2, sort_keys=True) + "\n")


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write a safetensors file, whole or not at all, readable as any new file. Raises OSError in one sentence."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.touch()
        mode = part.stat().st_mode & 0o777
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, part, metadata=metadata)
        part.chmod(mode)  # save_file makes every file private
        os.replace(part, path)
    except Exception as error:  # safetensors reports a full disk as its own error
        raise OSError(f"could not write {path}: {error}") from error
    finally:
        part.unlink(missing_ok=True)


# ------------------------------------------------------------------------------------------------ the original layout


def original_unet_names(unet) -> dict[str, str]:
    """diffusers' name -> name in the original layout, without its prefix, of every tensor of a U-Net.

    Raises ValueError for a U-Net that the original layout does not have.
    """
    n, blocks = unet.config.layers_per_block, len(unet.config.down_block_types)
    if not isinstance(n, int):
        raise ValueError(f"layers_per_block={n} has no original layout: accepted is one number for all blocks")
    attends = ["Attn" in kind for kind in unet.config.up_block_types]
    places = {f"mid_block.resnets.{j}": f"middle_block.{2 * j}" for j in (0, 1)} | UNET
    places["mid_block.attentions.0"] = "middle_block.1"
    for i in range(blocks):
        for j in range(n + 1):
            for kind, k in (("resnets", 0), ("attentions", 1)):
                places[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{1 + i * (n + 1) + j}.{k}"
                places[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{i * (n + 1) + j}.{k}"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * (n + 1)}.0.op"
        places[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{i * (n + 1) + n}.{1 + attends[i]}.conv"
    return {name: _placed(name, places, RESNET if ".resnets." in name else {}) for name in unet.state_dict()}


def original_vae_names(vae) -> dict[str, str]:
    """The same for a VAE."""
    blocks, places = len(vae.config.down_block_types), {}
    for side in ("encoder", "decoder"):
        places |= {f"{side}.mid_block.resnets.{j}": f"{side}.mid.block_{j + 1}" for j in (0, 1)}
        places |= {f"{side}.mid_block.attentions.0": f"{side}.mid.attn_1", f"{side}.conv_norm_out": f"{side}.norm_out"}
        places |= {f"{side}.{name}": f"{side}.{name}" for name in ("conv_in", "conv_out")}
    for i in range(blocks):
        for j in range(vae.config.layers_per_block + 1):
            places[f"encoder.down_blocks.{i}.resnets.{j}"] = f"encoder.down.{i}.block.{j}"
            places[f"decoder.up_blocks.{i}.resnets.{j}"] = f"decoder.up.{blocks - 1 - i}.block.{j}"
        places[f"encoder.down_blocks.{i}.downsamplers.0.conv"] = f"encoder.down.{i}.downsample.conv"
        places[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = f"decoder.up.{blocks - 1 - i}.upsample.conv"
    places |= {name: name for name in ("quant_conv", "post_quant_conv")}
    inner = {"resnets": {"conv_shortcut": "nin_shortcut"}, "attentions": VAE_ATTENTION}
    kinds = {name: next((k for k in inner if f".{k}." in name), None) for name in vae.state_dict()}
    return {name: _placed(name, places, inner.get(kind, {})) for name, kind in kinds.items()}


def _placed(name: str, places: dict[str, str], inner: dict[str, str]) -> str:
    """`name` with its longest prefix in `places` replaced, and what `inner` names behind it."""
    parts = name.split(".")
    for count in range(len(parts) - 1, 0, -1):
        place, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if place in places:
            old = next((old for old in inner if rest.startswith(f"{old}.")), None)
            return f"{places[place]}.{inner[old] + rest.removeprefix(old) if old else rest}"
    raise ValueError(f"{name} has no place in the original layout of Stable Diffusion 1, 2 and XL")


def original_tensors(pipe) -> dict[str, torch.Tensor]:
    """All weights of a Stable Diffusion 1, 2 or XL pipeline under their original names. Raises ValueError for any other."""
    unet, vae = pipe.unet.state_dict(), pipe.vae.state_dict()
    tensors = {f"model.diffusion_model.{new}": unet[old] for old, new in original_unet_names(pipe.unet).items()}
    for old, new in original_vae_names(pipe.vae).items():
        convolution = ".attn_1." in new and vae[old].ndim == 2  # a 1 x 1 convolution there
        tensors[f"first_stage_model.{new}"] = vae[old][:, :, None, None] if convolution else vae[old]
    if getattr(pipe, "text_encoder_2", None) is not None:
        encoders = {"conditioner.embedders.0.": pipe.text_encoder, "conditioner.embedders.1.": pipe.text_encoder_2}
    else:
        encoders = {"cond_stage_model.": pipe.text_encoder}
    for prefix, encoder in encoders.items():
        weights = {n.removeprefix("text_model."): t for n, t in encoder.state_dict().items()}
        weights.pop("embeddings.position_ids", None)  # of transformers before 4.31
        # OpenAI's CLIP is in transformers' names there too; Stable Diffusion 2's, and XL's second, in open_clip's.
        if encoder is getattr(pipe, "text_encoder_2", None) or encoder.config.hidden_act == "gelu":
            tensors |= {f"{prefix}model.{name}": tensor for name, tensor in _open_clip(weights).items()}
        else:
            tensors |= {f"{prefix}transformer.text_model.{name}": tensor for name, tensor in weights.items()}
    return tensors


def _open_clip(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A text encoder's weights in open_clip's names, with q, k and v in one tensor."""
    tensors = {}
    for name, tensor in weights.items():
        if match := re.fullmatch(r"(.*)self_attn\.q_proj\.(weight|bias)", name):
            tensor = torch.cat([weights[name.replace("q_proj", part)] for part in ("q_proj", "k_proj", "v_proj")])
            name = f"{match[1]}attn.in_proj_{match[2]}"
        elif "self_attn.k_proj" in name or "self_attn.v_proj" in name:
            continue
        elif name == "text_projection.weight":
            name, tensor = "text_projection", tensor.T
        for old, new in OPEN_CLIP.items():
            name = name.replace(old, new)
        tensors[name] = tensor
    return tensors


def to_single_file(pipe, path: Path) -> None:
    """Write a pipeline, as it is now, as one .safetensors checkpoint in the original layout, which other programs draw with.

    The last of open_clip's layers, which Stable Diffusion 2 does not use and diffusers does not have, is left out.
    """
    if Path(path).suffix != ".safetensors":
        raise ValueError(
            f"a checkpoint cannot be named {Path(path).name!r}: accepted is a name that ends in .safetensors"
        )
    tensors, prediction = original_tensors(pipe), pipe.scheduler.config.get("prediction_type", "epsilon")
    v = prediction == "v_prediction"
    if hasattr(pipe, "text_encoder_2"):
        kind = "stable-diffusion-xl-v1-base"
    else:
        kind = "stable-diffusion-v1"
        if pipe.text_encoder.config.hidden_act == "gelu":
            kind = "stable-diffusion-v2-768-v" if v else "stable-diffusion-v2-512"
    about = {"sai_model_spec": "1.0.0", "architecture": kind, "prediction_type": "v" if v else "epsilon"}
    about["predict_key"] = about["prediction_type"]
    write(path, tensors, {"format": "pt"} | {f"modelspec.{name}": value for name, value in about.items()})


# --------------------------------------------------------------------------------------------------------------- LoRA


def to_lora(erasure: Erasure, base, path: Path, rank: int, layout: str = "peft") -> float:
    """Write an erasure as a LoRA: of each changed weight's step from the base, the `rank` largest singular values.

    Returns the relative error ||kept step - step|| / ||step|| over all tensors, which is also in the file's metadata. Biases and
    norms have no place in a LoRA: they stay the base's, and count as error. `base` is the base model; `layout` "peft" is
    diffusers' own, "kohya" that of other programs. Raises ValueError for a method that is more than weights.
    """
    check_choice("layout", layout, LAYOUTS)
    rank = check_number("rank", rank, 1, whole=True)
    if Path(path).suffix != ".safetensors":
        raise ValueError(f"a LoRA cannot be named {Path(path).name!r}: accepted is a name that ends in .safetensors")
    check_plain(erasure, "LoRA")
    if changed := changed_encoders(erasure.delta):
        raise ValueError(f"{changed[0]} is changed, which no LoRA written here holds: share the delta or a checkpoint")
    theta = erasure.scaled(base, 0.0).delta  # the base's own tensors; refuses another base
    steps = {name: tensor.detach().cpu().float() - theta[name] for name, tensor in erasure.delta.items()}
    unet = unet_of(base)
    xl = unet.config.addition_embed_type == "text_time"
    names = kohya_names(unet, original=xl) if layout == "kohya" else {}
    tensors, left_out, missed, whole = {}, [], 0.0, 0.0
    for name, step in steps.items():
        layer, kind = name.rsplit(".", 1)
        whole += float(step.double().square().sum())
        if kind != "weight" or step.ndim not in (2, 4):
            missed += float(step.double().square().sum())
            left_out.append(name)
            continue
        up, down, rest = _factors(step, rank)
        missed += rest
        if layout == "peft":
            tensors |= {f"unet.{layer}.lora_A.weight": down, f"unet.{layer}.lora_B.weight": up}
        else:
            tensors |= {f"{names[layer]}.lora_down.weight": down, f"{names[layer]}.lora_up.weight": up}
            tensors[f"{names[layer]}.alpha"] = torch.tensor(float(rank))
    if not tensors:
        raise ValueError(f"no LoRA can hold this erasure: it has biases and norms alone, such as {left_out[0]}")
    error = (missed / whole) ** 0.5 if whole else 0.0
    about = {"method": erasure.info["method"], "concepts": erasure.info.get("concepts", []), "digest": erasure.digest()}
    about |= {"base": fingerprint(unet), "rank": rank, "relative_error": error, "left_out": left_out}
    metadata = {"format": "pt", "erasekit": json.dumps(about)}
    if layout == "kohya":
        metadata |= {"ss_network_module": "networks.lora", "ss_network_dim": str(rank), "ss_network_alpha": str(rank)}
    write(path, tensors, metadata)
    return error


def _factors(step: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """up (out, rank) and down (rank, in), with a kernel's dimensions if `step` has them, and the squared norm of the rest."""
    up, s, down = torch.linalg.svd(step.flatten(1), full_matrices=False)
    root = s[:rank].sqrt()
    # Equal ranks in all layers, with zeros where a weight has fewer: loaders disagree on what several ranks mean.
    zeros = rank - len(root)
    up = F.pad(up[:, :rank] * root, (0, zeros))
    down = F.pad(root[:, None] * down[:rank], (0, 0, 0, zeros))
    if step.ndim == 4:
        up, down = up[:, :, None, None], down.unflatten(1, step.shape[1:])
    return up, down, float(s[rank:].double().square().sum())


def kohya_names(unet, original: bool) -> dict[str, str]:
    """diffusers' name of a layer -> its name in kohya's LoRAs: made of the original names (as for XL) or diffusers'."""
    names = original_unet_names(unet) if original else {name: name for name in unet.state_dict()}
    names = {old: new for old, new in names.items() if old.endswith(".weight")}
    return {
        o.removesuffix(".weight"): "lora_unet_" + n.removesuffix(".weight").replace(".", "_") for o, n in names.items()
    }
