"""Robust removal: what an attacker would find on the present model is searched for during training, and erased too.

Every few steps two searches start in public, from the concept's own tokens: a key, and new words in place of its name. Both
take a few steps of Adam on the transfer loss
    min over found   || eps_theta'(z_t, t, found) - eps_theta(z_t, t, c) ||^2,
where an attacker, who does not have theta, takes the noise of pictures. Removal then holds theta' to its target under what was
found, too. STEREO (arXiv 2408.16807) searches for words in rounds before its erasure; here the search goes on beside it.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from . import losses
from .attention import Prompt, PromptState, initial_prompt
from .checkpoints import seeded
from .conditioning import encode_with_grad, token_ids
from .tokens import add_tokens, embedding_table, placeholder_tokens, text_encoders
from .training import Batch, Trainer, gradients_off, optimizer_step

KINDS = ("key", "words")
KEPT = 8  # the latest searches whose results are erased: with one alone, the model forgets the others
LR = 1e-1  # of the searches, which are short; what attacks of 10 to 200 steps do best with, too


class Adversary:
    """The latest finds: `found["k"]` and `found["v"]` (KEPT, concepts, m, d_ctx), `found["words"]` (KEPT, concepts, n, width)."""

    def __init__(self, trainer: Trainer, state: PromptState):
        self.trainer, self.state = trainer, state
        world, config, concepts = trainer.world, trainer.config, trainer.concepts
        pipe, table, prompts = world.pipe, embedding_table(world.pipe), trainer.prompts[: trainer.num_erased]
        starts = [initial_prompt(world.concept_tokens(c).float(), config.m) for c in concepts]
        # As many words as the key has tokens, or as the longest prompt leaves room for.
        room = pipe.tokenizer.model_max_length - max(len(token_ids(pipe, prompt)) for prompt in prompts)
        count = max(1, min(config.m, room))
        names = [token_ids(pipe, concept)[1:-1] for concept in concepts]
        words = [table[[own[n % len(own)] for n in range(count)]] for own in names]
        sides = {"k": [p.k for p in starts], "v": [p.v for p in starts], "words": words}
        self.start = {name: torch.stack(own).to(trainer.device) for name, own in sides.items()}
        self.found = {name: start.expand(KEPT, *start.shape).clone() for name, start in self.start.items()}
        new = placeholder_tokens(count * len(concepts)).split()
        self.prompts = []
        for prompt, owner in zip(prompts, trainer.owner.tolist()):
            name = next(word for word in world.words(concepts[owner]) if word in prompt)
            self.prompts.append(prompt.replace(name, " ".join(new[owner * count : (owner + 1) * count])))

    @contextmanager
    def attached(self, kind: str, tensors: dict[str, Tensor]) -> Iterator[Callable[[Batch], Tensor]]:
        """Yields theta's prediction, as a function of a batch, for what is erased with a key, or with words for its names."""
        trainer = self.trainer

        def with_key(b: Batch) -> Tensor:
            owner = trainer.owner[b.index[: b.n]].to(trainer.device)
            with self.state.use(Prompt(tensors["k"][owner], tensors["v"][owner], trainer.config.layers)):
                return trainer.predict(b.z[: b.n], b.t[: b.n], b.cond[: b.n])

        if kind == "key":
            yield with_key
            return
        pipe = trainer.world.pipe
        with add_tokens(pipe, tensors["words"].detach().flatten(0, 1)) as set_embeddings, ExitStack() as stack:
            for encoder in text_encoders(pipe):
                stack.enter_context(gradients_off(encoder))

            def with_words(b: Batch) -> Tensor:
                set_embeddings(tensors["words"].flatten(0, 1))
                cond = encode_with_grad(pipe, [self.prompts[i] for i in b.index[: b.n].tolist()])
                return trainer.predict(b.z[: b.n], b.t[: b.n], cond)

            yield with_words

    def search(self, n: int) -> None:
        """At step n: find a key and words on the present model, in place of the oldest ones."""
        trainer, config = self.trainer, self.trainer.config
        for number, kind in enumerate(KINDS):
            names = ("k", "v") if kind == "key" else ("words",)
            tensors = {name: torch.nn.Parameter(self.start[name].clone()) for name in names}
            adam = torch.optim.Adam(tensors.values(), lr=LR)
            with self.attached(kind, tensors) as predict:
                for again in range(config.robust_steps):
                    b = trainer.batch("adversary", n, number, again, retained=False)
                    loss = (b.weight * losses.transfer(predict(b), b.eps)).mean()
                    optimizer_step(adam, loss, tensors.values())
            for name, tensor in tensors.items():
                self.found[name][(n // config.robust_every - 1) % KEPT] = tensor.detach()

    def loss(self, b: Batch, y: Tensor, n: int) -> Tensor:
        """Removal at step n under one of the finds: keys and words in turn."""
        config = self.trainer.config
        kept = min(n // config.robust_every, KEPT)
        which = int(torch.randint(kept, (), generator=seeded("find", config.seed, n)))
        with self.attached(KINDS[n % len(KINDS)], {name: x[which] for name, x in self.found.items()}) as predict:
            return (b.weight[: b.n] * losses.removal(predict(b), y)).mean()
