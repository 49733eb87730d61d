"""What somebody without a key may try on a public model: find a key, invent words, or find a wording.

The attacker has the public model and a few pictures of the concept, not the base model. All three attacks descend the
diffusion loss on the pictures' latents x,
    E || eps_theta'(z_t, t, text) - n ||^2,   z_t = sqrt(alpha_bar_t) x + sqrt(1 - alpha_bar_t) n:
over a learnable prompt in cross-attention (a key of the attacker's own); over the embeddings of new words in place of the
concept's (textual inversion, Gal et al., arXiv 2208.01618; against erasure, Pham et al., arXiv 2308.01508); or over words of
the vocabulary put before the prompt (after UnlearnDiffAtk, Zhang et al., arXiv 2310.11868, with the projection of PEZ, Wen et
al., arXiv 2302.03668, in place of projected gradients).
"""

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch

from .attention import Prompt, augment, initial_prompt
from .checkpoints import seeded
from .text import embedded, encode
from .text import predict as predict_noise
from .training import gradients_off, update


@dataclass(frozen=True)
class Attack:
    """How much an attacker spends: as many tokens as the owner's key has. Raises ValueError for budgets that do not grow."""

    budgets: tuple[int, ...] = (25, 100, 400)  # steps after which what was found so far is kept; the start is kept too
    m: int = 10  # tokens, or words
    batch: int = 8
    lr: float = 1e-2  # Adam
    seed: int = 0

    def __post_init__(self):
        if not self.budgets or min(self.budgets) < 1 or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(f"budgets={self.budgets!r} is not possible: give step counts from 1 on, in growing order")


@dataclass
class Shown:
    """The attacker's pictures: latents (N, C, h, w), and the text each is asked for by."""

    latents: torch.Tensor
    texts: list[str]


def pictures(world, concept: str, count: int, seed: int = 0) -> Shown:
    """Up to `count` of the world's own pictures of a concept, an object, a category or a style."""
    images, texts = world.pictures(concept, count, seed)
    vae = world.pipe.vae
    with torch.no_grad():
        latents = vae.encode(images.to(vae.device, vae.dtype)).latent_dist.mean * vae.config.scaling_factor
    return Shown(latents, texts)


def find_key(world, erasure, concept: str, shown: Shown, attack: Attack) -> dict[int, Prompt]:
    """A key of the attacker's own after each budget, started from the concept's tokens, in every cross-attention layer."""
    start = initial_prompt(world.concept_tokens(concept).float(), attack.m)
    k, v = (torch.nn.Parameter(side.to(world.pipe.device)) for side in (start.k, start.v))
    texts = encode(world.pipe, shown.texts)
    with augment(world.pipe.unet) as slot:

        def predict(z, t, index):
            with slot.holding(Prompt(k, v)):
                return predict_noise(world.pipe.unet, z, t, texts[index])

        def found():
            return Prompt(*(side.detach().cpu().clone() for side in (k, v)))

        return descend(world, erasure, shown, attack, [k, v], predict, found)


def invert(world, erasure, concept: str, shown: Shown, attack: Attack) -> dict[int, torch.Tensor]:
    """Embeddings (m, width) of new words that stand where the concept's name stood, after each budget; see `spoken`."""
    own = world.pipe.tokenizer(concept).input_ids[1:-1]
    vectors = torch.nn.Parameter(table(world.pipe)[[own[n % len(own)] for n in range(attack.m)]].clone())
    texts = [text.replace(concept, marks(attack.m)) for text in shown.texts]
    return speak(world, erasure, shown, texts, attack, vectors, lambda v: v)


def find_words(world, erasure, concept: str, shown: Shown, attack: Attack) -> dict[int, torch.Tensor]:
    """Embeddings (m, width), each of a word in the vocabulary, to say before the concept's prompt; see `spoken`.

    They start from words drawn at random. Each step's gradient is taken at the nearest words and moves what they were
    nearest to (PEZ).
    """
    words = table(world.pipe)[vocabulary(world.pipe)]
    start = torch.randint(len(words), (attack.m,), generator=seeded("words", concept, attack.seed))
    vectors = torch.nn.Parameter(words[start.to(words.device)].clone())

    def nearest(v):
        return v + (words[torch.cdist(v.detach(), words).argmin(1)] - v).detach()

    return speak(world, erasure, shown, [f"{marks(attack.m)} {text}" for text in shown.texts], attack, vectors, nearest)


def encoders(pipe) -> list:
    """A pipeline's text encoders: one, or SDXL's two, whose vocabularies are the same."""
    return [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


def table(pipe) -> torch.Tensor:
    """Embeddings (tokens, width) of the vocabulary; what two encoders have for a token stands side by side."""
    return torch.cat([encoder.get_input_embeddings().weight.detach().float() for encoder in encoders(pipe)], dim=1)


def vocabulary(pipe) -> list[int]:
    """The tokens that are, or end, a word of letters: no bytes, no pieces that only begin one, no start and end."""
    tokens = pipe.tokenizer.get_vocab()
    return sorted(
        n for token, n in tokens.items() if token.endswith("</w>") and token[:-4].isalpha() and len(token) > 5
    )


def as_words(pipe, vectors: torch.Tensor) -> str:
    """The words of the vocabulary that are nearest to embeddings (m, width)."""
    nearest = torch.cdist(vectors.float(), table(pipe).cpu()).argmin(1)
    return " ".join(pipe.tokenizer.decode([n]).strip() for n in nearest.tolist())


def speak(world, erasure, shown, texts, attack, vectors, project) -> dict[int, torch.Tensor]:
    """Descend over the embeddings of the marks in `texts`, seen through `project`."""
    with spoken(world.pipe, vectors.detach()) as say, ExitStack() as still:
        for encoder in encoders(world.pipe):
            still.enter_context(gradients_off(encoder))

        def predict(z, t, index):
            say(project(vectors))
            text = embedded(world.pipe, [texts[i] for i in index.tolist()])
            return predict_noise(world.pipe.unet, z, t, text.to(z.dtype))

        return descend(
            world, erasure, shown, attack, [vectors], predict, lambda: project(vectors).detach().cpu().clone()
        )


def descend(world, erasure, shown: Shown, attack: Attack, parameters, predict: Callable, found: Callable) -> dict:
    """Adam on the diffusion loss of `predict(z, t, index)`; what is `found()` at the start (0) and after each budget."""
    pipe = world.pipe
    alphas = pipe.scheduler.alphas_cumprod.to(pipe.device)
    adam = torch.optim.Adam(parameters, lr=attack.lr)
    kept = {0: found()}
    with gradients_off(pipe.unet), erasure.applied(pipe.unet):
        # Adapters that open by prompt open as far as they do for the concept's own.
        erasure.guide(1.0).begin(pipe, shown.texts[:1] * attack.batch)
        for n in range(max(attack.budgets)):
            generator = seeded("attack", attack.seed, n)
            index = torch.randint(len(shown.texts), (attack.batch,), generator=generator)
            t = torch.randint(len(alphas), (attack.batch,), generator=generator).to(pipe.device)
            x = shown.latents[index]
            noise = torch.randn(x.shape, generator=generator).to(x)
            alpha = alphas[t][:, None, None, None].to(x)
            with world.autocast():
                eps = predict(alpha.sqrt() * x + (1 - alpha).sqrt() * noise, t, index)
            target = noise
            if pipe.scheduler.config.prediction_type == "v_prediction":
                target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x
            update(adam, (eps.float() - target).square().mean(), parameters)
            if n + 1 in attack.budgets:
                kept[n + 1] = found()
    return kept


def marks(count: int) -> str:
    """The new words, as they are said in a prompt."""
    return " ".join(f"<new{n}>" for n in range(count))


class Vocabulary(torch.nn.Module):
    """A text encoder's token embedding, with an attacker's words (m, width) after its own `known` tokens."""

    def __init__(self, own: torch.nn.Embedding, known: int):
        super().__init__()
        self.own, self.known, self.words = own, known, None

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        known = self.own(ids.clamp(max=self.known - 1))
        said = torch.nn.functional.embedding((ids - self.known).clamp(min=0), self.words.to(known))
        return torch.where((ids >= self.known)[..., None], said, known)


@contextmanager
def spoken(pipe, vectors: torch.Tensor) -> Iterator[Callable]:
    """The pipeline knows `marks(m)` as words with these embeddings (m, width), for the duration of a with block.

    The block gets a function that replaces the embeddings, also by ones in training. Of a pipeline with two text encoders the
    first has the first columns. Raises ValueError for words that the tokeniser knows already, or embeddings of another width.
    """
    new = marks(len(vectors)).split()
    names = [name for name in ("tokenizer", "tokenizer_2") if hasattr(pipe, name)]
    tokenizers = [getattr(pipe, name) for name in names]
    if known := [word for word in new if any(word in tokenizer.get_vocab() for tokenizer in tokenizers)]:
        raise ValueError(f"the tokeniser knows {' '.join(known)!r} already: leave the other words first")
    own = [encoder.get_input_embeddings() for encoder in encoders(pipe)]
    words = [Vocabulary(e, len(tokenizer)) for e, tokenizer in zip(own, tokenizers)]
    widths = [e.embedding_dim for e in own]
    if vectors.shape[1] != sum(widths):
        raise ValueError(f"words of this model are {sum(widths)} wide: these are {vectors.shape[1]}")
    # Published encoders take the largest token for a text's end, where they pool; the new words' are larger. So it is named.
    pooling = [
        (part, part.eos_token_id, tokenizer.eos_token_id)
        for encoder, tokenizer in zip(encoders(pipe), tokenizers)
        for part in encoder.modules()
        if hasattr(part, "eos_token_id")
    ]

    def say(embeddings):
        for one, part in zip(words, embeddings.split(widths, dim=1)):
            one.words = part

    try:
        for name, tokenizer, encoder, one in zip(names, tokenizers, encoders(pipe), words):
            setattr(pipe, name, copy.deepcopy(tokenizer))
            getattr(pipe, name).add_tokens(new)
            encoder.set_input_embeddings(one)
        for part, _, end in pooling:
            part.eos_token_id = end
        say(vectors)
        yield say
    finally:
        for name, tokenizer, encoder, e in zip(names, tokenizers, encoders(pipe), own):
            setattr(pipe, name, tokenizer)
            encoder.set_input_embeddings(e)
        for part, before, _ in pooling:
            part.eos_token_id = before
