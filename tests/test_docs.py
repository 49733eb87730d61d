"""Every number, figure and address in the texts is generated from its source, and up to date."""

import json
import re

import numpy as np
import pytest

from erasekit import paths
from erasekit.studies import STUDIES
from erasekit.studies.kit import show
from erasekit.tools import docs, notebooks

README = paths.ROOT / "README.md"
TEXTS = [README, *sorted(paths.DOCS.glob("*.md"))]
MAX_WORDS = 1500  # of README


def test_everything_generated_is_up_to_date(capsys):
    assert docs.main(["all", "--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_noticed_and_repaired(tmp_path, monkeypatch, capsys):
    text = (paths.DOCS / "results.md").read_text(encoding="utf-8")
    changed = tmp_path / "results.md"
    changed.write_text(text.replace("| 100.0 |", "| 99.9 |", 1), encoding="utf-8")
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert docs.update([(changed, text)], check=True) == ["results.md"]
    assert docs.update([(changed, text)], check=False) == ["results.md"]
    assert changed.read_text(encoding="utf-8") == text


def test_results_have_every_study():
    headings = re.findall(r"^### (\w+)$", (paths.DOCS / "results.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(headings) == sorted(STUDIES)


def test_figures_in_the_texts_exist():
    manifest = show.read_manifest(paths.FIGURES)
    for text in TEXTS:
        for name in re.findall(r"figures/([\w-]+)\.png", text.read_text(encoding="utf-8")):
            assert (paths.FIGURES / f"{name}.png").exists()
            assert name == docs.GLANCE_FIGURE or (paths.NOTEBOOKS / f"{manifest[name]['notebook']}.ipynb").exists()
            assert (paths.ROOT / manifest[name]["record"]).exists()


def test_links_in_the_texts_exist():
    for text in TEXTS:
        for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text.read_text(encoding="utf-8")):
            assert (text.parent / link).exists(), f"{text.name}: {link}"


def test_readme_is_short_and_opens_every_notebook():
    text = README.read_text(encoding="utf-8")
    assert len(re.sub(r"\]\([^)]*\)|<!--.*?-->", " ", text).split()) <= MAX_WORDS
    assert [book.name for book in notebooks.find() if book.opening()[0] not in text] == []


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_cost_at_full_size_is_its_record_s(device):
    text = (paths.DOCS / "stable_diffusion.md").read_text(encoding="utf-8")
    record = json.loads((paths.RECORDS / "benchmarks" / f"full_size.{device}.json").read_text(encoding="utf-8"))
    lines = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert record["made"]["device"] in text
    for row in record["rows"]:
        assert f"{row['seconds a step']:g} | {row['peak GB']:g} |" in lines[next(iter(row.values()))]
    for row in record.get("trainings", []):
        assert f"| {row['evaluations']} | {row['seconds']} | {row['peak GB']} |" in lines[row["training"]]


def test_what_trainings_repeat_on_a_gpu_is_their_record_s():
    record = json.loads((paths.RECORDS / "benchmarks" / "repeated_trainings.json").read_text(encoding="utf-8"))
    moved = [abs(first - second) for first, second in (row["ESR-1"] for row in record["rows"])]
    said = (
        f"{len(moved)} repeated\n  trainings",
        f"ESR-1 by {np.median(moved):.1f} points (median), at most {max(moved):.0f}.",
    )
    assert all(words in README.read_text(encoding="utf-8") for words in said)
    mean, most = f"{np.mean(moved):.1f} points on average", f"{max(moved):.1f} at most, over {len(moved)} trainings"
    rare = f"{np.quantile(moved, 0.95):.1f} at the 95th percentile"
    book = (paths.NOTEBOOKS / "04_objects.ipynb").read_text(encoding="utf-8")
    assert f"moved by {mean}, {rare} and {most}" in book


def test_the_address_stands_in_one_place():
    sources = [*(paths.ROOT / "erasekit").rglob("*.py"), *paths.ROOT.glob("*.toml"), *paths.ROOT.glob("*.yml")]
    assert [path.name for path in sources if paths.REPOSITORY in path.read_text(encoding="utf-8")] == ["paths.py"]


def test_a_new_address_leaves_other_repositories_alone():
    old = (
        "https://colab.research.google.com/github/old/name/blob/v1/notebooks/00_a.ipynb "
        "git+https://github.com/old/name@v1 https://github.com/old/name.git https://github.com/old/name-too "
        "https://github.com/rohitgandikota/erasing"
    )
    assert docs.readdress(old) == (
        f"https://colab.research.google.com/github/{paths.REPOSITORY}/blob/{paths.RELEASE}/notebooks/00_a.ipynb "
        f"git+https://github.com/{paths.REPOSITORY}@{paths.RELEASE} https://github.com/{paths.REPOSITORY}.git "
        "https://github.com/old/name-too https://github.com/rohitgandikota/erasing"
    )
    assert docs.readdress(docs.readdress(old)) == docs.readdress(old)
