"""The U-Net, on the frozen text encoder and VAE. Leaving concepts out makes the oracle: the model that never saw them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tqdm.auto import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from ...checkpoints import read_tensors, seeded, write_tensors
from ...pipelines import files
from ...provenance import fingerprint
from . import fit, groups, networks, oracles, pictures
from .art import Art

BATCH = 192
CHUNK = 256  # pictures that are encoded and kept together
CHUNKS = 200
UNCONDITIONED = 0.1  # share of empty captions
BARE = 0.7  # share of the captions whose padding is hidden, so that attention must look at the words


def weights_of(art: Art, without: Sequence[str]) -> torch.Tensor:
    """How often each icon is drawn (N,): Emojinette's ten classes three times as often, held-out pairs and `without` never."""
    common = torch.tensor([art.objects[i] in art.category["emojinette"] for i in art.object_id])
    return (1.0 + 2.0 * common) * ~art.held_out() * art.without(groups.left_out(without))


@torch.no_grad()
def latent_pool(art: Art, vae: AutoencoderKL, without: Sequence[str], chunks: int):
    """`chunks` x 256 pictures, a quarter of two icons: latents (M, C, 16, 16), float16 on the CPU, and what is on each.

    Each chunk is kept in the build folder: encoding takes minutes, and an interrupted run goes on.
    """
    weights = weights_of(art, without)
    name = "-".join(["pool", *without, fingerprint(vae)[:8]]).replace(" ", "_")
    latents, shown = [], []
    vae = vae.to(memory_format=torch.channels_last)
    for n in tqdm(range(chunks), desc="encode", mininterval=20):
        path = fit.folder() / "latents" / f"{name}-{n}.safetensors"
        generator = seeded("pool", n)
        if path.exists():
            tensors, meta = read_tensors(path)
        else:
            # No mirroring: the art faces one way, and a small model asked for both draws animals with two heads.
            images, drawn = pictures.draw(art, weights, CHUNK, generator, mirror=0.0, white=0.5)
            parts = images.contiguous(memory_format=torch.channels_last).split(32)
            means = [vae.encode(part.to(vae.device)).latent_dist.mean for part in parts]
            tensors = {"latents": torch.cat(means).half().cpu()}
            meta = {"shown": [[*p.objects, p.style, p.background] for p in drawn]}
            write_tensors(path, tensors, meta)
        latents.append(tensors["latents"])
        shown += [pictures.Picture(tuple(each[:-2]), each[-2], each[-1]) for each in meta["shown"]]
    return torch.cat(latents), shown


def padding_mask(ids: torch.Tensor, end: int, generator: torch.Generator) -> torch.Tensor:
    """Which tokens attention may see (B, T): all, or for most of the texts none after the end token."""
    ends = (ids == end).int().argmax(1, keepdim=True)
    bare = torch.rand(len(ids), 1, generator=generator) < BARE
    return (torch.arange(ids.shape[1]) <= ends) | ~bare


def train(
    art: Art,
    folder: Path,
    steps: int,
    seed: int,
    without: Sequence[str],
    minutes: float | None = None,
    chunks: int = CHUNKS,
    device: str = "cpu",
    size: int = BATCH,
) -> None:
    """DDPM on eps with min-SNR-5 weights (Hang et al. 2023), time steps stratified over the batch, EMA.

    Reads VAE, tokeniser and text encoder of `folder` and writes the pipeline's other parts there, or with a seed or `without`
    a U-Net where `oracles.folder` says. Where the time is up first, what is written is the average so far.
    """
    without = oracles.names(without)
    torch.manual_seed(seed)
    vae = AutoencoderKL.from_pretrained(folder / "vae", dtype=torch.float32).eval().to(device)
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32, attn_implementation="eager")
    encoder = encoder.eval().to(device)
    unet = networks.make_unet().train().to(device)
    unet.set_attn_processor(AttnProcessor())  # SDPA's backward is slow at these sizes on a CPU
    identity = f"{fingerprint(vae)[:16]} {fingerprint(encoder)[:16]}"
    latents, shown = latent_pool(art, vae, without, chunks)
    vae = vae.to(memory_format=torch.contiguous_format)  # safetensors takes no other
    alphas = DDPMScheduler.from_config(networks.make_scheduler().config).alphas_cumprod
    snr = alphas / (1 - alphas)
    weight, unsaid = (snr.clamp(max=5) / snr).to(device), groups.unsaid(without)
    alphas = alphas.to(device)

    def batch(step: int) -> tuple[torch.Tensor, ...]:
        """Noisy latents, time steps, noise, and the texts' outputs and masks, of `size` pictures."""
        generator = seeded("unet", seed, step)
        chosen = torch.randint(len(latents), (size,), generator=generator)
        texts = [pictures.describe(shown[i], generator, unsaid).text for i in chosen.tolist()]
        empty = torch.rand(size, generator=generator) < UNCONDITIONED
        texts = ["" if e else text for e, text in zip(empty, texts)]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        with torch.no_grad():
            context = encoder(ids.to(device)).last_hidden_state
        # The empty text keeps its padding: the unconditional half of guidance is always asked with it.
        mask = (padding_mask(ids, tokenizer.eos_token_id, generator) | empty[:, None]).to(device)
        clean = latents[chosen].float().to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        t = (torch.arange(size) + torch.rand(size, generator=generator)) / size * len(alphas)
        t = t.long().clamp(max=len(alphas) - 1).to(device)
        a = alphas[t][:, None, None, None]
        return a.sqrt() * clean + (1 - a).sqrt() * noise, t, noise, context, mask

    def loss(noisy, t, noise, context, mask) -> torch.Tensor:
        with fit.autocast(device):
            predicted = unet(noisy, t, context, encoder_attention_mask=mask).sample.float()
        return (weight[t] * (predicted - noise).square().mean((1, 2, 3))).mean()

    began, name = time.time(), oracles.run_name(without, seed)
    done = fit.fit(name, unet, loss, steps, lr=1e-3, ema=0.999, minutes=minutes, identity=identity, batch=batch)
    target = oracles.folder(without, seed)
    if name == "unet":
        save_pipeline(vae, unet, encoder, tokenizer, folder)
    else:
        unet.half().save_pretrained(target / "unet")
    said = {
        "done": done >= steps,
        "steps": done,
        "planned steps": steps,
        "batch": size,
        "seed": seed,
        "without": list(without),
        "last session, s": round(time.time() - began),
    }
    (target / "training.json").write_text(json.dumps(said, indent=1) + "\n")


def save_pipeline(vae, unet, encoder, tokenizer, folder: Path) -> None:
    """A StableDiffusionPipeline folder in fp16 safetensors that every version of transformers reads."""
    unet.set_default_attn_processor()
    pipeline = StableDiffusionPipeline(
        vae=vae,
        unet=unet,
        text_encoder=encoder,
        tokenizer=tokenizer,
        scheduler=networks.make_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    files.save_pipeline(pipeline.to(dtype=torch.float16), folder)
    networks.load_in_float32(folder / "text_encoder")
