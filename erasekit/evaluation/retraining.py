"""A public model that its users train further, or compress: as an erasure whose delta is all of the U-Net's weights.

Fine-tuning minimises the diffusion loss on pictures with their prompts, over all weights or a LoRA (Hu et al., arXiv
2106.09685) on attention. Adapters of an erasure stay on beside the weights that are trained.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.func import functional_call

from ..artifacts import Erasure
from ..base import weights_of
from ..checkpoints import seeded
from ..conditioning import predict_noise
from ..sampling import guidance_for
from ..training import gradients_off, optimizer_step
from .attacks import AttackImages


@dataclass(frozen=True)
class Tuning:
    """How a model is trained further. `rank` None trains all weights, else a LoRA of that rank; `budgets` as an `Attack`'s."""

    budgets: tuple[int, ...]
    lr: float
    rank: int | None = None
    batch_size: int = 8
    seed: int = 0

    def __post_init__(self):
        if not self.budgets or min(self.budgets) < 1 or list(self.budgets) != sorted(set(self.budgets)):
            raise ValueError(
                f"budgets={self.budgets!r} is not possible: give step counts of at least 1, in ascending order"
            )


def public_weights(world, erasure) -> dict[str, Tensor]:
    """Name -> weight of the public U-Net, float32 copies on the model's device."""
    with erasure.applied(world.pipe):
        return {name: p.detach().float().clone() for name, p in weights_of({"": world.pipe.unet}).items()}


def merged(erasure: Erasure, weights: dict[str, Tensor]) -> Erasure:
    """The erasure with these weights of the U-Net in the place of its own; keys and adapters stay."""
    return replace(erasure, delta=erasure.delta | {name: w.detach().cpu().clone() for name, w in weights.items()})


def fine_tune(world, erasure: Erasure, pictures: AttackImages, tuning: Tuning) -> Iterator[tuple[int, Erasure]]:
    """Yield (steps, public model) at 0 steps and after each budget; the base is in place whenever a model is yielded."""
    start = public_weights(world, erasure)
    yield 0, erasure
    low_rank = new_lora(start, tuning.rank, tuning.seed) if tuning.rank else {}
    free = [p for pair in low_rank.values() for p in pair] if tuning.rank else []
    whole = {} if tuning.rank else {name: torch.nn.Parameter(w) for name, w in start.items()}
    free += list(whole.values())

    def weights() -> dict[str, Tensor]:
        return whole or start | {name: start[name] + up @ down for name, (down, up) in low_rank.items()}

    optimizer, taken = torch.optim.Adam(free, lr=tuning.lr), 0
    for budget in tuning.budgets:
        with gradients_off(world.pipe.unet), erasure.applied(world.pipe) as public:
            guide, within = guidance_for(public, 1.0), Within(world.pipe.unet)

            def step(n, guide=guide):
                loss = diffusion_loss(world, pictures, guide, seeded("tuning", tuning.seed, n), tuning)
                optimizer_step(optimizer, loss, free, clip=1.0)

            for n in range(taken, budget):
                functional_call(within, {f"unet.{name}": w for name, w in weights().items()}, (step, n))
        taken = budget
        yield budget, merged(erasure, weights())


class Within(torch.nn.Module):
    """A U-Net that `functional_call` runs a whole step of training in: checkpointed layers need the weights backwards too."""

    def __init__(self, unet):
        super().__init__()
        self.unet = unet

    def forward(self, step, n):
        return step(n)


def diffusion_loss(world, pictures, guide, generator, tuning: Tuning) -> Tensor:
    """E |eps - n|^2, or of v, on a batch of pictures at random time steps."""
    alphas, count = world.pipe.scheduler.alphas_cumprod, tuning.batch_size
    index = torch.randint(len(pictures.prompts), (count,), generator=generator)
    t = torch.randint(len(alphas), (count,), generator=generator)
    x = pictures.latents[index.to(pictures.latents.device)]
    noise = torch.randn(x.shape, generator=generator).to(x)
    alpha = alphas[t][:, None, None, None].to(x)
    z = alpha.sqrt() * x + (1 - alpha).sqrt() * noise
    guide.prepare(world.pipe, [pictures.prompts[i] for i in index.tolist()])  # and the strength of adapters
    with world.autocast():
        output = predict_noise(world.pipe.unet, z, t.to(z.device), guide.c)
    velocity = world.pipe.scheduler.config.prediction_type == "v_prediction"
    target = alpha.sqrt() * noise - (1 - alpha).sqrt() * x if velocity else noise
    return (output.float() - target).square().mean()


def new_lora(weights: dict[str, Tensor], rank: int, seed: int) -> dict[str, tuple]:
    """Projection of attention -> (down (rank, in), up (out, rank)); `up` is zero, so that nothing changes at first."""
    found, generator = {}, seeded("lora", seed)
    for name, w in weights.items():
        if ".attn" in name and name.endswith(("to_q.weight", "to_k.weight", "to_v.weight", "to_out.0.weight")):
            down = torch.randn(rank, w.shape[1], generator=generator) / rank
            found[name] = torch.nn.Parameter(down.to(w)), torch.nn.Parameter(torch.zeros(w.shape[0], rank).to(w))
    return found


def rounded_to_bits(weights: dict[str, Tensor], bits: int) -> dict[str, Tensor]:
    """Every matrix and kernel in whole multiples of a step, 2^(bits - 1) - 1 of them to each output's largest weight.

    Biases and norms keep their precision, as is usual where weights alone are quantised. Raises ValueError below 2 bits.
    """
    if bits < 2:
        raise ValueError(f"bits={bits} is not possible: signed weights take at least 2")
    changed, most = {}, 2 ** (bits - 1) - 1
    for name, w in weights.items():
        if w.ndim > 1:
            step = w.abs().amax(tuple(range(1, w.ndim)), keepdim=True).clamp(min=1e-12) / most
            changed[name] = (w / step).round() * step
    return weights | changed


def pruned(weights: dict[str, Tensor], share: float) -> dict[str, Tensor]:
    """The `share` of each matrix's and kernel's weights that are smallest set to zero. Raises ValueError outside [0, 1)."""
    if not 0 <= share < 1:
        raise ValueError(f"share={share:g} is not possible: prune at least 0 and less than 1 of the weights")
    changed = {}
    for name, w in weights.items():
        if w.ndim > 1 and (count := int(share * w.numel())):
            threshold = w.abs().flatten().kthvalue(count).values
            changed[name] = torch.where(w.abs() <= threshold, 0.0, w)
    return weights | changed
