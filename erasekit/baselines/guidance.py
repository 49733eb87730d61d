"""The guidance of methods that steer the sampler: the negative prompt, SLD, and SPM's adapters."""

import torch

from ..conditioning import encode, token_embeddings, token_ids
from ..sampling import GUIDANCE, Guidance


class NegativePrompt(Guidance):
    """Guidance away from the erased concepts: eps_S in place of eps_null."""

    def __init__(self, scale: float, concept_text: str):
        super().__init__(scale)
        self.concept_text = concept_text

    def prepare(self, pipe, prompts):
        super().prepare(pipe, prompts)
        self.null = encode(pipe, [self.concept_text] * len(prompts))


class SafeLatentDiffusion(Guidance):
    """SLD (Schramowski et al., arXiv 2211.05105, eqs. 3 to 8): a third prediction, for the unsafe text S, is steered away from.

    With D = eps_p - eps_S: mu = min(1, s_S |D|) where D < threshold, else 0; gamma = mu (eps_S - eps_null) + s_m nu, with the
    momentum nu <- beta_m nu + (1 - beta_m) gamma. From step `warmup` on, gamma is subtracted from the guidance.
    """

    def __init__(self, scale: float, concept_text: str, warmup, s_S, threshold, s_m, beta_m):
        super().__init__(scale)
        self.concept_text, self.warmup = concept_text, warmup
        self.s_S, self.threshold, self.s_m, self.beta_m = s_S, threshold, s_m, beta_m

    def prepare(self, pipe, prompts):
        super().prepare(pipe, prompts)
        self.unsafe, self.nu = encode(pipe, [self.concept_text] * len(prompts)), 0.0

    def __call__(self, predict, latents, t, step):
        eps_null, eps_p = predict(latents, t, self.null, False), predict(latents, t, self.c, True)
        eps_S = predict(latents, t, self.unsafe, False)
        D = eps_p - eps_S
        mu = torch.where(self.threshold > D, (self.s_S * D.abs()).clamp(max=1), 0.0)
        gamma = mu * (eps_S - eps_null) + self.s_m * self.nu
        self.nu = self.beta_m * self.nu + (1 - self.beta_m) * gamma
        return eps_null + self.scale * (eps_p - eps_null - (gamma if step >= self.warmup else 0.0))


class FacilitatedTransport(Guidance):
    """SPM's use of its adapters (Lyu et al., arXiv 2312.16145): each is as strong as the prompt is about its concept.

    The multiplier of concept n is max(cosine of the flattened embeddings, share of the concept's tokens in the prompt). It
    enters once, m up(down(h)); the published code applies it to both factors, so that its effect is squared. With `always`,
    every multiplier is 1.
    """

    uses_adapter = True

    def __init__(self, scale: float, concepts: list[str], texts: list[str], always: bool = False, adapter=None):
        super().__init__(scale)
        self.concepts, self.texts, self.always, self.adapter = concepts, texts, always, adapter

    def prepare(self, pipe, prompts):
        super().prepare(pipe, prompts)
        own, given = token_embeddings(pipe, self.texts).float().flatten(1), self.c.tokens.float().flatten(1)
        cosine = torch.cosine_similarity(given[:, None], own[None], dim=2)

        def words(text):
            return set(token_ids(pipe, text)[1:-1])

        shared = [[len(words(p) & words(c)) / len(words(c)) for c in self.concepts] for p in prompts]
        multiplier = torch.maximum(cosine, torch.tensor(shared).to(cosine)).clamp(min=0)
        self.adapter.multiplier = torch.ones_like(multiplier) if self.always else multiplier


GUIDANCE |= {
    "negative prompt": NegativePrompt,
    "sld": SafeLatentDiffusion,
    "facilitated transport": FacilitatedTransport,
}
