"""Prompts to the U-Net's conditioning, by the pipeline's own tokeniser and text encoder; and the U-Net call."""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE_IDS = 6  # SDXL's time ids: height, width, crop top, crop left, target height, target width


@dataclass(frozen=True)
class Conditioning:
    """`tokens` (B, n, d_ctx), read by cross-attention; `added` (B, pooled width + 6), SDXL's pooled text and sizes, or None."""

    tokens: Tensor
    added: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index) -> "Conditioning":
        return self.map(lambda x: x[index])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Conditioning":
        """Apply a function to each tensor."""
        return Conditioning(function(self.tokens), None if self.added is None else function(self.added))

    def to(self, *args) -> "Conditioning":
        return self.map(lambda x: x.to(*args))

    def expand(self, count: int) -> "Conditioning":
        """A batch of one repeated `count` times, without a copy."""
        return self.map(lambda x: x.expand(count, *x.shape[1:]))

    @staticmethod
    def cat(parts: list["Conditioning"]) -> "Conditioning":
        """Join batches."""
        added = None if parts[0].added is None else torch.cat([p.added for p in parts])
        return Conditioning(torch.cat([p.tokens for p in parts]), added)


def token_ids(pipe, text: str, cut: bool = True) -> list[int]:
    """A text's tokens with start and end, words of several vectors expanded as diffusers does, `cut` to the context or not."""
    if hasattr(pipe, "maybe_convert_prompt"):
        text = pipe.maybe_convert_prompt(text, pipe.tokenizer)
    return pipe.tokenizer(text, truncation=cut, verbose=False).input_ids


def encode(pipe, prompts: list[str]) -> Conditioning:
    """Conditioning of a batch of prompts; equal prompts are encoded once.

    Where SDXL's pipeline replaces the empty prompt by zeros (`force_zeros_for_empty_prompt`), so does this.
    """
    unique = list(dict.fromkeys(prompts))
    with torch.no_grad():
        cond = encode_with_grad(pipe, unique)[[unique.index(p) for p in prompts]]
    if cond.added is not None and pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([p == "" for p in prompts], device=cond.tokens.device)
        cond.tokens[empty] = 0
        cond.added[empty, : pooled_width(pipe.unet)] = 0
    return cond


def encode_with_grad(pipe, prompts: list[str]) -> Conditioning:
    """The encoders' outputs for each prompt; gradients pass. Warns of what a prompt longer than the context loses."""
    limit = pipe.tokenizer.model_max_length
    for prompt in prompts:
        if len(ids := token_ids(pipe, prompt, cut=False)) > limit:
            lost, shown = pipe.tokenizer.decode(ids[limit - 1 : -1]).strip(), prompt[:60] + "..." * (len(prompt) > 60)
            warnings.warn(
                f"{shown!r} is {len(ids)} tokens, this model reads {limit}: {lost!r} is cut off", stacklevel=3
            )
    log = logging.getLogger(type(pipe).__module__)  # diffusers' own warning would name its pieces again
    quiet, log.disabled = log.disabled, True
    try:
        tokens, _, *pooled = pipe.encode_prompt(
            prompts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
    finally:
        log.disabled = quiet
    if not pooled_width(pipe.unet):
        return Conditioning(tokens)
    pooled = pooled[0]
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(prompts), -1).to(pooled)
    return Conditioning(tokens, torch.cat([pooled, sizes], dim=1))


def token_embeddings(pipe, prompts: list[str]) -> Tensor:
    """Text encoder outputs (B, n, d_ctx); the empty prompt's are the encoder's own, also where SDXL draws it from zeros."""
    unique = list(dict.fromkeys(prompts))
    with torch.no_grad():
        return encode_with_grad(pipe, unique).tokens[[unique.index(p) for p in prompts]]


def pooled_width(unet) -> int:
    """Width of the pooled text embedding the U-Net takes beside the tokens; 0 if it takes none."""
    if unet.config.addition_embed_type != "text_time":
        return 0
    return unet.config.projection_class_embeddings_input_dim - SIZE_IDS * unet.config.addition_time_embed_dim


def predict_noise(unet, z: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
    """U-Net output (B, C, h, w) for latents z at time steps t (B,): predicted noise, or v."""
    if cond.added is None:
        return unet(z, t, cond.tokens).sample
    width = pooled_width(unet)
    added = {"text_embeds": cond.added[:, :width], "time_ids": cond.added[:, width:]}
    return unet(z, t, cond.tokens, added_cond_kwargs=added).sample
