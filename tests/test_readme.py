"""Every number of README's tables is a record's."""

import json

from erasekit import paths, readme

TABLES = {
    "recovery",
    "crowd",
    "continual",
    "hiding",
    "world",
    "objects",
    "unsafe",
    "styles",
    "prompt_length",
    "stability",
    "clip_study",
    "clip_models",
    "mechanisms",
    "cost",
    "recipes",
    "attacks",
}


def test_tables_agree_with_their_records(capsys):
    assert {name for _, name, _ in readme.BLOCK.findall(readme.README.read_text())} == TABLES
    assert readme.main(["--check"]) == 0, capsys.readouterr().out


def test_a_changed_number_is_noticed(tmp_path, monkeypatch, capsys):
    text = readme.README.read_text()
    block = readme.BLOCK.search(text)[0]
    changed = tmp_path / "README.md"
    changed.write_text(text.replace(block, block.replace(" | ", " | 1", 1)))
    monkeypatch.setattr(readme, "README", changed)
    assert readme.main(["--check"]) == 1
    assert "differs" in capsys.readouterr().out


def test_the_benchmarks_tables_are_their_records():
    text = readme.README.read_text()
    cpu, cuda = (
        json.loads((paths.RECORDS / "benchmarks" / f"full_size.{device}.json").read_text())
        for device in ("cpu", "cuda")
    )
    assert cpu["made"]["device"] in text and cuda["made"]["device"].split()[1] in text
    for rows in zip(cpu["rows"], cuda["rows"]):
        cells = [f"{row[number]:g}" for row in rows for number in ("seconds a step", "peak GB")]
        assert f"| {rows[0]['way']} | {' | '.join(cells)} |" in text
    for row in cuda["trainings"]:
        cells = row["evaluations"], row["seconds"], row["peak GB"]
        assert f"| {row['training']} | {' | '.join(map(str, cells))} |" in text
