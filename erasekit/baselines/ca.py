"""CA, concept ablation (Kumari et al., arXiv 2303.13516), model-based: the target's prediction becomes that of an anchor."""

from contextlib import contextmanager
from dataclasses import dataclass

import torch

from .. import losses
from ..artifacts import Erasure
from ..checkpoints import seeded
from ..text import encode
from ..training import Bench, Student, WeightTraining, update
from ..trajectories import roll


@dataclass(frozen=True)
class CA(WeightTraining):
    """Published: keys and values of attn2, AdamW with weight decay 1e-2, gradients clipped at 1, 100 to 400 steps.

    Anchors: for an object, the retained object nearest to it; for a style, the same object in no style.
    """

    group: str = "kv"
    weight_decay: float = 1e-2
    clip: float = 1.0


def ca(world, concepts: list[str], config: CA | None = None, checkpoint=None, progress=True) -> Erasure:
    """L = || eps_theta'(x_t, t, c*) - sg[eps_theta'(x_t, t, c)] ||^2, x_t a noised anchor image, c its caption (eq. 5).

    Anchor images are the pool's. No random crops, so no mask. The teacher is the student itself, as published.
    """
    config = config or CA()
    bench = Bench(world, concepts, config, "ca")
    anchors = [text for c in concepts for text in world.anchors(c)]
    clean = roll(world, [(anchor, "") for anchor in anchors], config.seed, **config.roll).clean
    embeddings = encode(world.pipe, anchors)
    with Student(bench.unet, config.group).training() as student, start_token_cut(bench.unet):
        theta = student.parameters
        adam = torch.optim.AdamW(theta.values(), lr=config.lr, weight_decay=config.weight_decay)

        def step(n: int) -> dict[str, float]:
            b, generator = bench.draw("retain", n), seeded("ablation", config.seed, n)
            index = b.index[: b.n]
            x = clean[index, torch.randint(clean.shape[1], index.shape, generator=generator)]
            t = torch.randint(len(bench.alphas), index.shape, generator=generator).to(bench.device)
            noise = torch.randn(x.shape, generator=generator).to(bench.device)
            a = bench.alphas[t][:, None, None, None]
            x_t = (a.sqrt() * x.to(bench.device) + (1 - a).sqrt() * noise).to(b.z)
            with torch.no_grad():
                teacher = bench.predict(x_t, t, embeddings[index.to(bench.device)])
            # One forward for the anchor images under the target's caption and for what is retained.
            student_says = bench.predict(torch.cat([x_t, b.z[b.n :]]), torch.cat([t, b.t[b.n :]]), b.text)
            weight = bench.error_weight(t)
            l_removal = (weight * losses.squared_error(student_says[: b.n], teacher)).mean()
            l_retain = bench.retain(student_says, b)
            update(adam, l_removal + config.retain_weight * l_retain, theta.values(), config.clip)
            return {"removal": l_removal.item(), "retain": l_retain.item()}

        history = bench.fit(step, {"theta": (theta, adam)}, checkpoint, progress)
        return bench.erasure(history, delta=student.delta(), anchors=list(dict.fromkeys(anchors)))


@contextmanager
def start_token_cut(unet):
    """No gradient through the start token's key and value: it is the same in every prompt."""

    def hook(module, inputs, output):
        return torch.cat([output[:, :1].detach(), output[:, 1:]], dim=1)

    names = [n for n, _ in unet.named_modules() if n.endswith((".attn2.to_k", ".attn2.to_v"))]
    handles = [unet.get_submodule(n).register_forward_hook(hook) for n in names]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
