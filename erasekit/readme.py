"""Writes the tables of README.md from the committed records: `python -m erasekit.readme [--check]`.

Between `<!-- table: hiding -->` and `<!-- end -->` stands the table of the study "hiding", and so on: of its record of scale full
where there is one, else quick.
"""

import re
import sys

from .figures import STUDIES, source
from .paths import RECORDS, ROOT
from .results import Record

README = ROOT / "README.md"
BLOCK = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table(study: str) -> str:
    """A study's table in Markdown, and the line that says where it comes from."""
    scale = next(s for s in ("full", "quick") if (RECORDS / "emojinette" / s / f"{study}.json").exists())
    record = Record.read(RECORDS / "emojinette" / scale / f"{study}.json")
    frame = STUDIES[study][1](record).reset_index()
    rows = [list(frame.columns), ["---"] * len(frame.columns), *frame.values.tolist()]
    lines = ["| " + " | ".join(f"{v:.1f}" if isinstance(v, float) else str(v) for v in row) + " |" for row in rows]
    made = record.made
    about = f"{source(record)}; scale {scale}, commit {made['commit']}, torch {made['versions']['torch']}, {made['device']}; "
    return "\n".join(lines) + f"\n\n{about}record: [`{record.name}`]({record.name})\n"


def main(argv: list[str]) -> int:
    text = README.read_text(encoding="utf-8")
    fresh = BLOCK.sub(lambda match: f"{match[1]}{table(match[2])}{match[3]}", text)
    if argv == ["--check"]:
        print("README.md agrees with the records" if fresh == text else "README.md differs from the records")
        return int(fresh != text)
    README.write_text(fresh, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
