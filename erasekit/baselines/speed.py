"""SPEED (Li et al., ICLR 2026, arXiv 2503.07392): a closed-form edit of values in the null space of what is retained."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Erasure
from ..checkpoints import seeded
from ..checks import as_texts, check_number
from ..conditioning import token_embeddings
from .registry import method, untrained_erasure
from .uce import edit_vectors, to_delta, value_weights


@dataclass(frozen=True)
class SPEED:
    """Published: s = 1 (0.05 for ten concepts), threshold 0.1, ten augmentations, hundreds of retained concepts.

    `retain`: concepts whose last word is kept; "" keeps all its tokens but the first, as published where no list is given.
    """

    s: float = 1.0  # weight of the edit's own norm
    threshold: float = 0.1  # of the retained vectors' second moment: directions with a smaller eigenvalue may change
    augmentations: int = 10  # noisy copies of each retained vector
    retain: tuple[str, ...] = ("",)
    seed: int = 0  # of the copies' noise

    def __post_init__(self):
        object.__setattr__(self, "retain", as_texts("retain", self.retain))
        check_number("s", self.s, above=True)


@method("speed", SPEED, sweep=[{"s": s} for s in (30.0, 10.0, 3.0, 1.0, 0.05)])
def speed(world, concepts: list[str], config: SPEED | None = None) -> Erasure:
    """W' = W + W (S_ac - S_cc) P [I - M K (K^T P M K)^+ K^T P] M with M = (S_cc P + s I)^-1, for to_v alone.

    It minimises ||(W + X) C - W C*||^2 + s ||X||^2 among the X = X P with X K = 0. S_cc and S_ac are means of c c^T and c* c^T
    over the concepts' last words, as in the released code, where the paper sums, and here over the training templates too. K:
    the start token and three k-means centres of "", which here start from fixed vectors instead of random ones. The weight
    that relaxes X K = 0 is 0 as published, so it is left out; a pseudo-inverse serves where P has removed some of K.
    """
    config, began = config or SPEED(), time.time()
    C, target = edit_vectors(world, concepts, "last")
    S_cc, S_ac = C.T @ C / len(C), target.T @ C / len(C)
    K, R = fixed_vectors(world.pipe), retained_last_words(world, config.retain)
    weights = {}
    for name, W in value_weights(world.pipe.unet).items():
        P = null_space(W, R, S_cc, S_ac, config, seeded("speed", config.seed, name))
        weights[name] = W + constrained_edit(W, S_cc, S_ac, P, K, config.s)
    return untrained_erasure(world, concepts, config, "speed", began, to_delta(weights))


def constrained_edit(W: Tensor, S_cc: Tensor, S_ac: Tensor, P: Tensor, K: Tensor, s: float) -> Tensor:
    """The X of `speed`, for a projector P (d, d) and fixed vectors K (m, d)."""
    identity = torch.eye(len(P), dtype=P.dtype, device=P.device)
    M = torch.linalg.inv(S_cc @ P + s * identity)
    # Directions of K that P removes are kept anyway; what rounding leaves of them is no constraint.
    kept = torch.linalg.pinv(K @ P @ M @ K.T, atol=1e-12, hermitian=True)
    return W @ (S_ac - S_cc) @ P @ (identity - M @ K.T @ kept @ K @ P) @ M


def null_space(W: Tensor, R: Tensor, S_cc: Tensor, S_ac: Tensor, config: SPEED, generator) -> Tensor:
    """The projector (d, d) on directions that the retained vectors R (n, d) hardly have.

    Of R, those that a plain edit of this layer moves at least as far as their mean; and of their copies with noise along the
    direction that W passes on least, again those that it moves so far.
    """
    plain = W @ (S_ac - S_cc) @ torch.linalg.inv(S_cc + torch.eye(len(S_cc)).to(S_cc))

    def most_moved(vectors):
        distance = (vectors @ plain.T).norm(dim=1)
        return vectors[distance >= (1 - 1e-9) * distance.mean()]  # all of those that are equal but for rounding

    R, weakest = most_moved(R), torch.linalg.svd(W, full_matrices=False).Vh[-1]
    weakest = weakest * weakest.sum().sign()  # which a decomposition leaves open
    noise = torch.randn(config.augmentations, len(R), 1, generator=generator, dtype=R.dtype).to(R.device)
    R = torch.cat([R, most_moved((R + noise * weakest).flatten(0, 1))])
    eigenvalues, directions = torch.linalg.eigh(R.T @ R / max(1, len(R)))
    free = directions[:, eigenvalues < config.threshold]
    return free @ free.T


def fixed_vectors(pipe) -> Tensor:
    """The start token's embedding and three centres of the empty prompt's others, (4, d_ctx)."""
    from sklearn.cluster import KMeans

    empty = token_embeddings(pipe, [""])[0].double()
    others = empty[1:].cpu().numpy()
    first = others[[0, len(others) // 2, -1]]
    centres = torch.from_numpy(KMeans(3, init=first, n_init=1).fit(others).cluster_centers_)
    return torch.cat([empty[:1], centres.to(empty)])


def retained_last_words(world, retain: tuple[str, ...]) -> Tensor:
    """Embeddings (n, d_ctx) of the retained concepts' last words in all training templates, and of "" behind its start."""
    empty = token_embeddings(world.pipe, [""])[0, 1:].double()
    parts = [empty if "" in retain else empty[:0]]
    if named := [r for r in retain if r]:
        parts.append(edit_vectors(world, named, "last")[0])
    return torch.cat(parts)
