"""STEREO (Srivatsan et al., arXiv 2408.16807): find the words that bring the concept back, then erase all of them at once."""

from dataclasses import dataclass
from pathlib import Path

import torch

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..conditioning import Conditioning, encode, encode_with_grad, token_ids
from ..tokens import add_tokens, embedding_table, placeholder_tokens
from ..training import TrainableWeights, Trainer, WeightConfig, optimizer_step
from .registry import RATES, method


@dataclass(frozen=True)
class STEREO(WeightConfig):
    """Published: four rounds of 200 steps at lr 5e-6 and 3,000 of textual inversion at 5e-3, then 200 at 2e-5; batch 1, s 2.

    The search has a quarter of `lr`, as published.
    """

    s: float = 2.0  # guidance towards the anchors and away from the words
    rounds: int = 4
    round_steps: int = 100  # model updates of each round
    inner: int = 100  # updates of its word
    word_lr: float = 1e-2


@method("stereo", STEREO, sweep=RATES)
def stereo(world, concepts: list[str], config: STEREO | None = None, checkpoint=None, progress=True) -> Erasure:
    """|| eps_theta'(z, k) - y ||^2, y = eps("") + (s - 1) (eps(a) - eps("")) - (s + 1) mean over k' of (eps(k') - eps("")).

    k, k': the concept and each round's word, k drawn for each sample; a: a sentence with the concept in it (section 4). The
    published target leaves out a part of each difference by a factor that its code sets to keep it. Latents are the frozen
    model's of the concept's own prompt, anchors its training templates, and `retain` is kept as by the other methods.
    A checkpoint has the words of a finished search; an interrupted search begins anew.
    """
    trainer = Trainer(world, concepts, config or STEREO(), "stereo")
    config, size = trainer.config, trainer.num_erased
    own = trainer.cond[:size]
    known = checkpoint and Path(checkpoint).exists()  # `fit` fills them in
    every = Conditioning.cat([own, *([own] * config.rounds if known else search(trainer))])
    words = {name: x for name, x in vars(every).items() if x is not None}
    anchors = [encode(world.pipe, [text for text, _ in world.paraphrases(c)]) for c in concepts]
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        theta = w.parameters
        optimizer = torch.optim.Adam(theta.values(), lr=config.lr)

        def step(n: int) -> dict[str, float]:
            b, generator = trainer.batch("removal", n), seeded("words", config.seed, n)
            index, eps_null = b.index[: b.n], b.eps_null[: b.n]
            k = size * torch.randint(config.rounds + 1, (b.n,), generator=generator) + index
            draws = zip(trainer.owner[index].tolist(), torch.randint(2**31, (b.n,), generator=generator).tolist())
            conds = [every[(size * r + index).to(trainer.device)] for r in range(1, config.rounds + 1)]
            conds += [anchors[c][[draw % len(anchors[c])]] for c, draw in draws]
            times = config.rounds + 1
            with w.frozen():
                z, t = b.z[: b.n].repeat(times, 1, 1, 1), b.t[: b.n].repeat(times)
                *eps_words, eps_anchor = trainer.predict(z, t, Conditioning.cat(conds)).chunk(times)
            mean = torch.stack([b.eps[: b.n], *eps_words]).mean(0)
            y = losses.neutral_target(mean, eps_null, config.s + 1) + (config.s - 1) * (eps_anchor - eps_null)
            cond = Conditioning.cat([every[k.to(trainer.device)], b.cond[b.n :]])
            prediction = trainer.predict(b.z, b.t, cond)
            l_removal = (b.weight[: b.n] * losses.removal(prediction[: b.n], y)).mean()
            l_retain = trainer.retain_loss(prediction, b)
            optimizer_step(optimizer, l_removal + config.retain_weight * l_retain, theta.values())
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        trainables = {"theta": (theta, optimizer), "words": (words, torch.optim.SGD(words.values()))}
        history = trainer.fit(step, trainables, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta())


def search(trainer: Trainer) -> list[Conditioning]:
    """The erased prompts with each round's words: erase the present word, then find the one that is left.

    The model goes on from round to round, towards the base's prediction for the empty prompt.
    """
    config, found = trainer.config, [trainer.cond[: trainer.num_erased]]
    with TrainableWeights(trainer.unet, config.train_method).training() as w:
        theta = w.parameters
        for r in range(config.rounds):
            optimizer = torch.optim.Adam(theta.values(), lr=config.lr / 4)
            for n in range(config.round_steps):
                b = trainer.batch("search", r, n, retained=False)
                prediction = trainer.predict(b.z, b.t, found[-1][b.index.to(trainer.device)])
                optimizer_step(optimizer, (b.weight * losses.removal(prediction, b.eps_null)).mean(), theta.values())
            found.append(invert(trainer, r))
    return found[1:]


def invert(trainer: Trainer, r: int) -> Conditioning:
    """The erased prompts with one new token for each concept, trained until theta' predicts what the base does (transfer).

    Textual inversion as published takes the noise of pictures in place of the base's prediction, and starts from "object".
    """
    pipe, config, table = trainer.world.pipe, trainer.config, embedding_table(trainer.world.pipe)
    names = placeholder_tokens(len(trainer.concepts)).split()
    words_of = [trainer.world.words(concept) for concept in trainer.concepts]
    owned = zip(trainer.prompts, trainer.owner.tolist())
    prompts = [p.replace(next((w for w in words_of[c] if w in p), words_of[c][0]), names[c]) for p, c in owned]
    start = [table[token_ids(pipe, concept)[1:-1]].mean(0) for concept in trainer.concepts]
    vectors = torch.nn.Parameter(torch.stack(start))
    optimizer = torch.optim.Adam([vectors], lr=config.word_lr)
    with add_tokens(pipe, vectors.detach()) as set_embeddings:
        for n in range(config.inner):
            set_embeddings(vectors)
            b = trainer.batch("inversion", r, n, retained=False)
            prediction = trainer.predict(b.z, b.t, encode_with_grad(pipe, [prompts[i] for i in b.index.tolist()]))
            optimizer_step(optimizer, (b.weight * losses.transfer(prediction, b.eps)).mean(), [vectors])
        return encode(pipe, prompts)
