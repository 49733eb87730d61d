"""SPM (Lyu et al., arXiv 2312.16145): a rank-one adapter per concept beside every linear layer of the transformer blocks."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..conditioning import Conditioning
from ..training import TrainConfig, Trainer, gradients_off, optimizer_step
from . import guidance  # noqa: F401  registers "facilitated transport"
from .adapters import LowRank, low_rank_layers, new_low_rank, trainable
from .registry import method


@dataclass(frozen=True)
class SPM(TrainConfig):
    """Published: lr 1e-4, 3,000 steps of batch 1 with four anchors, anchor weight 1,000. Here each sample has one anchor."""

    RATES = TrainConfig.RATES | {"lr": 3e-3}
    eta: float = 1.0
    anchor_weight: float = 1.0  # with 1,000 nothing is erased in the steps taken here
    transport: bool = (
        True  # False: every adapter at full strength for every prompt, to measure what the gating is worth
    )


@method("spm", SPM, sweep=[{"anchor_weight": weight} for weight in (100.0, 30.0, 10.0)])
def spm(world, concepts: list[str], config: SPM | None = None, checkpoint=None, progress=True) -> Erasure:
    """|| eps_M(z, t, c) - [eps(z, t, "") - eta (eps(z, t, c) - eps(z, t, ""))] ||^2 + w || eps_M(z, t, a) - eps(z, t, a) ||^2.

    Anchors a: random directions of about the concept's length, as published (eqs. 5 to 7). Latents come from the frozen model's
    pool instead of the adapted model; all concepts' adapters train in one run, each sample with its own alone.
    """
    trainer = Trainer(world, concepts, config or SPM(), "spm")
    config = trainer.config
    start = new_low_rank(low_rank_layers(trainer.unet), len(concepts), seeded("spm", config.seed))
    tensors = trainable(start, trainer.device)
    adapter, optimizer = LowRank(tensors), torch.optim.Adam(tensors.values(), lr=config.lr)

    def step(n: int) -> dict[str, float]:
        b, generator = trainer.batch("removal", n), seeded("anchors", config.seed, n)
        z, t, c, weight = b.z[: b.n], b.t[: b.n], b.cond[: b.n], b.weight[: b.n]
        direction = torch.randn(c.tokens.shape, generator=generator).to(c.tokens)
        length = c.tokens.flatten(1).norm(dim=1) * (0.8 + 0.4 * torch.rand(b.n, generator=generator).to(c.tokens))
        anchor = Conditioning(direction * (length / direction.flatten(1).norm(dim=1))[:, None, None], c.added)
        with adapter.disabled():
            eps_anchor = trainer.predict(z, t, anchor)
        # The concept, its anchors, and what is retained, in one forward pass; for the last, every adapter is on.
        own = F.one_hot(trainer.owner[b.index[: b.n]], len(concepts)).float().to(trainer.device)
        adapter.multiplier = torch.cat([own, own, torch.ones(len(b.z) - b.n, len(concepts)).to(own)])
        cond = Conditioning.cat([c, anchor, b.cond[b.n :]])
        prediction = trainer.predict(torch.cat([z, z, b.z[b.n :]]), torch.cat([t, t, b.t[b.n :]]), cond)
        l_removal = (weight * losses.removal(prediction[: b.n], trainer.target(b, config.eta))).mean()
        l_anchor = (weight * losses.retain(prediction[b.n : 2 * b.n], eps_anchor)).mean()
        l_retain = trainer.retain_loss(prediction[b.n :], b)
        loss = l_removal + config.anchor_weight * l_anchor + config.retain_weight * l_retain
        optimizer_step(optimizer, loss, tensors.values())
        return {"removal": l_removal.item(), "anchor": l_anchor.item(), "retain": l_retain.item()}

    with gradients_off(trainer.unet), adapter.attached(trainer.unet):
        history = trainer.fit(step, {"adapter": (tensors, optimizer)}, checkpoint, progress)
    texts = [world.prompt_pairs(c)[0][0] for c in concepts]
    rule = {"kind": "facilitated transport", "concepts": list(concepts), "texts": texts, "always": not config.transport}
    adapters = {name: t.detach().cpu() for name, t in tensors.items()}
    return trainer.erasure(history, adapters=adapters, adapter="low-rank", guidance=rule)
