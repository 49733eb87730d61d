"""What the transfer stage trains: tensors, or one small network that makes a prompt from the concept's text.

The paper compares concatenation with addition and leaves "more complex prompting mechanisms" to the future; "layers",
"projected", "timed" and "network" are ours. See `attention.MECHANISMS` for how each enters a layer.
"""

import torch

from .attention import MECHANISMS, Prompt, initial_prompt, prompted_layers
from .checkpoints import seeded

CHOICES = (*MECHANISMS, "network")
RINGS = 4  # times at which a timed prompt is kept
HIDDEN = 256  # width of the network


def start(unet, mechanism: str, place: str, tokens: torch.Tensor, m: int, said: int) -> Prompt:
    """A prompt of any mechanism that starts from a concept's token embeddings (n, d_ctx), on their device.

    An added one starts from nothing, at all `said` tokens of the text.
    """
    first = initial_prompt(tokens, m)
    sides = (first.k, first.v)
    if mechanism == "added":
        sides = (torch.zeros(said, tokens.shape[-1]).to(tokens) for _ in sides)
    elif mechanism == "timed":
        sides = (side.expand(RINGS, -1, -1) for side in sides)
    elif mechanism in ("layers", "projected"):
        layers = [unet.get_submodule(name) for name in prompted_layers(unet, place)]
        if mechanism == "layers":
            sides = (side.expand(len(layers), -1, -1) for side in sides)
        else:
            widest = max(layer.to_k.out_features for layer in layers)
            with torch.no_grad():
                kind = layers[0].to_k.weight.dtype
                after = [
                    (layer.to_k(first.k.to(kind)).float(), layer.to_v(first.v.to(kind)).float()) for layer in layers
                ]
            sides = (torch.stack([pad(x, widest) for x in column]) for column in zip(*after))
    return Prompt(*(side.clone() for side in sides), place, mechanism)


def pad(x: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, width - x.shape[-1]))


class Tensors:
    """One prompt for each concept; `parameters` are their (p_k, p_v), stacked over concepts."""

    def __init__(self, unet, mechanism: str, place: str, tokens: list[torch.Tensor], m: int, said: int):
        starts = [start(unet, mechanism, place, own, m, said) for own in tokens]
        self.place, self.mechanism = place, mechanism
        k, v = (torch.stack(side) for side in zip(*((p.k, p.v) for p in starts)))
        self.parameters = {"k": torch.nn.Parameter(k), "v": torch.nn.Parameter(v)}

    def prompt(self, concept) -> Prompt:
        """The prompt of a concept by its number, or of a batch by theirs (B,)."""
        return Prompt(self.parameters["k"][concept], self.parameters["v"][concept], self.place, self.mechanism)


class Network:
    """One network for all concepts: p = start + W_2 GELU(W_1 mean of the concept's tokens) / hidden width; W_2 starts at zero.

    Divided by the width, a step of Adam moves p about as far as it moves a prompt that is a tensor.

    Whoever holds it makes the prompt of any concept, also of one it was never trained on.
    """

    def __init__(self, unet, place: str, tokens: list[torch.Tensor], m: int, seed: int):
        self.place = place
        starts = [initial_prompt(own, m) for own in tokens]
        self.start = torch.stack([torch.stack([p.k, p.v]) for p in starts])  # (concepts, 2, m, d)
        self.text = torch.stack([own.mean(0) for own in tokens])
        width, out = self.text.shape[1], self.start[0].numel()
        first = torch.randn(HIDDEN, width, generator=seeded("key network", seed)) / width**0.5
        first, last = first.to(self.text), torch.zeros(out, HIDDEN).to(self.text)
        self.parameters = {"first": torch.nn.Parameter(first), "last": torch.nn.Parameter(last)}

    def prompt(self, concept) -> Prompt:
        """The prompt of a concept by its number, or of a batch by theirs (B,)."""
        inner = (
            torch.nn.functional.gelu(self.text[concept] @ self.parameters["first"].T)
            @ self.parameters["last"].T
            / HIDDEN
        )
        k, v = (self.start[concept] + inner.unflatten(-1, self.start.shape[1:])).unbind(-3)
        return Prompt(k, v, self.place)
