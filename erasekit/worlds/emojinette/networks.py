"""The parts of the miniature Stable Diffusion: diffusers and transformers classes at small sizes."""

import json

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT_SIZE = 16  # width and height of a latent
MAX_TOKENS = 24  # context of the text encoder; the longest caption has 18 tokens
TEXT_WIDTH = 192  # of the text embeddings


def make_vae() -> AutoencoderKL:
    """f = 4: 64 x 64 x 3 images become 16 x 16 x 4 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,  # train_vae normalises each latent channel inside the quantisation layers
    )


def make_unet() -> UNet2DConditionModel:
    """Seven attn2 layers at 8 x 8 and 4 x 4, and none at 16 x 16, where attention would cost most."""
    return UNet2DConditionModel(
        sample_size=LATENT_SIZE,
        in_channels=4,
        out_channels=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        cross_attention_dim=TEXT_WIDTH,
        norm_num_groups=16,
    )


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


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
