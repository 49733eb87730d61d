"""KPOP: knowledge transfer trains the prompts, knowledge removal trains the model, in turn (arXiv 2403.12326, section 3)."""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from . import losses
from .artifacts import Erasure
from .attention import LAYERS, Prompt, augment, check_key
from .checkpoints import seeded
from .checks import as_texts, check_choice, check_type
from .conditioning import encode
from .mechanisms import CHOICES, PromptNetwork, PromptTensors
from .robust import Adversary
from .training import Batch, LatentConfig, TrainableWeights, Trainer, optimizer_step
from .trajectories import make_pool
from .world import World, as_world

TARGETS = ("neutral", "anchor")
SCHEDULES = ("alternating", "joint")


@dataclass(frozen=True)
class KPOP(LatentConfig):
    """Settings of the method, in the paper's symbols where it has one. Defaults suit the bundled world."""

    RATES = LatentConfig.RATES | {"steps": 150}
    prompted_target: str = "concept"  # of the prompted prediction in removal: "concept" or "neutral", see `losses`
    layers: str = "all"  # prompted attn2 layers: "mid" (the paper's for objects), "mid+up" or "all"
    m: int = 10  # prompt length
    retain_prompt: bool = False  # keep what is retained also under one more prompt, trained with the others and dropped
    mechanism: str = "shared"  # how the prompt enters, see `mechanisms`; "network": one network makes all prompts
    train_keys_for: tuple[str, ...] = ()  # concepts whose prompts are trained; () for all
    target: str = "neutral"  # of removal: "neutral", the paper's, or "anchor", a retained concept as in CA (2303.13516)
    anchors: int = 1  # the nearest retained concepts, of which each sample draws one
    neutral_share: float = 0.0  # of samples that take the neutral target in place of an anchor's
    eta: float = 1.0  # how far beyond the target, away from the concept
    lam: float = 1.0  # weight of the prompted term in removal (lambda; b in the adversarial reading)
    transfer_steps: int = 1  # prompt updates before each model update
    # "alternating", the paper's, or "joint": one prompted pass serves both stages, and prompts and model update together.
    schedule: str = "alternating"
    prompt_lr: float = 3e-2
    secret: int | None = None  # seed of the keys' random start, in place of the concepts' tokens; never saved with them
    robust_every: int = 0  # steps between searches for keys and words that are erased too, see `robust`; 0: none
    robust_steps: int = 10  # of each search

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "train_keys_for", as_texts("train_keys_for", self.train_keys_for))
        check_choice("prompted_target", self.prompted_target, losses.PROMPTED_TARGETS)
        check_choice("mechanism", self.mechanism, CHOICES)
        check_choice("layers", self.layers, LAYERS)
        check_choice("target", self.target, TARGETS)
        check_choice("schedule", self.schedule, SCHEDULES)
        if self.retain_prompt and not self.retain:
            raise ValueError("retain_prompt=True is not possible with retain=(): name what is retained")
        if self.target != "anchor" and (self.anchors, self.neutral_share) != (1, 0):
            raise ValueError(f"anchors={self.anchors}, neutral_share={self.neutral_share} need target='anchor'")
        if self.neutral_share > 1:
            raise ValueError(f"neutral_share={self.neutral_share} is not possible: it is a share, from 0 to 1")
        if self.secret is not None and self.mechanism == "added":
            raise ValueError("secret is not possible with mechanism='added', whose prompts start from zero")
        joint_fits = self.prompted_target == "concept" and self.transfer_steps == 1 and self.lam > 0
        if self.schedule == "joint" and not joint_fits:
            raise ValueError(
                f"schedule='joint' is not possible with prompted_target={self.prompted_target!r}, transfer_steps="
                f"{self.transfer_steps}, lam={self.lam}: it takes 'concept', one transfer step, and lam above 0"
            )


def kpop(
    world: World | DiffusionPipeline,
    concepts: list[str],
    config: KPOP | None = None,
    checkpoint: Path | None = None,
    progress: bool = True,
    rehearse: dict[str, Prompt] | None = None,
) -> Erasure:
    """Erase concepts from a world or a diffusers pipeline, and train one key for each.

    `config`: None for the defaults, at the world's own rates. `checkpoint`: a file to resume from; an interrupted run
    continues to the same result. `rehearse`: keys of earlier erasures that should still work afterwards (for a
    `World.with_erasure` of them). Raises ValueError for an impossible model, concept or setting. The world's model is
    unchanged afterwards.
    """
    world = as_world(world)
    config = KPOP() if config is None else config
    check_type("config", config, KPOP, "ek.KPOP(...)")
    concepts = world.check_request(concepts, config.retain)
    for name in config.train_keys_for:
        check_choice("concept in train_keys_for", name, concepts)
    check_type("rehearse", rehearse := rehearse or {}, dict, "erasure.keys")
    for key in rehearse.values():
        check_key(world.pipe.unet, key)
    anchored, diverse = concepts if config.target == "anchor" else [], config.diverse_prompts
    others = [p for rank in range(config.anchors) for c in anchored for p in world.anchor_prompts(c, diverse, rank)]
    trainer = Trainer(world, concepts, config, "kpop")
    config = trainer.config
    prompts = make_prompts(trainer)
    old_keys = Rehearsal(world, rehearse, trainer) if rehearse else None
    anchors = encode(world.pipe, others) if others else None
    with_key = torch.tensor([float(c in (config.train_keys_for or concepts)) for c in concepts], device=trainer.device)
    predict = trainer.predict

    with (
        augment(trainer.unet, config.layers) as state,
        TrainableWeights(trainer.unet, config.train_method).training() as w,
    ):
        trainer.weights, theta = w, w.parameters
        model_adam = torch.optim.Adam(theta.values(), lr=config.lr)
        prompt_adam = torch.optim.Adam(prompts.parameters.values(), lr=config.prompt_lr)
        adversary = Adversary(trainer, state) if config.robust_every else None

        def owner(b: Batch) -> Tensor:
            return trainer.owner[b.index[: b.n]].to(trainer.device)

        def mean_over_keys(b: Batch, loss: Tensor) -> Tensor:
            """Mean over samples whose concept's prompt is trained."""
            if not config.train_keys_for:
                return loss.mean()
            which = with_key[owner(b)]
            return (which * loss).sum() / which.sum().clamp(min=1)

        def prompted(b: Batch, retained: bool = False) -> Tensor:
            """theta' with each sample's own prompt; for what is retained, with the retain prompt."""
            rows, which = (slice(b.n, None), len(concepts)) if retained else (slice(b.n), owner(b))
            with state.use(prompts.prompt(which).at(b.t[rows], len(trainer.alphas))):
                return predict(b.z[rows], b.t[rows], b.cond[rows])

        def retained_prompted(b: Batch) -> Tensor:
            """The loss on what is retained, with the retain prompt; 0 without one."""
            error = losses.retain(prompted(b, retained=True), b.eps[b.n :]) if config.retain_prompt else 0.0
            return (b.weight[b.n :] * error).sum() / b.n

        def target(b: Batch, n: int) -> Tensor:
            if config.target == "neutral":
                return trainer.target(b, config.eta)
            generator = seeded("anchor", config.seed, n)
            which = trainer.num_erased * torch.randint(config.anchors, (b.n,), generator=generator) + b.index[: b.n]
            with w.frozen():
                eps_a = predict(b.z[: b.n], b.t[: b.n], anchors[which.to(trainer.device)])
            neutral = (torch.rand(b.n, generator=generator) < config.neutral_share).to(trainer.device)
            eps_a = torch.where(neutral[:, None, None, None], b.eps_null[: b.n], eps_a)
            return losses.neutral_target(b.eps[: b.n], eps_a, config.eta)

        def step(n: int) -> dict[str, float]:
            values = {}
            searched = config.robust_every and n // config.robust_every
            if searched and n % config.robust_every == 0:
                adversary.search(n)
            # A trajectory that was sampled for this step alone serves both stages.
            shared = trainer.batch("removal", n) if config.latents == "on_policy" else None
            # Stage 1, knowledge transfer: the prompts learn to make theta' predict the concept.
            for again in range(config.transfer_steps if config.schedule == "alternating" else 0):
                b = shared or trainer.batch("transfer", n, again, retained=config.retain_prompt)
                l_transfer = mean_over_keys(b, b.weight[: b.n] * losses.transfer(prompted(b), b.eps[: b.n]))
                optimizer_step(prompt_adam, l_transfer + retained_prompted(b), prompts.parameters.values())
                values["transfer"] = l_transfer.item()

            # Stage 2, knowledge removal: without a prompt theta' predicts the target, and what is retained stays.
            b = shared or trainer.batch("removal", n)
            y, weight = target(b, n), b.weight[: b.n]
            plain = predict(b.z, b.t, b.cond)
            goal = losses.prompted_target(config.prompted_target, b.eps[: b.n], y)
            l_removal = (weight * losses.removal(plain[: b.n], y)).mean()
            l_prompted = mean_over_keys(b, weight * losses.squared_error(prompted(b), goal))
            l_retain = trainer.retain_loss(plain, b) + retained_prompted(b)
            loss = l_removal + config.lam * l_prompted + config.retain_weight * l_retain
            if searched:
                loss = loss + (l_robust := adversary.loss(b, y, n))
                values["robust"] = l_robust.item()
            if old_keys:
                loss = loss + config.lam * (l_old := old_keys.loss(state, n))
                values["rehearsal"] = l_old.item()
            if config.schedule == "joint":
                # The prompt gradient is lam x the transfer gradient; Adam is scale-invariant, so lam cancels.
                optimizer_step(model_adam, loss, [*theta.values(), *prompts.parameters.values()])
                prompt_adam.step()
                values["transfer"] = l_prompted.item()
            else:
                optimizer_step(model_adam, loss, theta.values())
            return values | {"removal": l_removal.item(), "retain": l_retain.item()}

        trainables = {"theta": (theta, model_adam), "prompts": (prompts.parameters, prompt_adam)}
        if adversary:  # not trained by `fit`, but part of what resumes
            trainables["found"] = adversary.found, torch.optim.SGD(adversary.found.values())
        history = trainer.fit(step, trainables, checkpoint, progress)
        delta = w.delta()
    keys = {c: detached(prompts.prompt(n)) for n, c in enumerate(concepts)}
    erasure = trainer.erasure(history, delta=delta, keys=keys)
    erasure.info["moved"] = erasure.moved(world)
    if config.secret is not None:
        erasure.info["config"] = erasure.info["config"] | {"secret": "withheld"}
    return erasure


def make_prompts(trainer: Trainer) -> PromptTensors | PromptNetwork:
    """The trainable prompts, one per concept, starting from the concept's own token embeddings, or from the secret."""
    config, unet = trainer.config, trainer.unet
    tokens = [trainer.world.concept_tokens(c).float().to(trainer.device) for c in trainer.concepts]
    if config.secret is not None:
        tokens = [secret_tokens(own, config.m, config.secret, c) for own, c in zip(tokens, trainer.concepts)]
    tokens += trainer.cond.tokens[trainer.num_erased :][: config.retain_prompt].float()  # the retain prompt's, the last
    if config.mechanism == "network":
        return PromptNetwork(unet, config.layers, tokens, config.m, config.seed)
    return PromptTensors(unet, config.mechanism, config.layers, tokens, config.m, trainer.cond.tokens.shape[1])


def secret_tokens(tokens: Tensor, m: int, secret: int, concept: str) -> Tensor:
    """Gaussian tokens (m, d_ctx) with the mean and standard deviation of a concept's own (n, d_ctx)."""
    noise = torch.randn((m, tokens.shape[1]), generator=seeded("secret", secret, concept))
    return tokens.mean() + tokens.std() * noise.to(tokens)


def detached(prompt: Prompt) -> Prompt:
    """A copy of a prompt outside any training."""
    return replace(prompt, k=prompt.k.detach().cpu().clone(), v=prompt.v.detach().cpu().clone())


class Rehearsal:
    """Keys of earlier erasures, trained towards the original model's prediction: removal's prompted term for old concepts."""

    def __init__(self, world, keys: dict[str, Prompt], trainer: Trainer):
        layers = trainer.config.layers
        for concept, key in keys.items():
            if (key.mechanism, key.layers) != ("shared", layers):
                raise ValueError(
                    f"the key of {concept!r} is {key.mechanism!r} in layers {key.layers!r}: rehearsed keys are 'shared' and "
                    f"in the layers prompted now, {layers!r}"
                )
        self.trainer = trainer
        pairs = [(key, pair) for concept, key in keys.items() for pair in world.prompt_pairs(concept)]
        self.k, self.v = (torch.stack([getattr(key, side) for key, _ in pairs]).to(trainer.device) for side in "kv")
        self.pool = make_pool(world.root, [p for _, p in pairs], trainer.config.seed, **trainer.config.trajectories)
        self.cond = encode(world.pipe, [prompt for _, (prompt, _) in pairs])
        # Part of the run's identity, so that a checkpoint is not resumed with other keys.
        trainer.identity["rehearsed"] = {c: key.digest()[:12] for c, key in keys.items()}

    def loss(self, state, n: int) -> Tensor:
        """Over as many samples as a batch has of what is erased."""
        trainer, config = self.trainer, self.trainer.config
        generator = seeded("rehearsal", config.seed, n)
        index = torch.randint(len(self.cond), (config.batch_size,), generator=generator)
        z, t, eps, _ = (x.to(trainer.device) for x in self.pool.sample(index, generator))
        index = index.to(trainer.device)
        with state.use(Prompt(self.k[index], self.v[index], config.layers)):
            prediction = trainer.predict(z.to(trainer.unet.dtype), t, self.cond[index])
        return (trainer.loss_weight(t) * losses.transfer(prediction, eps)).mean()
