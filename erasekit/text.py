"""Texts to embeddings, with the pipeline's own tokeniser and encoder."""

import torch

TIMES = 6  # numbers that SDXL is told of an image: its height and width, where it was cropped, and the size to draw


def encode(pipe, texts: list[str]) -> torch.Tensor:
    """Text embeddings (B, tokens, d_ctx); equal texts are encoded once.

    SDXL is told more: its pooled text and the image's sizes stand in one more row, which `predict` takes off again. Where its
    pipeline draws the unconditional half from zeros, the empty text is zeros.
    """
    embeddings = encoded(pipe, texts)
    width = pooled_width(pipe.unet)
    if width and pipe.config.force_zeros_for_empty_prompt:
        empty = torch.tensor([text == "" for text in texts], device=embeddings.device)
        embeddings[empty, :-1] = 0
        embeddings[empty, -1, :width] = 0
    return embeddings


def tokens(pipe, texts: list[str]) -> torch.Tensor:
    """`encode`'s rows (B, tokens, d_ctx) that are tokens, the empty text's as the encoder has them."""
    return said(pipe.unet, encoded(pipe, texts))


def encoded(pipe, texts: list[str]) -> torch.Tensor:
    unique = list(dict.fromkeys(texts))
    with torch.no_grad():
        embeddings = embedded(pipe, unique)
    return embeddings[[unique.index(text) for text in texts]]


def embedded(pipe, texts: list[str]) -> torch.Tensor:
    """`encode`'s rows as the encoders have them, for each text by itself; a gradient passes."""
    if not pooled_width(pipe.unet):
        return pipe.encode_prompt(texts, pipe.device, 1, False)[0]
    embeddings, _, pooled, _ = pipe.encode_prompt(
        texts, device=pipe.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    side = pipe.unet.config.sample_size * pipe.vae_scale_factor
    sizes = torch.tensor([[side, side, 0, 0, side, side]]).expand(len(texts), -1).to(pooled)
    row = torch.cat([pooled, sizes], dim=1)
    row = torch.nn.functional.pad(row, (0, embeddings.shape[-1] - row.shape[-1]))
    return torch.cat([embeddings, row[:, None]], dim=1)


def said(unet, text: torch.Tensor) -> torch.Tensor:
    """The rows of `encode`'s embeddings that cross-attention sees."""
    return text[:, :-1] if pooled_width(unet) else text


def pooled_width(unet) -> int:
    """Width of the pooled text that a U-Net wants beside the tokens; 0 for one that wants none."""
    if unet.config.addition_embed_type != "text_time":
        return 0
    return unet.config.projection_class_embeddings_input_dim - TIMES * unet.config.addition_time_embed_dim


def predict(unet, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
    """What the U-Net says (B, C, h, w) of latents, at time steps (B,), under `encode`'s embeddings: noise, or v."""
    width = pooled_width(unet)
    if not width:
        return unet(z, t, text).sample
    last = text[:, -1]
    added = {"text_embeds": last[:, :width], "time_ids": last[:, width : width + TIMES]}
    return unet(z, t, said(unet, text), added_cond_kwargs=added).sample


def concept_positions(pipe, text: str, concept: str) -> list[int]:
    """Where a concept's own tokens stand in a text. Raises ValueError if the text does not say it."""
    ids, wanted = (pipe.tokenizer(x, truncation=True).input_ids for x in (text, concept))
    wanted = wanted[1:-1]  # without start and end
    for start in range(len(ids) - len(wanted)):
        if ids[start : start + len(wanted)] == wanted:
            return list(range(start, start + len(wanted)))
    raise ValueError(f"the text {text!r} does not say {concept!r}")
