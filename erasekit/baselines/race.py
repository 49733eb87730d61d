"""RACE (Kim et al., arXiv 2405.16341): ESD on the text embedding nearby that brings the concept back most."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..conditioning import Conditioning
from ..training import Batch, TrainableWeights, Trainer, WeightConfig, optimizer_step
from .registry import RATES, method


@dataclass(frozen=True)
class RACE(WeightConfig):
    """Published: a finished ESD, trained on for 1,000 steps of batch 1 at lr 1e-5. Here it starts from the base."""

    eta: float = 1.0
    box: float = 0.1  # largest change of each number of the text embedding
    inner: int = 10  # the adversary's updates, each a quarter of the box


@method("race", RACE, sweep=RATES)
def race(world, concepts: list[str], config: RACE | None = None, checkpoint=None, progress=True) -> Erasure:
    """ESD's loss at k + delta, delta minimising || eps_theta'(z, t, k + delta) - n ||^2 in a box, by sign steps.

    k: the whole text embedding; n: the noise that z's trajectory began from (section 4). The trajectories are the frozen
    model's, from the pool. The published code also holds k + delta within k's own range, which the box seldom leaves.
    """
    trainer = Trainer(world, concepts, config or RACE(), "race")
    config = trainer.config
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        theta = w.parameters
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def attacked(b: Batch, n: int) -> Conditioning:
            """The erased samples' embeddings, each moved to where theta' best predicts the starting noise."""
            z, t, c, wanted = b.z[: b.n], b.t[: b.n], b.cond[: b.n], starting_noise(trainer, b)
            delta = 2 * torch.rand(c.tokens.shape, generator=seeded("box", config.seed, n)).to(c.tokens) - 1
            delta = config.box * delta
            for _ in range(config.inner):
                delta.requires_grad_(True)
                prediction = trainer.predict(z, t, Conditioning(c.tokens + delta, c.added))
                gradient = torch.autograd.grad((prediction - wanted).square().sum(), delta)[0]
                delta = (delta.detach() - config.box / 4 * gradient.sign()).clamp(-config.box, config.box)
            return Conditioning(c.tokens + delta, c.added)

        def step(n: int) -> dict[str, float]:
            b = trainer.batch("removal", n)
            prediction = trainer.predict(b.z, b.t, Conditioning.cat([attacked(b, n), b.cond[b.n :]]))
            l_removal = (b.weight[: b.n] * losses.removal(prediction[: b.n], trainer.target(b, config.eta))).mean()
            l_retain = trainer.retain_loss(prediction, b)
            optimizer_step(optimizer, l_removal + config.retain_weight * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)}, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta())


def starting_noise(trainer: Trainer, b: Batch) -> Tensor:
    """What the model would predict of a batch's erased samples if it knew the noise their trajectories began from."""
    pool, index, z, t = trainer.pool, b.index[: b.n], b.z[: b.n].float(), b.t[: b.n]
    step = (pool.timesteps == t.cpu()[:, None]).int().argmax(1)
    distance = (pool.latents[index, :, step] - z.cpu()[:, None]).flatten(2).norm(dim=2)  # (n, count)
    noise = pool.latents[index, distance.argmin(1), 0].to(z)  # of the trajectory that z is on
    if trainer.world.pipe.scheduler.config.prediction_type == "epsilon":
        return noise
    a = trainer.alphas[t][:, None, None, None]
    return (noise - (1 - a).sqrt() * z) / a.sqrt()  # v
