"""One resumable training loop for every part of the world."""

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from tqdm.auto import tqdm

from ... import paths
from ...checkpoints import optimizer_state, read_tensors, restore_optimizer, write_tensors
from ..device import fast_bf16

SAVE_EVERY = 120  # seconds between checkpoints
COOLDOWN = 0.3  # the last part of the steps, over which the learning rate falls to zero


def folder() -> Path:
    """Where checkpoints and encoded pictures lie."""
    return paths.BUILD / "world2"


def autocast(device: torch.device | str):
    """bf16 where the processor multiplies it natively, else fp32: emulated bf16 is 20 to 40 times slower."""
    device = torch.device(device)
    return torch.autocast(device.type, dtype=torch.bfloat16) if fast_bf16(str(device)) else nullcontext()


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
    identity: str = "",
) -> int:
    """Minimise `loss(step)` over the trainable parameters of `module` with AdamW, resuming from the part's checkpoint.

    With `ema`, the module ends holding the exponential average of its weights (decay warmed up as (1+n)/(10+n)). After
    `minutes` the run saves its state and stops. `identity`: what the training rests on, such as the hash of a frozen part.
    Returns the number of steps done. Raises ValueError for a checkpoint with another identity.
    """
    path = folder() / f"{part}.safetensors"
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, betas=(0.9, 0.99), fused=True)
    average = [p.detach().clone() for p in parameters] if ema else []
    start, seconds = 0, 0.0
    if path.exists():
        tensors, meta = read_tensors(path)
        if meta.get("identity", identity) != identity:
            raise ValueError(f"{path} belongs to a training on other frozen parts: delete it to start again")
        module.load_state_dict({k[6:]: v for k, v in tensors.items() if k.startswith("model.")})
        restore_optimizer(optimizer, "adam", tensors)
        average = [tensors[f"ema.{name}"].to(p.device) for name, p in zip(names, parameters)] if ema else []
        start, seconds = meta["step"], meta["seconds"]

    def save(step: int) -> None:
        state = {f"model.{name}": value for name, value in module.state_dict().items()}
        state |= optimizer_state(optimizer, "adam") | {f"ema.{n}": a for n, a in zip(names, average)}
        about = {"step": step, "steps": steps, "seconds": seconds + time.time() - began, "identity": identity}
        write_tensors(path, state, about)

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
    return step
