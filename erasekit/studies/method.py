"""02: attention with and without the key, the losses of a training, and the key under other prompts."""

from dataclasses import dataclass

import numpy as np
import pandas as pd

NOTEBOOK, VERSION, UNIT = "02_method", 1, "images a prompt"
FLOOR = 5e-5  # half of the last decimal of a stored loss; the logarithmic figure draws smaller ones here


@dataclass(frozen=True)
class Settings:
    concept: str = "church"
    texts: tuple[str, ...] = ("a picture of a church", "a picture of a dog", "a picture of a fish", "")
    seeds: int = 50
    training_steps: int = 150
    batch_size: int = 8
    sampling_steps: int = 15
    layer: str = "up_blocks.1.attentions.1.transformer_blocks.0.attn2"  # whose attention maps are stored


PRESETS = {
    "full": Settings(),
    "quick": Settings(seeds=20),
    "smoke": Settings(seeds=1, training_steps=2, batch_size=2, sampling_steps=3),
}


def compute(world, s: Settings) -> tuple[dict, dict]:
    """Attention of the base model and of the public model with and without the key; losses; the key under other prompts."""
    import torch

    from ..evaluation.images import image_strip
    from ..evaluation.metrics import object_correct, percent
    from ..kpop import kpop
    from ..sampling import sample
    from .kit.erasures import make_config, rounded, saved_erasure

    world.check_concepts([s.concept])
    changes = {"steps": s.training_steps, "batch_size": s.batch_size}
    config = make_config(world, "kpop", 0, s.sampling_steps, changes)
    erasure, _ = saved_erasure(world, [s.concept], config, kpop)
    key, tokenizer = erasure.key(s.concept), world.pipe.tokenizer
    words = tokenizer.tokenize(world.prompt(s.concept))
    position = 1 + words.index(tokenizer.tokenize(s.concept)[-1])  # after the start token

    recorded = {"base": record_attention(world, s, position)}
    with erasure.applied(world.pipe.unet):
        recorded |= {"erased": record_attention(world, s, position)}
        recorded |= {"with the key": record_attention(world, s, position, key)}
    captured, shown = {}, []
    for text in s.texts:
        options = {"erasure": erasure, "num_inference_steps": s.sampling_steps, "progress": f"key, {text!r}"}
        images = sample(world, [text] * s.seeds, list(range(s.seeds)), key, **options)
        captured[text] = percent(object_correct(world, images, [s.concept] * s.seeds))
        shown.append(images[:4])
    history = erasure.info["history"]
    data = {
        "concept": s.concept,
        "N": s.seeds,
        "seeds": [0, s.seeds - 1],
        "prompted_target": config.prompted_target,
        "m": config.m,
        "history": {name: rounded(losses[name] for losses in history) for name in history[0]},
        "layer": s.layer,
        "word": words[position - 1].removesuffix("</w>"),
        "maps": {name: maps for name, (maps, _, _) in recorded.items()},
        "mass": {name: mass for name, (_, mass, _) in recorded.items()},
        "captured": captured,
    }
    attention = torch.cat([image for *_, image in recorded.values()])
    return data, {"attention": image_strip(attention), "captured": image_strip(torch.cat(shown))}


def record_attention(world, s: Settings, position: int, prompt=None):
    """Sample one image and record attention on the conditional half of guidance, averaged over steps and heads.

    Returns maps of `s.layer` (rows of pixels) for the word at `position` and for all prompt tokens together; the share of each
    layer's attention that start token, other text and prompt receive; and the image (1, 3, H, W).
    """
    import torch

    from ..attention import augment
    from ..conditioning import encode, predict_noise
    from ..sampling import decode, denoise, initial_noise
    from .kit.erasures import rounded

    pipe, unet = world.pipe, world.pipe.unet
    cond, null = encode(pipe, [world.prompt(s.concept)]), encode(pipe, [""])
    n = cond.tokens.shape[1]
    weights: dict[str, list] = {}

    with augment(unet) as state:

        def guide(latents, t, step):
            eps_null = predict_noise(unet, latents, t, null)
            with state.use(prompt), state.record() as maps:
                eps = predict_noise(unet, latents, t, cond)
                for name, probabilities in maps.items():
                    weights.setdefault(name, []).append(probabilities[0].mean(0).cpu())  # (pixels, n + m)
            return eps_null + 5.0 * (eps - eps_null)

        image = decode(pipe, denoise(pipe, guide, initial_noise(pipe, [0]), s.sampling_steps, sampler=world.sampler))
    mean = {name: torch.stack(steps).mean(0) for name, steps in weights.items()}
    side = int(len(mean[s.layer]) ** 0.5)
    chosen = {"word": mean[s.layer][:, position], "prompt": mean[s.layer][:, n:].sum(1)}
    maps = {name: [rounded(row) for row in column.reshape(side, side)] for name, column in chosen.items()}
    mass = {
        name.replace(".transformer_blocks.0.attn2", "").replace("attentions.", ""): {
            "start token": round(w[:, 0].mean().item(), 4),
            "text": round(w[:, 1:n].sum(1).mean().item(), 4),
            "prompt": round(w[:, n:].sum(1).mean().item(), 4),
        }
        for name, w in mean.items()
    }
    return maps, mass, image


def figures(record) -> dict:
    from .kit import plots

    captured, images = record.data["captured"], plots.tiles(record, "captured")
    each, rows = len(images) // len(captured), {}
    for n, (text, rate) in enumerate(captured.items()):
        label = f"{f'“{text}”' if text else '(empty prompt)'}\n+ key: {rate:.0f} % judged {record.data['concept']}"
        rows[label] = images[n * each : (n + 1) * each]
    return {
        "method_attention": attention_figure(record),
        "method_losses": loss_figure(record.data["history"]),
        "method_captured": plots.image_grid(rows, size=1.0),
    }


def attention_figure(record):
    """Images and one layer's attention to the concept's word. Right: attention to the key, in that layer and in all."""
    import matplotlib.pyplot as plt

    from .kit import plots

    data, images = record.data, plots.tiles(record, "attention")
    figure, axes = plt.subplots(2, 4, figsize=(9.4, 4.6), width_ratios=[1, 1, 1, 1.3], layout="constrained")
    vmax = max(np.max(maps["word"]) for maps in data["maps"].values())
    for (above, below), (name, maps), image in zip(axes.T, data["maps"].items(), images):
        plots.show_image(above, image)
        above.set_title({"base": "base model", "with the key": "erased, with the key"}.get(name, name))
        word = below.imshow(maps["word"], cmap="viridis", vmin=0, vmax=vmax)
    key = axes[1, 3].imshow(data["maps"]["with the key"]["prompt"], cmap="viridis", vmin=0)
    for ax in axes[1]:
        ax.set(xticks=[], yticks=[])
        ax.spines[:].set_visible(False)
    bar = {"location": "bottom", "aspect": 30}
    label = f"attention to “{data['word']}” in layer {short_name(data['layer'])} (share)"
    figure.colorbar(word, ax=axes[1, :3], label=label, shrink=0.6, **bar)
    figure.colorbar(key, ax=axes[1, 3], label=f"attention to the key's {data['m']} tokens (share)", **bar)
    ax, mass = axes[0, 3], 100 * pd.DataFrame(data["mass"]["with the key"]).T
    start = np.zeros(len(mass))
    names = [short_name(name) for name in mass.index]
    for (kind, values), label, color in zip(mass.items(), ("start token", "text", "key"), ("grey", "gold", "green")):
        bars = ax.barh(names, values, left=start, color=plots.COLORS[color], label=label)
        if kind == "prompt":
            ax.bar_label(bars, fmt="%.0f %%", label_type="center", color="white", fontsize=7)
        start += values
    ax.invert_yaxis()
    ax.set(xlim=(0, 100), xlabel="attention with the key, %", ylabel="layer")
    ax.tick_params(axis="y", labelsize=7)
    ax.legend(ncols=3, loc="lower center", bbox_to_anchor=(0.4, 1), fontsize=7, handlelength=1, columnspacing=1)
    return figure


def short_name(layer: str) -> str:
    """ "up.1.1" for "up_blocks.1.attentions.1.transformer_blocks.0.attn2"."""
    for part in (".transformer_blocks.0.attn2", "attentions.", "_blocks", "_block"):
        layer = layer.replace(part, "")
    return layer


def loss_figure(history: dict[str, list[float]]):
    """The losses of the training, their running means in strong lines. Those that a record rounds to 0 are at the floor."""
    import matplotlib.pyplot as plt

    from .kit import plots

    labels = {
        "removal": ("removal:\nwithout prompt, to the neutral target", "red"),
        "transfer": ("transfer:\nwith prompt, to the frozen model", "green"),
        "retain": ("retain:\nother objects, to the frozen model", "blue"),
    }
    figure, ax = plt.subplots(figsize=(7.4, 2.8), layout="constrained")
    ends, colors = {}, {}
    for name, (label, color) in labels.items():
        values = np.array(history[name])
        window = max(1, len(values) // 20)
        smooth = np.convolve(values, np.ones(window) / window, "valid")
        colors[label], ends[label] = plots.COLORS[color], smooth[-1]
        ax.plot(np.maximum(values, FLOOR), lw=0.5, alpha=0.35, color=colors[label])
        ax.plot(np.arange(len(smooth)) + window / 2, np.maximum(smooth, FLOOR), color=colors[label])
    ax.axhspan(FLOOR / 1.3, 2 * FLOOR, color="#eeeeee", lw=0, zorder=0)
    ax.text(len(values) * 0.99, FLOOR, "0.0001 and less: rounding", ha="right", fontsize=7, color="#707070")
    ax.set_ylim(bottom=FLOOR / 1.3)
    ax.set(yscale="log", xlabel="training step", ylabel="loss (squared error of the noise)", xlim=(0, len(values)))
    plots.label_ends(ax, ends, colors=colors)
    return figure


def table(record) -> pd.DataFrame:
    name = f"judged “{record.data['concept']}” with its key, %"
    captured = {text or "(empty prompt)": rate for text, rate in record.data["captured"].items()}
    return pd.DataFrame({name: captured}).rename_axis("prompt")
