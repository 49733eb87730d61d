"""SLD (Schramowski et al., arXiv 2211.05105) and the negative prompt: nothing is trained, guidance steers away."""

import time
from dataclasses import asdict, dataclass

from ..artifacts import Erasure
from ..results import provenance
from ..training import accept, check_concepts

# level -> (warmup delta, in steps of 50), s_S, threshold, s_m, beta_m; Table 1 of the paper and its code.
LEVELS = {
    "weak": (15, 20.0, 0.0, 0.0, 0.0),
    "medium": (10, 1000.0, 0.01, 0.3, 0.4),
    "strong": (7, 2000.0, 0.025, 0.5, 0.7),
    "max": (0, 5000.0, 1.0, 0.5, 0.7),
}
PUBLISHED_STEPS = 50


@dataclass(frozen=True)
class SLD:
    """`level`: weak, medium, strong or max. `sampling_steps`: what images are drawn with; the warm-up keeps its share of them."""

    level: str = "max"
    sampling_steps: int = 25
    seed: int = 0  # nothing is random here

    def __post_init__(self):
        accept("level", self.level, LEVELS)


@dataclass(frozen=True)
class NegativePrompting:
    """No setting: the concepts stand where the empty text stood."""

    seed: int = 0  # nothing is random here


def sld(world, concepts: list[str], config: SLD | None = None) -> Erasure:
    """See `guidance.SafeLatentDiffusion`."""
    config = config or SLD()
    warmup, s_S, threshold, s_m, beta_m = LEVELS[config.level]
    warmup = round(warmup * config.sampling_steps / PUBLISHED_STEPS)
    return guided(
        world, concepts, config, "sld", kind="sld", warmup=warmup, s_S=s_S, threshold=threshold, s_m=s_m, beta_m=beta_m
    )


def negative_prompting(world, concepts: list[str], config: NegativePrompting | None = None) -> Erasure:
    """See `guidance.NegativePrompt`."""
    return guided(world, concepts, config or NegativePrompting(), "np", kind="negative prompt")


def guided(world, concepts, config, method, **rule) -> Erasure:
    """An erasure without tensors. Several concepts are listed in one text, as the published unsafe text lists its terms."""
    check_concepts(concepts)
    began = time.time()
    rule["concept_text"] = world.unsafe_text(concepts)
    info = {"method": method, "world": world.name, "concepts": list(concepts), "base": world.fingerprint}
    made = provenance(world.pipe.device, time.time() - began)
    info |= {"config": asdict(config), "seed": config.seed, "history": [], "provenance": made}
    return Erasure({}, {}, info | {"guidance": rule})
