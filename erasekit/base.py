"""The base model of an erasure: which of its weights a delta may change, and how a file's base is recognised."""

import warnings
import weakref

import torch

from .checks import check_unet, unet_of
from .provenance import fingerprint
from .sampling import noise_schedule

BF16 = torch.bfloat16
TEXT_ENCODERS = ("text_encoder", "text_encoder_2")  # with a dot, prefixes of a delta's tensors that are theirs


def changed_encoders(names) -> list[str]:
    """The text encoders that tensors of these names are of; all other names are of the U-Net."""
    return [part for part in TEXT_ENCODERS if any(name.startswith(f"{part}.") for name in names)]


def networks_of(model, names) -> dict[str, torch.nn.Module]:
    """Prefix -> network, of those that tensors of these names are of; "" for the U-Net. Raises ValueError without one."""
    networks, pipe = {"": unet_of(model)}, getattr(model, "pipe", model)
    for part in changed_encoders(names):
        networks[f"{part}."] = getattr(pipe, part, None)
        if networks[f"{part}."] is None:
            raise ValueError(f"{type(pipe).__name__} has no {part}, which this erasure changes: give the pipeline")
    return networks


def weights_of(networks: dict[str, torch.nn.Module]) -> dict[str, torch.nn.Parameter]:
    """Name with its prefix -> weight. A loaded LoRA, and transformers before 5.6, put a part more into some names."""
    named = ((prefix, name, p) for prefix, network in networks.items() for name, p in network.named_parameters())
    return {prefix + name.removeprefix("text_model.").replace(".base_layer.", "."): p for prefix, name, p in named}


_HASHES: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # network -> (its state, its fingerprints)


def part_hash(part: torch.nn.Module, dtype=None) -> str:
    """`fingerprint` of a network, computed again where a tensor's place, version or sum of bits differs from the last time."""
    state = [(n, t.data_ptr(), t._version, str(t.dtype), bit_sum(t)) for n, t in part.state_dict().items()]
    if _HASHES.get(part, (None,))[0] != state:
        _HASHES[part] = state, {}
    known = _HASHES[part][1]
    known[dtype] = known.get(dtype) or fingerprint(part, dtype)
    return known[dtype]


def part_hashes(pipe, dtype=None) -> dict[str, str]:
    """Component -> hash of each network as it is now, or as it would be in `dtype`."""
    parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    return {name: part_hash(part, dtype) for name, part in parts.items()}


def bit_sum(tensor: torch.Tensor) -> int:
    """Sum of a tensor's bits, read as 64-bit numbers: as fast as memory, and another for any one changed number."""
    raw = tensor.detach().contiguous().reshape(-1).view(torch.uint8)
    raw = raw.clone() if raw.storage_offset() % 8 else raw
    whole = len(raw) // 8 * 8
    return int(raw[:whole].view(torch.int64).sum()) + int(raw[whole:].sum())


def is_same(part, then: str, then_in_bf16: str | None) -> bool:
    """Whether a network has this fingerprint, or has it but for bf16, which it is in or was in then."""
    if part_hash(part) == then:
        return True
    in_bf16 = part_hash(part, BF16)
    return in_bf16 == then or (in_bf16 == then_in_bf16 and any(p.dtype == BF16 for p in part.parameters()))


def check_base(model, info: dict, what: str, changes=()) -> None:
    """Raise ValueError unless a model has the U-Net named in `info`, in any precision, with its own weights in place.

    And the text encoders that `changes`, names of tensors, are of. Warns where the model is a pipeline or a world whose other
    networks are not those of the training.
    """
    unet, pipe, bf16 = unet_of(model), getattr(model, "pipe", model), info.get("bf16", {})
    check_unet(unet)
    if not is_same(unet, info["base"], bf16.get("unet")):
        before = "".join(f" after {link['method']} of {', '.join(link['concepts'])}" for link in info.get("chain", ()))
        advice = "load that base, or remove the erasure that is applied to it"
        if unet.dtype == BF16:
            advice = "load that base as for the training, then .to(torch.bfloat16), or remove the erasure applied to it"
            advice = advice if bf16 else "the file is older than the support of bf16, so load that base in fp32 or fp16"
        raise ValueError(
            f"the {what} was made for the base model {info['base'][:12]} ({info['world']}{before}), but this model is "
            f"{part_hash(unet)[:12]}: {advice}"
        )
    if pipe is not unet and "components" in info:
        parts = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
        then = {name: value for name, value in info["components"].items() if name in parts}
        other = [name for name, value in then.items() if not is_same(parts[name], value, bf16.get(name))]
        other += ["noise schedule"] * (info.get("noise") not in (None, noise_schedule(pipe)))
        if base := [name for name in changed_encoders(changes) if name in other]:
            raise ValueError(
                f"the {what} was made for another {base[0]}: load that base, or remove the erasure that is applied to it"
            )
        if other:
            warnings.warn(
                f"the {what} was made beside another {', '.join(other)}: its effect may differ here", stacklevel=3
            )
