"""Train the bundled world: `python -m erasekit.emojinette.train vae unet judge clip`.

The same code runs on CPU and GPU, in bf16 autocast. Every part is seeded, keeps a checkpoint beside the build cache and
goes on from it after an interruption.
"""

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tqdm.auto import tqdm

from ..checkpoints import optimizer_state, read_tensors, restore_optimizer, seeded, write_tensors
from ..paths import BUILD, MODELS
from . import networks
from .art import BACKGROUNDS, TEMPLATES, Art, caption, load_art

SAVE_EVERY = 120  # seconds between checkpoints
STEPS = {"vae": 2400, "unet": 4400, "judge": 1200, "clip": 2000}
SEED = 0


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over a twentieth of the steps, then a cosine to a hundredth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def fit(
    part: str,
    module: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    ema: float | None = None,
) -> torch.nn.Module:
    """Minimise `loss(step)` over the parameters of `module` with AdamW, resuming from the part's checkpoint.

    With `ema`, the returned module holds the exponential average of the weights (decay warmed up as (1+n)/(10+n)).
    """
    path = BUILD / "world" / f"{part}.safetensors"
    names, parameters = zip(*module.named_parameters())
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    average = [p.detach().clone() for p in parameters] if ema else []
    start, seconds = 0, 0.0
    if path.exists():
        tensors, meta = read_tensors(path)
        if meta["steps"] == steps:
            module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
            restore_optimizer(optimizer, "adam", tensors)
            average = [tensors[f"ema.{name}"].to(p.device) for name, p in zip(names, parameters)] if ema else []
            start, seconds = meta["step"], meta["seconds"]

    def save(step: int) -> None:
        state = {f"model.{name}": value for name, value in module.state_dict().items()}
        state |= optimizer_state(optimizer, "adam") | {f"ema.{n}": a for n, a in zip(names, average)}
        spent = seconds + time.time() - began
        write_tensors(path, state, {"step": step, "steps": steps, "seconds": spent})

    began = saved = time.time()
    shown = 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=part, mininterval=5)
    for step in bar:
        for group in optimizer.param_groups:
            group["lr"] = one_cycle(step, steps, lr)
        value = loss(step)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if ema:
            decay = min(ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        shown = 0.98 * shown + 0.02 * value.item() if shown else value.item()
        bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
        if time.time() - saved > SAVE_EVERY:
            save(step + 1)
            saved = time.time()
    if start < steps:
        save(steps)
    if ema:
        with torch.no_grad():
            for p, a in zip(parameters, average):
                p.copy_(a)
    return module.eval()


def autocast(device: str):
    """bf16 autocast: two to eight times faster than fp32 where the CPU has AMX."""
    return torch.autocast(device, dtype=torch.bfloat16)


# ---------------------------------------------------------------------------------------------------------------- VAE


def train_vae(art: Art, device: str, steps: int):
    """L1 + L1 of the gradients + 1e-3 KL on 32 x 32 crops; then each latent channel is made zero-mean, unit-variance."""
    torch.manual_seed(SEED)
    vae = networks.make_vae().to(device).train()
    everything = torch.arange(len(art.object_id))

    def loss(step: int) -> torch.Tensor:
        generator = seeded("vae", SEED, step)
        rows = everything[torch.randint(len(everything), (64,), generator=generator)]
        images, _ = art.draw(rows, generator, mirror=0.5, white=0.5)
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
    images, _ = art.draw(everything, seeded("vae", "statistics"), mirror=0.5, white=0.5)
    with torch.no_grad():
        latents = torch.cat([vae.encode(chunk.to(device)).latent_dist.mean for chunk in images.split(64)])
        mean, std = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        # z = (mean - m) / s, folded into the 1 x 1 convolutions beside the latent, so that scaling_factor is 1.
        vae.post_quant_conv.bias += vae.post_quant_conv.weight[:, :, 0, 0] @ mean
        vae.post_quant_conv.weight *= std[None, :, None, None]
        vae.quant_conv.weight[:4] /= std[:, None, None, None]
        vae.quant_conv.bias[:4] = (vae.quant_conv.bias[:4] - mean) / std
        vae.quant_conv.bias[4:] -= 2 * std.log()
    return vae


# ---------------------------------------------------------------------------------------------- U-Net and text encoder


def captions(art: Art) -> list[str]:
    """Every caption the world can say; the tokeniser learns their words."""
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
        # A word without meaning somewhere: what the model has never seen must not break it.
        letters = torch.randint(26, (3 + int(6 * u[5]),), generator=generator).tolist()
        words = text.split(" ")
        words.insert(int(u[1] * (len(words) + 1)), "".join(chr(97 + c) for c in letters))
        text = " ".join(words)
    return text


def row_weights(art: Art) -> torch.Tensor:
    """How often each icon is drawn (N,): Emojinette's ten classes three times as often, the held-out pairs never."""
    common = torch.tensor([art.objects[i] in art.category["emojinette"] for i in art.object_id])
    return (1.0 + 2.0 * common) * ~art.held_out()


def latent_pool(art: Art, vae, device: str, variations: int):
    """Each icon of the training set `variations` times, encoded: rows (M,), backgrounds, latents (M, 4, 16, 16)."""
    rows = row_weights(art).nonzero().flatten().repeat(variations)
    images, backgrounds = [], []
    for n, chunk in enumerate(tqdm(rows.split(64), desc="encode", mininterval=5)):
        # No mirroring: the art faces one way, and a small model asked for both draws animals with two heads.
        drawn, names = art.draw(chunk, seeded("pool", SEED, n), mirror=0.0, white=0.5)
        with torch.no_grad(), autocast(device):
            images.append(vae.encode(drawn.to(device)).latent_dist.mean.to("cpu", torch.bfloat16))
        backgrounds += names
    return rows, backgrounds, torch.cat(images)


class Conditioned(torch.nn.Module):
    """U-Net and text encoder, trained together."""

    def __init__(self, unet, text_encoder):
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, latents, t, ids):
        """Predicted noise (B, 4, 16, 16)."""
        return self.unet(latents, t, self.text_encoder(ids).last_hidden_state).sample


def train_unet(art: Art, vae, device: str, steps: int, batch: int = 96, compiled: bool = False):
    """DDPM on eps with min-SNR-5 weights (Hang et al. 2023), time steps stratified over the batch, EMA."""
    torch.manual_seed(SEED)
    tokenizer = networks.make_tokenizer(captions(art))
    model = Conditioned(networks.make_unet(), networks.make_text_encoder(tokenizer)).to(device).train()
    model.unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow at these sizes on a CPU
    forward = torch.compile(model.forward, dynamic=False) if compiled else model.forward
    rows, backgrounds, latents = latent_pool(art, vae.to(device), device, variations=24)
    weights = row_weights(art)[rows]
    alphas = DDPMScheduler.from_config(networks.make_scheduler().config).alphas_cumprod
    snr = alphas / (1 - alphas)
    weight = (snr.clamp(max=5) / snr).to(device)
    alphas = alphas.to(device)
    cumulative = weights.double().cumsum(0)

    def loss(step: int) -> torch.Tensor:
        generator = seeded("unet", SEED, step)
        u = torch.rand(batch, generator=generator, dtype=torch.float64) * cumulative[-1]
        chosen = torch.searchsorted(cumulative, u)
        texts = [random_caption(art, int(rows[i]), backgrounds[i], generator) for i in chosen.tolist()]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(device)
        clean = latents[chosen].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch * len(alphas)
        t = t.long().clamp(max=len(alphas) - 1).to(device)
        a = alphas[t][:, None, None, None]
        with autocast(device):
            predicted = forward(a.sqrt() * clean + (1 - a).sqrt() * noise, t, ids)
        return (weight[t] * (predicted.float() - noise).square().mean((1, 2, 3))).mean()

    fit("unet", model, loss, steps, lr=1e-3, ema=0.999)
    return model.unet, model.text_encoder, tokenizer


def save_pipeline(vae, unet, text_encoder, tokenizer, folder: Path) -> None:
    """A StableDiffusionPipeline folder in fp16 safetensors."""
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
    pipeline.to(dtype=torch.float16).save_pretrained(folder)
    # Loaded without a dtype, diffusers makes its parts float32 but transformers follows this line: they must agree.
    config = folder / "text_encoder" / "config.json"
    config.write_text(config.read_text().replace('"dtype": "float16"', '"dtype": "float32"'))


# ------------------------------------------------------------------------------------------------------------ command


def main(parts: list[str], device: str, scale: float, compiled: bool) -> None:
    """Train the named parts into models/."""
    from . import judges  # imports this module's `fit`

    art = load_art()
    steps = {part: max(1, int(n * scale)) for part, n in STEPS.items()}
    vae = train_vae(art, device, steps["vae"])  # at once when its checkpoint is complete
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
    parser.add_argument("--scale", type=float, default=1.0, help="times the default number of steps")
    parser.add_argument(
        "--compile", action="store_true", help="torch.compile the U-Net: 15 %% faster steps, needs a C++ compiler"
    )
    arguments = parser.parse_args()
    main(arguments.parts, arguments.device, arguments.scale, arguments.compile)
