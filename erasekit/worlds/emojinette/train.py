"""Train the bundled world, one part at a time, each resumable:

    python -m erasekit.worlds.emojinette.train --part text
    python -m erasekit.worlds.emojinette.train --part vae
    python -m erasekit.worlds.emojinette.train --part unet
    python -m erasekit.worlds.emojinette.train --part unet --without S1    (the oracle that never saw S1)
    python -m erasekit.worlds.emojinette.train --part unet --seed 1        (a second base)
    python -m erasekit.worlds.emojinette.train --part judge
    python -m erasekit.worlds.emojinette.train --part clip

Text encoder and VAE are trained once, on everything, and frozen; --without and --seed concern the U-Net.
The default steps are the bundled networks', which a GPU takes in minutes (models/README.md). On a CPU, give the U-Net
--steps 6000 --batch 48: about four hours of one core.
"""

import argparse
import os
from pathlib import Path

import torch

from ... import paths
from ..device import default_device

STEPS = {"text": 1500, "vae": 6000, "unet": 8500, "judge": 3000, "clip": 3000}


def pipeline_folder() -> Path:
    """Where the finished parts of the pipeline lie."""
    return paths.MODELS / "emojinette-sd"


def train_text(given) -> None:
    """The tokeniser and the text encoder."""
    from . import text
    from .art import load_art

    encoder = text.train_text(load_art(), given.steps, given.seed, given.minutes, given.device)
    if encoder:
        text.save(encoder, pipeline_folder())


def train_vae(given) -> None:
    """The autoencoder."""
    from . import vae
    from .art import load_art

    size = given.batch or vae.BATCH
    trained = vae.train_vae(load_art(), given.steps, given.seed, given.minutes, given.start, given.device, size)
    if trained:
        trained.cpu().half().save_pretrained(pipeline_folder() / "vae")


def train_unet(given) -> None:
    """The U-Net on the frozen text encoder and VAE, and the whole pipeline's folder."""
    from . import unet
    from .art import load_art

    how = given.steps, given.seed, given.without, given.minutes, given.chunks, given.device, given.batch or unet.BATCH
    unet.train(load_art(), pipeline_folder(), *how)


def train_judge(given) -> None:
    """The judge of objects and styles."""
    from . import judges
    from .art import load_art

    judges.run_judge(load_art(), pipeline_folder(), given.steps, given.minutes, given.device)


def train_clip(given) -> None:
    """The open_clip model of the alignment study, apart from the text encoder that conditions."""
    from . import judges
    from .art import load_art

    judges.run_clip(load_art(), given.steps, given.minutes, given.device)


PARTS = {"text": train_text, "vae": train_vae, "unet": train_unet, "judge": train_judge, "clip": train_clip}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", required=True, choices=PARTS)
    parser.add_argument(
        "--steps", type=int, help=f"default: {STEPS}; may change when a run goes on, until its last 30 %%"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--without", nargs="*", default=[], help="splits, groups, objects or styles the U-Net never sees"
    )
    parser.add_argument("--minutes", type=float, help="stop after so long, resumable")
    parser.add_argument(
        "--chunks", type=int, default=200, help="unet: times 256 pictures, encoded once; may grow later"
    )
    parser.add_argument("--batch", type=int, help="unet and vae: pictures a step")
    parser.add_argument("--device", default=default_device(), help="default: the GPU, if there is one")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--start", type=Path, help="vae: folder of a VAE with as many latent channels or fewer to start from"
    )
    given = parser.parse_args(arguments)
    given.steps = given.steps or STEPS[given.part]
    torch.set_num_threads(given.threads)
    PARTS[given.part](given)


if __name__ == "__main__":
    main()
