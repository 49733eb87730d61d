"""Receler (Huang et al., arXiv 2311.17717): erasers after cross-attention, kept to the concept's place, with an adversary."""

from dataclasses import dataclass

import torch

from .. import losses
from ..adapters import Adapter
from ..artifacts import Erasure
from ..attention import augment
from ..checkpoints import seeded
from ..text import concept_positions, said
from ..training import Bench, Training, gradients_off, update
from .masks import concept_mask, resized


@dataclass(frozen=True)
class Receler(Training):
    """Published: rank 128 at widths up to 1,280, 16 adversarial vectors, 50 inner updates, 500 steps, lr 3e-4."""

    lr: float = 1e-3
    eta: float = 1.0
    rank: int = 32
    adversarial_tokens: int = 4
    inner: int = 5
    inner_lr: float = 0.1  # Adam with weight decay 0.1
    locality_weight: float = 0.1
    mask_threshold: float = 0.1


def receler(world, concepts: list[str], config: Receler | None = None, checkpoint=None, progress=True) -> Erasure:
    """|| eps_E(z, t, c + a) - [e_0 - eta (e_p - e_0)] ||^2 + 0.1 L_reg, a minimising || eps_E(z, t, c + a) - e_p ||^2.

    L_reg is what the erasers add outside the concept's mask (eqs. 4 to 8). Latents from the frozen model's pool. The mask
    comes from the finest attention maps: 8 x 8 in the bundled world, 64 x 64 in Stable Diffusion, where the paper takes 16 x 16.
    """
    config = config or Receler()
    bench = Bench(world, concepts, config, "receler")
    unet, generator = bench.unet, seeded("receler", config.seed)
    widths = {n: m.to_out[0].out_features for n, m in unet.named_modules() if n.endswith(".attn2")}
    tensors = {}
    for name, d in widths.items():
        tensors[f"{name}.D"] = (2 * torch.rand(config.rank, d, generator=generator) - 1) / d**0.5
        tensors[f"{name}.U"] = torch.zeros(d, config.rank)
    tensors = {name: torch.nn.Parameter(t.to(bench.device)) for name, t in tensors.items()}
    attack = torch.nn.Parameter(
        torch.rand(config.adversarial_tokens, bench.embeddings.shape[2], generator=generator).to(bench.device)
    )
    adapter = Adapter("eraser", tensors)
    adam = torch.optim.Adam(tensors.values(), lr=config.lr)
    inner_adam = torch.optim.Adam([attack], lr=config.inner_lr, weight_decay=config.inner_lr)
    positions = [
        concept_positions(world.pipe, text, concepts[owner]) for text, owner in zip(bench.texts, bench.owner.tolist())
    ]

    def attacked(b) -> torch.Tensor:
        """The prompts' embeddings with the adversary's vectors written in after the concept's words."""
        text = b.text[: b.n].clone()
        room = said(unet, text).shape[1]
        for row, subject in enumerate(b.index[: b.n].tolist()):
            after = positions[subject][-1] + 1
            text[row, after : min(after + config.adversarial_tokens, room)] = attack[: room - after]
        return text

    def step(n: int) -> dict[str, float]:
        b = bench.draw("removal", n)
        z, t, weight = b.z[: b.n], b.t[: b.n], b.weight[: b.n]
        with adapter.disabled(), slot.watching() as maps:
            bench.predict(z, t, b.text[: b.n])
            mask = concept_mask(maps, [positions[i] for i in b.index[: b.n].tolist()], config.mask_threshold)
        for _ in range(config.inner):
            l_attack = (weight * losses.transfer(bench.predict(z, t, attacked(b)), b.eps[: b.n])).mean()
            update(inner_adam, l_attack, [attack])
        adapter.outputs = {}
        text = torch.cat([attacked(b).detach(), b.text[b.n :]])
        says = bench.predict(b.z, b.t, text)
        l_removal = (weight * losses.removal(says[: b.n], bench.target(b, config.eta))).mean()
        l_local = torch.stack([outside(o[: b.n], mask) for o in adapter.outputs.values()]).mean()
        adapter.outputs = None
        l_retain = bench.retain(says, b)
        loss = l_removal + config.locality_weight * l_local + config.retain_weight * l_retain
        update(adam, loss, tensors.values())
        return {
            "attack": l_attack.item(),
            "removal": l_removal.item(),
            "local": l_local.item(),
            "retain": l_retain.item(),
        }

    players = {"adapter": (tensors, adam), "attack": ({"a": attack}, inner_adam)}
    with gradients_off(unet), augment(unet) as slot, adapter.attached(unet):
        history = bench.fit(step, players, checkpoint, progress)
    adapters = {name: t.detach().cpu() for name, t in tensors.items()}
    return bench.erasure(history, adapters=adapters, adapter="eraser")


def outside(o: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean square of an eraser's output (B, pixels, d) over the pixels outside the mask (B, h, w); 0 where there are none."""
    free = 1 - resized(mask, o.shape[1])
    return ((o.float().square().mean(2) * free).sum(1) / free.sum(1).clamp(min=1)).mean()
