"""Other ways a prompt may enter attention than the paper's, one class each; and a network that makes all prompts.

The paper compares concatenation with addition and leaves "more complex prompting mechanisms" to future work; per-layer,
projected and timed prompts and the network are ours.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import Prompt, initial_prompt, prompted_layers
from .checkpoints import seeded

TIME_PAIRS = 4  # of a timed prompt
NETWORK_WIDTH = 256


@dataclass
class PerLayerPrompt(Prompt):
    """A pair for each prompted layer: k and v (L, m, d_ctx)."""

    mechanism: ClassVar[str] = "layers"
    dimensions: ClassVar[int] = 3

    @classmethod
    def initial(cls, unet, layers, tokens, m, text_length):
        start, count = initial_prompt(tokens, m), len(prompted_layers(unet, layers))
        return cls(*(side.expand(count, -1, -1).clone() for side in (start.k, start.v)), layers)

    def keys_values(self, attn, text, layer):
        p_k, p_v = self.tokens(text, layer)
        return attn.to_k(torch.cat([text, p_k], dim=1)), attn.to_v(torch.cat([text, p_v], dim=1))


@dataclass
class ProjectedPrompt(Prompt):
    """A pair for each layer that joins after the projections: (L, m, widest layer); a narrower layer takes the first numbers."""

    mechanism: ClassVar[str] = "projected"
    dimensions: ClassVar[int] = 3

    @classmethod
    def initial(cls, unet, layers, tokens, m, text_length):
        start, attns = initial_prompt(tokens, m), [unet.get_submodule(name) for name in prompted_layers(unet, layers)]
        widest, dtype = max(attn.to_k.out_features for attn in attns), attns[0].to_k.weight.dtype
        with torch.no_grad():
            pairs = [(a.to_k(start.k.to(dtype)).float(), a.to_v(start.v.to(dtype)).float()) for a in attns]
        sides = (torch.stack([F.pad(x, (0, widest - x.shape[-1])) for x in side]) for side in zip(*pairs))
        return cls(*(side.clone() for side in sides), layers)

    def keys_values(self, attn, text, layer):
        pairs = zip((attn.to_k(text), attn.to_v(text)), self.tokens(text, layer))
        return tuple(torch.cat([x, p[..., : x.shape[-1]].to(x)], dim=1) for x, p in pairs)

    def expected_width(self, unet):
        return max(unet.get_submodule(name).to_k.out_features for name in prompted_layers(unet, self.layers))


@dataclass
class AddedPrompt(Prompt):
    """Added to the text, c + p, in place of joining it: one token per text token, (n, d_ctx), zero at first."""

    mechanism: ClassVar[str] = "added"

    def __post_init__(self):
        if self.log_weight:
            raise ValueError(f"log_weight={self.log_weight} is not possible: an added prompt has no tokens of its own")

    @classmethod
    def initial(cls, unet, layers, tokens, m, text_length):
        initial_prompt(tokens, m)  # for its check of m
        return cls(*(torch.zeros(text_length, tokens.shape[-1]).to(tokens) for _ in "kv"), layers)

    def keys_values(self, attn, text, layer):
        p_k, p_v = self.tokens(text)
        return attn.to_k(text + p_k), attn.to_v(text + p_v)


@dataclass
class TimedPrompt(Prompt):
    """Pairs at evenly spaced time steps, blended between them: (R, m, d_ctx), from the clean end to the noisy one."""

    mechanism: ClassVar[str] = "timed"
    dimensions: ClassVar[int] = 3

    @classmethod
    def initial(cls, unet, layers, tokens, m, text_length):
        start = initial_prompt(tokens, m)
        return cls(*(side.expand(TIME_PAIRS, -1, -1).clone() for side in (start.k, start.v)), layers)

    def at(self, t, total):
        pairs = self.k.shape[-3]
        place = t.float() / (total - 1) * (pairs - 1)
        low = place.floor().long().clamp(max=pairs - 2)
        part, rows = (place - low)[:, None, None], torch.arange(len(t), device=t.device)

        def blend(side):
            side = side.to(t.device).expand(len(t), *side.shape[-3:])
            return torch.lerp(side[rows, low], side[rows, low + 1], part.to(side))

        return Prompt(blend(self.k), blend(self.v), self.layers, self.log_weight)

    def keys_values(self, attn, text, layer):
        raise ValueError("a timed prompt depends on the time step: use prompt.at(t, total)")


MECHANISMS = {cls.mechanism: cls for cls in (Prompt, PerLayerPrompt, ProjectedPrompt, AddedPrompt, TimedPrompt)}
CHOICES = (*MECHANISMS, "network")


class PromptTensors:
    """One prompt per concept as free tensors; `parameters` are their k and v, stacked over concepts."""

    def __init__(self, unet, mechanism: str, layers: str, tokens: list[Tensor], m: int, text_length: int):
        self.kind, self.layers = MECHANISMS[mechanism], layers
        starts = [self.kind.initial(unet, layers, own, m, text_length) for own in tokens]
        k, v = (torch.stack(side) for side in zip(*((p.k, p.v) for p in starts)))
        self.parameters = {"k": torch.nn.Parameter(k), "v": torch.nn.Parameter(v)}

    def prompt(self, concept) -> Prompt:
        """The prompt of a concept by its index, or of a batch by theirs (B,)."""
        return self.kind(self.parameters["k"][concept], self.parameters["v"][concept], self.layers)


class PromptNetwork:
    """One network for all concepts: p = p_0 + W_2 GELU(W_1 mean of the concept's tokens) / width; W_2 starts at zero.

    Divided by its width, a step of Adam moves p about as far as it moves a free tensor. The network also makes a prompt for
    a concept it was not trained on.
    """

    def __init__(self, unet, layers: str, tokens: list[Tensor], m: int, seed: int):
        self.layers = layers
        starts = [initial_prompt(own, m) for own in tokens]
        self.start = torch.stack([torch.stack([p.k, p.v]) for p in starts])  # (concepts, 2, m, d)
        self.text = torch.stack([own.mean(0) for own in tokens])
        width, out = self.text.shape[1], self.start[0].numel()
        first = torch.randn(NETWORK_WIDTH, width, generator=seeded("key network", seed)) / width**0.5
        first, last = first.to(self.text), torch.zeros(out, NETWORK_WIDTH).to(self.text)
        self.parameters = {"first": torch.nn.Parameter(first), "last": torch.nn.Parameter(last)}

    def prompt(self, concept) -> Prompt:
        """The prompt of a concept by its index, or of a batch by theirs (B,)."""
        hidden = F.gelu(self.text[concept] @ self.parameters["first"].T)
        change = hidden @ self.parameters["last"].T / NETWORK_WIDTH
        k, v = (self.start[concept] + change.unflatten(-1, self.start.shape[1:])).unbind(-3)
        return Prompt(k, v, self.layers)
