"""06, before the comparison: every method from gentle to strong on styles, with objects and seeds that no table reports."""

from dataclasses import dataclass

from .operating_points import along_step, mean_points, sweep_figure, table

__all__ = ["NOTEBOOK", "PRESETS", "SWEEP", "UNIT", "VERSION", "Settings", "compute", "figures", "table"]
NOTEBOOK, VERSION, UNIT = "06_styles", 1, "images a style"  # raise VERSION when the numbers should change

LEARNING_RATES = ({"lr": 8e-4}, {"lr": 1.6e-3}, {"lr": 3.2e-3})  # a style needs larger steps than an object
SWEEP = {
    "esd-x": LEARNING_RATES,
    "uce": tuple({"lam": lam} for lam in (50.0, 15.0, 5.0)),
    "ca": LEARNING_RATES,
    "sld": ({"level": "max"},),
    "np": ({},),
    "mace": tuple({"lam": lam} for lam in (30.0, 10.0)),
    "spm": tuple({"anchor_weight": weight} for weight in (10.0, 3.0)),
    "kpop": LEARNING_RATES,
    "kpop-anchor": LEARNING_RATES,
}
UNNAMED_SEEDS = 10  # images of each object by a prompt that names no style


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(SWEEP)
    erased: tuple[str, ...] = ("openmoji",)
    step_scales: tuple[float, ...] = (0.6, 0.8, 1.0)
    seeds: int = 4
    first_seed: int = 1000
    training_seed: int = 100
    sampling_steps: int = 8
    training_steps: int | None = None


PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("uce", "kpop"), step_scales=(0.8, 1.0)),
    "smoke": Settings(("uce", "kpop"), ("noto",), (1.0,), seeds=1, sampling_steps=2, training_steps=1),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Rates in percent, means over the erased styles, for each method, setting and step scale; and each method's choice.

    ESR-1: images of the erased style that the judge sees in another style. PSR-1: images of the other styles with style and
    object right. "object": images of the erased style that are still their object. The target is what leaving the style
    unnamed does, since the base then draws some style anyway.
    """
    from tqdm.auto import tqdm

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import judge_images, object_correct, percent, style_correct
    from .kit.erasures import at_lr_scale, best_of_grid, make_config, measured

    objects = world.concepts("tuning") + world.concepts("tuning kept")
    sizes = objects, s.seeds, s.first_seed, s.sampling_steps

    def prompts_in(style, seeds):
        return [(world.prompt(o, style), o, s.first_seed + n) for o in objects for n in range(seeds)]

    def rates(erasure, erased):
        own, others = prompts_in(erased, s.seeds), [style for style in world.styles if style != erased]
        prompts = own + [p for style in others for p in prompts_in(style, 1)]
        styles = [erased] * len(own) + [style for style in others for _ in objects]
        images = sample_images(world, erasure, prompts, s.sampling_steps)
        style_right = style_correct(world, images, styles)
        object_right = object_correct(world, images, [o for _, o, _ in prompts])
        return {
            "ESR-1": percent(~style_right[: len(own)]),
            "PSR-1": percent(style_right[len(own) :] & object_right[len(own) :]),
            "object": percent(object_right[: len(own)]),
        }

    def curve(method, config, erased):
        measure = along_step(world, s.step_scales, lambda erasure: rates(erasure, erased))
        study = "style_operating_points", VERSION, world
        return measured(*study, [erased], method, config, 1.0, measure, s.step_scales, sizes)[0]["points"]

    runs, sweep = [], [(m, at_lr_scale(world, m, c)) for m in s.methods for c in SWEEP[m]]
    for method, changes in tqdm(sweep, desc="style operating points"):
        config = make_config(world, method, s.training_seed, s.sampling_steps, changes, s.training_steps)
        means = mean_points([curve(method, config, style) for style in s.erased])
        runs += [{"method": method, "settings": changes} | point for point in means]
    unnamed = [(world.prompt(o), o, s.first_seed + n) for o in objects for n in range(UNNAMED_SEEDS)]
    styles = judge_images(world, sample_images(world, None, unnamed, s.sampling_steps))[1].argmax(1)
    target = sum(percent(styles != world.judge.styles.index(style)) for style in s.erased) / len(s.erased)
    by_method = {m: [run for run in runs if run["method"] == m] for m in s.methods}
    return {
        "N": len(objects) * s.seeds,
        "seeds": [s.first_seed, s.first_seed + s.seeds - 1],
        "training_seed": s.training_seed,
        "erased": s.erased,
        "target_esr": target,
        "base": mean_points([[rates(None, style)] for style in s.erased])[0],
        "runs": runs,
        "operating_points": {m: best_of_grid(own, target) for m, own in by_method.items()},
    }, {}


def figures(record) -> dict:
    labels = "Erased: images not in the erased style, %", "Kept: other styles, style and object right, %"
    return {"styles_operating_points": sweep_figure(record.data, *labels)}
