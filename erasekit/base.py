"""The base model of an erasure: how a file's is recognised."""

import warnings

import torch

from .checks import check_unet, unet_of
from .world import part_hash

BF16 = torch.bfloat16


def is_same(part, then: str, then_in_bf16: str | None) -> bool:
    """Whether a network has this fingerprint, or has it but for bf16, which it is in or was in then."""
    if part_hash(part) == then:
        return True
    in_bf16 = part_hash(part, BF16)
    return in_bf16 == then or (in_bf16 == then_in_bf16 and any(p.dtype == BF16 for p in part.parameters()))


def check_base(model, info: dict, what: str) -> None:
    """Raise ValueError unless a model has the U-Net named in `info`, in any precision, with its own weights in place.

    Warns where the model is a pipeline or a world whose other networks are not those of the training.
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
        if other := [name for name, value in then.items() if not is_same(parts[name], value, bf16.get(name))]:
            warnings.warn(
                f"the {what} was made beside another {', '.join(other)}: its effect may differ here", stacklevel=3
            )
