"""Shared fixtures: the bundled world, a toy world of the same classes at the smallest sizes, and toy Stable Diffusions."""

import copy
import json
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("ATEN_CPU_CAPABILITY", "avx2")  # that of the golden numbers: wider vectors round otherwise

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from erasekit.artifacts import Erasure
from erasekit.attention import Prompt
from erasekit.kpop import KPOP, kpop
from erasekit.world import World
from erasekit.worlds import load
from erasekit.worlds.benchmark import Benchmark
from erasekit.worlds.emojinette import networks

WIDTH = 32  # of the toy's text embeddings
SHORT = {"steps": 1, "batch_size": 1, "lr": 1e-2, "num_trajectories": 1, "trajectory_steps": 2}


def make_tokenizer(captions: list[str]) -> CLIPTokenizer:
    """A byte-level BPE trained on the captions: their words become single tokens, and no text is unknown."""
    blank = CLIPTokenizer()  # its normaliser and pre-tokeniser, so that training splits text as inference does
    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    bpe.normalizer = blank.backend_tokenizer.normalizer
    bpe.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    settings = {"min_frequency": 1, "end_of_word_suffix": "</w>", "show_progress": False}
    bpe.train_from_iterator(captions, trainers.BpeTrainer(initial_alphabet=alphabet, **settings))
    learned = bpe.get_vocab()
    pieces = alphabet + [f"{byte}</w>" for byte in alphabet]
    pieces += [piece for piece, _ in sorted(learned.items(), key=lambda item: item[1]) if piece not in set(pieces)]
    vocabulary = {piece: n for n, piece in enumerate([*pieces, "<|startoftext|>", "<|endoftext|>"])}
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=networks.TOKENS)


def make_toy(seed: int) -> Benchmark:
    """A random StableDiffusionPipeline of 0.1 M parameters as a world: attn2 in one down, the mid and two up layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = make_tokenizer(["a picture of a church", "a picture of a dog", "a picture of a fish"])
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=networks.TOKENS,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id,
            )
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            block_out_channels=(16, 32),
            layers_per_block=1,
            attention_head_dim=2,
            cross_attention_dim=WIDTH,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            sample_size=16,
            scaling_factor=0.2,
        )
    pipe = StableDiffusionPipeline(
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        unet=unet.eval(),
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return Benchmark(pipe, "toy", groups={"pair": ("church", "dog")})


def reconfigured(part, **changes):
    """A new part of a pipeline with some of its config changed."""
    # diffusers takes names in a config's private list for defaults, whatever their values.
    return type(part).from_config({k: v for k, v in part.config.items() if not k.startswith("_")} | changes)


def make_v2(toy):
    """Predicts v, as Stable Diffusion 2.1 does, with linear projections."""
    unet = reconfigured(toy.unet, use_linear_projection=True)
    scheduler = reconfigured(toy.scheduler, prediction_type="v_prediction")
    return type(toy)(**toy.components | {"unet": unet, "scheduler": scheduler}, requires_safety_checker=False)


def make_xl(toy):
    """Two text encoders of half the width, and pooled text and image sizes beside the tokens."""
    config = toy.text_encoder.config.to_dict() | {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    config["eos_token_id"] = 2  # as published: the pooled text is taken at the largest token
    one, two = (kind(CLIPTextConfig(**config)).eval() for kind in (CLIPTextModel, CLIPTextModelWithProjection))
    changes = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = reconfigured(toy.unet, projection_class_embeddings_input_dim=40, **changes)
    parts = {"vae": toy.vae, "scheduler": toy.scheduler, "tokenizer": toy.tokenizer, "tokenizer_2": toy.tokenizer}
    return StableDiffusionXLPipeline(**parts, text_encoder=one, text_encoder_2=two, unet=unet, add_watermarker=False)


@pytest.fixture(scope="session")
def world() -> World:
    """The bundled world. Do not change it."""
    return load("emojinette", device="cpu", precision="fp32")


@pytest.fixture(scope="session")
def toy() -> World:
    """Do not change it."""
    return make_toy(seed=0)


@pytest.fixture(scope="session")
def other_toy() -> World:
    """The toy with other weights."""
    return make_toy(seed=1)


@pytest.fixture(scope="session", params=("1", "2", "XL"))
def sd(request, tmp_path_factory):
    """A world loaded from a folder, onto the GPU if there is one."""
    toy = make_toy(seed=2).pipe
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipe = {"1": lambda t: t, "2": make_v2, "XL": make_xl}[request.param](toy)
    folder = tmp_path_factory.mktemp("sd") / request.param
    pipe.save_pretrained(folder)
    return load(str(folder), precision="fp32")


@pytest.fixture
def unet(toy):
    """A copy of the toy's U-Net, free to change."""
    return copy.deepcopy(toy.pipe.unet)


@pytest.fixture
def prompt() -> Prompt:
    """Three random tokens of the toy's width."""
    generator = torch.Generator().manual_seed(1)
    return Prompt(torch.randn(3, WIDTH, generator=generator), torch.randn(3, WIDTH, generator=generator))


@pytest.fixture
def sentence():
    """Checks that an error is one sentence on one line, and returns it."""

    def read(error) -> str:
        text = str(error.value)
        assert "\n" not in text and 20 < len(text) < 500
        return text

    return read


@pytest.fixture(scope="session")
def trained(toy):
    return kpop(toy, ["church", "dog"], KPOP(m=2, **SHORT), progress=False)


@pytest.fixture
def erasure(trained):
    return Erasure(dict(trained.delta), dict(trained.keys), dict(trained.info))


@pytest.fixture
def own():
    """A toy that the test may change."""
    return make_toy(seed=0)


@pytest.fixture
def refused(sentence):
    """Checks that a call raises one sentence that matches."""

    def check(kind, message, call):
        with pytest.raises(kind, match=message) as error:
            call()
        sentence(error)

    return check
