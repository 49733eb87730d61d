"""KPOP: knowledge transfer trains the prompts, knowledge removal trains the model, in turn (arXiv 2403.12326, section 3)."""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import losses
from .artifacts import Erasure
from .attention import PLACES, Prompt, augment, initial_prompt
from .text import encode
from .training import Bench, Student, WeightTraining, accept, update

TARGETS = ("neutral", "anchor")


@dataclass(frozen=True)
class KPOP(WeightTraining):
    """Settings of the method; the paper's symbols where it has one. Defaults suit the bundled world."""

    steps: int = 150
    reading: str = "recoverable"  # what the prompted output is held to: "recoverable" or "adversarial"
    # Prompted layers: "mid", "mid+up" or "all"; the paper's objects use "mid", which recovers less here.
    place: str = "all"
    m: int = 10  # prompt length
    # What removal pulls the concept to: "neutral", the paper's, or "anchor", a retained object as in CA (arXiv 2303.13516).
    target: str = "neutral"
    eta: float = 1.0  # how far beyond it, away from the concept
    lam: float = 1.0  # weight of the prompted term in removal (the paper's lambda, or b in the adversarial reading)
    transfer_steps: int = 1  # prompt updates before each model update
    prompt_lr: float = 3e-2  # Adam, prompts

    def __post_init__(self):
        super().__post_init__()
        accept("reading", self.reading, losses.READINGS)
        accept("place", self.place, PLACES)
        accept("target", self.target, TARGETS)
        if self.transfer_steps < 0:
            raise ValueError(f"transfer_steps={self.transfer_steps} is not possible: it is at least 0")


def kpop(
    world, concepts: list[str], config: KPOP | None = None, checkpoint: Path | None = None, progress: bool = True
) -> Erasure:
    """Hide concepts, and make one key for each.

    `checkpoint` is a file to stop and go on with: a run that finds its own there continues to the same result. Raises
    ValueError for an empty concept or an impossible setting. The world's model is unchanged afterwards.
    """
    config = config or KPOP()
    bench = Bench(world, concepts, config, "kpop")
    starts = [initial_prompt(world.concept_tokens(c).float(), config.m) for c in concepts]
    p_k, p_v = (torch.nn.Parameter(torch.stack(side).to(bench.device)) for side in zip(*((p.k, p.v) for p in starts)))

    if config.target == "anchor":
        anchors = encode(world.pipe, [text for c in concepts for text in world.anchors(c)])

    def prompt_of(b) -> Prompt:
        owner = bench.owner[b.index[: b.n]]
        return Prompt(p_k[owner], p_v[owner])

    with augment(bench.unet, config.place) as slot, Student(bench.unet, config.group).training() as student:
        theta = student.parameters
        model_adam = torch.optim.Adam(theta.values(), lr=config.lr)
        prompt_adam = torch.optim.Adam([p_k, p_v], lr=config.prompt_lr)

        def prompted(b) -> torch.Tensor:
            with slot.holding(prompt_of(b)):
                return bench.predict(b.z[: b.n], b.t[: b.n], b.text[: b.n])

        def target(b) -> torch.Tensor:
            if config.target == "neutral":
                return bench.target(b, config.eta)
            with student.frozen():
                eps_a = bench.predict(b.z[: b.n], b.t[: b.n], anchors[b.index[: b.n].to(bench.device)])
            return losses.neutral_target(b.eps[: b.n], eps_a, config.eta)

        def step(n: int) -> dict[str, float]:
            said = {}
            # Stage 1, knowledge transfer: the prompts learn to draw the concept through theta'.
            for again in range(config.transfer_steps):
                b = bench.draw("transfer", n, again, retained=False)
                l_transfer = (b.weight * losses.transfer(prompted(b), b.eps)).mean()
                update(prompt_adam, l_transfer, [p_k, p_v])
                said["transfer"] = l_transfer.item()

            # Stage 2, knowledge removal: without the prompts theta' draws something neutral, and what is retained stays.
            b = bench.draw("removal", n)
            y, weight = target(b), b.weight[: b.n]
            plain = bench.predict(b.z, b.t, b.text)
            held_to = losses.prompted_target(config.reading, b.eps[: b.n], y)
            l_removal = (weight * losses.removal(plain[: b.n], y)).mean()
            l_prompted = (weight * losses.squared_error(prompted(b), held_to)).mean()
            l_retain = bench.retain(plain, b)
            update(model_adam, l_removal + config.lam * l_prompted + config.retain_weight * l_retain, theta.values())
            return said | {"removal": l_removal.item(), "retain": l_retain.item()}

        players = {"theta": (theta, model_adam), "prompts": ({"k": p_k, "v": p_v}, prompt_adam)}
        history = bench.fit(step, players, checkpoint, progress)
        delta = student.delta()
    keys = {c: Prompt(p_k[n].detach().cpu(), p_v[n].detach().cpu(), config.place) for n, c in enumerate(concepts)}
    return bench.erasure(history, delta=delta, keys=keys)
