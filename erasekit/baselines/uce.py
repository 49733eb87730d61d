"""UCE (Gandikota et al., arXiv 2308.14761): a closed-form edit of the keys and values of cross-attention."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Erasure
from ..conditioning import token_embeddings, token_ids
from ..training import as_texts, check_choice, check_concepts
from .registry import method, untrained_erasure

VECTORS = ("block", "last")
WORDINGS = ("templates", "bare")
LAMBDAS = [{"lam": lam, "wordings": w} for w in WORDINGS for lam in (500.0, 200.0, 100.0, 50.0)]


@dataclass(frozen=True)
class UCE:
    """Published: alpha 1, lambda 0.5, beta max(0.1, 1 / number of retained prompts).

    `vectors`: the embeddings of a phrase that are edited. "block": from its last word to the end of the padding (the code of
    the published numbers). "last": its last word alone (the later code). `wordings`: the phrases, "templates" for those that
    training uses or "bare" for the concept's name alone, as published.
    """

    alpha: float = 1.0
    lam: float = 0.5
    vectors: str = "block"
    wordings: str = "templates"
    retain: tuple[str, ...] = ()
    seed: int = 0  # nothing is random

    def __post_init__(self):
        object.__setattr__(self, "retain", as_texts("retain", self.retain))
        check_choice("vectors", self.vectors, VECTORS)
        check_choice("wordings", self.wordings, WORDINGS)


@method("uce", UCE, sweep=LAMBDAS)
def uce(world, concepts: list[str], config: UCE | None = None) -> Erasure:
    """W' = (alpha V* C_E^T + beta (W C_P) C_P^T + lambda W)(alpha C_E C_E^T + beta C_P C_P^T + lambda I)^-1, V* = W C*."""
    config, began = config or UCE(), time.time()
    weights = edited_weights(world, concepts, config)
    return untrained_erasure(world, concepts, config, "uce", began, to_delta(weights))


def edited_weights(world, concepts: list[str], config: UCE) -> dict[str, Tensor]:
    """UCE's edit of every key and value matrix, double precision."""
    (C, target), P = (
        edit_vectors(world, concepts, config.vectors, config.wordings),
        retained_vectors(world, config.retain),
    )
    beta = max(0.1, 1 / max(1, len(config.retain)))
    return {
        name: ridge(W, [(config.alpha, C, target @ W.T), (beta, P, P @ W.T)], config.lam)
        for name, W in key_value_weights(world.pipe.unet).items()
    }


def key_value_weights(unet) -> dict[str, Tensor]:
    """Name -> (out, d_ctx), double precision, of every attn2 to_k and to_v."""
    wanted = (".attn2.to_k.weight", ".attn2.to_v.weight")
    return {name: p.data.double() for name, p in unet.named_parameters() if name.endswith(wanted)}


def value_weights(unet) -> dict[str, Tensor]:
    """Of these the values alone."""
    return {name: W for name, W in key_value_weights(unet).items() if ".to_v." in name}


def to_delta(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: W.float().cpu() for name, W in weights.items()}


def ridge(W: Tensor, terms: list[tuple[float, Tensor, Tensor]], lam: float) -> Tensor:
    """argmin over W' of sum_w w ||C W'^T - V||^2 + lam ||W' - W||^2, for terms (w, C (n, d), V (n, out))."""
    left = lam * W
    right = lam * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    for weight, C, V in terms:
        left = left + weight * V.T @ C
        right = right + weight * C.T @ C
    return torch.linalg.solve(right, left, left=False)


def edit_vectors(world, concepts: list[str], vectors: str, wordings: str = "templates") -> tuple[Tensor, Tensor]:
    """`phrase_vectors` of the concepts, in all training templates or bare, and of what replaces them, each (n, d_ctx)."""
    check_concepts(concepts)
    if wordings == "bare":
        pairs = [(concept, new) for concept in concepts for _, new in world.paraphrases(concept)[:1]]
    else:
        pairs = [pair for concept in concepts for pair in world.paraphrases(concept)]
    olds, news = zip(*(phrase_vectors(world.pipe, *pair, vectors) for pair in pairs))
    return torch.cat(olds), torch.cat(news)


def concept_vectors(world, concepts: list[str]) -> tuple[Tensor, Tensor]:
    """One embedding for each concept, its prompts' last word on average, and one for what replaces it, each (n, d_ctx)."""
    check_concepts(concepts)
    pairs = [[phrase_vectors(world.pipe, *pair, "last") for pair in world.prompt_pairs(c)] for c in concepts]
    means = [[torch.cat(side).mean(0) for side in zip(*own)] for own in pairs]
    return tuple(torch.stack(side) for side in zip(*means))


def phrase_vectors(pipe, old: str, new: str, vectors: str) -> tuple[Tensor, Tensor]:
    """Embeddings (n, d_ctx) to edit and their replacements, aligned at each phrase's last word."""
    blocks = []
    for text in (old, new):
        # Start and end are tokens too: the last word of "" is the start token.
        last = len(token_ids(pipe, text)) - 2
        block = token_embeddings(pipe, [text])[0, last:].double()
        blocks.append(block[:1] if vectors == "last" else block)
    shorter = min(map(len, blocks))
    return blocks[0][:shorter], blocks[1][:shorter]


def retained_vectors(world, retain: tuple[str, ...]) -> Tensor:
    """All embeddings (n, d_ctx) of the retained prompts."""
    if not retain:
        return torch.zeros(0, world.pipe.unet.config.cross_attention_dim, dtype=torch.float64, device=world.pipe.device)
    return sequence_vectors(world.pipe, [world.prompt(r) if r else "" for r in retain])


def sequence_vectors(pipe, prompts: list[str]) -> Tensor:
    """All embeddings (n, d_ctx) of some prompts, padding included, double precision."""
    return token_embeddings(pipe, prompts).double().flatten(0, 1)
