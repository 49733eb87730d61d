"""The training loop of the bundled networks: one-cycle AdamW with checkpoints."""

import math
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from ... import paths
from ...checkpoints import optimizer_state, read_tensors, restore_optimizer, write_tensors

SAVE_EVERY = 120  # seconds between checkpoints


def one_cycle(step: int, steps: int, peak: float) -> float:
    """Learning rate: linear warm-up over a twentieth of the steps, then a cosine to a hundredth of the peak."""
    warm = max(1, steps // 20)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))))


def fit(
    name: str,
    module: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    ema: float | None = None,
) -> torch.nn.Module:
    """Minimise `loss(step)` over the parameters of `module` with AdamW, resuming from the checkpoint `name`.

    With `ema`, the returned module holds the exponential average of the weights (decay warmed up as (1+n)/(10+n)).
    """
    path = paths.BUILD / "world" / f"{name}.safetensors"
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
        write_tensors(path, state, {"step": step, "steps": steps, "seconds": seconds + time.time() - began})

    began = saved = time.time()
    smoothed = 0.0
    bar = tqdm(range(start, steps), initial=start, total=steps, desc=name, mininterval=5)
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
        smoothed = 0.98 * smoothed + 0.02 * value.item() if smoothed else value.item()
        bar.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
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
