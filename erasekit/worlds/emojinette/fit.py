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
WARM_UP = 3  # ordinary steps before a GPU's step is captured
COOLDOWN = 0.3  # the last part of the steps, over which the learning rate falls to zero


def folder() -> Path:
    """Where checkpoints and encoded pictures lie."""
    return paths.BUILD / "emojinette"


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


class Step:
    """One step of the optimiser, for one set of input tensors after another.

    On a GPU the step is captured as a CUDA graph, and then replayed: launching the kernels of a network this small takes
    several times as long as running them. `loss(*inputs)` then draws nothing at random and never waits for the GPU.
    """

    def __init__(self, loss: Callable[..., torch.Tensor], optimizer: torch.optim.Optimizer, captured: bool):
        self.loss, self.optimizer, self.captured = loss, optimizer, captured
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.done, self.graph, self.inputs, self.value = 0, None, None, None

    def run(self) -> torch.Tensor:
        value = self.loss(*self.inputs)
        self.optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        return value.detach()

    def __call__(self, *inputs) -> torch.Tensor:
        self.done += 1
        if not self.captured:
            self.inputs = inputs
            return self.run()
        if self.inputs is None:
            self.inputs = [torch.empty_like(given, device=self.parameters[0].device) for given in inputs]
        for own, given in zip(self.inputs, inputs):
            own.copy_(given)
        if self.done <= WARM_UP:  # beside the default stream, as the capture is
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                value = self.run()
            torch.cuda.current_stream().wait_stream(stream)
            return value
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.cuda.graph(self.graph):
                self.value = self.run()
        self.graph.replay()
        return self.value


class Drawn(torch.utils.data.Dataset):
    """The inputs of each step, for `workers` processes that draw them in advance: step n is the same whoever draws it."""

    def __init__(self, batch: Callable[[int], tuple[torch.Tensor, ...]]):
        self.batch = batch

    def __getitem__(self, step: int) -> tuple[torch.Tensor, ...]:
        return self.batch(step)


def fit(
    part: str,
    module: torch.nn.Module,
    loss: Callable[..., torch.Tensor],
    steps: int,
    lr: float,
    weight_decay: float = 0.01,
    ema: float | None = None,
    minutes: float | None = None,
    identity: str = "",
    batch: Callable[[int], tuple[torch.Tensor, ...]] | None = None,
    workers: int = 0,
) -> int:
    """Minimise `loss(step)` over the trainable parameters of `module` with AdamW, resuming from the part's checkpoint.

    With `batch`, minimise `loss(*batch(step))`, which is many times faster on a GPU: see `Step`. `workers`: processes that draw
    batches on the CPU.
    With `ema`, the module ends holding the exponential average of its weights (decay warmed up as (1+n)/(10+n)). After
    `minutes` the run saves its state and stops. `identity`: what the training rests on, such as the hash of a frozen part.
    Returns the number of steps done. Raises ValueError for a checkpoint with another identity.
    """
    path = folder() / f"{part}.safetensors"
    names, parameters = zip(*((n, p) for n, p in module.named_parameters() if p.requires_grad))
    cuda = parameters[0].is_cuda
    rate = torch.tensor(lr, device=parameters[0].device) if cuda else lr  # a captured step reads it from the GPU
    how = {"weight_decay": weight_decay, "betas": (0.9, 0.99), "fused": True, "capturable": cuda}
    optimizer = torch.optim.AdamW(parameters, lr=rate, **how)
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
    shown, step = 0.0, start
    drawn = torch.utils.data.DataLoader(Drawn(batch), None, sampler=range(start, steps), num_workers=workers)
    inputs = iter(drawn) if batch else ((n,) for n in range(start, steps))
    optimise = Step(loss, optimizer, captured=cuda and batch is not None)
    with tqdm(initial=start, total=steps, desc=part, mininterval=20) as bar:
        while step < steps:
            for group in optimizer.param_groups:
                now = trapezoid(step, steps, lr)
                group["lr"] = group["lr"].fill_(now) if cuda else now
            value = optimise(*next(inputs)).item()
            if not math.isfinite(value):
                raise RuntimeError(f"{part}: the loss is {value} at step {step}")
            if ema:
                decay = min(ema, (1 + step) / (10 + step))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            shown = 0.98 * shown + 0.02 * value if shown else value
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
