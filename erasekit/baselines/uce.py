"""UCE (Gandikota et al., arXiv 2308.14761) and RECE (Gong et al., arXiv 2407.12383): closed-form edits of attn2's K and V."""

import time
from dataclasses import asdict, dataclass

import torch

from ..artifacts import Erasure
from ..results import provenance
from ..text import tokens
from ..training import accept, check_concepts, several

VECTORS = ("block", "last")


@dataclass(frozen=True)
class UCE:
    """Published: alpha 1, lambda 0.5, beta max(0.1, 1 / number of kept phrases).

    `vectors`: which of a phrase's embeddings are edited: "block", from its last word to the end of the padding (the code
    behind the published numbers), or "last", its last word alone (the later code).
    """

    alpha: float = 1.0
    lam: float = 0.5
    vectors: str = "block"
    retain: tuple[str, ...] = ()  # the keep list
    seed: int = 0  # nothing is random here

    def __post_init__(self):
        object.__setattr__(self, "retain", several("retain", self.retain))
        accept("vectors", self.vectors, VECTORS)


@dataclass(frozen=True)
class RECE(UCE):
    """UCE, then rounds of finding the embedding that still acts like the concept and editing that away."""

    rounds: int = 3
    rho: float = 0.1  # ridge of the embedding search
    round_beta: float = 0.1
    round_lam: float = 0.1


def uce(world, concepts: list[str], config: UCE | None = None) -> Erasure:
    """W' = (alpha V* C_E^T + beta (W C_P) C_P^T + lambda W)(alpha C_E C_E^T + beta C_P C_P^T + lambda I)^-1, V* = W C*."""
    return finished(world, concepts, config or UCE(), "uce", [])


def rece(world, concepts: list[str], config: RECE | None = None) -> Erasure:
    """Per round: c~ = (rho I + sum W^T W)^-1 (sum W^T W_0) c over all layers and tokens, then the edit c~ -> "" (eqs. 7 to 9).

    The released script keeps the round its detector likes best; here the last one is kept, so no judge takes part.
    """
    config = config or RECE()
    return finished(world, concepts, config, "rece", range(config.rounds))


def finished(world, concepts, config, method, rounds) -> Erasure:
    check_concepts(concepts)
    began = time.time()
    original = key_value_weights(world.pipe.unet)
    pairs = [pair for concept in concepts for pair in world.sentences(concept)]
    olds, news = zip(*(phrase_pair(world.pipe, old, new, config.vectors) for old, new in pairs))
    C, target = torch.cat(olds), torch.cat(news)
    keep = kept_vectors(world, config.retain)
    beta = max(0.1, 1 / max(1, len(config.retain)))
    weights = {
        name: ridge(W, [(config.alpha, C, target @ W.T), (beta, keep, keep @ W.T)], config.lam)
        for name, W in original.items()
    }
    every = tokens(world.pipe, [old for old, _ in pairs]).double().flatten(0, 1)
    empty = tokens(world.pipe, [new for _, new in pairs]).double().flatten(0, 1)
    for _ in rounds:
        found = still_acting(every, weights, original, config.rho)
        weights = {
            name: ridge(W, [(1.0, found, empty @ W.T), (config.round_beta, keep, keep @ W.T)], config.round_lam)
            for name, W in weights.items()
        }
    settings = asdict(config) | {"retain": list(config.retain)}
    info = {"method": method, "world": world.name, "concepts": list(concepts), "base": world.fingerprint}
    made = provenance(world.pipe.device, time.time() - began)
    delta = {name: W.float().cpu() for name, W in weights.items()}
    return Erasure(delta, {}, info | {"config": settings, "seed": config.seed, "history": [], "provenance": made})


def key_value_weights(unet) -> dict[str, torch.Tensor]:
    """Name -> (out, d_ctx), double precision, of every attn2 to_k and to_v."""
    wanted = (".attn2.to_k.weight", ".attn2.to_v.weight")
    return {name: p.data.double() for name, p in unet.named_parameters() if name.endswith(wanted)}


def ridge(W: torch.Tensor, wishes: list[tuple[float, torch.Tensor, torch.Tensor]], lam: float) -> torch.Tensor:
    """argmin over W' of sum_w w ||C W'^T - V||^2 + lam ||W' - W||^2, for wishes (w, C (n, d), V (n, out))."""
    left = lam * W
    right = lam * torch.eye(W.shape[1], dtype=W.dtype, device=W.device)
    for weight, C, V in wishes:
        left = left + weight * V.T @ C
        right = right + weight * C.T @ C
    return torch.linalg.solve(right, left, left=False)


def phrase_pair(pipe, old: str, new: str, vectors: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The embeddings (n, d_ctx) to edit and those to put in their place, aligned at each phrase's last word."""
    blocks = []
    for text in (old, new):
        # Start and end are tokens too: the last word of "" is the start token.
        last = len(pipe.tokenizer(text, truncation=True).input_ids) - 2
        block = tokens(pipe, [text])[0, last:].double()
        blocks.append(block[:1] if vectors == "last" else block)
    shorter = min(map(len, blocks))
    return blocks[0][:shorter], blocks[1][:shorter]


def kept_vectors(world, retain: tuple[str, ...]) -> torch.Tensor:
    """All embeddings (n, d_ctx) of the kept texts."""
    texts = [world.prompt(r) if r else "" for r in retain]
    if not texts:
        return torch.zeros(0, world.pipe.unet.config.cross_attention_dim, dtype=torch.float64, device=world.pipe.device)
    return tokens(world.pipe, texts).double().flatten(0, 1)


def still_acting(c: torch.Tensor, weights: dict, original: dict, rho: float) -> torch.Tensor:
    """The embeddings (n, d_ctx) that make the edited projections act most like the original ones on c (n, d_ctx)."""
    pairs = [(weights[name], original[name]) for name in weights]
    right = rho * torch.eye(c.shape[1], dtype=c.dtype, device=c.device) + sum(W.T @ W for W, _ in pairs)
    return torch.linalg.solve(right, sum(W.T @ W0 for W, W0 in pairs) @ c.T).T
