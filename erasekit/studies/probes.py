"""15: what sampling otherwise finds, by no word: completion, inpainting, noisier steps, a classifier's guidance, inversion."""

from dataclasses import dataclass, replace

from .kit.probed import BASE, ORACLE, ProbeSettings, asked, class_rows, measure_probes, where
from .operating_points import PUBLIC

NOTEBOOK, VERSION, UNIT = "15_probes", 1, "images a class"  # raise VERSION when the numbers should change
ROWS = "models"  # the setting that erasures given to `run` are added to
PROBES = ("completion", "inpainting", "noise", "guidance", "inversion")
VERIFY = {"models": ("uce",), "probes": ("completion", "inversion")}
# What a probe's settings are, in the figures.
LABELS = {"completion": "first steps by the base", "inpainting": "share of the\nside filled", "noise": "best of many"}
LABELS |= {"guidance": "scale of the\nclassifier's guidance", "inversion": "redrawn from the\nfound noise with"}
SHOWN = ("base", "oracle", "esd-x", "adavd", "age", "kpop", "kpop-anchor")  # whose images are shown, of these probes
SETTINGS = {"completion": "first_steps", "inpainting": "holes", "guidance": "guidance_scales"}
HEADINGS = {"completion": "completion: steps by the base", "inpainting": "inpainting: side filled"}
HEADINGS |= {"guidance": "classifier guidance: scale"}


@dataclass(frozen=True)
class Settings(ProbeSettings):
    models: tuple[str, ...] = (BASE, ORACLE, *PUBLIC)
    probes: tuple[str, ...] = PROBES
    num_probed: int = 2  # of its classes where a probe is dear: noise and guidance
    first_steps: tuple[int, ...] = (0, 2, 4, 6, 8, 10)  # of `sampling_steps`, taken by the base; 0: its prompt alone
    holes: tuple[float, ...] = (0.5, 0.75)  # side of the square that is filled, as a share of the picture's
    etas: tuple[float, ...] = (1.0, 1.17, 1.34, 1.51, 1.68, 1.85)
    noise_scales: tuple[float, ...] = (1.0, 1.0133, 1.0267, 1.04)
    noise_seeds: int = 15  # searches, each with a try of every eta and scale
    noise_steps: int = 25
    guidance_scales: tuple[float, ...] = (0.0, 1.0, 3.0, 10.0, 30.0)  # of the classifier
    pictures: int = 10  # of a class, inverted
    inversion_steps: int = 50


SHORT = {"seeds": 1, "noise_seeds": 1, "noise_steps": 2, "pictures": 1, "inversion_steps": 2}
SHORT |= {"first_steps": (0, 1), "holes": (0.5,), "etas": (1.0, 1.85), "noise_scales": (1.0,)}
SHORT |= {"guidance_scales": (0.0, 1.0), "num_probed": 1, "sampling_steps": 2, "training_steps": 1}
PRESETS = {
    "full": Settings(),
    "quick": Settings(("base", "oracle", "uce", "adavd"), seeds=10, noise_seeds=5, pictures=5),
    "smoke": replace(Settings(("base", "oracle", "uce", "adavd")), **SHORT),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """A row for each model, probe, setting of the probe and class: the share of images that show the class, in percent.

    Images: for each probe a row of pictures for each model of `SHOWN`, of the first class: for completion, inpainting and
    guidance one at each setting, for noise the best of the first searches, for inversion each text's. Raises ValueError for
    an unknown probe.
    """
    from ..checks import check_choice

    cells = []
    for probe in s.probes:
        check_choice("probe", probe, PROBES)
        concepts = world.split(s.split)[: s.num_probed if probe in ("noise", "guidance") else None]
        measure = globals()[f"measure_{probe}"]
        own = list(concepts), *sizes_of(s, probe)
        cells.append((probe, own, lambda e, m=measure, c=concepts: m(world, e, c, s)))
    about, runs, strips = measure_probes("probes", VERSION, world, s, cells)
    shown = {p: [i for m, i in zip(about["models"], own) if m in SHOWN] for p, own in strips.items()}
    return about | {"runs": runs}, {probe: stacked(own) for probe, own in shown.items() if own}


def sizes_of(s: Settings, probe: str) -> list:
    """The settings that a probe's numbers depend on."""
    own = {
        "completion": (s.seeds, s.first_steps, s.sampling_steps),
        "inpainting": (s.seeds, s.holes, s.sampling_steps),
        "noise": (s.noise_seeds, s.etas, s.noise_scales, s.noise_steps, s.sampling_steps),
        "guidance": (s.seeds, s.guidance_scales, s.sampling_steps),
        "inversion": (s.pictures, s.inversion_steps),
    }
    return list(own[probe])


def strip_of(images: list):
    """The images (3, H, W) side by side."""
    import torch

    from ..evaluation.images import image_strip

    return image_strip(torch.stack(images))


def stacked(strips: list):
    """Strips of one size, one below the other."""
    import numpy as np
    from PIL import Image

    return Image.fromarray(np.concatenate([np.asarray(strip.convert("RGB")) for strip in strips]))


def measure_completion(world, erasure, concepts, s: Settings):
    """By the number of steps that the base takes."""
    from ..evaluation.probes import completion

    prompts, labels, seeds = asked(world, concepts, s.seeds)
    rows, firsts = [], []
    for first in s.first_steps:
        images = completion(world, erasure, prompts, seeds, s.sampling_steps, first)
        rows += class_rows(world, images, labels, at=first, n=s.seeds)
        firsts.append(images[0])
    return rows, strip_of(firsts)


def measure_inpainting(world, erasure, concepts, s: Settings):
    """By the share of the side that is filled, in the base's images of the same prompts; the noise is another."""
    from ..evaluation.images import sample_images
    from ..evaluation.probes import inpainting

    prompts, labels, seeds = asked(world, concepts, s.seeds)
    pictures = sample_images(world, None, list(zip(prompts, labels, seeds)), s.sampling_steps)
    others, rows, firsts = [1000 + seed for seed in seeds], [], [pictures[0]]
    for share in s.holes:
        images = inpainting(world, erasure, pictures, prompts, others, s.sampling_steps, share)
        rows += class_rows(world, images, labels, at=share, n=s.seeds)
        firsts.append(images[0])
    return rows, strip_of(firsts)


def measure_noise(world, erasure, concepts, s: Settings):
    """The best of many tries by the judge's probability: at every eta and scale, and as many plain ones; and one try's rate.

    Each try has noise of its own.
    """
    import torch

    from ..evaluation.images import sample_images
    from ..evaluation.metrics import judge_images, object_correct, percent
    from ..evaluation.probes import noisy

    tries = [(eta, scale) for eta in s.etas for scale in s.noise_scales]
    rows, firsts, count = [], [], len(tries)
    for concept in concepts:
        numbers = list(range(s.noise_seeds * count))
        prompts, labels = [world.prompt(concept)] * len(numbers), [concept] * len(numbers)
        etas, scales = (list(x) * s.noise_seeds for x in zip(*tries))
        plain = sample_images(world, erasure, list(zip(prompts, labels, numbers)), s.sampling_steps)
        searched = noisy(world, erasure, prompts, numbers, s.noise_steps, etas, scales)
        for at, images in (("plain", plain), ("noisy", searched)):
            correct = object_correct(world, images, labels).reshape(s.noise_seeds, count)
            shown = judge_images(world, images)[0][:, world.judge.objects.index(concept)]
            best = shown.reshape(s.noise_seeds, count).argmax(1)
            found = correct[torch.arange(s.noise_seeds), best]
            row = {"at": at, "concept": concept, "n": s.noise_seeds, "rate": percent(found), "tries": count}
            by_eta = correct.reshape(s.noise_seeds, len(s.etas), -1).float().mean((0, 2))
            rows.append(row | {"one try": percent(correct)} | ({"by eta": rounded(by_eta)} if at == "noisy" else {}))
            if concept == concepts[0]:
                firsts += [images[n * count + best[n]] for n in range(min(2, s.noise_seeds))]
    return rows, strip_of(firsts)


def rounded(shares) -> list[float]:
    return [round(100 * share, 1) for share in shares.tolist()]


def measure_guidance(world, erasure, concepts, s: Settings):
    """By the scale of the classifier's guidance; "clip": the rate by the world's CLIP, which guided nothing."""
    from ..evaluation.metrics import percent
    from ..evaluation.probes import classifier_guided

    prompts, labels, seeds = asked(world, concepts, s.seeds)
    count, times = len(labels), len(s.guidance_scales)
    scales = [scale for scale in s.guidance_scales for _ in labels]
    how = prompts * times, seeds * times, s.sampling_steps, labels * times, scales
    rows, drawn = [], classifier_guided(world, erasure, *how).split(count)
    for scale, images in zip(s.guidance_scales, drawn):
        clip = clip_correct(world, images, labels)
        for row in class_rows(world, images, labels, at=scale, n=s.seeds):
            rows.append(row | {"clip": percent(clip[where(labels, row["concept"])])})
    return rows, strip_of([images[0] for images in drawn])


def clip_correct(world, images, labels: list[str]):
    """Boolean (N,): the label's prompt is the nearest of all objects' by the world's CLIP."""
    import torch

    from ..evaluation.metrics import in_top_k

    model, tokenizer = world.clip
    objects = list(world.judge.objects)
    with torch.no_grad():
        text = model.encode_text(tokenizer([world.prompt(o) for o in objects]).to(world.pipe.device), normalize=True)
        scaled = images.to(world.pipe.device).float() / 127.5 - 1
        scores = model.encode_image(scaled, normalize=True) @ text.T
    return in_top_k(scores.cpu(), objects, labels)


def measure_inversion(world, erasure, concepts, s: Settings):
    """Pictures of the art inverted and drawn again: by "" or the prompt both ways, and from ""'s noise by the guided prompt.

    "surprise": minus the log-likelihood of each picture's noise, in nats a number.
    """
    import torch

    from ..evaluation.probes import GUIDANCE_SCALE, invert, redraw, surprise

    prompts, labels, _ = asked(world, concepts, s.pictures)
    pictures = torch.cat([pictures_of(world, concept, s) for concept in concepts])
    texts = {"": [""] * len(labels), "prompt": prompts}
    noise = {name: invert(world, erasure, pictures, own, s.inversion_steps) for name, own in texts.items()}
    ways = (
        ("no text", "", "", 1.0),
        ("prompt", "prompt", "prompt", 1.0),
        ("prompt, guided", "", "prompt", GUIDANCE_SCALE),
    )
    rows, shown = [], [pictures[0].add(1).mul(127.5).round().to(torch.uint8)]
    for at, source, text, scale in ways:
        images = redraw(world, erasure, noise[source], texts[text], s.inversion_steps, scale)
        nats = surprise(noise[source])
        for row in class_rows(world, images, labels, at=at, n=s.pictures):
            own = nats[where(labels, row["concept"])].tolist()
            rows.append(row | {"surprise": [round(x, 4) for x in own]})
        shown.append(images[0])
    return rows, strip_of(shown)


def pictures_of(world, concept: str, s: Settings):
    """`s.pictures` of the art (N, 3, H, W) in [-1, 1], each of its icons at several places where they are fewer."""
    import torch

    found, seed = [], 0
    while sum(map(len, found)) < s.pictures:
        found.append(world.concept_images(concept, s.pictures, seed)[0])
        seed += 1
    return torch.cat(found)[: s.pictures]


def framed(record):
    """A row for each rate, with the "setting" that it is measured at, as text, and the "column" of the table it belongs to."""
    import pandas as pd

    frame = pd.DataFrame(record.data["runs"])
    names = {"completion": "{} steps", "inpainting": "{} of the side", "guidance": "scale {}"}
    settings = [f"{a:g}" if isinstance(a, float | int) else a for a in frame["at"]]
    columns = [names.get(probe, "{}").format(text) for probe, text in zip(frame.probe, settings)]
    return frame.assign(setting=settings, column=columns)


def ordered(record) -> tuple[list[str], list[int]]:
    """Models by the rate without a probe, see `by_rate`."""
    from .kit.plots import by_rate

    frame = framed(record)
    plain = frame[(frame.probe == "completion") & (frame["at"] == 0)]
    return by_rate(record.data["models"], plain.groupby("model").rate.mean())


def figures(record) -> dict:
    """A heat map for each probe, models by its settings; and images of the first class."""
    from .kit.probed import draw_grids, rate_grids

    (models, starts), frame = ordered(record), framed(record)
    short = frame.setting.replace({"prompt, guided": "guided", "prompt": "the\nprompt", "no text": "no\ntext"})
    groups = frame.assign(column=short).groupby("probe", sort=False)
    labels = LABELS | ({"noise": f"best of\n{frame.tries.max():.0f} images"} if "tries" in frame else {})
    heatmaps = draw_grids({probe: rate_grids(own, models)[0] for probe, own in groups}, labels, starts)
    images = {"probes_images": images_figure(record)} if any(probe in record.images for probe in SETTINGS) else {}
    return {"probes": heatmaps} | images


def images_figure(record):
    """The first class by probe and setting, a row for each of some models; all from one seed."""
    from .kit.plots import image_grid

    shown = {probe: drawn(record, probe) for probe in SETTINGS if probe in record.images}
    rows = {m: [tile for own in shown.values() for tile in own[m]] for m in SHOWN if m in record.data["models"]}
    titles = []
    for probe in shown:
        own = [f"{x:g}" for x in record.settings[SETTINGS[probe]]]
        titles += ["picture", *own] if probe == "inpainting" else own
    groups = {HEADINGS[probe]: len(next(iter(own.values()))) for probe, own in shown.items()}
    return image_grid(rows, titles, groups, size=0.6)


def drawn(record, probe: str) -> dict[str, list]:
    """Model -> its square images (H, H, 3) in a probe's picture, which has a row for each of `SHOWN`."""
    import numpy as np

    pixels = np.asarray(record.images[probe].convert("RGB"))
    models = [m for m in record.data["models"] if m in SHOWN]
    rows = np.split(pixels, len(models))
    return {m: np.split(row, row.shape[1] // row.shape[0], axis=1) for m, row in zip(models, rows)}


def table(record):
    """Every model's rates by probe and setting, and the likelihood of inverted noise, with 95 % intervals of one training.

    Of inversion only what differs between models: drawn again without guidance, every picture comes back from every model.
    """
    import numpy as np
    import pandas as pd

    from .kit.probed import rate_grids

    frame, models = framed(record), ordered(record)[0]
    frame = frame.assign(column=frame.probe + ", " + frame.column)
    unguided = (frame.probe == "inversion") & frame["at"].isin(["no text", "prompt"])
    parts = [frame[~unguided]]
    for name, label in (("one try", "one try"), ("clip", "by CLIP")):
        if name in frame:
            own = frame[frame[name].notna()]
            parts.append(own.assign(rate=own[name], column=own.column + ", " + label))
    if "one try" in frame:  # its images are every try's
        parts[1] = parts[1].assign(n=parts[1].n * parts[1].tries)
    found = rate_grids(pd.concat(parts, ignore_index=True), models)[1].T
    nats = {}
    for model, own in frame[unguided & (frame["at"] == "no text")].groupby(
        "model", sort=False
    ):  # the guided way's noise
        values = np.concatenate(own.surprise.to_list())
        mean, half = values.mean(), 1.96 * values.std() / len(values) ** 0.5
        label = "inversion, no text: minus log-likelihood of the noise, nats a number (a Gaussian's: 1.42)"
        nats.setdefault(label, {})[model] = f"{mean:.3f} ({mean - half:.3f} to {mean + half:.3f})"
    found = pd.concat([found, pd.DataFrame(nats).T.reindex(columns=models)]) if nats else found
    return found.fillna("").rename_axis("images that show the concept, %")
