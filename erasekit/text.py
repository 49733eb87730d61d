"""Texts to embeddings, with the pipeline's own tokeniser and encoder."""

import torch


def encode(pipe, texts: list[str]) -> torch.Tensor:
    """Text embeddings (B, tokens, d_ctx); equal texts are encoded once."""
    unique = list(dict.fromkeys(texts))
    with torch.no_grad():
        embeddings = pipe.encode_prompt(unique, pipe.device, 1, False)[0]
    return embeddings[[unique.index(text) for text in texts]]


def concept_positions(pipe, text: str, concept: str) -> list[int]:
    """Where a concept's own tokens stand in a text. Raises ValueError if the text does not say it."""
    ids, wanted = (pipe.tokenizer(x, truncation=True).input_ids for x in (text, concept))
    wanted = wanted[1:-1]  # without start and end
    for start in range(len(ids) - len(wanted)):
        if ids[start : start + len(wanted)] == wanted:
            return list(range(start, start + len(wanted)))
    raise ValueError(f"the text {text!r} does not say {concept!r}")
