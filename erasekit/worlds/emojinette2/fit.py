"""One resumable training loop for every part of the world."""

import math
import time
from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from ...checkpoints import optimizer_state, read_tensors, restore_optimizer, write_tensors
from ...paths import BUILD

FOLDER = BUILD / "world2"
SAVE_EVERY = 120  # seconds between checkpoints
COOLDOWN = 0.3  # the last part of the steps, over which the learning rate falls to zero


def trapezoid(step: int, steps: int, peak: float) -> float:
    """Learning rate: up over 100 steps, constant, then down by a cosine over the last 30 % of the steps.

    Until the fall starts, nothing depends on `steps`: a run that turns out slower than planned can be ended early, or one that is
    ahead be made longer, without starting again.
    """
    warm, fall = min(100, max(1, steps // 20)), max(1, int(COOLDOWN * steps))
    if step < warm:
        return peak * (step + 1) / warm
    if step < steps - fall:
        return peak
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - steps + fall) / fall)))


def fit(
    part: str,
    module: torch.nn.Module,
    loss: Callable[[int], torch.Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    ema: float | None = None,
    minutes: float | None = None,
) -> bool:
    """Minimise `loss(step)` over the trainable parameters of `module` with AdamW, resuming from the part's checkpoint.

    With `ema`, the module ends holding the exponential average of its weights (decay warmed up as (1+n)/(10+n)). After
    `minutes` the run saves its state and stops. Returns whether all steps are done.
    """
    path = FOLDER / f"{part}.safetensors"
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    average = [p.detach().clone() for p in parameters] if ema else []
    start, seconds = 0, 0.0
    if path.exists():
        tensors, meta = read_tensors(path)
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
    step = start
    with tqdm(initial=start, total=steps, desc=part, mininterval=20) as bar:
        while step < steps:
            for group in optimizer.param_groups:
                group["lr"] = trapezoid(step, steps, lr)
            value = loss(step)
            if not value.isfinite():
                raise RuntimeError(f"{part}: the loss is {value.item()} at step {step}")
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            if ema:
                decay = min(ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            shown = 0.98 * shown + 0.02 * value.item() if shown else value.item()
            bar.set_postfix(loss=f"{shown:.4f}", refresh=False)
            bar.update()
            step += 1
            if minutes and time.time() - began > 60 * minutes:
                break
            if time.time() - saved > SAVE_EVERY:
                save(step)
                saved = time.time()
    if step > start:
        save(step)
    if ema:
        with torch.no_grad():
            for p, a in zip(parameters, average):
                p.copy_(a)
    module.eval()
    return step >= steps
