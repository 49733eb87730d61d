"""The tokeniser and the frozen table of word meanings under it.

A byte-level BPE as CLIP's, trained on English words by their frequency, so that common words and the names of things are single
tokens; each of those starts from its GloVe vector.
"""

import json

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

from ...checkpoints import seeded
from . import sources, words
from .networks import TOKENS, WIDTH

VOCABULARY = 24_000
COMMON = 40_000  # of the most frequent words, the BPE's training text
NEIGHBOURS = 30  # words kept whole for each word of a caption: the nearest in meaning
RAISED = 60  # the count that makes a word whole
LONGEST = 16  # letters of a word kept whole


def letters_only(word: str) -> bool:
    return word.isascii() and word.isalpha() and len(word) <= LONGEST


def centred() -> tuple[dict[str, int], torch.Tensor]:
    """Word -> row, and unit vectors (N, 100).

    The mean and the two main directions of frequent words say how frequent a word is, not what it means: they are taken out.
    """
    names, vectors = sources.word_vectors()
    vectors = vectors - vectors[:VOCABULARY].mean(0)
    _, _, main = torch.linalg.svd(vectors[:VOCABULARY], full_matrices=False)
    vectors = vectors - vectors @ main[:2].T @ main[:2]
    return {name: n for n, name in enumerate(names)}, torch.nn.functional.normalize(vectors, dim=1)


def visual_nouns(rows: dict[str, int], vectors: torch.Tensor, limit: int = 80_000) -> list[str]:
    """The nearest words of each word that names something in the captions, and emoji's own words: names of things, mostly."""
    texts = (text for e in words.OBJECTS.values() for text in (e.name, *e.kinds, *e.synonyms))
    anchors = [rows[w] for w in dict.fromkeys(w for text in texts for w in text.split()) if w in rows]
    names = [name for name in list(rows)[:limit] if letters_only(name)]
    candidates = vectors[[rows[name] for name in names]]
    near = (vectors[anchors] @ candidates.T).topk(NEIGHBOURS, dim=1).indices.unique().tolist()
    emoji = sorted(w for w in sources.emoji_words() if w in rows and letters_only(w))
    return list(dict.fromkeys([names[n] for n in near] + emoji))


def make_tokenizer() -> CLIPTokenizer:
    """The tokeniser of this world; it can encode any text."""
    rows, vectors = centred()
    counts = {
        word: max(1, int(8e3 / (rank + 20))) for word, rank in rows.items() if rank < COMMON and letters_only(word)
    }
    for word in visual_nouns(rows, vectors):
        counts[word] = max(counts.get(word, 0), RAISED)
    for word in words.caption_words():
        counts[word] = max(counts.get(word, 0), 5 * RAISED)
    blank = CLIPTokenizer()  # for its normaliser and pre-tokeniser, so that training splits as use will
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY - 258,  # less the bytes' word-final forms and the two special tokens
        min_frequency=1,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator((" ".join([word] * count) for word, count in counts.items()), trainer)
    learned = bpe.get_vocab()
    # Both forms of every byte, inside a word and at its end, so that no text is ever unknown.
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet]
    known = set(pieces)
    pieces += [piece for piece, _ in sorted(learned.items(), key=lambda item: item[1]) if piece not in known]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS)


def whole_words(tokenizer: CLIPTokenizer) -> dict[str, int]:
    """Word -> token, for tokens that are whole words."""
    return {
        piece[:-4]: n
        for piece, n in tokenizer.get_vocab().items()
        if piece.endswith("</w>") and letters_only(piece[:-4])
    }


def token_table(tokenizer: CLIPTokenizer) -> torch.Tensor:
    """(tokens, 192): the word's meaning through a fixed orthonormal map; random vectors of the same length for other pieces."""
    rows, vectors = centred()
    generator = seeded("token table")
    table = torch.nn.functional.normalize(torch.randn(len(tokenizer), WIDTH, generator=generator), dim=1)
    spread, _ = torch.linalg.qr(torch.randn(WIDTH, vectors.shape[1], generator=generator))
    for word, token in whole_words(tokenizer).items():
        if word in rows:
            table[token] = spread @ vectors[rows[word]]
    return table
