"""The learnable prompt, and the attention processor that appends it (KPOP, arXiv 2403.12326, section 3).

In each prompted attn2 layer
    K = W_K [tau(c); p_k],   V = W_V [tau(c); p_v],   out = W_O softmax(Q K^T / sqrt(d)) V.
The tokens join before the projections; one pair serves all prompted layers. No prompt means the layer's own processor
runs, untouched: a prompt of zeros is not the same as none, because it takes softmax mass. `MECHANISMS` names the other ways
a prompt may enter.
"""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
import torch.utils.checkpoint

PLACES = {
    "mid": ("mid_block.",),
    "mid+up": ("mid_block.", "up_blocks."),
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
}


# "shared": the paper's. "layers": a pair for each layer. "projected": a pair for each layer that joins after the projections.
# "added": c + p before the projections, in place of joining. "timed": the pair moves with the time step.
MECHANISMS = ("shared", "layers", "projected", "added", "timed")


@dataclass
class Prompt:
    """A learnable prompt (p_k, p_v), each (m, d_ctx), or (B, m, d_ctx) with one for each image of a batch.

    `place` names the layers it was trained in: "mid", "mid+up" or "all". `mechanism` is one of `MECHANISMS`; "layers" and
    "projected" have (L, m, width) in place of (m, d_ctx), one for each layer of the place in order (a narrow layer of
    "projected" takes the first of the numbers), "timed" has (R, m, d_ctx), for R times from the clean end to the noisy one.
    `log_weight` is added to the attention logits of its tokens: 0 is the key as trained, -inf is no key.
    """

    k: torch.Tensor
    v: torch.Tensor
    place: str = "all"
    mechanism: str = "shared"
    log_weight: float = 0.0

    def __post_init__(self):
        if self.mechanism not in MECHANISMS:
            raise ValueError(f"unknown mechanism {self.mechanism!r}: accepted are {', '.join(MECHANISMS)}")
        if self.log_weight and self.mechanism == "added":
            raise ValueError(f"log_weight={self.log_weight} is not possible: an added prompt has no tokens to weigh")

    @property
    def m(self) -> int:
        """Number of tokens."""
        return self.k.shape[-2]

    def at(self, t: torch.Tensor, total: int) -> "Prompt":
        """The prompt at time steps (B,) out of `total`: of a timed one, its pairs blended; any other is itself."""
        if self.mechanism != "timed":
            return self
        rings = self.k.shape[-3]
        where = t.float() / (total - 1) * (rings - 1)
        low = where.floor().long().clamp(max=rings - 2)
        part, each = (where - low)[:, None, None], torch.arange(len(t), device=t.device)

        def blend(side):
            side = side.to(t.device).expand(len(t), *side.shape[-3:])
            return torch.lerp(side[each, low], side[each, low + 1], part.to(side))

        return replace(self, k=blend(self.k), v=blend(self.v), mechanism="shared")

    def tokens(self, layer: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(p_k, p_v) of one layer, (B, m, width), in the device and precision of `like`, a batch."""
        if self.mechanism == "timed":
            raise ValueError("a timed prompt has no tokens of its own: put prompt.at(t, total) into the slot")
        sides = (self.k, self.v)
        if self.mechanism in ("layers", "projected"):
            sides = (side[..., layer, :, :] for side in sides)
        # Prompts are kept in float32; only their use here follows the model's precision.
        return tuple(side.to(like).expand(len(like), -1, -1) for side in sides)

    def digest(self) -> str:
        """Hash of what the key does: its numbers, where and how they enter, and their weight."""
        digest = hashlib.sha256(f"{self.place} {self.mechanism} {self.log_weight} {tuple(self.k.shape)}".encode())
        for side in (self.k, self.v):
            digest.update(side.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    @staticmethod
    def random_like(prompt: "Prompt", generator: torch.Generator) -> "Prompt":
        """Gaussian tokens with the mean and spread of the given ones: a key somebody guesses."""
        k, v = (t.mean() + t.std() * torch.randn(t.shape, generator=generator) for t in (prompt.k, prompt.v))
        return replace(prompt, k=k, v=v)


def initial_prompt(tokens: torch.Tensor, m: int) -> Prompt:
    """A prompt of length m that starts from a concept's token embeddings (n, d_ctx), repeated in order.

    Raises ValueError unless m is a positive integer.
    """
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise ValueError(
            f"prompt length m={m!r} is not possible: m is a positive integer (to switch a prompt off, leave it out)"
        )
    index = torch.arange(m) % len(tokens)
    return Prompt(tokens[index].clone(), tokens[index].clone())


class Slot:
    """What the prompted layers share: the prompt in force, if any, and, while watched, their attention maps."""

    def __init__(self):
        self.prompt: Prompt | None = None
        self.maps: dict[str, torch.Tensor] | None = None
        self.gradients = False

    @contextmanager
    def holding(self, prompt: Prompt | None) -> Iterator[None]:
        """Put `prompt` in force; the previous one comes back afterwards."""
        before, self.prompt = self.prompt, prompt
        try:
            yield
        finally:
            self.prompt = before

    def checkpoint(self, block, *inputs):
        """Gradient checkpointing of a block: when it is computed again, it is with what the slot holds now."""
        prompt, gradients, maps = self.prompt, self.gradients, [self.maps]

        def again(*inputs):
            before = self.prompt, self.maps, self.gradients
            # What is watched is collected the first time; the second must go the same way and collect nothing.
            first = maps[0]
            self.prompt, self.maps, self.gradients = prompt, first, gradients
            maps[0] = None if first is None else {}
            try:
                return block(*inputs)
            finally:
                self.prompt, self.maps, self.gradients = before

        return torch.utils.checkpoint.checkpoint(again, *inputs, use_reentrant=False)

    @contextmanager
    def watching(self, gradients: bool = False) -> Iterator[dict[str, torch.Tensor]]:
        """Collect attention probabilities: layer name -> (B, heads, pixels, tokens + m), of the latest forward."""
        self.maps, self.gradients = {}, gradients
        try:
            yield self.maps
        finally:
            self.maps = None


class PromptAttnProcessor:
    """A diffusers attention processor that appends the slot's prompt to the text tokens.

    Without a prompt, and unwatched, it calls the processor it replaced: bit-identical output.
    """

    def __init__(self, name: str, layer: int, slot: Slot, inner):
        self.name, self.layer, self.slot, self.inner = name, layer, slot, inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """Arguments as in diffusers' AttnProcessor; hidden_states is (B, pixels, channels), the text (B, tokens, d_ctx)."""
        prompt = self.slot.prompt
        if prompt is not None and prompt.log_weight == -torch.inf:
            prompt = None
        if prompt is None and self.slot.maps is None:
            # Not every processor takes temb, and attn2 has none.
            given = (hidden_states, encoder_hidden_states, attention_mask, *(() if temb is None else (temb,)))
            return self.inner(attn, *given)
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError(
                "a learnable prompt does not work with an IP-Adapter loaded: call pipe.unload_ip_adapter() first"
            )
        residual, batch = hidden_states, len(hidden_states)
        text_k = text_v = (
            attn.norm_encoder_hidden_states(encoder_hidden_states) if attn.norm_cross else encoder_hidden_states
        )
        said, mechanism = text_k.shape[1], prompt.mechanism if prompt is not None else None
        if prompt is not None:
            p_k, p_v = prompt.tokens(self.layer, text_k)
        if mechanism == "added":
            text_k, text_v = text_k + p_k, text_v + p_v
        elif mechanism in ("shared", "layers"):
            text_k, text_v = (torch.cat([text_k, p], dim=1) for p in (p_k, p_v))
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        def heads(x):  # (B, n, heads * d) -> (B, heads, n, d)
            return x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        key, value = attn.to_k(text_k), attn.to_v(text_v)
        if mechanism == "projected":
            key, value = (torch.cat([x, p[..., : x.shape[-1]].to(x)], dim=1) for x, p in ((key, p_k), (value, p_v)))
        query, key, value = heads(attn.to_q(hidden_states)), heads(key), heads(value)
        # Explicit softmax rather than SDPA: there are few keys, its backward is faster on a CPU, and it can be watched.
        if attn.upcast_attention:  # Stable Diffusion 2.1's overflow in half precision
            with torch.autocast(query.device.type, enabled=False):
                logits = query.float() @ key.float().transpose(-1, -2) * attn.scale
        else:
            logits = query @ key.transpose(-1, -2) * attn.scale
        if attention_mask is not None:
            # The prompt's tokens are never masked.
            mask = F.pad(attention_mask, (0, logits.shape[-1] - attention_mask.shape[-1]))
            logits = logits + mask.reshape(batch, -1, mask.shape[-2], mask.shape[-1])
        if prompt is not None and prompt.log_weight:
            logits = logits + prompt.log_weight * (torch.arange(logits.shape[-1], device=logits.device) >= said)
        weights = logits.softmax(dim=-1)
        if self.slot.maps is not None:
            self.slot.maps[self.name] = weights if self.slot.gradients else weights.detach()
        out = (weights.to(value) @ value).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def prompted_layers(unet, place: str) -> list[str]:
    """The attn2 layers of a place, in the order in which a prompt has them."""
    names = (name.removesuffix(".processor") for name in unet.attn_processors)
    return [name for name in names if name.endswith(".attn2") and name.startswith(PLACES[place])]


@contextmanager
def augment(unet, place: str = "all", prompt: Prompt | None = None) -> Iterator[Slot]:
    """Let the attn2 layers of a place ("mid", "mid+up" or "all") take a prompt; the old processors come back at the end.

    Yields the `Slot`: `with slot.holding(p): unet(...)`. Raises ValueError for an unknown place, for a prompt of another
    width, and RuntimeError if something (attention slicing, fused QKV, ...) replaced the processors meanwhile.
    """
    if place not in PLACES:
        raise ValueError(f"unknown place {place!r}: accepted are {', '.join(PLACES)}")
    check_width(unet, prompt)
    before = dict(unet.attn_processors)
    slot = Slot()
    slot.prompt = prompt
    ours = {
        f"{name}.processor": PromptAttnProcessor(name, layer, slot, before[f"{name}.processor"])
        for layer, name in enumerate(prompted_layers(unet, place))
    }
    unet.set_attn_processor(before | ours)  # a new dict: diffusers empties the one it is given
    recomputing = {
        m: m._gradient_checkpointing_func for m in unet.modules() if getattr(m, "gradient_checkpointing", False)
    }
    for module in recomputing:
        module._gradient_checkpointing_func = slot.checkpoint
    try:
        yield slot
        lost = [
            name for name, processor in unet.attn_processors.items() if name in ours and processor is not ours[name]
        ]
        if lost:
            raise RuntimeError(
                f"the prompt was dropped from {len(lost)} layers ({lost[0]}, ...): attention slicing, xformers or fused "
                "projections replace attention processors, so switch them on before, not inside, augment()"
            )
    finally:
        unet.set_attn_processor(dict(before))
        for module, function in recomputing.items():
            module._gradient_checkpointing_func = function


def check_width(unet, prompt: Prompt | None) -> None:
    """Raise ValueError if the prompt's width is not that of the U-Net's text embeddings (or, joined later, of its layers)."""
    if prompt is None:
        return
    width, what = unet.config.cross_attention_dim, "text embeddings are"
    if prompt.mechanism == "projected":
        layers = prompted_layers(unet, prompt.place)
        width, what = max(unet.get_submodule(n).to_k.out_features for n in layers), "widest prompted layer is"
    if prompt.k.shape[-1] != width:
        raise ValueError(f"the prompt is {prompt.k.shape[-1]} wide but this model's {what} {width} wide")
