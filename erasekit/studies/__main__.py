"""Run one study, its sampling shared by processes: `accelerate launch -m erasekit.studies objects --world sd14 --preset full`."""

import argparse

from . import PRESETS, STUDIES, run


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m erasekit.studies", description=__doc__)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--world", default="emojinette", help="a world's name, a folder, or a hub id")
    parser.add_argument("--preset", default="quick", choices=PRESETS)
    parser.add_argument("--recompute", action="store_true", help="compute it even where a record is valid")
    args = parser.parse_args()
    run(args.study, args.world, args.preset, args.recompute)


if __name__ == "__main__":
    main()
