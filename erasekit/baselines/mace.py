"""MACE (Lu et al., arXiv 2403.06135): scrub the concept from its neighbours' tokens, then from its own, then fuse."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from ..adapters import Adapter, low_rank_layers, new_low_rank
from ..artifacts import Erasure
from ..attention import augment
from ..checkpoints import seeded
from ..text import concept_positions, tokens
from ..training import Bench, Training, gradients_off, update
from .masks import concept_mask, resized
from .uce import kept_vectors, key_value_weights, ridge


@dataclass(frozen=True)
class MACE(Training):
    """Published, objects: lambda 10, rank-one LoRA, 50 steps at lr 1e-5, a prior over COCO captions that objects do without.

    `retain` is the prior here, with `retain_weight`.
    """

    lr: float = 3e-4
    steps: int = 50
    lam: float = 10.0
    mask_threshold: float = 0.3


def mace(world, concepts: list[str], config: MACE | None = None, checkpoint=None, progress=True) -> Erasure:
    """Stage 1 and 3: ridge regressions of attn2's keys and values; stage 2: LoRA against the concept's attention (section 3).

    Masks are thresholded attention maps in place of Grounded-SAM, for styles too, which the paper does not mask. Stage 2 trains
    all concepts' LoRAs in one run, each sample its own, on latents of the pool at its own time steps.
    """
    config = config or MACE()
    bench = Bench(world, concepts, config, "mace")
    pipe, unet = world.pipe, bench.unet
    original, keep = key_value_weights(unet), kept_vectors(world, config.retain)
    prior = [(config.retain_weight, keep)]
    pairs = [sentence_pairs(world, concept) for concept in concepts]

    shared = [shared_tokens(pipe, *pair) for own in pairs for pair in own]
    old, new = (torch.cat(side) for side in zip(*shared))
    scrubbed = {
        name: ridge(W, [(1.0, old, new @ W.T)] + [(w, C, C @ W.T) for w, C in prior], config.lam)
        for name, W in original.items()
    }

    layers = low_rank_layers(unet, lambda name: name.endswith((".attn2.to_k", ".attn2.to_v")))
    start = new_low_rank(layers, len(concepts), seeded("mace", config.seed))
    tensors = {name: torch.nn.Parameter(t.to(bench.device)) for name, t in start.items()}
    adapter = Adapter("low-rank", tensors)
    adam = torch.optim.AdamW(tensors.values(), lr=config.lr)
    positions = [
        concept_positions(pipe, bench.texts[n], concepts[owner]) for n, owner in enumerate(bench.owner.tolist())
    ]
    ends = [len(pipe.tokenizer(text, truncation=True).input_ids) - 1 for text in bench.texts]

    def step(n: int) -> dict[str, float]:
        b = bench.draw("attention", n, retained=False)
        subjects = b.index.tolist()
        with adapter.disabled(), slot.watching() as maps:
            bench.predict(b.z, b.t, b.text)
            mask = concept_mask(maps, [positions[i] for i in subjects], config.mask_threshold)
        adapter.multiplier = F.one_hot(bench.owner[b.index], len(concepts)).float().to(bench.device)
        with slot.watching(gradients=True) as maps:
            bench.predict(b.z, b.t, b.text)
            loss = attention_norm(maps, mask, [[*positions[i], ends[i]] for i in subjects])
        update(adam, loss, tensors.values())
        return {"attention": loss.item()}

    parameters = dict(unet.named_parameters())
    try:
        for name, W in scrubbed.items():
            parameters[name].data = W.to(parameters[name])
        with gradients_off(unet), augment(unet) as slot, adapter.attached(unet):
            history = bench.fit(step, {"adapter": (tensors, adam)}, checkpoint, progress)
    finally:
        for name, W in original.items():
            parameters[name].data = W.to(parameters[name])

    weights = {}
    for name, W in scrubbed.items():
        layer, wishes = name.removesuffix(".weight"), [(w, C, C @ W.T) for w, C in prior]
        up, down = tensors[f"{layer}.up"].detach().double(), tensors[f"{layer}.down"].detach().double()
        for n, own in enumerate(pairs):
            C = tokens(pipe, [sentence for sentence, _ in own]).double().flatten(0, 1)
            wishes.append((1.0, C, C @ (W + up[:, n, None] @ down[None, n]).T))
        weights[name] = ridge(W, wishes, config.lam)
    delta = {name: W.float().cpu() for name, W in weights.items()}
    return bench.erasure(history, delta=delta)


def sentence_pairs(world, concept: str) -> list[tuple[str, str]]:
    """Sentences with the concept, the same without it (an object becomes its anchor, a style goes)."""
    if concept in world.styles:
        return world.subjects(concept)
    anchor = world.anchor(concept)
    return [(world.wording(t, concept), world.wording(t, anchor)) for t in world.told]


def shared_tokens(pipe, old: str, new: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings (n, d_ctx) of the positions two sentences share: what stands before and after the word, and the padding."""
    ids = [pipe.tokenizer(text, truncation=True).input_ids for text in (old, new)]
    embeddings = [tokens(pipe, [text])[0].double() for text in (old, new)]
    before = next((n for n, (a, b) in enumerate(zip(*ids)) if a != b), min(map(len, ids)))
    after = 0
    while after < min(map(len, ids)) - before and ids[0][-1 - after] == ids[1][-1 - after]:
        after += 1
    tails = [e[len(i) - after :] for e, i in zip(embeddings, ids)]
    length = min(map(len, tails))
    return tuple(torch.cat([e[:before], tail[:length]]) for e, tail in zip(embeddings, tails))


def attention_norm(maps: dict[str, torch.Tensor], mask: torch.Tensor, positions: list[list[int]]) -> torch.Tensor:
    """Sum over layers of the Frobenius norm of attention at mask pixels and the concept's tokens, averaged over the batch."""
    total = 0.0
    for attention in maps.values():
        inside = resized(mask, attention.shape[2])
        for row, own in enumerate(positions):
            total = (
                total
                + (attention[row][:, :, own].float() * inside[row][None, :, None]).square().sum().add(1e-12).sqrt()
            )
    return total / len(positions)
