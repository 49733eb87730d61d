"""Where a concept is, by cross-attention: Receler's mask, and MACE's here in place of Grounded-SAM."""

import torch
import torch.nn.functional as F
from torch import Tensor

from ..conditioning import token_ids


def concept_mask(maps: dict[str, Tensor], positions: list[list[int]], threshold: float) -> Tensor:
    """Binary masks (B, h, w) from the finest maps: mean attention to the concept's tokens, scaled to [0, 1], thresholded.

    `maps`: layer -> (B, heads, pixels, tokens). `positions`: each sample's concept tokens.
    """
    pixels = max(m.shape[2] for m in maps.values())
    finest = torch.stack([m.float().mean(1) for m in maps.values() if m.shape[2] == pixels]).mean(0)
    attention = torch.stack([finest[row][:, own].mean(1) for row, own in enumerate(positions)])
    low, high = attention.amin(1, keepdim=True), attention.amax(1, keepdim=True)
    side = int(pixels**0.5)
    return ((attention - low) / (high - low).clamp(min=1e-8) >= threshold).float().unflatten(1, (side, side))


def resized(mask: Tensor, pixels: int) -> Tensor:
    """Masks (B, h, w) at another layer's size, flattened: (B, pixels)."""
    side = int(pixels**0.5)
    return F.interpolate(mask[:, None], (side, side), mode="nearest").flatten(1)


def concept_positions(pipe, prompt: str, *words: str) -> list[int]:
    """Token positions in a prompt of the first of a concept's words that it contains. Raises ValueError if it has none."""
    ids = token_ids(pipe, prompt)
    for word in words:
        wanted = token_ids(pipe, word)[1:-1]  # without start and end
        for start in range(len(ids) - len(wanted)):
            if ids[start : start + len(wanted)] == wanted:
                return list(range(start, start + len(wanted)))
    raise ValueError(f"the prompt {prompt!r} does not contain {words[0]!r}")
