"""EAP (Bui et al., arXiv 2410.15618): ESD that preserves, at each step, the candidate concept it would harm most."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..conditioning import Conditioning
from ..training import Batch, TrainableWeights, Trainer, WeightConfig, optimizer_step
from .registry import RATES, method

RATES_AND_SPACES = [
    rate | {"loss_space": space} for space in losses.LOSS_SPACES for rate in RATES[space == "eps" :]
]  # the released code: x0


@dataclass(frozen=True)
class EAP(WeightConfig):
    """Published: 1,000 model and 1,000 adversary updates of batch 1, lr 1e-5, candidates from a word list, loss_space "x0".

    The candidates are `retain`, at least one.
    """

    retain: tuple[str, ...] = ("",)
    eta: float = 1.0
    temperature: float = 2.0  # of the Gumbel-softmax
    adversary_lr: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        if not self.retain:
            raise ValueError("retain=() is not possible: the candidates of this method are the retained prompts")


@method("eap", EAP, sweep=RATES_AND_SPACES)
def eap(world, concepts: list[str], config: EAP | None = None, checkpoint=None, progress=True) -> Erasure:
    """theta': || eps_theta'(z_e, c_e) - y ||^2 + w || eps_theta'(z_a, c_a) - eps(z_a, c_a) ||^2; pi: ascent on the second term.

    c_a = g(pi_c) R with a hard Gumbel-softmax g (eqs. 5 to 8); each model update follows one of the adversary. Latents from
    the frozen model's pool, a candidate's from its own trajectories.
    """
    trainer = Trainer(world, concepts, config or EAP(), "eap")
    config = trainer.config
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        theta, adversary = w.parameters, Adversary(trainer)
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b = trainer.batch("adversary", n, retained=False)
            a = adversary.candidates(b, "adversary", n)
            l_adversary = (a.weight * losses.retain(trainer.predict(a.z, a.t, a.cond), a.eps)).mean()
            optimizer_step(adversary.optimizer, -l_adversary, [adversary.pi])

            b = trainer.batch("removal", n, retained=False)
            a = adversary.candidates(b, "removal", n)
            cond = Conditioning.cat([b.cond, a.cond.map(Tensor.detach)])
            prediction = trainer.predict(torch.cat([b.z, a.z]), torch.cat([b.t, a.t]), cond)
            l_removal = (b.weight * losses.removal(prediction[: b.n], trainer.target(b, config.eta))).mean()
            l_retain = (a.weight * losses.retain(prediction[b.n :], a.eps)).mean()
            optimizer_step(optimizer, l_removal + config.retain_weight * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)} | adversary.trainables, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta(), candidates=adversary.preferred())


class Adversary:
    """A distribution over the retained prompts for each concept, trainable logits pi (concepts, candidates)."""

    def __init__(self, trainer: Trainer):
        self.trainer, self.R = trainer, trainer.cond[trainer.num_erased :]
        self.pi = torch.nn.Parameter(torch.zeros(len(trainer.concepts), len(self.R), device=trainer.device))
        self.optimizer = torch.optim.Adam([self.pi], lr=trainer.config.adversary_lr)
        self.trainables = {"adversary": ({"pi": self.pi}, self.optimizer)}

    def candidates(self, b: Batch, purpose: str, n: int) -> Batch:
        """A retained prompt for each erased sample of a batch; gradients pass to pi, straight through."""
        trainer, generator = self.trainer, seeded("choice", purpose, self.trainer.config.seed, n)
        logits = self.pi[trainer.owner[b.index[: b.n]].to(trainer.device)]
        gumbel = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        soft = F.softmax((logits + gumbel.to(logits)) / trainer.config.temperature, dim=1)
        best = soft.argmax(1)
        hard = F.one_hot(best, len(self.R)).to(soft) + soft - soft.detach()
        cond = self.R.map(lambda R: torch.einsum("bn,n...->b...", hard, R.to(hard)))
        index = trainer.num_erased + best.cpu()
        z, t, eps, eps_null = (x.to(trainer.device) for x in trainer.pool.sample(index, generator))
        return Batch(b.n, index, z.to(b.z), t, cond, eps, eps_null, trainer.loss_weight(t))

    def preferred(self) -> dict[str, str]:
        """Each concept's most likely candidate."""
        retained = self.trainer.prompts[self.trainer.num_erased :]
        return {c: retained[int(row.argmax())] for c, row in zip(self.trainer.concepts, self.pi)}
