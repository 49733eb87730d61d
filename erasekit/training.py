"""What every trained method shares: settings, the student inside the frozen model's U-Net, batches, and one resumable loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from tqdm.auto import tqdm

from . import losses
from .artifacts import Erasure, check_plain
from .checkpoints import optimizer_state, read_tensors, restore_optimizer, seeded, write_tensors
from .results import provenance
from .text import encode, predict
from .trajectories import ROLL, roll, trajectory

SAVE_EVERY = 30  # seconds between checkpoints
PAPER_STEPS = 50  # of the trajectories that the recipe "paper" rolls
SCALE = 2.0**12  # of losses, so that half-precision gradients do not vanish; a power of two rounds nothing elsewhere

GROUPS = {
    "x": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "u": lambda name: ".attn2." not in name and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out.")),
}


def accept(name: str, value, accepted) -> None:
    """Raise ValueError naming the value and the accepted ones, unless it is one of them."""
    if value not in accepted:
        raise ValueError(f"unknown {name} {value!r}: accepted are {', '.join(accepted)}")


def several(name: str, value) -> tuple:
    """A list as a tuple. Raises ValueError for one text, whose letters would be taken for it."""
    if isinstance(value, str):
        raise ValueError(f"{name}={value!r} is one text, not a list of them: give [{value!r}]")
    return tuple(value)


@dataclass(frozen=True)
class Training:
    """Settings every trained method has. Raises ValueError for an impossible one."""

    steps: int = 100  # model updates
    batch: int = 8  # samples of what is erased, and as many of what is retained
    lr: float = 1e-4
    error: str = "eps"  # the space errors are taken in: "eps" or "x0"
    retain: tuple[
        str, ...
    ] = ()  # texts whose prediction is kept ("" is the empty text); name what you do not report on
    retain_weight: float = 1.0
    rolled: int | None = None  # trajectories of each text in the pool; None: as many as `trajectories.ROLL` says
    rolled_retained: int | None = None  # of each retained text; None: as many as of the others
    roll_steps: int | None = None  # latents of each trajectory, evenly spaced in time; None: as for `rolled`
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "retain", several("retain", self.retain))
        accept("error", self.error, losses.ERROR_SPACES)
        for name in ("steps", "batch", "rolled", "rolled_retained", "roll_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not possible: it is at least 1")
        if (self.rolled_retained or 1) > (most := self.roll["seeds"]):
            raise ValueError(
                f"rolled_retained={self.rolled_retained} is not possible: it is at most {most}, as is rolled"
            )

    @property
    def roll(self) -> dict:
        """How trajectories are rolled: what `trajectories.roll` takes beside texts and seed."""
        own = {"seeds": self.rolled, "steps": self.roll_steps}
        return ROLL | {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class WeightTraining(Training):
    """Settings of the methods that train weights of the U-Net."""

    group: str = "x"  # "x" (attn2), "kv" (its keys and values), "u" (all but attn2, time embedding, output head)

    def __post_init__(self):
        super().__post_init__()
        accept("group", self.group, GROUPS)


RECIPES = ("pool", "paper")
ROLLERS = ("frozen", "current")
LATENTS = ("own", "erased")


@dataclass(frozen=True)
class Rolled(WeightTraining):
    """Settings of the methods that offer their publication's way to latents beside ours.

    "pool": all latents of trajectories that were rolled before, by the frozen model unless `roller` says otherwise. "paper":
    for every step a new trajectory of the model as it is now, of which one latent is used; what is retained is asked there too.
    """

    recipe: str = "pool"
    # Model updates after which each erased text's oldest trajectory in the pool gives way to a new one; None: never.
    refresh: int | None = None
    roller: str = "frozen"  # who rolls the new ones: "frozen", or "current", the model in training as it is then
    # Where what is retained is asked: at latents of its "own" trajectories, or at the "erased" texts', as "paper" always does.
    retained_at: str = "own"

    def __post_init__(self):
        super().__post_init__()
        accept("recipe", self.recipe, RECIPES)
        accept("roller", self.roller, ROLLERS)
        accept("retained_at", self.retained_at, LATENTS)
        of_a_pool = [name for name in ("rolled", "rolled_retained", "roll_steps") if getattr(self, name) is not None]
        if of_a_pool and self.recipe == "paper":
            name = of_a_pool[0]
            raise ValueError(f"{name}={getattr(self, name)} is not possible with recipe='paper', which keeps no pool")
        if self.rolled_retained is not None and self.retained_at == "erased":
            raise ValueError(
                f"rolled_retained={self.rolled_retained} is not possible with retained_at='erased': what is retained has no "
                "trajectories of its own then"
            )
        if self.refresh is not None and (self.refresh < 1 or self.recipe == "paper"):
            raise ValueError(
                f"refresh={self.refresh} is not possible with recipe={self.recipe!r}: it is at least 1, and of a pool"
            )
        if self.roller != "frozen" and not self.refresh:
            raise ValueError(
                f"roller={self.roller!r} is not possible without refresh, the number of updates after which it rolls"
            )


class Student:
    """theta' living inside the frozen model's own U-Net: they share every weight that is not trained.

    The U-Net holds theta' while `training`; `frozen` and `swapped` put theta back for the length of a with block.
    """

    def __init__(self, unet, group: str):
        self.unet = unet
        chosen = {name: p for name, p in unet.named_parameters() if GROUPS[group](name)}
        if not chosen:
            raise ValueError(f"the group {group!r} selects no weights of this model")
        self.parameters = chosen
        self.theta = {name: p.data for name, p in chosen.items()}

    @contextmanager
    def training(self) -> Iterator["Student"]:
        """The trained weights are fresh float32 copies inside the block; the frozen ones come back after it."""
        with gradients_off(self.unet):
            for p in self.parameters.values():
                p.data = p.data.float().clone()
                p.requires_grad_(True)
            try:
                yield self
            finally:
                for name, p in self.parameters.items():
                    p.data = self.theta[name]

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """theta in place of theta', without gradients."""
        with self.swapped(), torch.no_grad():
            yield

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """theta in place of theta'; a gradient through it must be taken before the block ends."""
        trained = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.theta[name]
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = trained[name]

    def delta(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}


@contextmanager
def gradients_off(unet) -> Iterator[None]:
    """No weight of the U-Net asks for a gradient inside the block; afterwards each is as it was."""
    wanted = {name: p.requires_grad for name, p in unet.named_parameters()}
    unet.requires_grad_(False)
    try:
        yield
    finally:
        for name, p in unet.named_parameters():
            p.requires_grad_(wanted[name])


@dataclass
class Batch:
    """`n` samples of what is erased, then as many of what is retained, if anything is.

    `index` (B,) of each sample's text, latents `z` (B, C, h, w), time steps `t` (B,), embeddings `text`, the frozen model's
    predictions `eps` for that text and `null`, of the first `n` at least, for the text it is erased towards, and `weight` (B,),
    of the error space.
    """

    n: int
    index: torch.Tensor
    z: torch.Tensor
    t: torch.Tensor
    text: torch.Tensor
    eps: torch.Tensor
    null: torch.Tensor
    weight: torch.Tensor


class Bench:
    """The shared kit: texts, embeddings, a pool of latents with the frozen model's predictions, batches, and the loop."""

    def __init__(self, world, concepts: list[str], config: Training, method: str):
        check_concepts(concepts)
        check_plain(world.pipe.unet)
        self.world, self.concepts, self.config, self.method = world, list(concepts), config, method
        self.unet, self.device = world.pipe.unet, world.pipe.device
        subjects = [(n, s) for n, concept in enumerate(concepts) for s in world.subjects(concept)]
        retained = [(world.prompt(r) if r else "", "") for r in config.retain]
        self.owner = torch.tensor([n for n, _ in subjects])  # subject -> concept
        self.erased, self.retained = len(subjects), len(retained)
        self.texts = [text for _, (text, _) in subjects] + [text for text, _ in retained]
        self.pool, self.student = None, None
        if getattr(config, "recipe", "pool") == "pool":
            own = retained if getattr(config, "retained_at", "own") == "own" else []
            how = config.roll
            seeds = [how["seeds"]] * self.erased + [config.rolled_retained or how["seeds"]] * len(own)
            self.pool = roll(world, [s for _, s in subjects] + own, config.seed, **how | {"seeds": seeds})
        self.bases = [base for _, (_, base) in subjects]
        self.embeddings = encode(world.pipe, self.texts)
        self.alphas = world.pipe.scheduler.alphas_cumprod.to(self.device)
        self.began = time.time()
        # What two runs must share to be the same run; taken now, while the U-Net holds the base.
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        base = world.fingerprint
        self.identity = {"method": method, "concepts": self.concepts, "base": base, "config": settings}

    def draw(self, purpose: str, step: int, *more: int, retained: bool = True) -> Batch:
        """The batch of a step, drawn by the seed, the purpose and the step alone. `retained=False` leaves that part out."""
        generator, n = seeded(purpose, self.config.seed, step, *more), self.config.batch
        index = torch.randint(self.erased, (n,), generator=generator)
        if retained and self.retained:
            index = torch.cat([index, self.erased + torch.randint(self.retained, (n,), generator=generator)])
        if self.pool:
            own = index[index < len(self.pool.latents)]
            z, t, eps, null = (x.to(self.device) for x in self.pool.draw(own, generator))
            z = z.to(self.unet.dtype)
            if len(own) < len(index):  # what has no trajectories of its own
                z, t = z.repeat(2, 1, 1, 1), t.repeat(2)
                with self.student.frozen():
                    said = self.predict(z[n:], t[n:], self.embeddings[index[n:].to(self.device)])
                eps = torch.cat([eps, said])
        else:
            z, t, eps, null = self.rolled(index, generator)
        weight = self.error_weight(t)
        return Batch(n, index, z, t, self.embeddings[index.to(self.device)], eps, null, weight)

    @torch.no_grad()
    def rolled(self, index: torch.Tensor, generator: torch.Generator):
        """`LatentPool.draw` of the recipe "paper", for a `student` in training: 50 DDIM steps, guidance 3, stopped anywhere."""
        n, sample = self.config.batch, self.world.pipe.unet.config
        scheduler = DDIMScheduler.from_config(self.world.pipe.scheduler.config, clip_sample=False)
        scheduler.set_timesteps(PAPER_STEPS)
        stops = torch.randint(PAPER_STEPS, (n,), generator=generator)
        shape = (n, sample.in_channels, sample.sample_size, sample.sample_size)
        z = torch.randn(shape, generator=generator).to(self.device, self.unet.dtype)
        own, empty = self.embeddings[index[:n].to(self.device)], encode(self.world.pipe, [""])
        for step, time_ in enumerate(scheduler.timesteps.tolist()):
            rows = (stops > step).nonzero().flatten().to(self.device)
            if not len(rows):
                break
            t = torch.full((2 * len(rows),), time_, device=self.device)
            both = torch.cat([own[rows], empty.expand(len(rows), -1, -1)])
            eps, null = self.predict(z[rows].repeat(2, 1, 1, 1), t, both).chunk(2)
            guided = (null + ROLL["guidance"] * (eps - null)).to(z)
            z[rows] = scheduler.step(guided, time_, z[rows], eta=0.0).prev_sample
        times = len(index) // n  # what is retained has the same latents
        z, t = z.repeat(times, 1, 1, 1), scheduler.timesteps[stops].to(self.device).repeat(times)
        bases = encode(self.world.pipe, [self.bases[i] for i in index[:n].tolist()])
        with self.student.frozen():
            said = self.predict(
                torch.cat([z, z[:n]]), torch.cat([t, t[:n]]), torch.cat([self.embeddings[index.to(self.device)], bases])
            )
        return z, t, said[: len(index)], said[len(index) :]

    @torch.no_grad()
    def renew(self, n: int) -> None:
        """Each erased text's oldest trajectory gives way to a new one; whoever rolls it, theta's answers are kept."""
        pool, slot = self.pool, (n // self.config.refresh - 1) % self.pool.latents.shape[1]
        for i, (text, base) in enumerate(zip(self.texts[: self.erased], self.bases)):
            how = {"seed": [self.config.seed, n], **self.config.roll} | {"seeds": 1}
            if self.config.roller == "frozen":
                with self.student.frozen():
                    z, eps, null, clean, _ = trajectory(self.world, text, base, **how)
            else:
                z, *_, clean, t = trajectory(self.world, text, "", **how)
                with self.student.frozen():
                    eps, null = (self.said_along(z[0], t, asked)[None] for asked in (text, base))
            for kept, new in zip((pool.latents, pool.eps, pool.null, pool.clean), (z, eps, null, clean)):
                kept[i, slot] = new[0]

    def said_along(self, z: torch.Tensor, t: torch.Tensor, text: str) -> torch.Tensor:
        """What the U-Net predicts of a text at each latent (steps, C, h, w) of a trajectory, on the CPU."""
        embedding = encode(self.world.pipe, [text])
        parts = zip(
            z.to(self.device, self.unet.dtype).split(self.world.batch), t.to(self.device).split(self.world.batch)
        )
        return torch.cat([self.predict(z, t, embedding.expand(len(t), -1, -1)).cpu() for z, t in parts])

    def error_weight(self, t: torch.Tensor) -> torch.Tensor:
        """The weight (B,) of the configured error space at time steps (B,)."""
        prediction = self.world.pipe.scheduler.config.prediction_type
        return losses.error_weight(self.config.error, self.alphas[t], prediction)

    def predict(self, z: torch.Tensor, t: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """The U-Net's noise prediction (B, C, h, w), float32."""
        # autocast caches cast weights until its block ends, so each prediction opens its own: theta and theta' alternate.
        with self.world.autocast():
            return predict(self.unet, z, t, text.to(self.unet.dtype)).float()

    def retain(self, student: torch.Tensor, b: Batch) -> torch.Tensor:
        """The loss on what is retained, from the student's predictions of a whole batch; zero where nothing is."""
        return (b.weight[b.n :] * losses.retain(student[b.n :], b.eps[b.n :])).sum() / b.n

    def target(self, b: Batch, eta: float) -> torch.Tensor:
        """What the erased samples of a batch are pulled to; see `losses.neutral_target`."""
        return losses.neutral_target(b.eps[: b.n], b.null[: b.n], eta)

    def fit(
        self,
        step: Callable[[int], dict[str, float]],
        players: dict[str, tuple[dict[str, torch.Tensor], torch.optim.Optimizer]],
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Call `step(n)`, which updates the players and returns its losses, and resume from `checkpoint` if it is this run's.

        A player is its named tensors and their optimiser. The pool is renewed on the way. Returns the losses of every step.
        Nothing in a step depends on how many there will be, so a checkpoint of a shorter training goes on too.
        """
        history: list[dict[str, float]] = []
        total, identity, refresh = self.config.steps, self.identity, getattr(self.config, "refresh", None)
        changing = ("latents", "eps", "null", "clean") if refresh else ()
        renewed = {name: getattr(self.pool, name)[: self.erased] for name in changing}
        if checkpoint and Path(checkpoint).exists():
            stored, meta = read_tensors(checkpoint)
            if lengthless(meta["identity"]) != lengthless(identity):
                raise ValueError(
                    f"{checkpoint} belongs to another run (other concepts, settings or base): remove it first"
                )
            if len(meta["history"]) > total:
                raise ValueError(
                    f"steps={total} is not possible: {checkpoint} has taken {len(meta['history'])} already; ask for as many "
                    "or more, or remove it"
                )
            for player, (tensors, optimizer) in players.items():
                for name, tensor in tensors.items():
                    tensor.data.copy_(stored[f"{player}.{name}"])
                restore_optimizer(optimizer, f"adam.{player}", stored)
            for name, own in renewed.items():
                own.copy_(stored[f"pool.{name}"])
            history = meta["history"]
        bar = tqdm(range(len(history), total), initial=len(history), total=total, disable=not progress, mininterval=1)
        bar.set_description(f"{self.method}: {', '.join(self.concepts)}")
        saved = time.time()
        for n in bar:
            if refresh and n and n % refresh == 0:
                self.renew(n)
            history.append(step(n))
            bar.set_postfix({k: f"{v:.3f}" for k, v in history[-1].items()}, refresh=False)
            if checkpoint and (time.time() - saved > SAVE_EVERY or n + 1 == total):
                state = {f"{p}.{name}": t for p, (tensors, _) in players.items() for name, t in tensors.items()}
                for player, (_, optimizer) in players.items():
                    state |= optimizer_state(optimizer, f"adam.{player}")
                state |= {f"pool.{name}": own for name, own in renewed.items()}
                write_tensors(checkpoint, state, {"identity": identity, "history": history}, private=True)
                saved = time.time()
        return history

    def erasure(self, history=(), **parts) -> Erasure:
        """The finished erasure; `parts` are `Erasure`'s delta, keys and adapters, and more for its info."""
        held = {name: parts.pop(name) for name in ("delta", "keys", "adapters") if name in parts}
        info = {"world": self.world.name, **self.identity, "seed": self.config.seed, "history": list(history)} | parts
        made = provenance(self.device, time.time() - self.began)
        return Erasure(**{"delta": {}, "keys": {}} | held, info=info | {"provenance": made})


def lengthless(identity: dict) -> dict:
    """What a run is, but for its number of steps."""
    return identity | {"config": {name: value for name, value in identity["config"].items() if name != "steps"}}


def update(adam: torch.optim.Optimizer, loss: torch.Tensor, parameters, clip: float | None = None) -> None:
    """One step on these parameters alone; no gradient reaches any other, and one the loss does not use stays.

    `clip` bounds the gradient's norm. Raises FloatingPointError, before anything moves, for a loss or gradient that is no number.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss.item()}: take a smaller learning rate, or bf16 or fp32 in place of fp16"
        )
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss * SCALE, parameters, allow_unused=True)
    if not all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None):
        raise FloatingPointError("a gradient is no number: take bf16 or fp32 in place of fp16, or errors on eps")
    for p, gradient in zip(parameters, gradients):
        p.grad = None if gradient is None else gradient / SCALE
    if clip:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    adam.step()


def check_concepts(concepts: list[str]) -> None:
    """Raise ValueError for no concept, an empty one, one named twice, or a bare string."""
    if isinstance(concepts, str):
        raise ValueError(f"concepts={concepts!r} is one string: give a list, [{concepts!r}]")
    if not concepts or any(not c.strip() for c in concepts):
        raise ValueError(f"there is an empty concept in {concepts!r}: name at least one, each with a word")
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"a concept is named twice in {concepts!r}")
