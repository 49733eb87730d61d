"""MACE (Lu et al., arXiv 2403.06135): scrub the concept from its neighbours' tokens, then from its own, then fuse."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..artifacts import Erasure
from ..attention import augment
from ..checkpoints import seeded
from ..conditioning import token_embeddings, token_ids
from ..training import TrainConfig, Trainer, gradients_off, optimizer_step
from .adapters import LowRank, low_rank_layers, new_low_rank, trainable
from .masks import concept_mask, concept_positions, resized
from .registry import method
from .uce import key_value_weights, retained_vectors, ridge, sequence_vectors, to_delta


@dataclass(frozen=True)
class MACE(TrainConfig):
    """Published, objects: lambda 10, rank-one LoRA, 50 steps at lr 1e-5, a prior over COCO captions that objects go without.

    The prior here is `retain`, with `retain_weight`.
    """

    RATES = TrainConfig.RATES | {"lr": 3e-4, "steps": 50}
    lam: float = 10.0
    mask_threshold: float = 0.3


@method("mace", MACE, sweep=[{"lam": lam, "lr": lr} for lr in (3e-4, 3e-3) for lam in (300.0, 100.0, 30.0)])
def mace(world, concepts: list[str], config: MACE | None = None, checkpoint=None, progress=True) -> Erasure:
    """Stages 1 and 3: ridge regressions of attn2's keys and values; stage 2: LoRA against the concept's attention (section 3).

    Masks are thresholded attention maps in place of Grounded-SAM, for styles too, which the paper does not mask. Stage 2 trains
    all concepts' LoRAs in one run, each sample its own, on latents of the pool at their own time steps.
    """
    config = config or MACE()
    pairs = [sentence_pairs(world, concept, config.diverse_prompts) for concept in concepts]
    trainer = Trainer(world, concepts, config, "mace")
    config = trainer.config
    pipe, unet = world.pipe, trainer.unet
    original, P = key_value_weights(unet), retained_vectors(world, config.retain)

    # Stage 1: the tokens around the concept lose it.
    olds, news = zip(*(shared_tokens(pipe, *pair) for own in pairs for pair in own))
    old, new = torch.cat(olds), torch.cat(news)
    scrubbed = {
        name: ridge(W, [(1.0, old, new @ W.T), (config.retain_weight, P, P @ W.T)], config.lam)
        for name, W in original.items()
    }

    # Stage 2: LoRA lowers the attention to the concept's own tokens.
    layers = low_rank_layers(unet, lambda name: name.endswith((".attn2.to_k", ".attn2.to_v")))
    tensors = trainable(new_low_rank(layers, len(concepts), seeded("mace", config.seed)), trainer.device)
    adapter, optimizer = LowRank(tensors), torch.optim.AdamW(tensors.values(), lr=config.lr)
    owners = zip(trainer.prompts, trainer.owner.tolist())
    positions = [concept_positions(pipe, prompt, *world.words(concepts[owner])) for prompt, owner in owners]
    ends = [len(token_ids(pipe, prompt)) - 1 for prompt in trainer.prompts]

    def step(n: int) -> dict[str, float]:
        b = trainer.batch("attention", n, retained=False)
        prompts = b.index.tolist()
        with adapter.disabled(), state.record() as maps:
            trainer.predict(b.z, b.t, b.cond)
            mask = concept_mask(maps, [positions[i] for i in prompts], config.mask_threshold)
        adapter.multiplier = F.one_hot(trainer.owner[b.index], len(concepts)).float().to(trainer.device)
        with state.record(gradients=True) as maps:
            trainer.predict(b.z, b.t, b.cond)
            loss = attention_norm(maps, mask, [[*positions[i], ends[i]] for i in prompts])
        optimizer_step(optimizer, loss, tensors.values())
        return {"attention": loss.item()}

    parameters = dict(unet.named_parameters())
    try:
        for name, W in scrubbed.items():
            parameters[name].data = W.to(parameters[name])
        with gradients_off(unet), augment(unet) as state, adapter.attached(unet):
            history = trainer.fit(step, {"adapter": (tensors, optimizer)}, checkpoint, progress)
    finally:
        for name, W in original.items():
            parameters[name].data = W.to(parameters[name])

    # Stage 3: one matrix does what each concept's LoRA does to that concept's sentences.
    sentences = [sequence_vectors(pipe, [sentence for sentence, _ in own]) for own in pairs]
    weights = {}
    for name, W in scrubbed.items():
        layer, terms = name.removesuffix(".weight"), [(config.retain_weight, P, P @ W.T)]
        up, down = (tensors[f"{layer}.{side}"].detach().double() for side in ("up", "down"))
        for n, C in enumerate(sentences):
            terms.append((1.0, C, C @ (W + up[:, n, None] @ down[None, n]).T))
        weights[name] = ridge(W, terms, config.lam)
    return trainer.erasure(history, delta=to_delta(weights))


def sentence_pairs(world, concept: str, diverse: bool = False) -> list[tuple[str, str]]:
    """Sentences with the concept, and the same without it (an object becomes its anchor, a style is left out)."""
    if world.is_style(concept) or diverse:
        prompts = [prompt for prompt, _ in world.prompt_pairs(concept, diverse)]
        return list(zip(prompts, world.anchor_prompts(concept, diverse)))
    anchor = world.anchor(concept)
    return [(world.format_prompt(t, concept), world.format_prompt(t, anchor)) for t in world.train_templates]


def shared_tokens(pipe, old: str, new: str) -> tuple[Tensor, Tensor]:
    """Embeddings (n, d_ctx) at the positions two sentences share: before and after the word, and the padding."""
    ids = [token_ids(pipe, text) for text in (old, new)]
    embeddings = [token_embeddings(pipe, [text])[0].double() for text in (old, new)]
    shorter = min(map(len, ids))
    before = next((n for n, (a, b) in enumerate(zip(*ids)) if a != b), shorter)
    after = 0
    while after < shorter - before and ids[0][-1 - after] == ids[1][-1 - after]:
        after += 1
    tails = [e[len(i) - after :] for e, i in zip(embeddings, ids)]
    length = min(map(len, tails))
    return tuple(torch.cat([e[:before], tail[:length]]) for e, tail in zip(embeddings, tails))


def attention_norm(maps: dict[str, Tensor], mask: Tensor, positions: list[list[int]]) -> Tensor:
    """Sum over layers of the Frobenius norm of attention at mask pixels and the concept's tokens, mean over the batch."""
    total = 0.0
    for attention in maps.values():
        inside = resized(mask, attention.shape[2])
        for row, own in enumerate(positions):
            masked = attention[row][:, :, own].float() * inside[row][None, :, None]
            total = total + masked.square().sum().add(1e-12).sqrt()
    return total / len(positions)
