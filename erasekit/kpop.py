"""KPOP: knowledge transfer trains the prompts, knowledge removal trains the model, in turn (arXiv 2403.12326, section 3)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch

from . import losses
from .artifacts import Erasure
from .attention import PLACES, Prompt, augment
from .checkpoints import seeded
from .mechanisms import CHOICES, Network, Tensors
from .text import encode, said
from .training import Bench, Rolled, Student, accept, update
from .trajectories import roll

TARGETS = ("neutral", "anchor")
STAGES = ("alternating", "joint")


@dataclass(frozen=True)
class KPOP(Rolled):
    """Settings of the method; the paper's symbols where it has one. Defaults suit the bundled world."""

    steps: int = 150
    reading: str = "recoverable"  # what the prompted output is held to: "recoverable" or "adversarial"
    # Prompted layers: "mid", "mid+up" or "all"; the paper's objects use "mid", which recovers less here.
    place: str = "all"
    m: int = 10  # prompt length
    # How the prompt enters a layer (`attention.MECHANISMS`), or "network": one network makes every concept's.
    mechanism: str = "shared"
    # The concepts that prompts are trained on, () for all. Of another that is hidden too, the key is what an untrained tensor
    # or the network gives.
    taught: tuple[str, ...] = ()
    # What removal pulls the concept to: "neutral", the paper's, or "anchor", a retained object as in CA (arXiv 2303.13516).
    target: str = "neutral"
    eta: float = 1.0  # how far beyond it, away from the concept
    lam: float = 1.0  # weight of the prompted term in removal (the paper's lambda, or b in the adversarial reading)
    transfer_steps: int = 1  # prompt updates before each model update
    # "alternating", the paper's, or "joint": one pass of the prompted model serves both stages, and prompts and model move at
    # once. Both pull the prompted output to the same place only in the recoverable reading.
    stages: str = "alternating"
    prompt_lr: float = 3e-2  # Adam, prompts

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "taught", tuple(self.taught))
        accept("reading", self.reading, losses.READINGS)
        accept("mechanism", self.mechanism, CHOICES)
        accept("place", self.place, PLACES)
        accept("target", self.target, TARGETS)
        accept("stages", self.stages, STAGES)
        if self.transfer_steps < 0:
            raise ValueError(f"transfer_steps={self.transfer_steps} is not possible: it is at least 0")
        if self.stages == "joint" and (self.reading != "recoverable" or self.transfer_steps != 1 or self.lam <= 0):
            raise ValueError(
                f"stages='joint' is not possible with reading={self.reading!r}, transfer_steps={self.transfer_steps}, "
                f"lam={self.lam}: it takes the recoverable reading, one transfer step, and lam above 0"
            )


def kpop(
    world,
    concepts: list[str],
    config: KPOP | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
    rehearse: dict[str, Prompt] | None = None,
) -> Erasure:
    """Hide concepts, and make one key for each.

    `checkpoint` is a file to stop and go on with: a run that finds its own there continues to the same result. `rehearse` are
    keys of earlier erasures that should still open the model when this one is done (for a `World.after` them). Raises
    ValueError for an empty concept or an impossible setting. The world's model is unchanged afterwards.
    """
    config = config or KPOP()
    for name in config.taught:
        accept("taught concept", name, concepts)
    bench = Bench(world, concepts, config, "kpop")
    tokens = [world.concept_tokens(c).float().to(bench.device) for c in concepts]
    if config.mechanism == "network":
        prompts = Network(bench.unet, config.place, tokens, config.m, config.seed)
    else:
        prompts = Tensors(
            bench.unet, config.mechanism, config.place, tokens, config.m, said(bench.unet, bench.embeddings).shape[1]
        )
    taught = torch.tensor([float(c in config.taught) for c in concepts], device=bench.device)
    old = Rehearsal(world, rehearse, bench) if rehearse else None

    if config.target == "anchor":
        anchors = encode(world.pipe, [text for c in concepts for text in world.anchors(c)])

    with augment(bench.unet, config.place) as slot, Student(bench.unet, config.group).training() as student:
        bench.student, theta = student, student.parameters
        model_adam = torch.optim.Adam(theta.values(), lr=config.lr)
        prompt_adam = torch.optim.Adam(prompts.parameters.values(), lr=config.prompt_lr)

        def owner(b) -> torch.Tensor:
            return bench.owner[b.index[: b.n]].to(bench.device)

        def over_taught(b, loss: torch.Tensor) -> torch.Tensor:
            """The mean over samples whose concept is taught; zero where there is none."""
            if not config.taught:
                return loss.mean()
            which = taught[owner(b)]
            return (which * loss).sum() / which.sum().clamp(min=1)

        def prompted(b) -> torch.Tensor:
            with slot.holding(prompts.prompt(owner(b)).at(b.t[: b.n], len(bench.alphas))):
                return bench.predict(b.z[: b.n], b.t[: b.n], b.text[: b.n])

        def target(b) -> torch.Tensor:
            if config.target == "neutral":
                return bench.target(b, config.eta)
            with student.frozen():
                eps_a = bench.predict(b.z[: b.n], b.t[: b.n], anchors[b.index[: b.n].to(bench.device)])
            return losses.neutral_target(b.eps[: b.n], eps_a, config.eta)

        def step(n: int) -> dict[str, float]:
            said = {}
            # Where a trajectory was rolled for this step alone, both stages use it.
            shared = bench.draw("removal", n) if config.recipe == "paper" else None
            # Stage 1, knowledge transfer: the prompts learn to draw the concept through theta'.
            for again in range(config.transfer_steps if config.stages == "alternating" else 0):
                b = shared or bench.draw("transfer", n, again, retained=False)
                l_transfer = over_taught(b, b.weight[: b.n] * losses.transfer(prompted(b), b.eps[: b.n]))
                update(prompt_adam, l_transfer, prompts.parameters.values())
                said["transfer"] = l_transfer.item()

            # Stage 2, knowledge removal: without the prompts theta' draws something neutral, and what is retained stays.
            b = shared or bench.draw("removal", n)
            y, weight = target(b), b.weight[: b.n]
            plain = bench.predict(b.z, b.t, b.text)
            held_to = losses.prompted_target(config.reading, b.eps[: b.n], y)
            l_removal = (weight * losses.removal(plain[: b.n], y)).mean()
            l_prompted = over_taught(b, weight * losses.squared_error(prompted(b), held_to))
            l_retain = bench.retain(plain, b)
            loss = l_removal + config.lam * l_prompted + config.retain_weight * l_retain
            if old:
                loss = loss + config.lam * (l_old := old.loss(slot, n))
                said["rehearsal"] = l_old.item()
            if config.stages == "joint":
                # The prompts' gradient of the loss is lam times that of the transfer loss, and Adam takes no notice of lam.
                update(model_adam, loss, [*theta.values(), *prompts.parameters.values()])
                prompt_adam.step()
                said["transfer"] = l_prompted.item()
            else:
                update(model_adam, loss, theta.values())
            return said | {"removal": l_removal.item(), "retain": l_retain.item()}

        players = {"theta": (theta, model_adam), "prompts": (prompts.parameters, prompt_adam)}
        history = bench.fit(step, players, checkpoint, progress)
        delta = student.delta()
    return bench.erasure(history, delta=delta, keys={c: detached(prompts.prompt(n)) for n, c in enumerate(concepts)})


def detached(prompt: Prompt) -> Prompt:
    """A copy of a prompt that belongs to no training."""
    return replace(prompt, k=prompt.k.detach().cpu().clone(), v=prompt.v.detach().cpu().clone())


class Rehearsal:
    """Keys of earlier erasures, held to what the original model draws: the prompted term of removal, for old concepts."""

    def __init__(self, world, keys: dict[str, Prompt], bench: Bench):
        for concept, key in keys.items():
            if (key.mechanism, key.place) != ("shared", bench.config.place):
                raise ValueError(
                    f"the key of {concept!r} is {key.mechanism} in {key.place}: rehearsed keys are shared and in the place that "
                    f"is prompted now, {bench.config.place}"
                )
        self.bench = bench
        subjects = [(key, subject) for concept, key in keys.items() for subject in world.subjects(concept)]
        self.k, self.v = (torch.stack([getattr(key, side) for key, _ in subjects]).to(bench.device) for side in "kv")
        self.pool = roll(world.origin, [subject for _, subject in subjects], bench.config.seed, **bench.config.roll)
        self.text = encode(world.pipe, [text for _, (text, _) in subjects])
        # Names, and what the keys are, so that a checkpoint is not gone on with under others.
        bench.identity["rehearsed"] = {c: key.digest()[:12] for c, key in keys.items()}

    def loss(self, slot, n: int) -> torch.Tensor:
        """Of as many samples as there are of what is erased."""
        generator, bench = seeded("rehearsal", self.bench.config.seed, n), self.bench
        index = torch.randint(len(self.text), (bench.config.batch,), generator=generator)
        z, t, eps, _ = (x.to(bench.device) for x in self.pool.draw(index, generator))
        index = index.to(bench.device)
        with slot.holding(Prompt(self.k[index], self.v[index], bench.config.place)):
            said = bench.predict(z.to(bench.unet.dtype), t, self.text[index])
        return (bench.error_weight(t) * losses.transfer(said, eps)).mean()
