"""Recomputes a few cells of a committed record and compares the numbers: evidence that today's code still gives them.

python -m erasekit.tools.verify [STUDY] [--cells N]
"""

import argparse
import datetime
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace

from .. import paths

TOLERANCE = 10.0  # of rates in percent: another processor rounds otherwise, and an image in ten may change sides
# Keys of what differs from run to run or was given; and of what identifies a row, whatever it holds.
SKIPPED = re.compile(r"second|minute|timed|[GM]B|^operating_points?$")
SETTINGS = re.compile(r"^(scale|lr|prompt_lr|lam|log_weight|settings|changes)$")


def main(argv: list[str] | None = None) -> int:
    from ..studies import STUDIES

    parser = argparse.ArgumentParser(prog="python -m erasekit.tools.verify", description=__doc__.splitlines()[0])
    parser.add_argument("study", nargs="?", choices=STUDIES, help="by default another one every week")
    parser.add_argument("--cells", type=int, default=2, help="values of the narrowed setting to compute (default 2)")
    args = parser.parse_args(argv)
    study = args.study or list(STUDIES)[datetime.date.today().isocalendar().week % len(STUDIES)]
    if paths.BUILD.name != "verify":  # compute in a process whose build folder has no cells
        folder = paths.BUILD / "verify"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "erasekit.tools.verify", study, "--cells", str(args.cells)]
        return subprocess.run(command, env=os.environ | {"ERASEKIT_BUILD": str(folder)}).returncode
    return verify(study, args.cells)


def verify(study: str, cells: int) -> int:
    """Recompute, compare, and append the outcome to the record's `verified`, which is all that changes in it."""
    from ..provenance import commit
    from ..studies import PRESETS, module
    from ..studies.kit.records import Record
    from ..worlds import load

    files = [paths.RECORDS / "emojinette" / preset / f"{study}.json" for preset in PRESETS[::-1]]
    record = next(Record.read(file) for file in files if file.exists())
    settings = narrow(module(study), record.preset, cells)
    data, _ = module(study).compute(load("emojinette"), settings)
    found = list(differences(json.loads(json.dumps(data)), record.data))
    if not found:
        print(f"{study}: nothing to compare; its narrowed settings give no row of {record.name}", file=sys.stderr)
        return 1
    largest, where = max(found)
    outcome = {"commit": commit(), "cells": cells, "date": datetime.date.today().isoformat()}
    record.verified.append(outcome | {"numbers": len(found), "largest_difference": round(largest, 6)})
    record.save_json()
    print(f"{study}: {len(found)} numbers of {record.name} recomputed, largest difference {largest:g} at {where}")
    return int(largest > TOLERANCE)


def narrow(source, preset: str, cells: int):
    """The record's settings cut to a few cells: by the study's VERIFY, else one training seed of the first named variants.

    The first of these settings that is a tuple is cut to `cells` values.
    """
    settings = source.PRESETS[preset]
    own = {field.name: getattr(settings, field.name) for field in fields(settings)}
    names = {k: v[:cells] for k, v in own.items() if isinstance(v, tuple) and all(isinstance(x, str) for x in v)}
    seeds = {"training_seeds": 1} if "training_seeds" in own else {}
    changes = dict(getattr(source, "VERIFY", names | seeds))
    for name in [name for name, value in changes.items() if isinstance(value, tuple)][:1]:
        changes[name] = changes[name][:cells]
    return replace(settings, **changes)


def differences(new, old, where: str = "") -> Iterator[tuple[float, str]]:
    """(absolute difference, place) of each fraction that is in both. Rows are matched by their other fields."""
    if isinstance(new, dict) and isinstance(old, dict):
        for key in new.keys() & old.keys():
            if not (SKIPPED.search(key) or SETTINGS.search(key)):
                yield from differences(new[key], old[key], f"{where}.{key}")
    elif isinstance(new, list) and isinstance(old, list):
        if new and all(isinstance(row, dict) for row in (*new, *old)):
            theirs = grouped(old)
            for identity, rows in grouped(new).items():
                if len(rows) == len(theirs.get(identity, [])):
                    for mine, yours in zip(rows, theirs[identity]):
                        yield from differences(mine, yours, f"{where}{identity}")
        elif len(new) == len(old):
            for n, (mine, yours) in enumerate(zip(new, old)):
                yield from differences(mine, yours, f"{where}[{n}]")
    elif isinstance(new, float) and isinstance(old, (int, float)):
        yield (0.0 if new != new and old != old else abs(new - old)), where  # NaN: not measured in both


def grouped(rows: list[dict]) -> dict[str, list[dict]]:
    """Rows by what identifies them: text, whole numbers, and settings."""
    groups = {}
    for row in rows:
        known = {k: v for k, v in row.items() if not SKIPPED.search(k)}
        identity = {k: v for k, v in known.items() if isinstance(v, str | int | None) or SETTINGS.search(k)}
        groups.setdefault(json.dumps(identity, sort_keys=True), []).append(row)
    return groups


if __name__ == "__main__":
    sys.exit(main())
