"""ESD (Gandikota et al., arXiv 2303.07345): the concept's prediction moves to the far side of the empty prompt's."""

from dataclasses import dataclass

import torch

from .. import losses
from ..artifacts import Erasure
from ..training import LatentConfig, TrainableWeights, Trainer, optimizer_step
from .registry import RATES, method


@dataclass(frozen=True)
class ESD(LatentConfig):
    """Published: 1,000 steps of batch 1, lr 1e-5. ESD-x trains "xattn", ESD-u "noxattn"."""

    eta: float = 1.0  # negative guidance


@method("esd-u", ESD, sweep=RATES, train_method="noxattn")
@method("esd-x", ESD, sweep=RATES, train_method="xattn")
def esd(world, concepts: list[str], config: ESD | None = None, checkpoint=None, progress=True) -> Erasure:
    """L = || eps_theta'(z, t, c) - [eps(z, t, "") - eta (eps(z, t, c) - eps(z, t, ""))] ||^2 (eq. 7)."""
    trainer = Trainer(world, concepts, config or ESD(), "esd")
    config = trainer.config
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        trainer.weights, theta = w, w.parameters
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b = trainer.batch("removal", n)
            prediction = trainer.predict(b.z, b.t, b.cond)
            l_removal = (b.weight[: b.n] * losses.removal(prediction[: b.n], trainer.target(b, config.eta))).mean()
            l_retain = trainer.retain_loss(prediction, b)
            optimizer_step(optimizer, l_removal + config.retain_weight * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)}, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta())
