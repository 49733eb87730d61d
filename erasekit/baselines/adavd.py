"""AdaVD (Wang et al., CVPR 2025, arXiv 2412.06143): each token's value loses its part along the concept's, while sampling.

Nothing is trained and no weight changes: an adapter on the values of cross-attention takes what they are of the text, so that
it depends on the prompt alone, neither on the image nor on the time step. It has to stay attached, so nothing can be exported.
"""

import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..artifacts import ADAPTERS, Erasure
from .adapters import Adapter
from .registry import method, untrained_erasure
from .uce import concept_vectors, value_weights


@dataclass(frozen=True)
class AdaVD:
    """Published: a sigmoid of steepness 100, centre 0.93 and height 2, so that the concept's own value is all but mirrored."""

    steepness: float = 100.0
    centre: float = 0.93  # the cosine to the concept's value from which on a value loses more than half of `height`
    height: float = 2.0
    seed: int = 0  # nothing is random


class ValueDecomposer(Adapter):
    """v <- v - sum_n sigma(cos(v, v_n)) a_n v_n, where sum_n a_n v_n is v's projection on the span of the concepts' values.

    For one concept a = <v, v_1> / |v_1|^2. `directions` (concepts, d): the unit v_n. `dual` (d, concepts): its pseudo-inverse,
    which gives the a_n. `removed` (concepts, d): the directions times the sigmoid's height. `gate`: its steepness and centre.
    """

    linear_in = (".removed",)

    def change(self, layer, inputs, output):
        v = output.float()  # the sigmoid is too steep for half precision
        directions, dual, removed, gate = (self.tensors[f"{layer}.{name}"].to(v) for name in TENSORS)
        sigma = torch.sigmoid(gate[0] * (F.normalize(v, dim=-1) @ directions.T - gate[1]))
        change = -(sigma * (v @ dual)) @ removed
        change[:, 0] = 0  # the start token, which is the same in every prompt
        return change.to(output)


TENSORS = ("directions", "dual", "removed", "gate")
ADAPTERS |= {"value decomposer": ValueDecomposer}


@method("adavd", AdaVD, sweep=[{"centre": centre} for centre in (0.97, 0.93, 0.85, 0.7, 0.5)])
def adavd(world, concepts: list[str], config: AdaVD | None = None) -> Erasure:
    """The values of the concepts' last words, for `ValueDecomposer`: in their prompts here, in their names alone as published.

    Several concepts are taken apart by their dual basis, which is what Gram and Schmidt's steps amount to, in whatever order;
    the released code skips a step from the third concept on. It also takes the cosine over both halves of guidance joined,
    the empty one being alike, so that its cosines are larger; here, as in the equation, each value is compared by itself.
    """
    config, began = config or AdaVD(), time.time()
    k, _ = concept_vectors(world, concepts)
    tensors = {}
    for name, W in value_weights(world.pipe.unet).items():
        directions = F.normalize(k @ W.T, dim=1)
        gate = torch.tensor([config.steepness, config.centre])
        own = directions, torch.linalg.pinv(directions), config.height * directions, gate
        tensors |= {f"{name.removesuffix('.weight')}.{n}": t.float().cpu().contiguous() for n, t in zip(TENSORS, own)}
    return untrained_erasure(world, concepts, config, "adavd", began, adapters=tensors, adapter="value decomposer")
