"""SPM (Lyu et al., arXiv 2312.16145): a rank-one adapter for each concept beside every linear layer of the transformer blocks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import losses
from ..adapters import Adapter, low_rank_layers, new_low_rank
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..text import said
from ..training import Bench, Training, gradients_off, update


@dataclass(frozen=True)
class SPM(Training):
    """Published: lr 1e-4, 3,000 steps of batch 1 with four anchors, anchor weight 1,000. Here every sample brings one anchor."""

    lr: float = 3e-3
    eta: float = 1.0
    anchor_weight: float = 1.0  # with 1,000 nothing is erased within the steps taken here
    # False leaves every adapter open for every prompt, to see what opening them by prompt is worth.
    transport: bool = True


def spm(world, concepts: list[str], config: SPM | None = None, checkpoint=None, progress=True) -> Erasure:
    """|| eps_M(z, t, c) - [eps(z, t, "") - eta (eps(z, t, c) - eps(z, t, ""))] ||^2 + w || eps_M(z, t, a) - eps(z, t, a) ||^2.

    Anchors a: random directions of about the concept's length, as published (eqs. 5 to 7); latents from the frozen model's
    pool instead of the adapted model's; all concepts' adapters in one run, each sample opening its own alone.
    """
    config = config or SPM()
    bench = Bench(world, concepts, config, "spm")
    layers = low_rank_layers(bench.unet)
    start = new_low_rank(layers, len(concepts), seeded("spm", config.seed))
    tensors = {name: torch.nn.Parameter(t.to(bench.device)) for name, t in start.items()}
    adapter = Adapter("low-rank", tensors)
    adam = torch.optim.Adam(tensors.values(), lr=config.lr)

    def step(n: int) -> dict[str, float]:
        b, generator = bench.draw("removal", n), seeded("anchors", config.seed, n)
        own = F.one_hot(bench.owner[b.index[: b.n]], len(concepts)).float().to(bench.device)
        c = b.text[: b.n]
        direction = torch.randn(c.shape, generator=generator).to(c)
        length = c.flatten(1).norm(dim=1) * (0.8 + 0.4 * torch.rand(b.n, generator=generator).to(c))
        anchor = direction * (length / direction.flatten(1).norm(dim=1))[:, None, None]
        tokens = said(bench.unet, c).shape[1]
        anchor[:, tokens:] = c[:, tokens:]  # SDXL's sizes are no words
        z, t = b.z[: b.n], b.t[: b.n]
        with adapter.disabled():
            eps_anchor = bench.predict(z, t, anchor)
        # The concept, its anchors, and what is retained, in one forward; what is retained sees every adapter open.
        adapter.multiplier = torch.cat([own, own, torch.ones(len(b.z) - b.n, len(concepts)).to(own)])
        says = bench.predict(
            torch.cat([z, z, b.z[b.n :]]), torch.cat([t, t, b.t[b.n :]]), torch.cat([c, anchor, b.text[b.n :]])
        )
        weight = b.weight[: b.n]
        l_removal = (weight * losses.removal(says[: b.n], bench.target(b, config.eta))).mean()
        l_anchor = (weight * losses.retain(says[b.n : 2 * b.n], eps_anchor)).mean()
        l_retain = bench.retain(says[b.n :], b)
        loss = l_removal + config.anchor_weight * l_anchor + config.retain_weight * l_retain
        update(adam, loss, tensors.values())
        return {"removal": l_removal.item(), "anchor": l_anchor.item(), "retain": l_retain.item()}

    with gradients_off(bench.unet), adapter.attached(bench.unet):
        history = bench.fit(step, {"adapter": (tensors, adam)}, checkpoint, progress)
    rule = {
        "kind": "facilitated transport",
        "concepts": list(concepts),
        "texts": [world.subjects(c)[0][0] for c in concepts],
        "always": not config.transport,
    }
    adapters = {name: t.detach().cpu() for name, t in tensors.items()}
    return bench.erasure(history, adapters=adapters, adapter="low-rank", guidance=rule)
