"""SLD (Schramowski et al., arXiv 2211.05105) and the negative prompt: nothing is trained, guidance steers away."""

import time
from dataclasses import dataclass

from ..artifacts import Erasure
from ..checks import check_choice, check_concepts
from ..conditioning import token_ids
from .registry import method, untrained_erasure

# level -> (warmup delta, in steps of 50), s_S, threshold, s_m, beta_m: Table 1 of the paper and its code.
LEVELS = {
    "weak": (15, 20.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}
PUBLISHED_STEPS = 50


@dataclass(frozen=True)
class SLD:
    """`level`: "weak", "medium", "strong" or "max". `sampling_steps`: of later images; the warm-up keeps its share of them."""

    level: str = "max"
    sampling_steps: int = 25
    seed: int = 0  # nothing is random

    def __post_init__(self):
        check_choice("level", self.level, LEVELS)


@dataclass(frozen=True)
class NegativePrompting:
    """No settings."""

    seed: int = 0  # nothing is random


@method("sld", SLD, sweep=[{"level": level} for level in ("medium", "strong", "max")])
def sld(world, concepts: list[str], config: SLD | None = None) -> Erasure:
    """Guidance with a third prediction, see `guidance.SafeLatentDiffusion` (eqs. 3 to 8)."""
    config, began = config or SLD(), time.time()
    warmup, s_S, threshold, s_m, beta_m = LEVELS[config.level]
    rule = {"kind": "sld", "warmup": round(warmup * config.sampling_steps / PUBLISHED_STEPS), "s_S": s_S}
    rule |= {"threshold": threshold, "s_m": s_m, "beta_m": beta_m}
    return guided(world, concepts, config, "sld", began, rule)


@method("np", NegativePrompting)
def negative_prompting(world, concepts: list[str], config: NegativePrompting | None = None) -> Erasure:
    """The concepts in place of the empty prompt, see `guidance.NegativePrompt`."""
    return guided(world, concepts, config or NegativePrompting(), "np", time.time(), {"kind": "negative prompt"})


def guided(world, concepts: list[str], config, name: str, began: float, rule: dict) -> Erasure:
    """An erasure without tensors. All concepts share one prompt, as the published unsafe text lists its terms."""
    check_concepts(concepts)
    limit = world.pipe.tokenizer.model_max_length
    texts = [joint_prompt(world, concepts[: n + 1]) for n in range(len(concepts))]
    sizes = [len(token_ids(world.pipe, text, cut=False)) for text in texts]
    if sizes[-1] > limit:
        fit = sum(size <= limit for size in sizes)
        raise ValueError(
            f"{name!r} names all concepts in one text, and {fit} of {len(concepts)} fit its {limit} tokens: erase fewer"
        )
    return untrained_erasure(world, concepts, config, name, began, guidance=rule | {"concept_text": texts[-1]})


def joint_prompt(world, concepts: list[str]) -> str:
    """Several concepts in one prompt: "church, dog"."""
    styles = [c for c in concepts if world.is_style(c)]
    return "in the style of " + ", ".join(styles) if styles else ", ".join(concepts)
