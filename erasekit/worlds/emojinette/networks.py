"""The parts of the miniature Stable Diffusion: real diffusers and transformers classes, small sizes."""

from pathlib import Path

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LATENT = 16  # width and height of the latent
CHANNELS = 6  # of the latent; with four, thin outlines of openmoji and contrast break
TOKENS = 24  # the text encoder's context; the longest caption of two things has 21
WIDTH = 192  # of the text embeddings


def make_vae(channels: int = CHANNELS) -> AutoencoderKL:
    """f = 4: 64 x 64 x 3 images become 16 x 16 latents."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 64, 96),
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=16,
        mid_block_add_attention=False,
        sample_size=64,
        scaling_factor=1.0,  # train_vae normalises each latent channel inside the quantisation layers
    )


def make_unet(channels: int = CHANNELS) -> UNet2DConditionModel:
    """Seven attn2 layers at 8 x 8 and 4 x 4; none at 16 x 16, which is what makes it cheap."""
    return UNet2DConditionModel(
        sample_size=LATENT,
        in_channels=channels,
        out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(64, 128, 192),
        layers_per_block=1,
        attention_head_dim=2,  # diffusers reads this as the number of heads
        cross_attention_dim=WIDTH,
        norm_num_groups=16,
    )


def make_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Four layers of 192, in plain attention: SDPA's backward is many times slower at this size on a CPU."""
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="eager",
    )
    return CLIPTextModel(config)


def load_in_float32(folder: Path) -> None:
    """Mend a text encoder's config: without a dtype diffusers loads its parts in float32, but transformers obeys this entry."""
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


def make_scheduler() -> DDIMScheduler:
    """Stable Diffusion's schedule."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )
