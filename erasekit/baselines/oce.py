"""OCE (Sun et al., ICML 2026, arXiv 2605.28902): values are rotated, so that their lengths and angles stay."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from ..artifacts import Erasure
from ..checks import as_texts
from ..conditioning import token_embeddings, token_ids
from .registry import method, untrained_erasure
from .uce import concept_vectors, edit_vectors, to_delta, value_weights


@dataclass(frozen=True)
class OCE:
    """Published: weights 1, 0.5 and 0.3, lambda 1.5; C_g over captions of COCO, here over `retain`'s prompts."""

    erase_weight: float = 1.0  # a
    generic_weight: float = 0.5  # b, of the retained prompts' tokens
    retain_weight: float = 0.3  # c, of the retained concepts' last words
    lam: float = 1.5  # of all other directions
    retain: tuple[str, ...] = ()
    seed: int = 0  # nothing is random

    def __post_init__(self):
        object.__setattr__(self, "retain", as_texts("retain", self.retain))


@method("oce", OCE, sweep=[{"erase_weight": a} for a in (1.0, 3.0, 10.0, 30.0, 100.0)])
def oce(world, concepts: list[str], config: OCE | None = None) -> Erasure:
    """W' = R W for to_v alone; R is the rotation nearest to

    M = -a G (I - G*) + b W C_g W^T + c sum_p (W k_p)(W k_p)^T + lambda W W^T,

    G and G* the projectors on the spans of the W k of what is erased and of what replaces it, k a last word. A span leaves out
    what is only rounding; the released code's has as many directions as vectors, even of equal ones. Where the nearest
    orthogonal matrix mirrors, it is turned into a rotation in M's weakest direction; that code negates the last neuron.
    """
    config, began = config or OCE(), time.time()
    C, target = concept_vectors(world, concepts)
    named = [r for r in config.retain if r]
    k_p = edit_vectors(world, named, "last")[0] if named else C[:0]
    kept = config.generic_weight * generic_moment(world, config.retain) + config.retain_weight * k_p.T @ k_p
    weights = {}
    for name, W in value_weights(world.pipe.unet).items():
        G, guide = span(C @ W.T), span(target @ W.T)
        identity = torch.eye(len(W), dtype=W.dtype, device=W.device)
        M = W @ kept @ W.T + config.lam * W @ W.T - config.erase_weight * G @ (identity - guide)
        weights[name] = nearest_rotation(M) @ W
    return untrained_erasure(world, concepts, config, "oce", began, to_delta(weights))


def nearest_rotation(M: Tensor) -> Tensor:
    """The R (n, n) with R^T R = I and det R = 1 that maximises tr(R^T M) (Kabsch 1976)."""
    U, _, Vh = torch.linalg.svd(M)
    U[:, -1] *= torch.linalg.det(U @ Vh).sign()
    return U @ Vh


def span(vectors: Tensor) -> Tensor:
    """The projector (d, d) on the span of some vectors (n, d), by their directions alone."""
    directions = torch.nn.functional.normalize(vectors, dim=1)
    _, sizes, basis = torch.linalg.svd(directions, full_matrices=False)
    basis = basis[sizes > 1e-6 * sizes[0]]
    return basis.T @ basis


def generic_moment(world, retain: tuple[str, ...]) -> Tensor:
    """Mean of k k^T (d, d) over the tokens, without padding, of the retained concepts' prompts; zero without any."""
    texts = [text for r in retain for text in ([old for old, _ in world.paraphrases(r)] if r else [""])]
    tokens = token_embeddings(world.pipe, texts or [""]).double()
    tokens = torch.cat([own[: len(token_ids(world.pipe, text))] for own, text in zip(tokens, texts)] or [tokens[0, :0]])
    return tokens.T @ tokens / max(1, len(tokens))
