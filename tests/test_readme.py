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


def test_the_benchmarks_table_is_its_record():
    text = readme.README.read_text()
    records = list((paths.RECORDS / "benchmarks").glob("full_size.*.json"))
    assert records
    for path in records:
        content = json.loads(path.read_text())
        assert content["made"]["device"] in text
        for row in content["rows"]:
            assert f"| {row['way']} | {row['seconds a step']:g} | {row['peak GB']:g} |" in text
