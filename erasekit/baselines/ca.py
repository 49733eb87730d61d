"""CA, concept ablation (Kumari et al., arXiv 2303.13516), model-based: the target's prediction becomes an anchor's."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..conditioning import encode
from ..training import TrainableWeights, Trainer, WeightConfig, optimizer_step
from ..trajectories import make_pool
from .registry import RATES, method


@dataclass(frozen=True)
class CA(WeightConfig):
    """Published: keys and values of attn2, AdamW with weight decay 1e-2, gradients clipped at 1, 100 to 400 steps.

    Anchors: of an object, the nearest retained object; of a style, the same object in no style.
    """

    train_method: str = "xattn-kv"
    weight_decay: float = 1e-2
    clip: float = 1.0


@method("ca", CA, sweep=RATES)
def ca(world, concepts: list[str], config: CA | None = None, checkpoint=None, progress=True) -> Erasure:
    """L = || eps_theta'(x_t, t, c*) - sg[eps_theta'(x_t, t, c)] ||^2, x_t a noised anchor image, c its caption (eq. 5).

    The teacher is the trained model itself, as published. Anchor images are the pool's; no random crops, so no mask.
    """
    config = config or CA()
    anchors = [prompt for c in concepts for prompt in world.anchor_prompts(c, config.diverse_prompts)]
    trainer = Trainer(world, concepts, config, "ca")
    config = trainer.config
    how = config.trajectories | {"count": trainer.count}
    images = make_pool(world, [(anchor, "") for anchor in anchors], config.seed, **how).clean
    anchor_cond = encode(world.pipe, anchors)
    with TrainableWeights(trainer.unet, config.train_method).training() as w, start_token_detached(trainer.unet):
        theta = w.parameters
        optimizer = torch.optim.AdamW(theta.values(), lr=config.lr, weight_decay=config.weight_decay)

        def step(n: int) -> dict[str, float]:
            b, generator = trainer.batch("retain", n), seeded("ablation", config.seed, n)
            index = b.index[: b.n]
            x = images[index, torch.randint(images.shape[1], index.shape, generator=generator)]
            t = torch.randint(len(trainer.alphas), index.shape, generator=generator).to(trainer.device)
            noise = torch.randn(x.shape, generator=generator).to(trainer.device)
            a = trainer.alphas[t][:, None, None, None]
            x_t = (a.sqrt() * x.to(trainer.device) + (1 - a).sqrt() * noise).to(b.z)
            with torch.no_grad():
                teacher = trainer.predict(x_t, t, anchor_cond[index.to(trainer.device)])
            # One forward pass for the anchor images with the target's caption, and for what is retained.
            prediction = trainer.predict(torch.cat([x_t, b.z[b.n :]]), torch.cat([t, b.t[b.n :]]), b.cond)
            l_removal = (trainer.loss_weight(t) * losses.squared_error(prediction[: b.n], teacher)).mean()
            l_retain = trainer.retain_loss(prediction, b)
            optimizer_step(optimizer, l_removal + config.retain_weight * l_retain, theta.values(), config.clip)
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = trainer.fit(step, {"theta": (theta, optimizer)}, checkpoint, progress)
        return trainer.erasure(history, delta=w.delta(), anchors=list(dict.fromkeys(anchors)))


@contextmanager
def start_token_detached(unet):
    """No gradient through the start token's key and value, which are the same in every prompt."""

    def hook(module, inputs, output):
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    layers = [m for name, m in unet.named_modules() if name.endswith((".attn2.to_k", ".attn2.to_v"))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
