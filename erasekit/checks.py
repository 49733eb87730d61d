"""What is impossible, refused in one sentence before anything is spent: choices, lists of texts, numbers, tensors, models."""

import math
import numbers
from dataclasses import fields
from typing import get_args

LEAST = {"transfer_steps": 0, "inner": 0, "rounds": 0, "robust_every": 0, "robust_steps": 0}
LEAST |= {"seed": -math.inf, "secret": -math.inf}  # of whole numbers; 1 for all others
LEAST_REAL = {"eta": -1}  # at -1 the target is the concept itself; 0 for all others
POSITIVE = ("lr", "temperature", "rho")  # endings of names of real numbers that must be above 0


def check_choice(name: str, value, accepted) -> None:
    """Raise ValueError unless the value is one of the accepted ones."""
    if value not in tuple(accepted):  # a tuple's members need no hash
        raise ValueError(f"unknown {name} {repr(value)[:100]}: accepted are {', '.join(accepted)}")


def as_texts(name: str, values) -> tuple[str, ...]:
    """A list of texts as a tuple. Raises ValueError for a bare string, read letter by letter, and what has no order."""
    if isinstance(values, str):
        raise ValueError(f"{name}={values!r} is one text, not a list of them: give [{values!r}]")
    ordered = hasattr(values, "__iter__") and not isinstance(values, (bytes, set, frozenset, dict))
    texts = tuple(values) if ordered else (None,)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError(f"{name}={values!r} is not possible: it is a list of texts")
    return tuple(map(str, texts))  # numpy's texts are a class of their own


def check_concepts(concepts: list[str]) -> list[str]:
    """The concepts as a list. Raises ValueError for none, an empty one, one named twice, or what is no list of texts."""
    if not (concepts := as_texts("concepts", concepts)) or any(not c.strip() for c in concepts):
        raise ValueError(f"there is an empty concept in {concepts!r}: name at least one, each with a word")
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"a concept is named twice in {concepts!r}")
    return list(concepts)


def check_number(name: str, value, least: float = 0, whole: bool = False, above: bool = False, most: float = math.inf):
    """The value, and a Python number for any other kind, such as numpy's, which no file can hold.

    Raises ValueError unless it is finite, at least `least` or `above` it, at most `most`, and `whole` if it must be.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral if whole else numbers.Real):
        raise ValueError(f"{name}={value!r} is not possible: it is a {'whole ' * whole}number")
    if not math.isfinite(value):
        raise ValueError(f"{name}={value!r} is not possible: it is a finite number")
    if value < least or (above and value == least):
        raise ValueError(f"{name}={value!r} is not possible: it is {'above' if above else 'at least'} {least}")
    if value > most:
        raise ValueError(f"{name}={value!r} is not possible: it is at most {most}")
    return value if isinstance(value, (int, float)) else int(value) if whole else float(value)


def check_numbers(config) -> None:
    """`check_number` for every number of a config, by its type and name, which becomes a Python number. Raises ValueError."""
    for entry in fields(config):
        name, value, kinds = entry.name, getattr(config, entry.name), get_args(entry.type) or (entry.type,)
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            value = check_number(name, value, LEAST.get(name, 1), whole=True)
        elif float in kinds:
            value = check_number(name, value, LEAST_REAL.get(name, 0), above=name.endswith(POSITIVE))
        elif bool in kinds and not isinstance(value, bool):
            raise ValueError(f"{name}={value!r} is not possible: it is True or False")
        object.__setattr__(config, name, value)


def check_type(name: str, value, kind: type, source: str) -> None:
    """Raise ValueError unless the value is of a class, which `source` gives."""
    if not isinstance(value, kind):
        raise ValueError(f"{name} is not possible as {type(value).__name__}: it is a {kind.__name__}, from {source}")


def check_finite(what: str, tensors: dict) -> None:
    """Raise ValueError naming the first tensor with a NaN or an infinite number."""
    import torch

    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{what} is not finite: {name} has NaN or infinite numbers, so no image would be right")


def unet_of(model):
    """The U-Net of a world, a pipeline, or a U-Net itself. Raises ValueError for anything else."""
    pipe = getattr(model, "pipe", model)
    unet = getattr(pipe, "unet", pipe)
    if not hasattr(getattr(unet, "config", None), "cross_attention_dim"):
        raise ValueError(
            f"{type(model).__name__} is not a model: accepted are worlds, ek.load(...), diffusers pipelines, and their U-Nets"
        )
    return unet


def check_unet(unet) -> None:
    """Raise ValueError for a U-Net whose weights are not under their own names, or not all there is to it."""
    weights, wrapped = dict(unet.named_parameters()), hasattr(unet, "_orig_mod")
    with_image = unet.config.encoder_hid_dim_type == "ip_image_proj"
    offloaded = any(p.is_meta for p in weights.values())
    reasons = {
        "is wrapped by torch.compile: use its _orig_mod, or compile in place with unet.compile()": wrapped,
        "has a LoRA loaded: fuse it for good or unload it first": any(".base_layer." in name for name in weights),
        "has fused projections, which copy the weights: call unfuse_qkv_projections() first": is_fused(unet),
        "has an IP-Adapter loaded, which adds weights: call pipe.unload_ip_adapter() first": with_image,
        "is offloaded module by module: load the pipeline without sequential CPU offload": offloaded,
        "has an adapter or guidance applied: remove that erasure first": hasattr(unet, "erasekit_public"),
    }
    for reason, true in reasons.items():
        if true:
            raise ValueError(f"this U-Net {reason}")


def is_fused(unet) -> bool:
    from diffusers.models.attention_processor import FusedAttnProcessor2_0

    return any(isinstance(p, FusedAttnProcessor2_0) for p in unet.attn_processors.values())
