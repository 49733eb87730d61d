"""The parts of the miniature Stable Diffusion at small sizes; most are the second world's."""

import json
from functools import partial

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from ..emojinette2 import networks

CHANNELS = 4  # of the latent
MAX_TOKENS = 24  # context of the text encoder; the longest caption has 18 tokens
TEXT_WIDTH = networks.WIDTH  # of the text embeddings

make_vae = partial(networks.make_vae, CHANNELS)
make_unet = partial(networks.make_unet, CHANNELS)
make_scheduler = networks.make_scheduler


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Four layers of width 192."""
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=4,
            max_position_embeddings=MAX_TOKENS,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE trained on the captions: their words become single tokens, and no text is unknown."""
    blank = CLIPTokenizer()  # its normaliser and pre-tokeniser, so that training splits text as inference does
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"vocab_size": 4096, "min_frequency": 1, "end_of_word_suffix": "</w>", "show_progress": False}
    bpe.train_from_iterator(captions, trainers.BpeTrainer(initial_alphabet=alphabet, **settings))
    learned = bpe.get_vocab()
    # Every byte inside a word and at its end, so that any text can be encoded.
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet]
    pieces += [piece for piece, _ in sorted(learned.items(), key=lambda item: item[1]) if piece not in set(pieces)]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS)
