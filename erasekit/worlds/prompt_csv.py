"""Prompts with their seeds from published CSV files, whose column names differ."""

from dataclasses import dataclass
from pathlib import Path

import pandas as pd

# Our name of a column -> its names in published files, in order of preference.
COLUMNS = {
    "prompt": ("prompt", "adv_prompt"),
    "seed": ("evaluation_seed", "sd_seed", "seed"),
    "label": ("class", "artist", "label_str", "categories", "source"),
    "case": ("case_number", "image_id"),
    "guidance": ("evaluation_guidance", "sd_guidance_scale", "guidance_scale"),
}
REQUIRED = ("prompt", "seed")


@dataclass(frozen=True)
class PromptRow:
    """One image to sample: `label` is the class or artist it should show ("" where the file has none)."""

    case: str
    prompt: str
    seed: int
    label: str = ""
    guidance: float | None = None


def read_prompts(path: Path, limit: int | None = None) -> list[PromptRow]:
    """The first `limit` rows of a CSV file, or all.

    See `COLUMNS` for the columns; `case` defaults to the row's number. Raises ValueError for a file without a prompt or seed
    column or without rows, and for a row with an empty prompt, a seed that is no integer or a guidance that is no number.
    """
    path = Path(path)
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False, nrows=limit)
    except (pd.errors.EmptyDataError, pd.errors.ParserError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a CSV file of prompts: {error}") from None
    column = {ours: next((n for n in names if n in table.columns), None) for ours, names in COLUMNS.items()}
    for name in REQUIRED:
        if column[name] is None:
            accepted, present = ", ".join(COLUMNS[name]), ", ".join(table.columns)
            raise ValueError(f"{path} has no {name} column: accepted are {accepted}; it has {present}")
    if table.empty:
        raise ValueError(f"{path} has no prompts")
    return [parse_row(path, n, row, column) for n, row in enumerate(table.to_dict("records"))]


def parse_row(path: Path, number: int, row: dict[str, str], column: dict[str, str | None]) -> PromptRow:
    """Check and convert one row."""
    case, prompt, seed, label, guidance = (
        row[column[name]].strip() if column[name] else "" for name in ("case", "prompt", "seed", "label", "guidance")
    )
    if not prompt:
        raise ValueError(f"{path}, row {number}: the prompt is empty")
    try:
        value = float(seed)  # spreadsheets turn 41337 into 41337.0
    except ValueError:
        value = float("nan")
    if not value.is_integer():  # infinity is not either
        raise ValueError(f"{path}, row {number}: the seed {seed!r} is not an integer")
    try:
        scale = float(guidance) if guidance else None
    except ValueError:
        raise ValueError(f"{path}, row {number}: the guidance {guidance!r} is not a number") from None
    return PromptRow(case or str(number), prompt, int(value), label, scale)
