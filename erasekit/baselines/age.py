"""AGE (Bui et al., arXiv 2501.18950): EAP whose adversary also chooses the concept that removal moves towards."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..artifacts import Erasure
from ..conditioning import Conditioning
from ..training import TrainableWeights, Trainer, optimizer_step
from .eap import EAP, RATES_AND_SPACES, Adversary
from .registry import method


@dataclass(frozen=True)
class AGE(EAP):
    """Published: as EAP, with lambda 1 and, for objects, temperature 0.1.

    `detached`: the first term gives the adversary no gradient, as in the released code; False is the objective as printed.
    """

    temperature: float = 0.1
    lam: float = 1.0
    detached: bool = True


@method("age", AGE, sweep=RATES_AND_SPACES)
def age(world, concepts: list[str], config: AGE | None = None, checkpoint=None, progress=True) -> Erasure:
    """theta': || eps_theta'(z_e, c_e) - y ||^2 + lambda || eps_theta'(z_t, c_t) - eps(z_t, c_t) ||^2,

    y = eps(z_e, c_t) - eta (eps(z_e, c_e) - eps(z_e, c_t)).

    pi, by ascent: || eps_theta'(z_e, c_e) - eps(z_e, c_t) ||^2 + lambda (second term), with c_t = g(pi_c) R (section 4).
    """
    trainer = Trainer(world, concepts, config or AGE(), "age")
    config = trainer.config
    predict = trainer.predict
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        theta, adversary = w.parameters, Adversary(trainer)
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b = trainer.batch("adversary", n, retained=False)
            a = adversary.candidates(b, "adversary", n)
            l_adversary = config.lam * (a.weight * losses.retain(predict(a.z, a.t, a.cond), a.eps)).mean()
            gradient = torch.autograd.grad(-l_adversary, adversary.pi, retain_graph=not config.detached)[0]
            if not config.detached:
                with torch.no_grad():
                    prediction = predict(b.z, b.t, b.cond)
                with w.swapped():  # backward must run while the U-Net holds the weights of this forward pass
                    l_far = (b.weight * losses.removal(prediction, predict(b.z, b.t, a.cond))).mean()
                    gradient = gradient + torch.autograd.grad(-l_far, adversary.pi)[0]
            adversary.pi.grad = gradient
            adversary.optimizer.step()

            b = trainer.batch("removal", n, retained=False)
            a = adversary.candidates(b, "removal", n)
            with w.frozen():
                eps_t = predict(b.z, b.t, a.cond)
            y = losses.neutral_target(b.eps, eps_t, config.eta)
            cond = Conditioning.cat([b.cond, a.cond.map(Tensor.detach)])
            prediction = predict(torch.cat([b.z, a.z]), torch.cat([b.t, a.t]), cond)
            l_removal = (b.weight * losses.removal(prediction[: b.n], y)).mean()
            l_retain = (a.weight * losses.retain(prediction[b.n :], a.eps)).mean()
            optimizer_step(optimizer, l_removal + config.lam * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)} | adversary.trainables, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta(), candidates=adversary.preferred())
