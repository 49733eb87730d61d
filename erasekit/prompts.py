"""Prompts with their seeds, read from the CSV files the field publishes; no two of them name their columns alike."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

# What we call a column -> what published files call it, first come, first taken.
COLUMNS = {
    "prompt": ("prompt", "adv_prompt"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "label": ("class", "artist", "label_str", "categories", "source"),
    "case": ("case_number", "image_id"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale"),
}
NEEDED = ("prompt", "seed")


@dataclass(frozen=True)
class Asked:
    """One image asked for: `label` is the class or artist it should show ("" where the file has none)."""

    case: str
    prompt: str
    seed: int
    label: str = ""
    guidance: float | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[Asked]:
    """The rows of a CSV file in order, at most `limit`.

    Read are case_number or image_id (else the row's number), prompt, evaluation_seed (sd_seed in I2P), class, artist or
    label_str, and a guidance scale where there is one; other columns are left alone. Raises ValueError for a file without a
    prompt or seed column, an empty one, and a row without a prompt, with a seed that is no integer or a guidance that is no
    number.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, nrows=limit)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file of prompts: {error}") from None
    has = {ours: next((n for n in names if n in table.columns), None) for ours, names in COLUMNS.items()}
    for name in NEEDED:
        if has[name] is None:
            raise ValueError(
                f"{path} has no {name} column: accepted are {', '.join(COLUMNS[name])}; it has {', '.join(table.columns)}"
            )
    if table.empty:
        raise ValueError(f"{path} holds no prompts")

    def value(row, name):
        return row[has[name]].strip() if has[name] else ""

    asked = []
    for number, row in enumerate(table.to_dict("records")):
        prompt, seed, guidance = (value(row, name) for name in ("prompt", "seed", "guidance"))
        if not prompt:
            raise ValueError(f"{path}, row {number}: the prompt is empty")
        try:
            # Files that went through a table program have 41337.0.
            seed, whole = int(float(seed)), float(seed).is_integer()
        except (ValueError, OverflowError):
            whole = False
        if not whole:
            raise ValueError(f"{path}, row {number}: the seed {value(row, 'seed')!r} is not an integer")
        try:
            guidance = float(guidance) if guidance else None
        except ValueError:
            raise ValueError(f"{path}, row {number}: the guidance {guidance!r} is not a number") from None
        case = value(row, "case") or str(number)
        asked.append(Asked(case, prompt, seed, value(row, "label"), guidance))
    return asked
