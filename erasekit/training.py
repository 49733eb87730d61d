"""The one loop: knowledge transfer trains the prompts, knowledge removal trains the model, in turn (KPOP, section 3)."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm

from . import losses
from .artifacts import Erasure
from .attention import PLACES, Prompt, augment, initial_prompt
from .checkpoints import optimizer_state, read_tensors, restore_optimizer, seeded, write_tensors
from .results import provenance
from .sampling import encode
from .trajectories import roll

SAVE_EVERY = 30  # seconds between checkpoints

GROUPS = {
    "x": lambda name: ".attn2." in name,
    "kv": lambda name: ".attn2.to_k." in name or ".attn2.to_v." in name,
    "u": lambda name: ".attn2." not in name and not name.startswith(("time_embedding.", "conv_norm_out.", "conv_out.")),
}


@dataclass(frozen=True)
class KPOP:
    """Settings of the method; the paper's symbols where it has one. Defaults suit the bundled world."""

    reading: str = "recoverable"  # what the prompted output is held to: "recoverable" or "adversarial"
    group: str = "x"  # trained weights: "x" (attn2), "kv" (its keys and values), "u" (all but attn2, time, head)
    place: str = (
        "all"  # prompted layers: "mid", "mid+up" or "all"; the paper's objects use "mid", which recovers less here
    )
    m: int = 10  # prompt length
    eta: float = 1.0  # strength of the neutral target
    lam: float = 1.0  # weight of the prompted term in removal (the paper's lambda, or b in the adversarial reading)
    steps: int = 150  # model updates
    transfer_steps: int = 1  # prompt updates before each model update
    batch: int = 8
    lr: float = 1e-4  # Adam, model
    prompt_lr: float = 3e-2  # Adam, prompts
    error: str = "eps"  # the space errors are taken in: "eps" or "x0"
    retain: tuple[str, ...] = ()  # texts whose prediction is kept; name what you do not report on
    retain_weight: float = 1.0
    seed: int = 0

    def __post_init__(self):
        for name, value, accepted in (
            ("reading", self.reading, losses.READINGS),
            ("group", self.group, tuple(GROUPS)),
            ("place", self.place, tuple(PLACES)),
            ("error", self.error, losses.ERROR_SPACES),
        ):
            if value not in accepted:
                raise ValueError(f"unknown {name} {value!r}: accepted are {', '.join(accepted)}")
        for name, least in (("steps", 1), ("batch", 1), ("transfer_steps", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is not possible: it is at least {least}")


class Student:
    """theta' living inside the frozen model's own U-Net: they share every weight that is not trained.

    The U-Net holds theta'; `frozen()` puts theta back for the length of a with block.
    """

    def __init__(self, unet, group: str):
        self.unet = unet
        chosen = {name: p for name, p in unet.named_parameters() if GROUPS[group](name)}
        if not chosen:
            raise ValueError(f"the group {group!r} selects no weights of this model")
        self.parameters = chosen
        self.theta = {name: p.data for name, p in chosen.items()}

    @contextmanager
    def training(self) -> Iterator[None]:
        """The trained weights are fresh float32 copies inside the block; the frozen ones come back after it."""
        wanted = {name: p.requires_grad for name, p in self.unet.named_parameters()}
        self.unet.requires_grad_(False)
        for p in self.parameters.values():
            p.data = p.data.float().clone()
            p.requires_grad_(True)
        try:
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = self.theta[name]
            for name, p in self.unet.named_parameters():
                p.requires_grad_(wanted[name])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        trained = {name: p.data for name, p in self.parameters.items()}
        for name, p in self.parameters.items():
            p.data = self.theta[name]
        try:
            with torch.no_grad():
                yield
        finally:
            for name, p in self.parameters.items():
                p.data = trained[name]


def kpop(
    world, concepts: list[str], config: KPOP | None = None, checkpoint: Path | None = None, progress: bool = True
) -> Erasure:
    """Hide concepts, and make one key for each.

    `checkpoint` is a file to stop and go on with: a run that finds its own there continues to the same result. Raises
    ValueError for an empty concept or an impossible setting. The world's model is unchanged afterwards.
    """
    config = config or KPOP()
    check_concepts(concepts)
    unet, device = world.pipe.unet, world.pipe.device
    began = time.time()
    texts = [world.prompt(c) for c in concepts]
    retained = [world.prompt(r) if r else "" for r in config.retain]
    prompts = [initial_prompt(world.concept_tokens(c).float(), config.m) for c in concepts]
    p_k, p_v = (torch.nn.Parameter(torch.stack(side).to(device)) for side in zip(*((p.k, p.v) for p in prompts)))
    # One pool for the concepts and, so that each is kept on its own trajectories, for what is retained.
    pool = roll(world, texts + retained, config.seed)
    embeddings = encode(world.pipe, [*texts, *retained, ""])
    alphas = world.pipe.scheduler.alphas_cumprod.to(device)
    student = Student(unet, config.group)
    history: list[dict[str, float]] = []

    def predict(latents, t, index, prompt=None) -> torch.Tensor:
        # autocast caches cast weights until its block ends, so each prediction opens its own: theta and theta' alternate.
        text = embeddings[index.to(device)].to(unet.dtype)
        with world.autocast(), slot.holding(prompt):
            return unet(latents, t, text).sample.float()

    def draw(generator, first, count):
        """A batch on the trajectories of `count` texts, from index `first` on: text index, latents, time steps."""
        index = first + torch.randint(count, (config.batch,), generator=generator)
        latents, t = pool.draw(index, generator)
        return index, latents.to(device, unet.dtype), t.to(device)

    def prompt_of(index) -> Prompt:
        return Prompt(p_k[index], p_v[index])

    with augment(unet, config.place) as slot, student.training():
        theta = list(student.parameters.values())
        model_adam = torch.optim.Adam(theta, lr=config.lr)
        prompt_adam = torch.optim.Adam([p_k, p_v], lr=config.prompt_lr)
        null = torch.full((config.batch,), len(embeddings) - 1)
        identity = {
            "concepts": list(concepts),
            "base": world.fingerprint,
            "config": asdict(config) | {"retain": list(config.retain)},
        }

        if checkpoint and Path(checkpoint).exists():
            tensors, meta = read_tensors(checkpoint)
            if meta["identity"] != identity:
                raise ValueError(
                    f"{checkpoint} belongs to another run (other concepts, settings or base): remove it first"
                )
            for name, p in student.parameters.items():
                p.data.copy_(tensors[f"theta.{name}"])
            p_k.data.copy_(tensors["p_k"])
            p_v.data.copy_(tensors["p_v"])
            restore_optimizer(model_adam, "model_adam", tensors)
            restore_optimizer(prompt_adam, "prompt_adam", tensors)
            history = meta["history"]

        def save() -> None:
            state = {f"theta.{name}": p for name, p in student.parameters.items()} | {"p_k": p_k, "p_v": p_v}
            state |= optimizer_state(model_adam, "model_adam") | optimizer_state(prompt_adam, "prompt_adam")
            write_tensors(checkpoint, state, {"identity": identity, "history": history}, private=True)

        bar = tqdm(range(len(history), config.steps), initial=len(history), total=config.steps, disable=not progress)
        bar.set_description("hide " + ", ".join(concepts))
        saved = time.time()
        for step in bar:
            # Stage 1, knowledge transfer: the prompts learn to draw the concept through theta'.
            for n in range(config.transfer_steps):
                index, z, t = draw(seeded("transfer", config.seed, step, n), 0, len(texts))
                with student.frozen():
                    eps_c = predict(z, t, index)
                weight = losses.error_weight(config.error, alphas[t])
                l_transfer = (weight * losses.transfer(predict(z, t, index, prompt_of(index)), eps_c)).mean()
                update(prompt_adam, l_transfer, [p_k, p_v])

            # Stage 2, knowledge removal: without the prompts theta' draws something neutral, and what is retained stays.
            # The concepts' samples come first, n of them, then the retained texts'; one forward serves both.
            generator, n = seeded("removal", config.seed, step), config.batch
            drawn = [draw(generator, 0, len(texts))]
            drawn += [draw(generator, len(texts), len(retained))] if retained else []
            index, z, t = (torch.cat(parts) for parts in zip(*drawn))
            with student.frozen():
                eps = predict(torch.cat([z, z[:n]]), torch.cat([t, t[:n]]), torch.cat([index, null]))
            eps_c, eps_r, eps_null = eps[:n], eps[n:-n], eps[-n:]
            y = losses.neutral_target(eps_c, eps_null, config.eta)
            weight = losses.error_weight(config.error, alphas[t])
            plain, prompted = predict(z, t, index), predict(z[:n], t[:n], index[:n], prompt_of(index[:n]))
            target = losses.prompted_target(config.reading, eps_c, y)
            l_removal = (weight[:n] * losses.removal(plain[:n], y)).mean()
            l_prompted = (weight[:n] * losses.squared_error(prompted, target)).mean()
            l_retain = (weight[n:] * losses.retain(plain[n:], eps_r)).sum() / n
            update(model_adam, l_removal + config.lam * l_prompted + config.retain_weight * l_retain, theta)

            history.append(
                {"transfer": l_transfer.item(), "removal": l_removal.item(), "retain": l_retain.item()}
                if config.transfer_steps
                else {"removal": l_removal.item(), "retain": l_retain.item()}
            )
            bar.set_postfix({k: f"{v:.3f}" for k, v in history[-1].items()}, refresh=False)
            if checkpoint and (time.time() - saved > SAVE_EVERY or step + 1 == config.steps):
                save()
                saved = time.time()

        delta = {name: p.detach().cpu().clone() for name, p in student.parameters.items()}
    keys = {c: Prompt(p_k[n].detach().cpu(), p_v[n].detach().cpu(), config.place) for n, c in enumerate(concepts)}
    info = {"method": "kpop", "world": world.name, **identity, "seed": config.seed, "history": history}
    return Erasure(delta, keys, info | {"provenance": provenance(world.pipe.device, time.time() - began)})


def update(adam: torch.optim.Optimizer, loss: torch.Tensor, parameters: list[torch.Tensor]) -> None:
    """One Adam step on these parameters alone; no gradient reaches any other."""
    for p, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
        p.grad = gradient
    adam.step()


def check_concepts(concepts: list[str]) -> None:
    """Raise ValueError for no concept, an empty one, one named twice, or a bare string."""
    if isinstance(concepts, str):
        raise ValueError(f"concepts={concepts!r} is one string: give a list, [{concepts!r}]")
    if not concepts or any(not c.strip() for c in concepts):
        raise ValueError(f"there is an empty concept in {concepts!r}: name at least one, each with a word")
    if len(set(concepts)) < len(concepts):
        raise ValueError(f"a concept is named twice in {concepts!r}")
