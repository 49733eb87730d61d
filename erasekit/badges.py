"""Writes the repository's address into README.md and the notebooks: change it in paths.py, then run this.

python -m erasekit.badges [--check]
"""

import re
import sys
from pathlib import Path

from erasekit import paths

COLAB = "https://colab.research.google.com"
ADDRESS = re.compile(rf"{re.escape(COLAB)}/github/([\w.-]+/[\w.-]+)/blob/([\w.-]+)/")


def badge(notebook: str) -> str:
    """The Colab badge, in Markdown, of a file in notebooks/, such as "00_quickstart.ipynb"."""
    link = f"{COLAB}/github/{paths.REPOSITORY}/blob/{paths.RELEASE}/notebooks/{notebook}"
    return f"[![Open In Colab]({COLAB}/assets/colab-badge.svg)]({link})"


def renew(text: str) -> str:
    """`text` with this repository's address as in paths.py.

    The old address is read off the badges, so links to other people's repositories stay as they are.
    """
    for repository, release in set(ADDRESS.findall(text)):
        place = rf"(github(?:\.com)?/){re.escape(repository)}"
        text = re.sub(rf"{place}((?:\.git)?(?:/blob/|/tree/|/raw/|@)){re.escape(release)}(?![\w-])", _pinned, text)
        text = re.sub(rf"{place}(?![\w-])", rf"\g<1>{paths.REPOSITORY}", text)
    return text


def _pinned(match: re.Match) -> str:
    return f"{match[1]}{paths.REPOSITORY}{match[2]}{paths.RELEASE}"


def files() -> list[Path]:
    return [paths.ROOT / "README.md", *sorted(paths.NOTEBOOKS.glob("*.ipynb"))]


def main(argv: list[str]) -> int:
    check = argv == ["--check"]
    texts = {path: path.read_text(encoding="utf-8") for path in files()}
    stale = [path for path, text in texts.items() if renew(text) != text]
    for path in stale:
        print(f"{path.name} has another address than paths.py" if check else f"rewriting {path.name}")
        if not check:  # as text, not as a notebook, so that nothing else in the file moves
            path.write_text(renew(texts[path]), encoding="utf-8")
    return 1 if check and stale else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
