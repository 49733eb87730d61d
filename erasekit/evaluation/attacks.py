"""Attacks on a public model: optimise a key, invent words, or search for a prompt.

The attacker has the public model and a few images of the concept, but not the base model. All three attacks minimise the
diffusion loss on the images' latents x,
    E || eps_theta'(z_t, t, prompt) - n ||^2,   z_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) n:
over a learnable prompt in cross-attention (a key of the attacker's own); over the embeddings of new tokens in place of the
concept's name (textual inversion, Gal et al., arXiv 2208.01618; against erasure, Pham et al., arXiv 2308.01508); or over
words of the vocabulary before the prompt (after UnlearnDiffAtk, Zhang et al., arXiv 2310.11868, with the projection of PEZ,
Wen et al., arXiv 2302.03668, in place of projected gradients).
"""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..attention import Prompt, augment, initial_prompt
from ..checkpoints import seeded
from ..conditioning import encode, encode_with_grad, predict_noise
from ..sampling import guidance_for
from ..tokens import add_tokens, embedding_table, placeholder_tokens, text_encoders
from ..training import gradients_off, optimizer_step


@dataclass(frozen=True)
class Attack:
    """An attacker's budget, with as many tokens as the owner has. Raises ValueError for budgets that do not ascend from 1."""

    budgets: tuple[int, ...] = (25, 100, 400)  # steps after which the result so far is returned, besides the start
    m: int = 10  # tokens or words
    batch_size: int = 8
    lr: float = 1e-2  # Adam
    seed: int = 0

    def __post_init__(self):
        if not self.budgets or min(self.budgets) < 1 or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(
                f"budgets={self.budgets!r} is not possible: give step counts of at least 1, in ascending order"
            )


def random_key(key: Prompt, generator: torch.Generator) -> Prompt:
    """Gaussian tokens with the mean and standard deviation of a key's: a guess."""
    k, v = (t.mean() + t.std() * torch.randn(t.shape, generator=generator) for t in (key.k, key.v))
    return replace(key, k=k, v=v)


@dataclass
class AttackImages:
    """The attacker's images of a concept: latents (N, C, h, w), and the prompt of each."""

    latents: Tensor
    prompts: list[str]


def attack_images(world, concept: str, count: int, seed: int = 0) -> AttackImages:
    """Up to `count` of the world's images of a concept: an object, a category or a style."""
    images, prompts = world.concept_images(concept, count, seed)
    vae = world.pipe.vae
    with torch.no_grad():
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
    return AttackImages(latents, prompts)


def optimize_key(world, erasure, concept: str, images: AttackImages, attack: Attack) -> dict[int, Prompt]:
    """A key in every cross-attention layer by budget. It starts from the concept's tokens, which is the result at 0 steps."""
    with erasure.applied(world.pipe):  # which may have another text encoder
        start = initial_prompt(world.concept_tokens(concept).float(), attack.m)
        cond = encode(world.pipe, images.prompts)
    k, v = (torch.nn.Parameter(side.to(world.pipe.device)) for side in (start.k, start.v))
    with augment(world.pipe.unet) as state:

        def predict(z, t, index):
            with state.use(Prompt(k, v)):
                return predict_noise(world.pipe.unet, z, t, cond[index])

        def result():
            return Prompt(*(side.detach().cpu().clone() for side in (k, v)))

        return descend(world, erasure, images, attack, [k, v], predict, result)


def textual_inversion(world, erasure, concept: str, images: AttackImages, attack: Attack) -> dict[int, Tensor]:
    """Embeddings (m, width) of new tokens in place of the concept's name, by budget; for `add_tokens`.

    They start from the concept's own tokens, repeated.
    """
    own = world.pipe.tokenizer(concept).input_ids[1:-1]
    with erasure.applied(world.pipe):
        table = embedding_table(world.pipe)
    vectors = torch.nn.Parameter(table[[own[n % len(own)] for n in range(attack.m)]].clone())
    prompts = [prompt.replace(concept, placeholder_tokens(attack.m)) for prompt in images.prompts]
    return optimize_tokens(world, erasure, images, prompts, attack, vectors, lambda v: v)


def hard_prompt_search(world, erasure, concept: str, images: AttackImages, attack: Attack) -> dict[int, Tensor]:
    """Embeddings (m, width), each of a word in the vocabulary, to put before the prompt, by budget; for `add_tokens`.

    They start from random words. The gradient is taken at the nearest words and moves the vectors behind them (PEZ).
    """
    with erasure.applied(world.pipe):
        words = embedding_table(world.pipe)[whole_words(world.pipe)]
    start = torch.randint(len(words), (attack.m,), generator=seeded("words", concept, attack.seed))
    vectors = torch.nn.Parameter(words[start.to(words.device)].clone())

    def nearest(v):
        return v + (words[torch.cdist(v.detach(), words).argmin(1)] - v).detach()

    prompts = [f"{placeholder_tokens(attack.m)} {prompt}" for prompt in images.prompts]
    return optimize_tokens(world, erasure, images, prompts, attack, vectors, nearest)


def optimize_tokens(world, erasure, images, prompts, attack: Attack, vectors, project: Callable) -> dict[int, Tensor]:
    """Descend over the embeddings of the placeholder tokens in `prompts`, which the encoder sees through `project`."""
    with add_tokens(world.pipe, vectors.detach()) as set_embeddings, ExitStack() as stack:
        for encoder in text_encoders(world.pipe):
            stack.enter_context(gradients_off(encoder))

        def predict(z, t, index):
            set_embeddings(project(vectors))
            cond = encode_with_grad(world.pipe, [prompts[i] for i in index.tolist()])
            return predict_noise(world.pipe.unet, z, t, cond.to(z.dtype))

        def result():
            return project(vectors).detach().cpu().clone()

        return descend(world, erasure, images, attack, [vectors], predict, result)


def descend(world, erasure, images, attack: Attack, parameters, predict: Callable, result: Callable) -> dict:
    """Adam on the diffusion loss of `predict(z, t, index)`; `result()` at the start (0) and after each budget."""
    pipe = world.pipe
    alphas = pipe.scheduler.alphas_cumprod.to(pipe.device)
    optimizer = torch.optim.Adam(parameters, lr=attack.lr)
    results = {0: result()}
    with gradients_off(pipe.unet), erasure.applied(pipe) as public:
        # Adapters whose strength depends on the prompt get the strength of the concept's own.
        guidance_for(public, 1.0).prepare(pipe, images.prompts[:1] * attack.batch_size)
        for n in range(max(attack.budgets)):
            generator = seeded("attack", attack.seed, n)
            index = torch.randint(len(images.prompts), (attack.batch_size,), generator=generator)
            t = torch.randint(len(alphas), (attack.batch_size,), generator=generator).to(pipe.device)
            x = images.latents[index]
            noise = torch.randn(x.shape, generator=generator).to(x)
            alpha = alphas[t][:, None, None, None].to(x)
            with world.autocast():
                eps = predict(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, index)
            target = noise
            if pipe.scheduler.config.prediction_type == "v_prediction":
                target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
            optimizer_step(optimizer, (eps.float() - target).square().mean(), parameters)
            if n + 1 in attack.budgets:
                results[n + 1] = result()
    return results


def whole_words(pipe) -> list[int]:
    """Ids of the tokens that are, or end, a word of letters: no bytes, no first pieces, no start and end."""
    tokens = pipe.tokenizer.get_vocab().items()
    return sorted(n for token, n in tokens if token.endswith("</w>") and token[:-4].isalpha() and len(token) > 5)


def nearest_words(pipe, vectors: Tensor) -> str:
    """The vocabulary's tokens nearest to embeddings (m, width)."""
    nearest = torch.cdist(vectors.float(), embedding_table(pipe).cpu()).argmin(1)
    return " ".join(pipe.tokenizer.decode([n]).strip() for n in nearest.tolist())
