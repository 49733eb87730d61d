"""ESD (Gandikota et al., arXiv 2303.07345): the concept's prediction is pulled to the far side of the empty text's."""

from dataclasses import dataclass

import torch

from .. import losses
from ..artifacts import Erasure
from ..training import Bench, Rolled, Student, update


@dataclass(frozen=True)
class ESD(Rolled):
    """ESD-x trains group "x", ESD-u group "u". Published: 1,000 steps of batch 1, lr 1e-5."""

    eta: float = 1.0  # negative guidance


def esd(world, concepts: list[str], config: ESD | None = None, checkpoint=None, progress=True) -> Erasure:
    """L = || eps_theta'(z, t, c) - [eps(z, t, "") - eta (eps(z, t, c) - eps(z, t, ""))] ||^2 (eq. 7)."""
    config = config or ESD()
    bench = Bench(world, concepts, config, "esd")
    with Student(bench.unet, config.group).training() as student:
        bench.student, theta = student, student.parameters
        adam = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b = bench.draw("removal", n)
            plain = bench.predict(b.z, b.t, b.text)
            l_removal = (b.weight[: b.n] * losses.removal(plain[: b.n], bench.target(b, config.eta))).mean()
            l_retain = bench.retain(plain, b)
            update(adam, l_removal + config.retain_weight * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = bench.fit(step, {"theta": (theta, adam)}, checkpoint, progress)
        return bench.erasure(history, delta=student.delta())
