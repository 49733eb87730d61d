"""Settings of studies that a Stable Diffusion replaces: its own concepts and, but for smoke, its published training."""

from dataclasses import fields, replace

SAMPLING_STEPS = 50


def overrides(world, study: str, preset: str, settings):
    """`settings` with what this world has in their place; worlds without a published training keep them all."""
    if not world.train_defaults:
        return settings
    from ..baselines import METHODS

    published = {method: {"settings": {}, "scale": 1.0} for method in METHODS}
    changes = {
        "operating_points": published,
        "operating_point": published["kpop"],
        "erased": world.styles[:1] if preset == "smoke" else world.styles,
        "style": world.styles[0],
        "other": "English springer",
        "unrelated": ("English springer", "tench", "parachute"),
        "texts": (world.prompt("church"), world.prompt("tench"), ""),
    }
    if preset != "smoke":
        changes |= {"sampling_steps": SAMPLING_STEPS, "training_steps": world.train_defaults["steps"]}
        changes |= {"batch_size": world.train_defaults["batch_size"]}
    if hasattr(settings, "lrs"):
        changes["lrs"] = {name: tuple(lr * world.lr_scale for lr in lrs) for name, lrs in settings.lrs.items()}
    names = {field.name for field in fields(settings)}
    return replace(settings, **{name: value for name, value in changes.items() if name in names})
