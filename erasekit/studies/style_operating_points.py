"""06, before the comparison: every method from gentle to strong on styles, with objects and seeds that no table reports."""

from dataclasses import dataclass

from .operating_points import STEP_SCALES, along_step, mean_points, sweep_figure, table

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
    "speed": tuple({"threshold": threshold} for threshold in (0.1, 1.0, 10.0)),  # of any s, 0.1 leaves a style as it is
    "oce": tuple({"erase_weight": weight} for weight in (10.0, 30.0, 100.0)),
    "adavd": tuple({"centre": centre} for centre in (0.7, 0.5, 0.3)),  # values of a style are less alike
    "ace": LEARNING_RATES,
    "ant": LEARNING_RATES,
    "stereo": LEARNING_RATES,
    "race": LEARNING_RATES,
    "kpop": LEARNING_RATES,
    "kpop-anchor": LEARNING_RATES,
}
UNNAMED_SEEDS = 10  # images of each object by a prompt that names no style


@dataclass(frozen=True)
class Settings:
    methods: tuple[str, ...] = tuple(SWEEP)
    erased: tuple[str, ...] = ("openmoji",)
    step_scales: tuple[float, ...] = STEP_SCALES
    extensions: int = 2  # further settings, at most, while the one that is taken is the edge of its grid
    seeds: int = 4
    first_seed: int = 1000
    training_seed: int = 100
    sampling_steps: int = 15
    training_steps: int | None = None


PRESETS = {
    "full": Settings(),
    "quick": Settings(methods=("uce", "kpop"), step_scales=(0.6, 0.8, 1.0), extensions=1),
    "smoke": Settings(("uce", "kpop"), ("noto",), (1.0,), 0, seeds=1, sampling_steps=2, training_steps=1),
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
    from .kit.erasures import at_lr_scale, beyond_edge, choose_operating_point, make_config, measured

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

    def line(method, changes):
        """The means of all erased styles' rates, at one setting."""
        config = make_config(world, method, s.training_seed, s.sampling_steps, changes, s.training_steps)
        means = mean_points([curve(method, config, style) for style in s.erased])
        return [{"method": method, "settings": changes} | point for point in means]

    unnamed = [(world.prompt(o), o, s.first_seed + n) for o in objects for n in range(UNNAMED_SEEDS)]
    styles = judge_images(world, sample_images(world, None, unnamed, s.sampling_steps))[1].argmax(1)
    target = sum(percent(styles != world.judge.styles.index(style)) for style in s.erased) / len(s.erased)
    runs, points = [], {}
    for method in tqdm(s.methods, desc="style operating points"):
        sweep = [at_lr_scale(world, method, changes) for changes in SWEEP[method]]
        own = [point for changes in sweep for point in line(method, changes)]
        for _ in range(s.extensions):
            if (further := beyond_edge(sweep, choose_operating_point(own, target)["settings"])) is None:
                break
            sweep.append(further)
            own += line(method, further)
        runs, points = runs + own, points | {method: choose_operating_point(own, target)}
    return {
        "N": len(objects) * s.seeds,
        "seeds": [s.first_seed, s.first_seed + s.seeds - 1],
        "training_seed": s.training_seed,
        "erased": s.erased,
        "target_esr": target,
        "base": mean_points([[rates(None, style)] for style in s.erased])[0],
        "runs": runs,
        "operating_points": points,
    }, {}


def figures(record) -> dict:
    labels = "Erased: images not in the erased style, %", "Kept: other styles, style and object right, %"
    return {"styles_operating_points": sweep_figure(record.data, *labels)}
