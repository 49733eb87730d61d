"""Shared fixtures: the bundled world, and a toy world of the same classes at the smallest sizes."""

import copy
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from erasekit.attention import Prompt
from erasekit.world import World
from erasekit.worlds import load
from erasekit.worlds.benchmark import Benchmark
from erasekit.worlds.emojinette import networks

WIDTH = 32  # of the toy's text embeddings


def make_toy(seed: int) -> Benchmark:
    """A random StableDiffusionPipeline of 0.1 M parameters as a world: attn2 in one down, the mid and two up layers."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        tokenizer = networks.make_tokenizer(["a picture of a church", "a picture of a dog", "a picture of a fish"])
        text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=WIDTH,
                intermediate_size=2 * WIDTH,
                num_hidden_layers=2,
                num_attention_heads=2,
                max_position_embeddings=networks.MAX_TOKENS,
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
