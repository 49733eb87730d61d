"""What every trained method shares: configs, the trainable copy of the weights, batches, and one resumable loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import losses
from .artifacts import Erasure
from .attention import one_thread
from .checkpoints import LATER, optimizer_state, read_tensors, restore_optimizer, seeded, write_tensors
from .checks import as_texts, check_choice, check_concepts, check_numbers, check_unet
from .conditioning import Conditioning, encode, predict_noise
from .provenance import provenance
from .sampling import scheduler_for
from .trajectories import TRAJECTORIES, make_pool
from .world import as_world

SAVE_EVERY = 30  # seconds between checkpoints
ON_POLICY_STEPS = 50  # DDIM steps of the trajectories that latents="on_policy" samples, as published
LOSS_SCALE = 2.0**12  # so that half-precision gradients do not vanish; a power of two rounds nothing else

OUTSIDE = ("time_embedding.", "conv_norm_out.", "conv_out.")  # never trained by ESD-u
TRAIN_METHODS = {  # ESD's names -> which of the U-Net's parameters are trained
    "xattn": lambda name: ".attn2." in name,
    "xattn-kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "noxattn": lambda name: ".attn2." not in name and not name.startswith(OUTSIDE),
}
LATENTS = ("pool", "on_policy")


@dataclass(frozen=True)
class TrainConfig:
    """Settings of every trained method. Raises ValueError for an impossible one.

    `steps`, `batch_size`, `lr` and the pool's are the world's own where they are None, see `at_world_rates`.
    """

    RATES: ClassVar[dict] = {"steps": 100, "batch_size": 8, "lr": 1e-4}  # where the world has none of its own
    steps: int | None = None  # model updates
    batch_size: int | None = None  # samples of what is erased, and as many of what is retained
    lr: float | None = None
    loss_space: str = "eps"  # the space of errors: "eps" or "x0"
    retain: tuple[str, ...] = ()  # concepts whose prediction is kept ("" is the empty prompt); report on others
    retain_weight: float = 1.0
    num_trajectories: int | None = None  # of each erased prompt in the pool; None: `trajectories.TRAJECTORIES`
    num_retain_trajectories: int | None = None  # of each retained prompt; None: as many
    trajectory_steps: int | None = None  # latents of each trajectory; None: `trajectories.TRAJECTORIES`
    diverse_prompts: bool = False  # erase each concept by many contextual prompts, which share its trajectories
    seed: int = 0

    def __post_init__(self):
        object.__setattr__(self, "retain", as_texts("retain", self.retain))
        check_choice("loss_space", self.loss_space, losses.LOSS_SPACES)
        check_numbers(self)
        if (own := self.num_retain_trajectories or 1) > (most := self.trajectories["count"]):
            raise ValueError(f"num_retain_trajectories={own} is not possible: it is at most num_trajectories, {most}")

    @property
    def trajectories(self) -> dict:
        """Arguments of `trajectories.make_pool`."""
        own = {"count": self.num_trajectories, "steps": self.trajectory_steps}
        return TRAJECTORIES | {name: value for name, value in own.items() if value is not None}


@dataclass(frozen=True)
class WeightConfig(TrainConfig):
    """Settings of methods that train weights of the U-Net: `train_method` says which, by ESD's names."""

    train_method: str = "xattn"  # "xattn", "xattn-kv", or "noxattn" (all but attn2, time embedding and output head)

    def __post_init__(self):
        super().__post_init__()
        check_choice("train_method", self.train_method, TRAIN_METHODS)


@dataclass(frozen=True)
class LatentConfig(WeightConfig):
    """Settings of methods that can also train as published.

    `latents`: "pool", trajectories of the frozen model, sampled once; or "on_policy", for each step a new trajectory of the
    present model, of which one latent is used, for the retained prompts too.
    """

    latents: str = "pool"

    def __post_init__(self):
        super().__post_init__()
        check_choice("latents", self.latents, LATENTS)
        of_pool = ("num_trajectories", "num_retain_trajectories", "trajectory_steps")
        given = [name for name in of_pool if getattr(self, name) is not None]
        if given and self.latents == "on_policy":
            raise ValueError(f"{given[0]}={getattr(self, given[0])} is not possible with latents='on_policy': no pool")


def at_world_rates(config, world):
    """A config with the world's own rates, or else its method's, in the place of None."""
    if not isinstance(config, TrainConfig):
        return config
    rates = dict(config.RATES)
    if isinstance(config, WeightConfig):
        rates |= {"lr": rates["lr"] * world.lr_scale} | world.train_defaults
    if getattr(config, "latents", "pool") == "pool":
        rates |= world.pool_defaults
    return replace(config, **{name: rate for name, rate in rates.items() if getattr(config, name) is None})


class TrainableWeights:
    """Trainable copy of selected U-Net weights, swapped into the same module; the rest is shared with the frozen model."""

    def __init__(self, unet, train_method: str):
        self.unet = unet
        self.parameters = {name: p for name, p in unet.named_parameters() if TRAIN_METHODS[train_method](name)}
        if not self.parameters:
            raise ValueError(f"train_method {train_method!r} selects no weights of this model")
        self.theta = {name: p.data for name, p in self.parameters.items()}

    @contextmanager
    def training(self) -> Iterator["TrainableWeights"]:
        """The U-Net holds theta', float32 copies, inside the block; theta comes back afterwards."""
        with one_thread(self.unet), gradients_off(self.unet):
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

    def delta(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self.parameters.items()}


@contextmanager
def gradients_off(module) -> Iterator[None]:
    """No weight of the module requires a gradient inside the block."""
    before = {name: p.requires_grad for name, p in module.named_parameters()}
    module.requires_grad_(False)
    try:
        yield
    finally:
        for name, p in module.named_parameters():
            p.requires_grad_(before[name])


@dataclass
class Batch:
    """`n` samples of what is erased, then as many of what is retained, if anything is.

    `index` (B,): each sample's prompt. `z` (B, C, h, w), `t` (B,), `cond`: the U-Net's inputs. `eps`: the frozen model's
    prediction; `eps_null`, of the first n at least: that for the prompt it is erased towards. `weight` (B,): of the loss space.
    """

    n: int
    index: Tensor
    z: Tensor
    t: Tensor
    cond: Conditioning
    eps: Tensor
    eps_null: Tensor
    weight: Tensor


class Trainer:
    """Shared by all methods: the config at the world's rates, prompts, the pool of latents, batches, and the training loop."""

    def __init__(self, world, concepts: list[str], config: TrainConfig, method: str):
        check_concepts(concepts)
        world = as_world(world)
        check_unet(world.pipe.unet)
        self.config = config = at_world_rates(config, world)
        self.world, self.concepts, self.method = world, list(concepts), method
        self.unet, self.device = world.pipe.unet, world.pipe.device
        self.weights: TrainableWeights | None = None  # needed by latents="on_policy"
        pairs = [(n, pair) for n, c in enumerate(concepts) for pair in world.prompt_pairs(c, config.diverse_prompts)]
        retained = [(world.prompt(r) if r else "", "") for r in config.retain]
        self.owner = torch.tensor([n for n, _ in pairs])  # erased prompt -> concept
        self.num_erased, self.num_retained, self.pool = len(pairs), len(retained), None
        asked = [pair for _, pair in pairs] + retained
        self.prompts, self.neutral_prompts = [p for p, _ in asked], [neutral for _, (_, neutral) in pairs]
        if getattr(config, "latents", "pool") == "pool":
            most, single = config.trajectories["count"], sum(len(world.prompt_pairs(c)) for c in concepts)
            self.count = max(1, most * single // len(pairs))  # of each of `diverse_prompts`, which share a concept's
            count = [self.count] * len(pairs) + [config.num_retain_trajectories or most] * len(retained)
            self.pool = make_pool(world, asked, config.seed, **config.trajectories | {"count": count})
        self.cond = encode(world.pipe, self.prompts)
        self.alphas = world.pipe.scheduler.alphas_cumprod.to(self.device)
        self.began = time.time()
        # What two runs must share to be the same run; computed now, while the U-Net holds the base.
        settings = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(config).items()}
        self.identity = world.identity | {"method": method, "concepts": self.concepts, "config": settings}

    def batch(self, purpose: str, step: int, *more: int, retained: bool = True) -> Batch:
        """The batch of a step, decided by seed, purpose and step alone. `retained=False` leaves that part out."""
        generator, n = seeded(purpose, self.config.seed, step, *more), self.config.batch_size
        index = torch.randint(self.num_erased, (n,), generator=generator)
        if retained and self.num_retained:
            index = torch.cat([index, self.num_erased + torch.randint(self.num_retained, (n,), generator=generator)])
        latents = self.pool.sample(index, generator) if self.pool else self.on_policy(index, generator)
        z, t, eps, eps_null = (x.to(self.device) for x in latents)
        cond = self.cond[index.to(self.device)]
        return Batch(n, index, z.to(self.unet.dtype), t, cond, eps, eps_null, self.loss_weight(t))

    @torch.no_grad()
    def on_policy(self, index: Tensor, generator: torch.Generator):
        """What `LatentPool.sample` returns, from new trajectories of theta': 50 DDIM steps, guidance 3, stopped anywhere."""
        n, pipe = self.config.batch_size, self.world.pipe
        scheduler = scheduler_for(pipe)
        scheduler.set_timesteps(ON_POLICY_STEPS)
        stops = torch.randint(ON_POLICY_STEPS, (n,), generator=generator)
        side = pipe.unet.config.sample_size
        z = torch.randn((n, pipe.unet.config.in_channels, side, side), generator=generator)
        z = z.to(self.device, self.unet.dtype)
        own, empty = self.cond[index[:n].to(self.device)], encode(pipe, [""])
        for step, now in enumerate(scheduler.timesteps.tolist()):
            rows = (stops > step).nonzero().flatten().to(self.device)
            if not len(rows):
                break
            t = torch.full((2 * len(rows),), now, device=self.device)
            both = Conditioning.cat([own[rows], empty.expand(len(rows))])
            eps, eps_null = self.predict(z[rows].repeat(2, 1, 1, 1), t, both).chunk(2)
            guided = (eps_null + TRAJECTORIES["guidance"] * (eps - eps_null)).to(z)
            z[rows] = scheduler.step(guided, now, z[rows], eta=0.0).prev_sample
        times = len(index) // n  # retained prompts share the latents
        z, t = z.repeat(times, 1, 1, 1), scheduler.timesteps[stops].to(self.device).repeat(times)
        neutral = encode(pipe, [self.neutral_prompts[i] for i in index[:n].tolist()])
        with self.weights.frozen():
            cond = Conditioning.cat([self.cond[index.to(self.device)], neutral])
            frozen = self.predict(torch.cat([z, z[:n]]), torch.cat([t, t[:n]]), cond)
        return z, t, frozen[: len(index)], frozen[len(index) :]

    def loss_weight(self, t: Tensor) -> Tensor:
        """The weight (B,) of the configured loss space at time steps (B,)."""
        kind = self.world.pipe.scheduler.config.prediction_type
        return losses.loss_weight(self.config.loss_space, self.alphas[t], kind)

    def predict(self, z: Tensor, t: Tensor, cond: Conditioning) -> Tensor:
        """The U-Net's prediction (B, C, h, w), float32."""
        # autocast caches cast weights until its block ends, so each prediction opens its own: theta and theta' alternate.
        with self.world.autocast():
            return predict_noise(self.unet, z, t, cond.to(self.unet.dtype)).float()

    def retain_loss(self, prediction: Tensor, b: Batch) -> Tensor:
        """The loss on what is retained, from the predictions for a whole batch; zero if nothing is."""
        return (b.weight[b.n :] * losses.retain(prediction[b.n :], b.eps[b.n :])).sum() / b.n

    def target(self, b: Batch, eta: float) -> Tensor:
        """The neutral target of a batch's erased samples."""
        return losses.neutral_target(b.eps[: b.n], b.eps_null[: b.n], eta)

    def fit(
        self,
        step: Callable[[int], dict[str, float]],
        trainables: dict[str, tuple[dict[str, Tensor], torch.optim.Optimizer]],
        checkpoint: Path | None = None,
        progress: bool = True,
    ) -> list[dict[str, float]]:
        """Call `step(n)`, which updates and returns its losses, for each step; resume from `checkpoint` if it is this run's.

        `trainables`: name -> (named tensors, their optimizer), stored in the checkpoint. Returns the losses of every step.
        Nothing in a step depends on how many there will be, so a longer run may resume a shorter one.
        """
        total, resumes = self.config.steps, checkpoint and Path(checkpoint).exists()
        history = self.resume(Path(checkpoint), trainables) if resumes else []
        how = {"desc": f"{self.method}: {', '.join(self.concepts)}", "disable": not progress, "mininterval": 1}
        bar, saved = tqdm(range(len(history), total), initial=len(history), total=total, **how), time.time()
        for n in bar:
            history.append(step(n))
            bar.set_postfix({k: f"{v:.3f}" for k, v in history[-1].items()}, refresh=False)
            if checkpoint and (time.time() - saved > SAVE_EVERY or n + 1 == total):
                state = {}
                for kind, (tensors, optimizer) in trainables.items():
                    state |= {f"{kind}.{name}": tensor for name, tensor in tensors.items()}
                    state |= optimizer_state(optimizer, f"adam.{kind}")
                write_tensors(checkpoint, state, {"identity": self.identity, "history": history}, private=True)
                saved = time.time()
        return history

    def resume(self, checkpoint: Path, trainables) -> list[dict[str, float]]:
        """Load a checkpoint of `fit` and return its history. Raises ValueError if it is another run's, or longer."""
        stored, meta = read_tensors(checkpoint)
        if without_steps(meta["identity"]) != without_steps(self.identity):
            raise ValueError(f"{checkpoint} belongs to another run (other concepts, settings or base): remove it first")
        if (taken := len(meta["history"])) > self.config.steps:
            raise ValueError(
                f"steps={self.config.steps} is not possible: {checkpoint} has taken {taken} already; ask for more, or remove it"
            )
        for kind, (tensors, optimizer) in trainables.items():
            for name, tensor in tensors.items():
                tensor.data.copy_(stored[f"{kind}.{name}"])
            restore_optimizer(optimizer, f"adam.{kind}", stored)
        return meta["history"]

    def erasure(self, history=(), **parts) -> Erasure:
        """The finished erasure; `parts` are `Erasure`'s delta, keys and adapters, and additions to its info."""
        own = {name: parts.pop(name) for name in ("delta", "keys", "adapters") if name in parts}
        info = {**self.identity, "seed": self.config.seed, "history": list(history)} | parts
        info["provenance"] = provenance(self.device, time.time() - self.began)
        return Erasure(**{"delta": {}, "keys": {}} | own, info=info)


def without_steps(identity: dict) -> dict:
    """The run's identity without `steps`, so that a longer run may resume a shorter one, and what early files lack."""
    config = LATER | identity["config"] | {"steps": None}
    return identity | {"bf16": None, "noise": None, "config": config}


def optimizer_step(optimizer: torch.optim.Optimizer, loss: Tensor, parameters, clip: float | None = None) -> None:
    """One update of these parameters alone; a parameter the loss does not depend on stays.

    `clip` bounds the gradient's norm. Raises FloatingPointError, before anything changes, for a non-finite loss or gradient.
    """
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}: use a smaller lr, or bf16 or fp32 in place of fp16")
    parameters = list(parameters)
    gradients = torch.autograd.grad(loss * LOSS_SCALE, parameters, allow_unused=True)
    if not all(torch.isfinite(gradient).all() for gradient in gradients if gradient is not None):
        raise FloatingPointError("a gradient is not finite: use bf16 or fp32 in place of fp16, or loss_space='eps'")
    for p, gradient in zip(parameters, gradients):
        p.grad = None if gradient is None else gradient / LOSS_SCALE
    if clip:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    optimizer.step()
