"""Run one study, its drawing shared by processes: `accelerate launch -m erasekit.studies objects --world sd14 --scale full`."""

import argparse

from ..worlds import load
from . import SCALE_NAMES, STUDIES, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasekit.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--world", default="emojinette", help="a world's name, a folder, or a hub id")
    parser.add_argument("--scale", default="quick", choices=SCALE_NAMES)
    parser.add_argument("--fresh", action="store_true", help="compute it even where a record is valid")
    args = parser.parse_args()
    run(args.study, load(args.world), args.scale, args.fresh)


if __name__ == "__main__":
    main()
