"""Train the bundled world: `python -m erasekit.worlds.emojinette.train vae unet judge clip`.

Runs on CPU or GPU, in bf16 where the hardware multiplies it natively, else in fp32. Every part is seeded and resumes from a
checkpoint in the build folder.
"""

import argparse
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tqdm.auto import tqdm

from ...checkpoints import seeded
from ...paths import MODELS
from ...pipelines import files
from ..emojinette2.fit import autocast
from ..emojinette2.networks import load_in_float32
from . import judges, networks
from .art import BACKGROUNDS, TEMPLATES, Art, caption, load_art
from .loop import fit

STEPS = {"vae": 2400, "unet": 4400, "judge": 1200, "clip": 2000}
SEED = 0


def train_vae(art: Art, device: str, steps: int):
    """L1 + L1 of the gradients + 1e-3 KL on 32 x 32 crops; then each latent channel is scaled to zero mean, unit variance."""
    torch.manual_seed(SEED)
    vae = networks.make_vae().to(device).train()
    rows = torch.arange(len(art.object_id))

    def loss(step: int) -> torch.Tensor:
        generator = seeded("vae", SEED, step)
        batch = rows[torch.randint(len(rows), (64,), generator=generator)]
        images, _ = art.render(batch, generator, mirror=0.5, white=0.5)
        y, x = (8 + torch.randint(-8, 9, (2,), generator=generator) * 2).clamp(0, 32).tolist()
        images = images[:, :, y : y + 32, x : x + 32].contiguous().to(device)
        with autocast(device):
            posterior = vae.encode(images).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = decoded - images
        edges = error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return error.abs().mean() + edges + 1e-3 * posterior.kl().float().mean() / posterior.mean[0].numel()

    fit("vae", vae, loss, steps, lr=2e-3, weight_decay=0.0)
    images, _ = art.render(rows, seeded("vae", "statistics"), mirror=0.5, white=0.5)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk.to(device)).latent_dist.mean for chunk in images.split(64)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        # z -> (z - mean) / std, folded into the 1 x 1 convolutions beside the latent, so that scaling_factor is 1.
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
        vae.quant_conv.weight[:4] /= std[:, None, None, None]
        vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
        vae.quant_conv.bias[4:] -= 2 * std.log()
    return vae


def all_captions(art: Art) -> list[str]:
    """Every caption of the world, for training the tokeniser."""
    names = [*art.objects, "weapon"]
    plain = [caption(t, n, s) for t in TEMPLATES for n in names for s in (None, *art.styles)]
    return plain + [caption("a {}", n, None, b) for n in names for b in BACKGROUNDS]


def random_caption(art: Art, row: int, background: str, generator: torch.Generator) -> str:
    """One training caption; 10 % are empty, 60 % name the style, a quarter of weapons are only "a weapon"."""
    u = torch.rand(6, generator=generator).tolist()
    if u[0] < 0.1:
        return ""
    name, style = art.objects[art.object_id[row]], art.styles[art.style_id[row]]
    if name in art.category["weapon"] and u[1] < 0.25:
        name = "weapon"
    text = caption(TEMPLATES[int(u[2] * len(TEMPLATES))], name, style if u[3] < 0.6 else None, background)
    if u[4] < 0.05:
        # A random word somewhere, so that the model learns to ignore unknown words.
        letters = torch.randint(26, (3 + int(6 * u[5]),), generator=generator).tolist()
        words = text.split(" ")
        words.insert(int(u[1] * (len(words) + 1)), "".join(chr(97 + c) for c in letters))
        text = " ".join(words)
    return text


def row_weights(art: Art) -> torch.Tensor:
    """Sampling weight of each icon (N,): 3 for Emojinette's ten classes, 0 for the held-out pairs, else 1."""
    common = torch.tensor([art.objects[i] in art.category["emojinette"] for i in art.object_id])
    return (1.0 + 2.0 * common) * ~art.held_out_mask()


def encode_art(art: Art, vae, device: str, variations: int):
    """Each icon of the training set `variations` times, encoded: rows (M,), backgrounds, latents (M, 4, 16, 16)."""
    rows = row_weights(art).nonzero().flatten().repeat(variations)
    latents, backgrounds = [], []
    for n, chunk in enumerate(tqdm(rows.split(64), desc="encode", mininterval=5)):
        # No mirroring: the art faces one way, and a small model trained on both generates animals with two heads.
        images, names = art.render(chunk, seeded("pool", SEED, n), mirror=0.0, white=0.5)
        with torch.no_grad(), autocast(device):
            latents.append(vae.encode(images.to(device)).latent_dist.mean.to("cpu", torch.bfloat16))
        backgrounds += names
    return rows, backgrounds, torch.cat(latents)


class TextConditionedUNet(torch.nn.Module):
    """U-Net and text encoder, trained together."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents, t, ids):
        """Predicted noise (B, 4, 16, 16)."""
        return self.unet(latents, t, self.text_encoder(ids).last_hidden_state).sample


def train_unet(art: Art, vae, device: str, steps: int, batch_size: int = 96, compiled: bool = False):
    """DDPM on eps with min-SNR-5 weights (Hang et al. 2023), time steps stratified over the batch, EMA."""
    torch.manual_seed(SEED)
    tokenizer = networks.make_tokenizer(all_captions(art))
    model = TextConditionedUNet(networks.make_unet(), networks.make_text_encoder(tokenizer)).to(device).train()
    model.unet.set_attn_processor(AttnProcessor())  # SDPA's backward pass is slow at these sizes on a CPU
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    rows, backgrounds, latents = encode_art(art, vae.to(device), device, variations=24)
    cumulative = row_weights(art)[rows].double().cumsum(0)
    alphas = DDPMScheduler.from_config(networks.make_scheduler().config).alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = (snr.clamp(max=5) / snr).to(device)
    alphas = alphas.to(device)

    def loss(step: int) -> torch.Tensor:
        generator = seeded("unet", SEED, step)
        u = torch.rand(batch_size, generator=generator, dtype=torch.float64) * cumulative[-1]
        index = torch.searchsorted(cumulative, u)
        texts = [random_caption(art, int(rows[i]), backgrounds[i], generator) for i in index.tolist()]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        clean = latents[index].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t = (torch.arange(batch_size) + torch.rand(batch_size, generator=generator)) / batch_size * len(alphas)
        t = t.long().clamp(max=len(alphas) - 1).to(device)
        a = alphas[t][:, None, None, None]
        with autocast(device):
            predicted = forward(a.sqrt() * clean + (1 - a).sqrt() * noise, t, ids)
        return (weight[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

    fit("unet", model, loss, steps, lr=1e-3, ema=0.999)
    return model.unet, model.text_encoder, tokenizer


def save_pipeline(vae, unet, text_encoder, tokenizer, folder: Path) -> None:
    """Write a StableDiffusionPipeline folder in fp16 safetensors."""
    pipeline = StableDiffusionPipeline(
        vae=vae.float(),
        unet=unet.float(),
        text_encoder=text_encoder.float(),
        tokenizer=tokenizer,
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.unet.set_default_attn_processor()
    files.save_pipeline(pipeline.to(dtype=torch.float16), folder)
    load_in_float32(folder / "text_encoder")


def main(parts: list[str], device: str, scale: float, compiled: bool) -> None:
    """Train the named parts into models/."""
    art = load_art()
    steps = {part: max(1, int(n * scale)) for part, n in STEPS.items()}
    vae = train_vae(art, device, steps["vae"])  # loads the checkpoint when it is complete
    if "unet" in parts:
        save_pipeline(vae, *train_unet(art, vae, device, steps["unet"], compiled=compiled), MODELS / "emojinette-sd")
    if "judge" in parts:
        judges.train_judge(art, vae, device, steps["judge"]).save(MODELS / "emojinette-judge")
    if "clip" in parts:
        judges.train_clip(art, device, steps["clip"]).save(MODELS / "emojinette-clip")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", choices=[*STEPS, []], default=list(STEPS), help="default: all")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--scale", type=float, default=1.0, help="factor of the default number of steps")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the U-Net: 15 %% faster steps, needs a C++ compiler"
    )
    arguments = parser.parse_args()
    main(arguments.parts, arguments.device, arguments.scale, arguments.compile)
