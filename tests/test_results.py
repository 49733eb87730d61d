"""Records: computed once, loaded while nothing they depend on changed, and honest about where they come from."""

import json
import subprocess

import pytest
from PIL import Image

from erasekit import paths, results
from erasekit.studies import panel

CONFIG = {"seeds": [0, 1], "eta": 1.0, "concepts": ("church", "dog")}


@pytest.fixture(autouse=True)
def records(tmp_path, monkeypatch):
    """An empty place for records; hashes that the tests may set."""
    monkeypatch.setattr(results, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(results, "code_hash", lambda *modules: "code 1")
    monkeypatch.setattr(results, "world_hash", lambda world: "model 1")
    return tmp_path / "records" / "toy" / "smoke"


@pytest.fixture
def ask(toy):
    """compute_or_load with a computation that says how often it ran."""
    runs = []

    def compute():
        runs.append(1)
        image = Image.new("RGB", (3, 2), (10, 20, 30 + len(runs)))
        return {"run": len(runs), "rates": [0.1, 99.5]}, {"grid": image}

    def ask(config=CONFIG, name="study", **kwargs):
        return results.compute_or_load(toy, "smoke", name, config, compute, **kwargs)

    return ask


def test_computes_once_and_says_so(ask, capsys):
    first = ask()
    assert "computing study: there is no record yet" in capsys.readouterr().out
    again = ask()
    assert "loaded" in capsys.readouterr().out
    assert first.data == again.data == {"run": 1, "rates": [0.1, 99.5]}


def test_images_come_back_pixel_by_pixel(ask):
    before, after = ask().images["grid"], ask().images["grid"]
    assert before is not after
    assert (after.size, after.mode, after.tobytes()) == (before.size, before.mode, before.tobytes())


def test_a_record_is_two_small_files_in_its_place(ask, records):
    ask()
    assert {path.name for path in records.iterdir()} == {"study.json", "study.grid.png"}


def test_another_config_is_computed(ask, capsys):
    ask()
    assert ask(CONFIG | {"eta": 2.0}).data["run"] == 2
    assert "the record's config differ" in capsys.readouterr().out


@pytest.mark.parametrize("kind, function", [("code", "code_hash"), ("model", "world_hash")])
def test_other_code_or_models_are_computed(ask, monkeypatch, capsys, kind, function):
    ask()
    monkeypatch.setattr(results, function, lambda *of: f"{kind} 2")
    assert ask().data["run"] == 2
    assert f"the record's {kind} differ" in capsys.readouterr().out


def test_fresh_computes_everything(ask):
    ask()
    assert ask(fresh=True).data["run"] == 2
    assert ask().data["run"] == 2, "the new record took the old one's place"


def test_a_trial_leaves_the_record_alone(ask, records, monkeypatch, tmp_path):
    monkeypatch.setattr(results, "BUILD", tmp_path / "build")
    ask()
    assert ask({**CONFIG, "more": 1}, trial=True).data["run"] == 2
    assert ask({**CONFIG, "more": 1}, trial=True).data["run"] == 2
    assert ask().data["run"] == 1 and len(list(records.glob("*.json"))) == 1


def test_names_do_not_share_a_record(ask):
    assert ask(name="one").data["run"] == 1
    assert ask(name="two").data["run"] == 2


@pytest.mark.parametrize(
    "file, content",
    [
        ("study.json", b'{"config": {'),
        ("study.json", b""),
        ("study.json", b"[]"),
        ("study.json", b"{}"),
        ("study.json", b"\xff\xfe\x00"),
        ("study.grid.png", b""),
        ("study.grid.png", b"\x89PNG\r\n\x1a\n"),
        ("study.grid.png", None),
    ],
)
def test_a_damaged_record_is_computed_again(ask, records, capsys, file, content):
    ask()
    (records / file).unlink() if content is None else (records / file).write_bytes(content)
    assert ask().data["run"] == 2
    assert "the record is damaged" in capsys.readouterr().out
    assert ask().data["run"] == 2


def test_a_cut_image_is_computed_again(ask, records):
    ask()
    path = records / "study.grid.png"
    path.write_bytes(path.read_bytes()[:-30])
    assert ask().data["run"] == 2


def test_an_interrupted_computation_leaves_no_record(toy, records):
    def compute():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        results.compute_or_load(toy, "smoke", "study", CONFIG, compute)
    assert not (records / "study.json").exists()


def test_a_record_says_where_it_comes_from(ask, records):
    ask()
    content = json.loads((records / "study.json").read_text())
    assert content["config"] == {"seeds": [0, 1], "eta": 1.0, "concepts": ["church", "dog"]}
    assert content["hashes"] == {"code": "code 1", "model": "model 1"}
    made = content["made"]
    assert made.keys() == {"commit", "versions", "device", "seconds", "date"}
    assert set(made["versions"]) == {"python", *results.PACKAGES}
    assert made["device"] and made["seconds"] >= 0


def test_loading_keeps_the_provenance(ask):
    assert ask().made == ask().made


def test_the_commit_is_this_checkout_s():
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert head.stdout.startswith(results.commit().removesuffix("+"))


def test_outside_a_checkout_the_commit_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setattr(results, "ROOT", tmp_path)
    assert results.commit() == "unknown"


# ------------------------------------------------------------------------------------------------------------------- hashes


@pytest.fixture
def tree(tmp_path, monkeypatch):
    """A small checkout."""
    for name in ("erasekit/losses.py", "erasekit/figures.py", "models/sd/unet.safetensors", "models/sd/scheduler.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("before")
    for name, folder in (("ROOT", "."), ("MODELS", "models"), ("DATA", "data")):
        monkeypatch.setattr(results, name, tmp_path / folder)
    return tmp_path


CODE_HASH, MODEL_HASH = results.code_hash.__wrapped__, results.model_hash.__wrapped__


@pytest.mark.parametrize("name, counts", [("losses.py", True), ("studies/new.py", True), ("figures.py", False)])
def test_the_code_hash_follows_what_a_study_imports_and_nothing_else(tree, name, counts):
    (tree / "erasekit" / "studies").mkdir()
    (tree / "erasekit" / "studies" / "new.py").write_text("from .. import middle")
    (tree / "erasekit" / "middle.py").write_text("def f():\n    from .losses import g")
    (tree / "erasekit" / "losses.py").write_text("g = 1")
    before = code_hash("erasekit.studies.new")
    path = tree / "erasekit" / name
    path.write_text(path.read_text() + "\nafter = 1")
    assert (code_hash("erasekit.studies.new") != before) == counts


def test_the_code_hash_is_blind_to_comments_docstrings_empty_lines_and_settings_and_to_nothing_else():
    plain = 'def f(x):\n    y = "# no comment"\n    return x'
    told = (
        '"""Module."""\n\n# why\ndef f(x):\n    """Two\n    lines."""\n\n    y = "# no comment"  # said\n    return x\n'
        'FULL = {\n    "seeds": 10,\n}\nSCALES = {"full": FULL}\n'
    )
    assert results.substance(told) == plain
    assert results.substance(plain.replace("x", "z")) != plain
    assert results.substance(plain.replace("# no", "# a")) != plain
    assert results.substance(plain + "\nSWEEP = 1") != plain


def code_hash(module):
    results.sources.cache_clear()
    return CODE_HASH(module)


@pytest.mark.parametrize("name", ["models/sd/unet.safetensors", "models/sd/scheduler.json", "data/art.parquet"])
def test_the_model_hash_follows_everything_the_world_reads(tree, name):
    (tree / "data").mkdir()
    before = MODEL_HASH()
    (tree / name).write_text("after")
    assert MODEL_HASH() != before


def test_a_record_put_together_from_kept_parts_tells_what_they_took(toy, tmp_path, monkeypatch):
    """Each part keeps its seconds; only those that an earlier run took are added."""
    monkeypatch.setattr(panel, "BUILD", tmp_path / "build")

    def part(n):
        return panel.cell("test", toy, lambda: ({"part": n}, None), "erasekit.sampling", n)[0]

    assert part(0) == {"part": 0}
    [path] = (tmp_path / "build" / "cells" / "test").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["seconds"] >= 0
    path.write_text(json.dumps(kept | {"seconds": 5000.0}))
    record = results.compute_or_load(toy, "smoke", "parts", {}, lambda: ({"parts": [part(0), part(1)]}, {}))
    assert record.data == {"parts": [{"part": 0}, {"part": 1}]} and 5000 <= record.made["seconds"] < 5100
    assert results.compute_or_load(toy, "smoke", "none", {}, lambda: ({}, {})).made["seconds"] < 100
