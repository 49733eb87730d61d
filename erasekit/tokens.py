"""New tokens with embeddings of their own: what textual inversion trains (Gal et al., arXiv 2208.01618)."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def placeholder_tokens(count: int) -> str:
    """The new tokens, as they are written in a prompt."""
    return " ".join(f"<new{n}>" for n in range(count))


def text_encoders(pipe) -> list:
    """One text encoder, or SDXL's two, whose vocabularies are the same."""
    return [getattr(pipe, name) for name in ("text_encoder", "text_encoder_2") if hasattr(pipe, name)]


def embedding_table(pipe) -> Tensor:
    """Token embeddings (vocabulary, width); those of two encoders are concatenated."""
    return torch.cat([encoder.get_input_embeddings().weight.detach().float() for encoder in text_encoders(pipe)], dim=1)


class ExtendedEmbedding(torch.nn.Module):
    """A text encoder's token embedding, with new vectors (m, width) for the ids from `first` on."""

    def __init__(self, own: torch.nn.Embedding, first: int):
        super().__init__()
        self.weight, self.first, self.vectors = own.weight, first, None  # under its own name, for erasures

    def forward(self, ids: Tensor) -> Tensor:
        own = torch.nn.functional.embedding(ids.clamp(max=self.first - 1), self.weight)
        new = torch.nn.functional.embedding((ids - self.first).clamp(min=0), self.vectors.to(own))
        return torch.where((ids >= self.first)[..., None], new, own)


@contextmanager
def add_tokens(pipe, vectors: Tensor) -> Iterator[Callable]:
    """The pipeline knows `placeholder_tokens(m)`, with these embeddings (m, width), inside the block.

    Yields a function that replaces the embeddings, also by ones in training. The first of two text encoders takes the first
    columns. Raises ValueError if the tokeniser has the tokens already, or for embeddings of another width.
    """
    new = placeholder_tokens(len(vectors)).split()
    names = [name for name in ("tokenizer", "tokenizer_2") if hasattr(pipe, name)]
    tokenizers, encoders = [getattr(pipe, name) for name in names], text_encoders(pipe)
    if known := [token for token in new if any(token in tokenizer.get_vocab() for tokenizer in tokenizers)]:
        raise ValueError(f"the tokenizer has {' '.join(known)!r} already: leave the other add_tokens block first")
    own = [encoder.get_input_embeddings() for encoder in encoders]
    extended = [ExtendedEmbedding(e, len(tokenizer)) for e, tokenizer in zip(own, tokenizers)]
    widths = [e.embedding_dim for e in own]
    if vectors.shape[1] != sum(widths):
        raise ValueError(f"these embeddings are {vectors.shape[1]} wide but this model's tokens are {sum(widths)} wide")
    # Published encoders pool at the largest id, taking it for the text's end. New ids are larger, so the end is named.
    pooling = [
        (part, part.eos_token_id, tokenizer.eos_token_id)
        for encoder, tokenizer in zip(encoders, tokenizers)
        for part in encoder.modules()
        if hasattr(part, "eos_token_id")
    ]

    def set_embeddings(values):
        for embedding, part in zip(extended, values.split(widths, dim=1)):
            embedding.vectors = part

    try:
        for name, tokenizer, encoder, embedding in zip(names, tokenizers, encoders, extended):
            setattr(pipe, name, copy.deepcopy(tokenizer))
            getattr(pipe, name).add_tokens(new)
            encoder.set_input_embeddings(embedding)
        for part, _, end in pooling:
            part.eos_token_id = end
        set_embeddings(vectors)
        yield set_embeddings
    finally:
        for name, tokenizer, encoder, embedding in zip(names, tokenizers, encoders, own):
            setattr(pipe, name, tokenizer)
            encoder.set_input_embeddings(embedding)
        for part, before, _ in pooling:
            part.eos_token_id = before
