"""ANT (Li et al., arXiv 2504.12782): ESD in the late sampling steps, the early ones kept, on the concept's salient weights."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..artifacts import Erasure
from ..checks import check_number
from ..training import LatentConfig, TrainableWeights, Trainer, optimizer_step
from .registry import RATES, method


@dataclass(frozen=True)
class ANT(LatentConfig):
    """Published: the first 7 of 50 steps are kept, with the weight of all others; 250 steps of batch 1 at lr 5e-4."""

    eta: float = 1.0
    early_share: float = 0.14  # of the sampling steps, from the noise on
    early_weight: float = 1.0  # of their mean loss against that of the late steps
    saliency: float = 0.5  # share of each tensor's weights that is salient, by the largest gradients; 1 trains all
    gradients: int = 5  # batches: only what is salient in each of them is trained

    def __post_init__(self):
        super().__post_init__()
        check_number("early_share", self.early_share, most=1)
        check_number("saliency", self.saliency, most=1)


@method("ant", ANT, sweep=RATES)
def ant(world, concepts: list[str], config: ANT | None = None, checkpoint=None, progress=True) -> Erasure:
    """|| eps_theta'(z, t, c) - [eps(z, t, "") -+ eta (eps(z, t, c) - eps(z, t, ""))] ||^2, minus late, plus early (section 3).

    The paper's terms that keep the empty prompt, which its code gives no gradient, are `retain`'s. Saliency is measured on
    the base, by batches of 8 in place of synonyms and seeds, ten steps each. The released script marks the smallest gradients;
    the paper's words, followed here, say the largest.
    """
    trainer = Trainer(world, concepts, config or ANT(), "ant")
    config = trainer.config
    first_early, share = (1 - config.early_share) * len(trainer.alphas), config.early_share
    early_weight = config.early_weight * (1 - share) / share if share else 0.0  # a batch has fewer early samples
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        trainer.weights, theta = w, w.parameters
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def removal(b, prediction: Tensor) -> Tensor:
            """The loss (n,) of each erased sample."""
            early = b.t[: b.n] >= first_early
            eta = torch.where(early, -config.eta, config.eta)[:, None, None, None]
            weight = b.weight[: b.n] * torch.where(early, early_weight, 1.0)
            return weight * losses.removal(prediction[: b.n], trainer.target(b, eta))

        salient = {name: torch.ones_like(p, dtype=torch.bool) for name, p in theta.items()}
        for n in range(config.gradients):
            b = trainer.batch("saliency", n, retained=False)
            loss = removal(b, trainer.predict(b.z, b.t, b.cond)).mean()
            gradients = torch.autograd.grad(loss, list(theta.values()), materialize_grads=True)
            for mask, gradient in zip(salient.values(), gradients):
                mask &= largest(gradient.abs(), config.saliency)

        def step(n: int) -> dict[str, float]:
            b = trainer.batch("removal", n)
            prediction = trainer.predict(b.z, b.t, b.cond)
            l_removal, l_retain = removal(b, prediction).mean(), trainer.retain_loss(prediction, b)
            optimizer_step(optimizer, l_removal + config.retain_weight * l_retain, theta.values())
            for name, p in theta.items():  # as if the other gradients were 0: Adam treats each weight alone
                p.data = torch.where(salient[name], p.data, w.theta[name])
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)}, checkpoint, progress)
        trained = sum(int(mask.sum()) for mask in salient.values()) / sum(mask.numel() for mask in salient.values())
        return trainer.erasure(history, delta=w.delta(), trained=trained)


def largest(values: Tensor, share: float) -> Tensor:
    """Where a tensor is among the `share` of its largest values."""
    count = max(1, round(share * values.numel()))
    return values >= values.flatten().kthvalue(values.numel() - count + 1).values
