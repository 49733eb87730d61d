"""ACE, anti-editing concept erasure (Wang et al., arXiv 2501.01633): ESD, and guidance that subtracts the concept itself."""

from dataclasses import dataclass

import torch

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..checks import check_number
from ..conditioning import Conditioning, encode
from ..training import LatentConfig, TrainableWeights, Trainer, optimizer_step
from .registry import RATES, method


@dataclass(frozen=True)
class ACE(LatentConfig):
    """Published: eta 3, s 3, LoRA of rank 4, 1,500 steps of batch 1 at lr 1e-3; the three losses weigh 0.01, 0.99 and 4.

    Here the weights of ESD-x train, as in all of ESD's family.
    """

    eta: float = 3.0
    s: float = 3.0  # correction: how far the empty prompt stays away from what is retained
    null_weight: float = 0.99  # of the empty prompt's loss; the concept's has the rest
    retain_weight: float = 4.0

    def __post_init__(self):
        super().__post_init__()
        check_number("null_weight", self.null_weight, most=1)


@method("ace", ACE, sweep=RATES)
def ace(world, concepts: list[str], config: ACE | None = None, checkpoint=None, progress=True) -> Erasure:
    """(1 - v) || eps_theta'(z, c) - y ||^2 + v || eps_theta'(z, "") - y_null ||^2 + w || eps_theta'(z, a) - eps(z, a) ||^2,

    y as ESD's, y_null = eps(z, "") + eta (eps(z, c) - eps(z, "")) - s (eps(z, a) - eps(z, "")), v `null_weight`.

    The anchor a is one retained concept, drawn for each sample, at the concept's latents, as published; the paper draws two and
    weighs their part of the correction by a CLIP score. The empty prompt is what is trained, so it is no anchor. Without
    anchors there is no correction and nothing is retained. Of a style, the part that counts is that beyond its own object.
    """
    trainer = Trainer(world, concepts, config or ACE(), "ace")
    config = trainer.config
    anchors = [n for n in range(trainer.num_erased, len(trainer.prompts)) if trainer.prompts[n]]
    empty = encode(world.pipe, [""])
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        trainer.weights, theta = w, w.parameters
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def predict(b, conds: list[Conditioning]):
            """One prediction of the batch's latents for each conditioning."""
            times = len(conds)
            return trainer.predict(b.z.repeat(times, 1, 1, 1), b.t.repeat(times), Conditioning.cat(conds)).chunk(times)

        def step(n: int) -> dict[str, float]:
            b, generator = trainer.batch("removal", n, retained=False), seeded("anchors", config.seed, n)
            others = [empty.expand(b.n)]
            if anchors:
                drawn = torch.tensor(anchors)[torch.randint(len(anchors), (b.n,), generator=generator)]
                others.append(trainer.cond[drawn.to(trainer.device)])
            with w.frozen():
                eps_empty, *eps_a = predict(b, others)
            prediction, null, *kept = predict(b, [b.cond, *others])
            y_null = eps_empty + config.eta * (b.eps - b.eps_null) - config.s * sum(eps - eps_empty for eps in eps_a)
            l_removal = (b.weight * losses.removal(prediction, trainer.target(b, config.eta))).mean()
            l_null = (b.weight * losses.squared_error(null, y_null)).mean()
            l_retain = sum(
                ((b.weight * losses.retain(*pair)).mean() for pair in zip(kept, eps_a)), torch.zeros_like(l_null)
            )
            loss = (1 - config.null_weight) * l_removal + config.null_weight * l_null + config.retain_weight * l_retain
            optimizer_step(optimizer, loss, theta.values())
            return {"removal": l_removal.item(), "null": l_null.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)}, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta())
