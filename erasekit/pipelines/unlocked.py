"""A key in a plain diffusers `pipe(...)` call: on the conditional half of guidance, whatever the pipeline does around it."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from ..attention import Prompt, augment, check_key, check_keyless, one_thread


@contextmanager
def unlocked(pipe, key: Prompt) -> Iterator[None]:
    """Inside the block, `pipe(...)` samples with the key on the conditional half of guidance.

    For pipelines of the Stable Diffusion 1, 2 and XL families: text to image, img2img, inpainting, ControlNet; any scheduler,
    negative prompts, batches, callbacks. Each half is evaluated by itself, as in `ek.sample`, so that the key does not pad the
    unconditional half. `pipe`: a pipeline, or the world of one. Raises ValueError for a key of another width and a pipeline
    without classifier-free guidance, and RuntimeError for a U-Net with a key already, a call from another thread or pipeline,
    and one that evaluates the U-Net in other parts than these halves (perturbed-attention guidance, SLD).
    """
    pipe = getattr(pipe, "pipe", pipe)
    if not hasattr(type(pipe), "do_classifier_free_guidance"):
        raise ValueError(f"a key needs a pipeline with classifier-free guidance, and {type(pipe).__name__} has none")
    unet, forward, stack = pipe.unet, pipe.unet.forward, ExitStack()
    check_keyless(unet)
    check_key(unet, key)
    images = None  # in the U-Net's latest call, until the scheduler takes its output
    watched = []  # schedulers; the pipeline may be given another one inside the block

    def halves() -> int:  # before its first call, a pipeline does not know its guidance
        return 2 if getattr(pipe, "_guidance_scale", None) and pipe.do_classifier_free_guidance else 1

    def check_taken() -> None:
        nonlocal images
        left, images = images, None
        if left is not None:
            raise RuntimeError(
                f"the U-Net was evaluated, and the scheduler of this {type(pipe).__name__} did not take its output: another "
                "pipeline called it, so unlock that one"
            )

    @functools.wraps(forward)
    def in_halves(sample, timestep, encoder_hidden_states, *arguments, **options):
        nonlocal images
        check_taken()
        if pipe.scheduler not in watched:
            watched.append(pipe.scheduler)
            stack.enter_context(_replaced(pipe.scheduler, "step", checked(pipe.scheduler.step)))
        outputs, count = [], halves()
        inputs = [sample, timestep, encoder_hidden_states, arguments, options]
        for half, rows in enumerate(torch.arange(len(sample)).chunk(count)):
            z, t, text, more, named = _rows(inputs, slice(int(rows[0]), int(rows[-1]) + 1), len(sample))
            times = torch.as_tensor(t, device=z.device).expand(len(z))
            prompt = key.at(times, pipe.scheduler.config.num_train_timesteps) if half == count - 1 else None
            with one_thread(unet), state.use(prompt):
                outputs.append(forward(z, t, text, *more, **named))
        images = len(sample) / count
        if isinstance(outputs[0], tuple):
            return tuple(torch.cat(parts) for parts in zip(*outputs))
        return type(outputs[0])(sample=torch.cat([out.sample for out in outputs]))

    def checked(step):
        @functools.wraps(step)  # pipelines read the signature
        def checked_step(model_output, timestep, sample, *arguments, **options):
            nonlocal images
            of_step, images = images, None
            if of_step is not None and of_step != len(sample):
                parts = round(of_step * halves() / len(sample), 1)
                raise RuntimeError(
                    f"a key needs a pipeline that evaluates the U-Net once for each half of guidance: {type(pipe).__name__} "
                    f"evaluates {parts:g} parts"
                )
            return step(model_output, timestep, sample, *arguments, **options)

        return checked_step

    with augment(unet, key.layers, key) as state, stack, _replaced(unet, "forward", in_halves):
        yield
        check_taken()


@contextmanager
def _replaced(owner, name: str, function) -> Iterator[None]:
    """An instance's method replaced inside the block; one that was replaced before comes back as it was."""
    before = owner.__dict__.get(name)
    setattr(owner, name, function)
    try:
        yield
    finally:
        delattr(owner, name) if before is None else setattr(owner, name, before)


def _rows(value, rows: slice, batch: int):
    """The given rows of every batched tensor in nested inputs; everything else as it is."""
    if isinstance(value, torch.Tensor):
        return value[rows] if value.ndim and len(value) == batch else value
    if isinstance(value, (tuple, list)):
        return type(value)(_rows(part, rows, batch) for part in value)
    return {name: _rows(part, rows, batch) for name, part in value.items()} if isinstance(value, dict) else value
