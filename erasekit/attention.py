"""The learnable prompt, and the attention processor that appends it (KPOP, arXiv 2403.12326, section 3).

In each prompted attn2 layer
    K = W_K [tau(c); p_k],   V = W_V [tau(c); p_v],   out = W_O softmax(Q K^T / sqrt(d)) V.
The prompt joins the text before the projections; one pair (p_k, p_v) serves all prompted layers. Without a prompt the layer
runs its own processor: a prompt of zeros is not the same as none, because it takes softmax mass. `mechanisms` has the other
ways a prompt may enter.
"""

import hashlib
import math
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor

from .checks import check_choice, check_finite, check_number, check_type, unet_of

LAYERS = {
    "mid": ("mid_block.",),
    "mid+up": ("mid_block.", "up_blocks."),
    "all": ("down_blocks.", "mid_block.", "up_blocks."),
}


@dataclass
class Prompt:
    """A learnable prompt (p_k, p_v), each (m, d_ctx), or (B, m, d_ctx) with one per image of a batch.

    `layers`: the attn2 layers it was trained in, "mid", "mid+up" or "all". `log_weight` is added to the attention logits of
    its tokens: 0 is the key as trained, -inf is no key.
    """

    k: Tensor
    v: Tensor
    layers: str = "all"
    log_weight: float = 0.0
    mechanism: ClassVar[str] = "shared"
    dimensions: ClassVar[int] = 2  # of k and v; one more with one prompt per image

    @property
    def m(self) -> int:
        """Number of tokens."""
        return self.k.shape[-2]

    @classmethod
    def initial(cls, unet, layers: str, tokens: Tensor, m: int, text_length: int) -> "Prompt":
        """The untrained prompt of a concept with token embeddings (n, d_ctx), on their device."""
        return replace(initial_prompt(tokens, m), layers=layers)

    def at(self, t: Tensor, total: int) -> "Prompt":
        """The prompt at time steps t (B,) out of `total`; only a timed one depends on them."""
        return self

    def keys_values(self, attn, text: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values (B, n + m, heads * d) of text (B, n, d_ctx) and prompt, in the prompted layer number `layer`."""
        p_k, p_v = self.tokens(text)
        return attn.to_k(torch.cat([text, p_k], dim=1)), attn.to_v(torch.cat([text, p_v], dim=1))

    def tokens(self, like: Tensor, layer: int | None = None) -> tuple[Tensor, Tensor]:
        """(p_k, p_v), each (B, m, width), on the device and in the precision of a batch `like`; of one layer, if named."""
        sides = (self.k, self.v) if layer is None else (side[..., layer, :, :] for side in (self.k, self.v))
        # Prompts are stored in float32; only their use here follows the model's precision.
        return tuple(side.to(like).expand(len(like), -1, -1) for side in sides)

    def expected_width(self, unet) -> int:
        """Width of the tokens this model takes."""
        return unet.config.cross_attention_dim

    def digest(self) -> str:
        """Hash of everything that decides what the key does."""
        digest = hashlib.sha256(f"{self.layers} {self.mechanism} {self.log_weight} {tuple(self.k.shape)}".encode())
        for side in (self.k, self.v):
            digest.update(side.detach().float().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()


def initial_prompt(tokens: Tensor, m: int) -> Prompt:
    """A prompt of length m that starts from a concept's token embeddings (n, d_ctx), repeated in order.

    Raises ValueError unless m is a positive integer.
    """
    check_number("prompt length m", m, 1, whole=True)
    index = torch.arange(m) % len(tokens)
    return Prompt(tokens[index].clone(), tokens[index].clone())


class PromptState:
    """What the prompted layers share: the prompt in use, if any, and the attention maps while they are recorded."""

    def __init__(self):
        self.prompt: Prompt | None = None
        self.maps: dict[str, Tensor] | None = None
        self.gradients = False

    def __reduce__(self):
        raise RuntimeError("a model cannot be copied or pickled while it takes a key: leave the with block first")

    @contextmanager
    def use(self, prompt: Prompt | None) -> Iterator[None]:
        """Use a prompt inside the block; the previous one is restored afterwards."""
        before, self.prompt = self.prompt, prompt
        try:
            yield
        finally:
            self.prompt = before

    @contextmanager
    def record(self, gradients: bool = False) -> Iterator[dict[str, Tensor]]:
        """Collect attention probabilities: layer name -> (B, heads, pixels, n + m), of the latest forward pass."""
        self.maps, self.gradients = {}, gradients
        try:
            yield self.maps
        finally:
            self.maps = None

    def checkpoint(self, block, *inputs):
        """Gradient checkpointing of a block that recomputes it with the present prompt."""
        prompt, gradients, maps = self.prompt, self.gradients, [self.maps]

        def recompute(*inputs):
            before = self.prompt, self.maps, self.gradients
            # Maps are collected by the first pass; the second must take the same path and collect nothing.
            first = maps[0]
            self.prompt, self.maps, self.gradients = prompt, first, gradients
            maps[0] = None if first is None else {}
            try:
                return block(*inputs)
            finally:
                self.prompt, self.maps, self.gradients = before

        return torch.utils.checkpoint.checkpoint(recompute, *inputs, use_reentrant=False)


class PromptAttnProcessor:
    """A diffusers attention processor that appends the prompt in use to the text tokens.

    Without a prompt and without recording it calls the processor it replaced: bit-identical output.
    """

    def __init__(self, name: str, layer: int, state: PromptState, inner):
        self.name, self.layer, self.state, self.inner = name, layer, state, inner

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, temb=None):
        """Arguments as in diffusers' AttnProcessor: hidden_states (B, pixels, channels), text (B, n, d_ctx)."""
        prompt = self.state.prompt
        if prompt is not None and prompt.log_weight == -torch.inf:
            prompt = None
        if prompt is None and self.state.maps is None:
            # Not every processor takes temb, and attn2 has none.
            arguments = (hidden_states, encoder_hidden_states, attention_mask, *(() if temb is None else (temb,)))
            return self.inner(attn, *arguments)
        if isinstance(encoder_hidden_states, tuple):
            raise ValueError("a learnable prompt does not work with an IP-Adapter: call pipe.unload_ip_adapter() first")
        residual, batch, text = hidden_states, len(hidden_states), encoder_hidden_states
        if attn.norm_cross:
            text = attn.norm_encoder_hidden_states(text)
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)

        if prompt is None:
            key, value = attn.to_k(text), attn.to_v(text)
        else:
            key, value = prompt.keys_values(attn, text, self.layer)
        # (B, n, heads * d) -> (B, heads, n, d)
        query, key, value = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (attn.to_q(hidden_states), key, value)
        )
        # Explicit softmax rather than SDPA: with few keys its backward is faster on a CPU, and it can be recorded.
        if attn.upcast_attention:  # Stable Diffusion 2.1 overflows in half precision
            with torch.autocast(query.device.type, enabled=False):
                logits = query.float() @ key.float().transpose(-1, -2) * attn.scale
        else:
            logits = query @ key.transpose(-1, -2) * attn.scale
        if attention_mask is not None:  # the prompt's tokens are never masked
            mask = F.pad(attention_mask, (0, logits.shape[-1] - attention_mask.shape[-1]))
            logits = logits + mask.reshape(batch, -1, mask.shape[-2], mask.shape[-1])
        if prompt is not None and prompt.log_weight:
            of_prompt = torch.arange(logits.shape[-1], device=logits.device) >= text.shape[1]
            logits = logits + prompt.log_weight * of_prompt
        weights = logits.softmax(dim=-1)
        if self.state.maps is not None:
            self.state.maps[self.name] = weights if self.state.gradients else weights.detach()
        out = (weights.to(value) @ value).transpose(1, 2).flatten(2)
        out = attn.to_out[1](attn.to_out[0](out))
        if attn.residual_connection:
            out = out + residual
        return out / attn.rescale_output_factor


def prompted_layers(unet, layers: str) -> list[str]:
    """Names of the attn2 layers of "mid", "mid+up" or "all", in the U-Net's order."""
    names = (name.removesuffix(".processor") for name in unet.attn_processors)
    return [name for name in names if name.endswith(".attn2") and name.startswith(LAYERS[layers])]


_HOLDERS: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # U-Net -> [thread inside, how often it entered]
_LOCK = threading.Lock()


@contextmanager
def one_thread(unet) -> Iterator[None]:
    """Only one thread may be inside for a U-Net, as often as it likes. Raises RuntimeError for a second one."""
    with _LOCK:
        holder = _HOLDERS.setdefault(unet, [threading.current_thread(), 0])
        if holder[0] is not threading.current_thread():
            raise RuntimeError(
                f"thread {holder[0].name!r} has a key, an erasure or a training on this U-Net: wait for it, or give each "
                "thread a pipeline with its own copy of the U-Net"
            )
        holder[1] += 1
    try:
        yield
    finally:
        with _LOCK:
            holder[1] -= 1
            if not holder[1]:
                _HOLDERS.pop(unet, None)


def check_keyless(unet) -> None:
    """Raise RuntimeError for a U-Net that draws with a key already: whatever else uses it would do so too."""
    processors = getattr(unet, "attn_processors", {}).values()
    if any(isinstance(p, PromptAttnProcessor) and p.state.prompt is not None for p in processors):
        raise RuntimeError("a key is in use on this U-Net: leave the block of unlocked() or augment() first")


@contextmanager
def augment(model, layers: str = "all", prompt: Prompt | None = None) -> Iterator[PromptState]:
    """Let the attn2 layers "mid", "mid+up" or "all" of a U-Net (or a pipeline's, or a world's) take a prompt inside the block.

    Yields the state: `with state.use(p): unet(...)`. Raises ValueError for unknown layers or a prompt of another width, and
    RuntimeError if something (attention slicing, fused QKV, ...) replaced the processors inside the block, and for a U-Net in
    use by another thread.
    """
    unet = unet_of(model)
    with one_thread(unet), _augmented(unet, layers, prompt) as state:
        yield state


@contextmanager
def _augmented(unet, layers: str, prompt: Prompt | None) -> Iterator[PromptState]:
    check_choice("layers", layers, LAYERS)
    if prompt is not None:
        check_key(unet, prompt)
    before = dict(unet.attn_processors)
    state = PromptState()
    state.prompt = prompt
    ours = {
        f"{name}.processor": PromptAttnProcessor(name, n, state, before[f"{name}.processor"])
        for n, name in enumerate(prompted_layers(unet, layers))
    }
    unet.set_attn_processor(before | ours)  # a new dict: diffusers empties the one it is given
    checkpointed = {
        m: m._gradient_checkpointing_func for m in unet.modules() if getattr(m, "gradient_checkpointing", False)
    }
    for module in checkpointed:
        module._gradient_checkpointing_func = state.checkpoint
    try:
        yield state
        lost = [name for name, p in unet.attn_processors.items() if name in ours and p is not ours[name]]
        if lost:
            raise RuntimeError(
                f"the prompt was dropped from {len(lost)} layers ({lost[0]}, ...): attention slicing, xformers or fused "
                "projections replace attention processors, so switch them on before, not inside, augment()"
            )
    finally:
        unet.set_attn_processor(dict(before))
        for module, function in checkpointed.items():
            module._gradient_checkpointing_func = function


def check_key(unet, prompt: Prompt) -> None:
    """Raise ValueError unless this is a prompt of one or more finite tokens as wide as this U-Net takes them."""
    check_type("key", prompt, Prompt, "erasure.key(concept) or load_key(file)[0]")
    check_choice("layers", prompt.layers, LAYERS)
    sides, own = [prompt.k, prompt.v], prompt.dimensions
    if not all(torch.is_tensor(x) and x.is_floating_point() and x.ndim in (own, own + 1) and x.numel() for x in sides):
        raise ValueError(f"a {prompt.mechanism!r} key has p_k and p_v of {own} dimensions, real numbers each")
    if prompt.k.shape != prompt.v.shape:
        raise ValueError(f"p_k {tuple(prompt.k.shape)} and p_v {tuple(prompt.v.shape)} of a key differ in shape")
    if prompt.k.shape[-1] != (width := prompt.expected_width(unet)):
        raise ValueError(f"the prompt is {prompt.k.shape[-1]} wide but this model takes {width}")
    check_finite("the prompt", {"p_k": prompt.k, "p_v": prompt.v})
    if math.isnan(prompt.log_weight) or prompt.log_weight == math.inf:
        raise ValueError(
            f"log_weight={prompt.log_weight} is not possible: it is a finite number, or -inf for no prompt"
        )
