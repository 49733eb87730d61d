"""Where a concept is, told by cross-attention: the mask Receler uses, and the one MACE is given here in place of Grounded-SAM."""

import torch
import torch.nn.functional as F


def concept_mask(maps: dict[str, torch.Tensor], positions: list[list[int]], threshold: float) -> torch.Tensor:
    """Binary masks (B, h, w) at the finest attention: attention to the concept's tokens, averaged, scaled to [0, 1], thresholded.

    `maps`: layer -> (B, heads, pixels, tokens); `positions`: each sample's concept tokens.
    """
    pixels = max(m.shape[2] for m in maps.values())
    finest = torch.stack([m.float().mean(1) for m in maps.values() if m.shape[2] == pixels]).mean(0)
    attention = torch.stack([finest[row][:, own].mean(1) for row, own in enumerate(positions)])
    low, high = attention.amin(1, keepdim=True), attention.amax(1, keepdim=True)
    side = int(pixels**0.5)
    return ((attention - low) / (high - low).clamp(min=1e-8) >= threshold).float().unflatten(1, (side, side))


def resized(mask: torch.Tensor, pixels: int) -> torch.Tensor:
    """Masks (B, h, w) at another layer's size, flat: (B, pixels)."""
    side = int(pixels**0.5)
    return F.interpolate(mask[:, None], (side, side), mode="nearest").flatten(1)
