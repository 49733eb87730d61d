"""Erase concepts from a text-to-image model, and use the result.

    erasekit erase dog --model emojinette --retain bear horse --out dog
    erasekit sample --model emojinette --erasure dog --key dog --prompt "a picture of a dog" --seeds 0 1 2 --out images
    erasekit check dog --model emojinette
    erasekit export dog --model emojinette --out pipeline --single-file dog.safetensors

A model is a world's name (emojinette, sd14, sd15, sd21, sdxl), a folder in diffusers' format, or owner/name on the hub.
`erasekit COMMAND --help` lists a command's options. Exit status: 0, 2 for what is not possible, 130 when interrupted.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import sys
import warnings
from contextlib import closing
from pathlib import Path

# Everything that loads torch is imported inside functions, so that --help and wrong arguments answer at once.

CHECKPOINT = "checkpoint.part"  # in the output folder of `erase`, until the training ends; git ignores *.part
DELTA = "delta.safetensors"
ERRORS = (ArithmeticError, ImportError, LookupError, OSError, RuntimeError, ValueError)  # what the API raises


def erase(args) -> None:
    """Erase concepts and save the public delta with its secret keys."""
    from .. import baselines

    folder = args.out
    check_output(folder)
    if (folder / DELTA).exists() or any(folder.glob("keys/*")):
        raise ValueError(f"{folder} holds an erasure already: give another --out, or move it away")
    named = {name: getattr(args, name) for name in ("retain", "steps", "seed")}
    changes = dict(args.set) | {name: value for name, value in named.items() if value is not None}
    config = baselines.method_config(args.method, **changes)  # a wrong setting is refused before the model is loaded
    world = load_model(args)
    checkpoint = folder / CHECKPOINT
    erasure = baselines.erase(world, args.concepts, args.method, config, checkpoint=checkpoint, progress=not args.quiet)
    erasure.save(folder)
    checkpoint.unlink(missing_ok=True)
    print(f"{folder / DELTA}: public, {plural(len(erasure.delta | erasure.adapters), 'tensor')}")
    for concept in erasure.keys:
        print(f"{key_file(folder, concept)}: the key of {concept!r}, secret")


def sample(args) -> None:
    """Write one image for each prompt and seed; those that are there already are kept, so that a run resumes."""
    from PIL import Image, PngImagePlugin
    from tqdm.auto import tqdm

    from ..sampling import sample_batches

    if args.key and not args.erasure:
        raise ValueError(f"--key {args.key} needs --erasure, the folder that the key is of")
    check_output(args.out)
    world = load_model(args)
    erasure = read_erasure(args.erasure, world) if args.erasure else None
    key = read_key(args.key, erasure, world) if args.key else None
    made = {"model": world.pipeline_hash[:16], "steps": args.steps, "guidance": args.guidance}
    made |= {"erasure": erasure and erasure.digest()[:16], "key": key and key.digest()[:16]}
    images = {}  # path -> what its image is made of
    for prompt in args.prompt:
        for seed in args.seeds:
            name = f"{slug(prompt)}-{seed}" + (f"-key-{slug(Path(args.key).name)}" if key else "")
            images[args.out / f"{name}.png"] = made | {"prompt": prompt, "seed": seed}
    total = len(images)
    for path in [path for path in images if path.exists()]:
        if read_about(path) != images[path]:
            raise ValueError(f"{path} is another image than this command makes: give another --out, or move it away")
        del images[path]
    if images:
        prompts, seeds = ([about[name] for about in images.values()] for name in ("prompt", "seed"))
        how = {"key": key, "erasure": erasure, "batch_size": world.batch_size}
        how |= {"num_inference_steps": args.steps, "guidance_scale": args.guidance}
        bar = tqdm(total=len(images), desc="images", unit="image", disable=args.quiet)
        with bar, closing(sample_batches(world, prompts, seeds, **how)) as batches:
            for part, batch in batches:
                args.out.mkdir(parents=True, exist_ok=True)
                for path, pixels in zip(list(images)[part], batch):
                    text = PngImagePlugin.PngInfo()
                    text.add_text("erasekit", json.dumps(images[path]))
                    unfinished = path.with_suffix(".part")
                    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(unfinished, format="PNG", pnginfo=text)
                    unfinished.replace(path)
                bar.update(len(batch))
    print(f"{plural(total, 'image')} in {args.out}, {len(images)} of them new")


def check(args) -> None:
    """Report what a folder or file holds. Reading it verifies checksums, and that the keys are this delta's."""
    world = load_model(args) if args.model else None
    erasure = read_erasure(args.path, world)
    info, config = erasure.info, erasure.info.get("config", {})
    settings = {name: config[name] for name in ("steps", "lr", "batch_size", "retain") if config.get(name)}
    before = "".join(f" after {link['method']} of {', '.join(link['concepts'])}" for link in info.get("chain", ()))
    given = f", as {args.model} has it" if world else " (give --model to compare)"
    public = erasure.delta | erasure.adapters
    size = sum(tensor.numel() * tensor.element_size() for tensor in public.values())
    rows = {"concepts": ", ".join(info.get("concepts", ())) or "not named"}
    rows |= {"method": info.get("method", "not named") + "".join(f", {n} {text(v)}" for n, v in settings.items())}
    rows |= {"base model": f"{info.get('world', 'custom')}, U-Net {info['base'][:12]}{before}{given}"}
    rows |= {"public": f"{plural(len(public), 'tensor')}, {size / 1e6:.1f} MB, digest {erasure.digest()[:12]}"}
    if rule := info.get("guidance"):
        rows["guidance"] = rule["kind"]
    for concept, key in erasure.keys.items():
        rows[f"key of {concept!r}"] = f"{plural(key.k.shape[-2], 'token')}, {key.mechanism}, layers {key.layers}"
    if not erasure.keys:
        rows["keys"] = "none"
    if (args.path / DELTA).exists():
        rows["checksums"] = checksums(args.path)
    if made := info.get("provenance"):
        versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
        rows["trained"] = f"{made['date']}, {made['seconds']} s on {made['device']}, with {versions}"
    if world:
        effect = erasure.effect(world)
        moved = "no weights" if effect["moved"] is None else f"weights by {100 * effect['moved']:.3g} % of their norm"
        pixels = f"{effect['difference']:.1f} of 255 a pixel in an image of {effect['prompt']!r}"
        rows["effect"] = f"changes {moved}, and {pixels}"
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")


def export(args) -> None:
    """Write the public model as files that need no erasekit."""
    from ..pipelines.files import check_plain, save_pipeline, to_lora, to_single_file

    outputs = [path for path in (args.out, args.single_file, args.lora) if path]
    if not outputs:
        raise ValueError("nothing to export: give --out FOLDER, --single-file FILE or --lora FILE")
    for path in outputs:
        check_output(path, folder=path is args.out)
        if path.is_file() or (path.is_dir() and any(path.iterdir())):
            raise ValueError(f"{path} exists already: give another name, or move it away")
    if len(set(outputs)) < len(outputs):
        raise ValueError(f"{outputs[-1]} is named twice: give each output a name of its own")
    world = load_model(args)
    erasure = read_erasure(args.path, world)
    check_plain(erasure, "file of weights")
    if args.lora:  # first, as most can be wrong with it
        error = to_lora(erasure, world, args.lora, args.rank, args.layout)
        print(f"{args.lora}: a LoRA of rank {args.rank}, {100 * error:.1f} % away from the erasure's step")
    with erasure.applied(world):
        if args.single_file:
            to_single_file(world.pipe, args.single_file)
            print(f"{args.single_file}: a checkpoint in the original layout")
        if args.out:
            save_pipeline(world.pipe, args.out)
            print(f"{args.out}: a pipeline in diffusers' format")


# ------------------------------------------------------------------------------------------------------------------ inputs


def load_model(args):
    """The world that --model names."""
    from ..worlds import is_world_name, load

    if is_world_name(args.model) and args.quiet:  # the libraries show bars of their own
        from diffusers.utils import logging as of_diffusers
        from transformers.utils import logging as of_transformers

        of_diffusers.disable_progress_bar()
        of_transformers.disable_progress_bar()
    return load(args.model, device=args.device, precision=args.precision)


def read_erasure(path: Path, world):
    """An erasure of erasekit's from its folder; with its base, also a file or folder of another project."""
    from .. import Erasure, read

    path = path.parent if path.name == DELTA else path
    if (path / DELTA).exists() or not path.exists():
        return Erasure.load(path, world)
    if world is None:
        raise ValueError(f"{path} has no {DELTA}: to read another project's file, give its base with --model")
    return read(path, world)


def read_key(name: str, erasure, world):
    """An erasure's key by its concept, or from a file, which must be of this erasure."""
    from .. import load_key

    if not Path(name).is_file():
        return erasure.key(name)
    key, meta = load_key(Path(name), world)
    if meta.get("opens", erasure.digest()) != erasure.digest():
        raise ValueError(f"{name} is the key of another erasure: give the key of the one in --erasure")
    return key


def read_about(path: Path) -> dict | None:
    """What an image of `sample` is made of; None for another image."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return json.loads(image.info["erasekit"])
    except (OSError, KeyError, ValueError):
        return None


def checksums(folder: Path) -> str:
    """Which of an erasure's files, which were just read, have a checksum that reading compared."""
    from safetensors import safe_open

    files, without = [folder / DELTA, *sorted(folder.glob("keys/*.safetensors"))], []
    for path in files:
        with safe_open(path, "pt") as file:
            if "sha256" not in (file.metadata() or {}):
                without.append(path.name)
    return (
        f"none in {', '.join(without)}, of an earlier version" if without else f"right in {plural(len(files), 'file')}"
    )


def key_file(folder: Path, concept: str) -> Path:
    from ..artifacts import key_path

    return key_path(folder, concept)


def check_output(path: Path, folder: bool = True) -> None:
    """Raise ValueError for a place that cannot be written to, before anything is spent."""
    there = next(p for p in (path, *path.absolute().parents) if p.exists())
    if folder and path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file: give a folder")
    if there != path and not there.is_dir():
        raise ValueError(f"{path} is not possible: {there} is a file")
    if not os.access(there, os.W_OK):
        raise ValueError(f"{path} cannot be written: {there} is read-only")


def slug(name: str) -> str:
    """A file name for a text, with a hash where other texts would give the same name."""
    short = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:60]
    same = short.replace("-", " ") == name
    return short if same else f"{short}-{hashlib.sha256(name.encode()).hexdigest()[:8]}".strip("-")


def plural(count: int, noun: str) -> str:
    return f"{count} {noun}" + "s" * (count != 1)


def text(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def setting(argument: str) -> tuple[str, object]:
    """NAME=VALUE, the value as Python writes it, or a text."""
    name, equals, value = argument.partition("=")
    if not (name and equals):
        raise argparse.ArgumentTypeError(f"{argument!r} is no setting: write it as NAME=VALUE, such as lr=1e-4")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


# ----------------------------------------------------------------------------------------------------------- command line


def make_parser() -> argparse.ArgumentParser:
    how = {"formatter_class": argparse.RawDescriptionHelpFormatter}
    parser = argparse.ArgumentParser("erasekit", description=__doc__, **how)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(function, *aliases: str, model: bool = True):
        summary = function.__doc__.splitlines()[0]
        added = commands.add_parser(function.__name__, aliases=aliases, help=summary, description=function.__doc__)
        added.set_defaults(function=function)
        where = "a world's name, a folder in diffusers' format, or owner/name on the hub"
        default = "; default: emojinette" if model else "; without it, the base is not compared"
        added.add_argument("--model", default="emojinette" if model else None, help=where + default)
        added.add_argument("--device", help="cpu, cuda, cuda:1, ...; default: a GPU if there is one")
        added.add_argument("--precision", default="auto", help="auto, fp32, bf16 or fp16; default: auto")
        added.add_argument("--quiet", action="store_true", help="no progress bar")
        return added

    p = command(erase, "hide")
    p.add_argument("concepts", nargs="+", metavar="CONCEPT", help="what is erased; each gets a key of its own")
    p.add_argument("--method", default="kpop", help="default: kpop; an unknown name lists all")
    p.add_argument("--retain", nargs="+", metavar="CONCEPT", help="concepts whose predictions are kept")
    p.add_argument("--steps", type=int, help="training steps; default: the method's in this model")
    p.add_argument("--seed", type=int, help="default: 0")
    p.add_argument("--set", type=setting, action="append", default=[], metavar="NAME=VALUE", help="any other setting")
    p.add_argument("--out", type=Path, required=True, help="folder of the result, and of the checkpoint until then")

    p = command(sample, "draw")
    p.add_argument("--prompt", nargs="+", required=True, help="one text or several")
    p.add_argument("--seeds", type=int, nargs="+", default=[0], help="one image each for every prompt; default: 0")
    p.add_argument("--erasure", type=Path, help="folder of an erasure; without it, the base model is sampled")
    p.add_argument("--key", help="concept whose key is used, or a key's file")
    p.add_argument("--steps", type=int, default=25, help="sampling steps; default: 25")
    p.add_argument("--guidance", type=float, default=5.0, help="guidance scale; default: 5")
    p.add_argument("--out", type=Path, required=True, help="folder of the images")

    p = command(check, model=False)
    p.add_argument("path", type=Path, help="folder of an erasure; with --model also another project's file")

    p = command(export)
    p.add_argument("path", type=Path, help="folder of an erasure")
    p.add_argument("--out", type=Path, help="folder of a whole pipeline in diffusers' format")
    p.add_argument("--single-file", type=Path, help="checkpoint in the original layout, .safetensors")
    p.add_argument("--lora", type=Path, help="LoRA of the step from the base, .safetensors")
    p.add_argument("--rank", type=int, default=16, help="of the LoRA; default: 16")
    p.add_argument("--layout", default="peft", help="of the LoRA's names: peft or kohya; default: peft")
    return parser


def resume_hint(args) -> str:
    """What an interrupted command has left, and how to go on."""
    if args.function is erase:
        if (checkpoint := args.out / CHECKPOINT).exists():
            return f"run the same command again to go on from {checkpoint}"
        return "there is no checkpoint yet, run the same command again to start over"
    return "run the same command again to go on" if args.function is sample else "run the same command again"


def main(arguments: list[str] | None = None) -> int:
    args = make_parser().parse_args(arguments)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
        try:
            args.function(args)
        except KeyboardInterrupt:
            print(f"\nInterrupted: {resume_hint(args)}.", file=sys.stderr)
            return 130
        except ERRORS as error:
            reason = (
                error.args[0] if isinstance(error, KeyError) and error.args else error
            )  # str() of a KeyError quotes it
            print((str(reason).strip().splitlines() or [type(error).__name__])[0], file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
