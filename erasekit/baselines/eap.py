"""EAP (Bui et al., arXiv 2410.15618): ESD that keeps, at each step, the candidate concept that an adversary says suffers most."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..training import Bench, Student, WeightTraining, update


@dataclass(frozen=True)
class EAP(WeightTraining):
    """Published: 1,000 model and 1,000 adversary passes of batch 1 at lr 1e-5, errors on x0, candidates from a word list.

    The candidates are `retain`, which must name at least one text.
    """

    retain: tuple[str, ...] = ("",)
    eta: float = 1.0
    temperature: float = 2.0  # of the Gumbel-softmax
    adversary_lr: float = 1e-2

    def __post_init__(self):
        super().__post_init__()
        if not self.retain:
            raise ValueError(
                "retain=() is not possible here: the candidates this method chooses from are the retained texts"
            )


def eap(world, concepts: list[str], config: EAP | None = None, checkpoint=None, progress=True) -> Erasure:
    """theta': || eps_theta'(z_e, c_e) - y ||^2 + w || eps_theta'(z_a, c_a) - eps(z_a, c_a) ||^2; pi: ascent on the second term.

    c_a = g(pi_c) R with a hard Gumbel-softmax g (eqs. 5 to 8); an adversary's pass precedes each model pass. Latents from
    the frozen model's pool, each candidate's on its own trajectories.
    """
    config = config or EAP()
    bench = Bench(world, concepts, config, "eap")
    with Student(bench.unet, config.group).training() as student:
        theta, choice = student.parameters, Choice(bench, config)
        adam = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b = bench.draw("adversary", n, retained=False)
            z, t, eps, weight, text, _ = choice.draw(b, "adversary", n)
            l_adversary = (weight * losses.retain(bench.predict(z, t, text), eps)).mean()
            update(choice.adam, -l_adversary, [choice.pi])

            b = bench.draw("removal", n, retained=False)
            z, t, eps, weight, text, _ = choice.draw(b, "removal", n)
            said = bench.predict(torch.cat([b.z, z]), torch.cat([b.t, t]), torch.cat([b.text, text.detach()]))
            l_removal = (b.weight * losses.removal(said[: b.n], bench.target(b, config.eta))).mean()
            l_retain = (weight * losses.retain(said[b.n :], eps)).mean()
            update(adam, l_removal + config.retain_weight * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        players = {"theta": (theta, adam), "adversary": ({"pi": choice.pi}, choice.adam)}
        history = bench.fit(step, players, checkpoint, progress)
        return bench.erasure(history, delta=student.delta(), chosen=choice.favourites())


class Choice:
    """An adversary's choice among the retained texts, one distribution pi for each concept."""

    def __init__(self, bench: Bench, config):
        self.bench, self.config = bench, config
        self.R = bench.embeddings[bench.erased :]
        self.pi = torch.nn.Parameter(torch.zeros(len(bench.concepts), len(self.R), device=bench.device))
        self.adam = torch.optim.Adam([self.pi], lr=config.adversary_lr)

    def draw(self, b, purpose: str, n: int):
        """For each erased sample of a batch a candidate: latents, time steps, frozen eps, weight, its text, its index."""
        bench, generator = self.bench, seeded("choice", purpose, self.config.seed, n)
        logits = self.pi[bench.owner[b.index[: b.n]].to(bench.device)]
        gumbel = -torch.log(-torch.log(torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)))
        soft = F.softmax((logits + gumbel.to(logits)) / self.config.temperature, dim=1)
        chosen = soft.argmax(1)
        hard = F.one_hot(chosen, len(self.R)).to(soft) + soft - soft.detach()  # straight through
        text = torch.einsum("bn,nld->bld", hard, self.R.to(hard))
        z, t, eps, _ = bench.pool.draw(bench.erased + chosen.cpu(), generator)
        z, t, eps = z.to(b.z), t.to(bench.device), eps.to(bench.device)
        return z, t, eps, bench.error_weight(t), text, chosen

    def favourites(self) -> dict[str, str]:
        """The candidate each concept's adversary came to prefer."""
        texts = self.bench.texts[self.bench.erased :]
        return {c: texts[int(row.argmax())] for c, row in zip(self.bench.concepts, self.pi)}
