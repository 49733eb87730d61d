"""How a sampler turns noise predictions into one: plain guidance, and the two methods that erase by guidance alone."""

import torch

from .text import encode, said, tokens


class Guidance:
    """Classifier-free guidance (Ho and Salimans 2022): eps_null + s_g (eps_p - eps_null)."""

    def __init__(self, scale: float = 5.0):
        self.scale = scale

    def begin(self, pipe, prompts: list[str]) -> None:
        """A new batch of images: encode its texts, once."""
        self.c, self.null = encode(pipe, prompts), encode(pipe, [""] * len(prompts))

    def __call__(self, predict, latents: torch.Tensor, t: torch.Tensor, step: int) -> torch.Tensor:
        """The noise (B, C, h, w) to remove at a step, counted from the noisy end.

        `predict(latents, t, text, conditional)` is asked once for each half, apart, so that a key on one half does not pad
        the other.
        """
        eps_null = predict(latents, t, self.null, False)
        return eps_null + self.scale * (predict(latents, t, self.c, True) - eps_null)


class NegativePrompt(Guidance):
    """Guidance away from the erased concepts in place of the empty text: eps_S takes the place of eps_null."""

    def __init__(self, scale: float, concept_text: str):
        super().__init__(scale)
        self.concept_text = concept_text

    def begin(self, pipe, prompts):
        super().begin(pipe, prompts)
        self.null = encode(pipe, [self.concept_text] * len(prompts))


class SafeLatentDiffusion(Guidance):
    """SLD (Schramowski et al., arXiv 2211.05105, eqs. 3 to 8): a third prediction, for the unsafe text S, is steered away from.

    With D = eps_p - eps_S: mu = min(1, s_S |D|) where D < threshold, else 0; gamma = mu (eps_S - eps_null) + s_m nu, where
    nu <- beta_m nu + (1 - beta_m) gamma is a momentum; from step `warmup` on, gamma is taken off the guidance.
    """

    def __init__(self, scale: float, concept_text: str, warmup, s_S, threshold, s_m, beta_m):
        super().__init__(scale)
        self.concept_text, self.warmup = concept_text, warmup
        self.s_S, self.threshold, self.s_m, self.beta_m = s_S, threshold, s_m, beta_m

    def begin(self, pipe, prompts):
        super().begin(pipe, prompts)
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
    """SPM's use of its adapters (Lyu et al., arXiv 2312.16145): each opens as far as the prompt is about its concept.

    The multiplier of concept n is max(cosine of the flattened embeddings, share of the concept's tokens in the prompt). It
    enters once, m up(down(h)); the published code applies it to both factors, so that its effect goes with the square. With
    `always`, every adapter is fully open for every prompt.
    """

    def __init__(self, scale: float, adapter, concepts: list[str], texts: list[str], always: bool = False):
        super().__init__(scale)
        self.adapter, self.concepts, self.texts, self.always = adapter, concepts, texts, always

    def begin(self, pipe, prompts):
        super().begin(pipe, prompts)
        about, asked = tokens(pipe, self.texts).float().flatten(1), said(pipe.unet, self.c).float().flatten(1)
        cosine = torch.cosine_similarity(asked[:, None], about[None], dim=2)

        def words(text):
            return set(pipe.tokenizer(text, truncation=True).input_ids[1:-1])

        shared = [[len(words(p) & words(c)) / len(words(c)) for c in self.concepts] for p in prompts]
        multiplier = torch.maximum(cosine, torch.tensor(shared).to(cosine)).clamp(min=0)
        self.adapter.multiplier = torch.ones_like(multiplier) if self.always else multiplier
