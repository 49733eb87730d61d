"""Receler (Huang et al., arXiv 2311.17717): erasers after cross-attention, kept to the concept's place, with an adversary."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import losses
from ..artifacts import Erasure
from ..attention import augment
from ..checkpoints import seeded
from ..conditioning import Conditioning
from ..training import TrainConfig, Trainer, gradients_off, optimizer_step
from .adapters import Eraser, trainable
from .masks import concept_mask, concept_positions, resized
from .registry import method


@dataclass(frozen=True)
class Receler(TrainConfig):
    """Published: rank 128 at widths up to 1,280, 16 adversarial vectors, 50 inner updates, 500 steps, lr 3e-4."""

    RATES = TrainConfig.RATES | {"lr": 1e-3}
    eta: float = 1.0
    rank: int = 32
    adversarial_tokens: int = 4
    inner: int = 5
    inner_lr: float = 0.1  # of Adam, and its weight decay
    locality_weight: float = 0.1
    mask_threshold: float = 0.1


@method("receler", Receler, sweep=[{"lr": 2e-3}, {"lr": 4e-3}, {"lr": 8e-3}])
def receler(world, concepts: list[str], config: Receler | None = None, checkpoint=None, progress=True) -> Erasure:
    """|| eps_E(z, t, c + a) - [e_0 - eta (e_p - e_0)] ||^2 + 0.1 L_reg, a minimising || eps_E(z, t, c + a) - e_p ||^2.

    L_reg is what the erasers add outside the concept's mask (eqs. 4 to 8). Latents from the frozen model's pool. The mask
    comes from the finest attention maps: 8 x 8 in the bundled world, 64 x 64 in Stable Diffusion (the paper: 16 x 16).
    """
    trainer = Trainer(world, concepts, config or Receler(), "receler")
    config = trainer.config
    unet, generator, start = trainer.unet, seeded("receler", config.seed), {}
    for name, layer in unet.named_modules():
        if name.endswith(".attn2"):
            d = layer.to_out[0].out_features
            start[f"{name}.D"] = (2 * torch.rand(config.rank, d, generator=generator) - 1) / d**0.5
            start[f"{name}.U"] = torch.zeros(d, config.rank)
    start["a"] = torch.rand(config.adversarial_tokens, trainer.cond.tokens.shape[2], generator=generator)
    tensors = trainable(start, trainer.device)
    a = tensors.pop("a")
    adapter, optimizer = Eraser(tensors), torch.optim.Adam(tensors.values(), lr=config.lr)
    inner_optimizer = torch.optim.Adam([a], lr=config.inner_lr, weight_decay=config.inner_lr)
    owners = zip(trainer.prompts, trainer.owner.tolist())
    positions = [concept_positions(world.pipe, prompt, *world.words(concepts[owner])) for prompt, owner in owners]

    def attacked(b) -> Conditioning:
        """The erased prompts with the adversary's vectors written in after the concept's words."""
        c = b.cond[: b.n]
        tokens, length = c.tokens.clone(), c.tokens.shape[1]
        for row, prompt in enumerate(b.index[: b.n].tolist()):
            after = positions[prompt][-1] + 1
            tokens[row, after : min(after + config.adversarial_tokens, length)] = a[: length - after]
        return Conditioning(tokens, c.added)

    def step(n: int) -> dict[str, float]:
        b = trainer.batch("removal", n)
        z, t, weight = b.z[: b.n], b.t[: b.n], b.weight[: b.n]
        with adapter.disabled(), state.record() as maps:
            trainer.predict(z, t, b.cond[: b.n])
            mask = concept_mask(maps, [positions[i] for i in b.index[: b.n].tolist()], config.mask_threshold)
        for _ in range(config.inner):
            l_attack = (weight * losses.transfer(trainer.predict(z, t, attacked(b)), b.eps[: b.n])).mean()
            optimizer_step(inner_optimizer, l_attack, [a])
        adapter.outputs = {}
        prediction = trainer.predict(b.z, b.t, Conditioning.cat([attacked(b).map(Tensor.detach), b.cond[b.n :]]))
        l_removal = (weight * losses.removal(prediction[: b.n], trainer.target(b, config.eta))).mean()
        l_local = torch.stack([outside(o[: b.n], mask) for o in adapter.outputs.values()]).mean()
        adapter.outputs = None
        l_retain = trainer.retain_loss(prediction, b)
        loss = l_removal + config.locality_weight * l_local + config.retain_weight * l_retain
        optimizer_step(optimizer, loss, tensors.values())
        values = {"attack": l_attack, "removal": l_removal, "local": l_local, "retain": l_retain}
        return {name: value.item() for name, value in values.items()}

    trainables = {"adapter": (tensors, optimizer), "attack": ({"a": a}, inner_optimizer)}
    with gradients_off(unet), augment(unet) as state, adapter.attached(unet):
        history = trainer.fit(step, trainables, checkpoint, progress)
    adapters = {name: t.detach().cpu() for name, t in tensors.items()}
    return trainer.erasure(history, adapters=adapters, adapter="eraser")


def outside(o: Tensor, mask: Tensor) -> Tensor:
    """Mean square of an eraser's output (B, pixels, d) over the pixels outside the mask (B, h, w); 0 if there are none."""
    free = 1 - resized(mask, o.shape[1])
    return ((o.float().square().mean(2) * free).sum(1) / free.sum(1).clamp(min=1)).mean()
