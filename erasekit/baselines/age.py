"""AGE (Bui et al., arXiv 2501.18950): EAP whose adversary also chooses where the concept goes."""

from dataclasses import dataclass

import torch

from .. import losses
from ..artifacts import Erasure
from ..training import Bench, Student, update
from .eap import EAP, Choice


@dataclass(frozen=True)
class AGE(EAP):
    """Published: as EAP, with lambda 1 and, for objects, temperature 0.1.

    `detached`: the adversary sees the first term through no gradient, as the released code has it; False is the objective
    as printed.
    """

    temperature: float = 0.1
    lam: float = 1.0
    detached: bool = True


def age(world, concepts: list[str], config: AGE | None = None, checkpoint=None, progress=True) -> Erasure:
    """theta': || eps_theta'(z_e, c_e) - y ||^2 + lambda || eps_theta'(z_t, c_t) - eps(z_t, c_t) ||^2,

    y = eps(z_e, c_t) - eta (eps(z_e, c_e) - eps(z_e, c_t)).

    pi, by ascent: || eps_theta'(z_e, c_e) - eps(z_e, c_t) ||^2 + lambda (second term), with c_t = g(pi_c) R (section 4).
    """
    config = config or AGE()
    bench = Bench(world, concepts, config, "age")
    with Student(bench.unet, config.group).training() as student:
        theta, choice = student.parameters, Choice(bench, config)
        adam = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b = bench.draw("adversary", n, retained=False)
            z, t, eps, weight, text, _ = choice.draw(b, "adversary", n)
            l_adversary = config.lam * (weight * losses.retain(bench.predict(z, t, text), eps)).mean()
            gradient = torch.autograd.grad(-l_adversary, choice.pi, retain_graph=not config.detached)[0]
            if not config.detached:
                with torch.no_grad():
                    says = bench.predict(b.z, b.t, b.text)
                with (
                    student.swapped()
                ):  # the gradient is taken in here, while the weights it passes are the frozen ones
                    l_far = (b.weight * losses.removal(says, bench.predict(b.z, b.t, text))).mean()
                    gradient = gradient + torch.autograd.grad(-l_far, choice.pi)[0]
            choice.pi.grad = gradient
            choice.adam.step()

            b = bench.draw("removal", n, retained=False)
            z, t, eps, weight, text, _ = choice.draw(b, "removal", n)
            with student.frozen():
                eps_t = bench.predict(b.z, b.t, text)
            y = losses.neutral_target(b.eps, eps_t, config.eta)
            said = bench.predict(torch.cat([b.z, z]), torch.cat([b.t, t]), torch.cat([b.text, text.detach()]))
            l_removal = (b.weight * losses.removal(said[: b.n], y)).mean()
            l_retain = (weight * losses.retain(said[b.n :], eps)).mean()
            update(adam, l_removal + config.lam * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        players = {"theta": (theta, adam), "adversary": ({"pi": choice.pi}, choice.adam)}
        history = bench.fit(step, players, checkpoint, progress)
        return bench.erasure(history, delta=student.delta(), chosen=choice.favourites())
