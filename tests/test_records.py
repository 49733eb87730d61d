"""Records: computed once, loaded while settings, world and version are the same, and clear about where they come from."""

import copy
import json
import subprocess
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from PIL import Image

from erasekit import paths, provenance, studies
from erasekit.studies.kit import cache
from erasekit.studies.kit.records import Record, Request, load_or_compute, made_of
from erasekit.studies.overrides import overrides
from erasekit.worlds import BUNDLED

SETTINGS = {"seeds": [0, 1], "eta": 1.0}
WORLD = SimpleNamespace(pipe=SimpleNamespace(device="cpu"), precision="fp32", version="v", sampler="ddim")


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    monkeypatch.delenv("ERASEKIT_RECORD", raising=False)
    return tmp_path


@pytest.fixture
def ask():
    """load_or_compute with a computation that counts how often it ran."""
    runs = []

    def compute(world):
        runs.append(1)
        return {"run": len(runs), "rates": (0.1, 99.5)}, {"grid": Image.new("RGB", (3, 2), (10, 20, 30 + len(runs)))}

    def ask(recompute=False, **changes):
        known = {"study": "objects", "version": 1, "preset": "quick", "world": {"name": "toy", "hash": "h"}}
        request = Request(**known | {"settings": SETTINGS} | changes)
        return load_or_compute(request, lambda: WORLD, compute, recompute)

    return ask


def record(ask, monkeypatch, **changes) -> Record:
    """A committed record."""
    with monkeypatch.context() as patch:
        patch.setenv("ERASEKIT_RECORD", "1")
        return ask(**changes)


def test_is_computed_once_and_prints_so(ask, capsys):
    first = ask()
    assert "computing objects: there is no record yet" in capsys.readouterr().out
    again = ask()
    assert capsys.readouterr().out.startswith("loaded ")
    assert first.data == again.data == {"run": 1, "rates": [0.1, 99.5]}
    assert again.images["grid"].tobytes() == first.images["grid"].tobytes()
    assert again.made == first.made


def test_a_plain_run_leaves_committed_records_alone(ask, folders, monkeypatch):
    committed = record(ask, monkeypatch)
    before = {path: path.read_bytes() for path in (folders / "records").rglob("*") if path.is_file()}
    assert len(before) == 2 and committed.committed
    assert ask().data["run"] == 1
    assert not ask(recompute=True).committed
    assert ask(version=2).data["run"] == 3
    assert {path: path.read_bytes() for path in before} == before


def test_recording_commits_what_a_plain_run_computed(ask, monkeypatch):
    ask()
    assert (again := record(ask, monkeypatch)).committed and again.data["run"] == 1
    assert Record.read(again.path).images["grid"].size == (3, 2)


@pytest.mark.parametrize("kind", [{"custom": True}, {"preset": "smoke"}])
def test_custom_settings_and_smoke_stay_in_the_build_folder(ask, monkeypatch, kind):
    assert not record(ask, monkeypatch, **kind).committed


def test_custom_records_do_not_replace_the_preset_s(ask):
    other = {"settings": SETTINGS | {"eta": 2.0}, "custom": True}
    assert [ask().data["run"], ask(**other).data["run"], ask().data["run"], ask(**other).data["run"]] == [1, 2, 1, 2]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"settings": SETTINGS | {"eta": 2.0}}, "the settings eta differ"),
        ({"version": 2}, "the version of the study is 1"),
        ({"world": {"name": "toy", "hash": "other"}}, "the world's hash differs"),
    ],
)
def test_other_settings_version_or_world_are_computed(ask, capsys, changes, reason):
    ask()
    assert ask(**changes).data["run"] == 2
    assert reason in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, content",
    [
        ("objects.json", b'{"settings": {'),
        ("objects.json", b"[]"),
        ("objects.json", b"{}"),
        ("objects.json", b"\xff\xfe\x00"),
        ("objects.grid.png", b"\x89PNG\r\n\x1a\n"),
        ("objects.grid.png", None),
    ],
)
def test_a_damaged_record_is_computed_again(ask, capsys, file, content):
    path = ask().path.with_name(file)
    path.unlink() if content is None else path.write_bytes(content)
    assert ask().data["run"] == 2
    assert "objects.json is damaged" in capsys.readouterr().out
    assert ask().data["run"] == 2


def test_a_cut_image_is_computed_again(ask):
    path = ask().image_file("grid")
    path.write_bytes(path.read_bytes()[:-30])
    assert ask().data["run"] == 2


def test_a_record_names_the_machine_that_took_longest_and_the_others():
    def part(device, seconds, commit="a"):
        return {"device": device, "seconds": seconds, "commit": commit, "precision": "fp32"}

    last = {"device": "cpu", "seconds": 1.0, "commit": "c"}
    assert made_of(last, []) == last
    assert made_of(last, [part("gpu", 90.0, "b"), part("gpu", 9.0)]) == {
        "device": "gpu and cpu",
        "seconds": 100.0,
        "commit": "b",
    }
    assert made_of(last, [part("gpu", 990.0)])["device"] == "gpu"  # what reads a cache is no machine of it


def test_an_interrupted_computation_leaves_no_record(folders):
    def compute(world):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_or_compute(Request("a", 1, "quick", {"name": "toy", "hash": "h"}, {}), lambda: WORLD, compute)
    assert not list(folders.rglob("*.json"))


def test_contents_of_a_record(ask):
    content = json.loads(ask().path.read_text())
    assert content["settings"] == SETTINGS and content["world"] == {"name": "toy", "hash": "h"}
    assert (content["study"], content["version"], content["preset"], content["verified"]) == ("objects", 1, "quick", [])
    assert content["made"].keys() == {"commit", "versions", "device", "seconds", "date"}


def test_seconds_include_those_of_cached_cells():
    def compute(world):
        return {"part": cache.cached("test", 1, world, lambda: ({"part": 0}, None))[0]}, {}

    def seconds(study):
        request = Request(study, 1, "quick", {"name": "toy", "hash": "h"}, {})
        return load_or_compute(request, lambda: WORLD, compute).made["seconds"]

    assert seconds("first") < 100
    for path in (paths.BUILD / "cells" / "test").glob("*.json"):
        path.write_text(path.read_text().replace('"seconds": 0.0', '"seconds": 5000.0'))
    assert 5000 <= seconds("second") < 5100


# ------------------------------------------------------------------------------------------------------------ studies.run


@dataclass(frozen=True)
class Settings:
    seeds: int = 10
    methods: tuple[str, ...] = ("uce", "kpop")
    training_steps: int | None = None
    operating_points: dict | None = None


@pytest.fixture
def fake(monkeypatch):
    """A study that notes what it is called with, on a world that only a computation may load."""
    calls = []

    def compute(world, settings):
        calls.append((world, settings))
        return {"seeds": settings.seeds}, {}

    presets = {"smoke": Settings(seeds=1), "quick": Settings(seeds=2), "full": Settings()}
    study = SimpleNamespace(VERSION=1, PRESETS=presets, compute=compute)
    world = SimpleNamespace(**vars(WORLD), name="emojinette", groups={}, parent=None, pool_defaults={})
    monkeypatch.setattr(studies, "module", lambda name: study)
    monkeypatch.setattr(studies, "_load", lambda name: calls.append("loaded") or world)
    return SimpleNamespace(calls=calls, world=world)


def test_a_world_is_loaded_only_to_compute(fake):
    studies.run("fake")
    assert fake.calls[0] == "loaded" and len(fake.calls) == 2
    studies.run("fake")
    assert len(fake.calls) == 2


def test_quick_is_served_by_full(fake):
    studies.run("fake", preset="full")
    assert studies.run("fake").preset == "full"
    assert studies.run("fake", exact_preset=True).preset == "quick"
    assert studies.run("fake", seeds=3).data == {"seeds": 3}


def test_lists_become_tuples_and_the_preset_s_own_values_are_not_custom(fake):
    assert studies.run("fake", methods=["uce", "kpop"]).path.name == "fake.json"
    assert studies.run("fake", methods=["uce"]).path.name != "fake.json"
    assert fake.calls[-1][1].methods == ("uce",)


def test_smoke_shortens_the_pool_and_leaves_the_world_alone(fake):
    studies.run("fake", preset="smoke")
    assert fake.calls[-1][0].pool_defaults == studies.SHORT_POOL and fake.world.pool_defaults == {}


@pytest.mark.parametrize(
    "changes, named", [({"preset": "huge"}, "unknown preset 'huge'"), ({"seedz": 1}, "'seedz' of fake")]
)
def test_wrong_input_is_one_sentence(fake, changes, named, sentence):
    with pytest.raises(ValueError) as error:
        studies.run("fake", **changes)
    assert named in sentence(error) and "accepted are" in sentence(error)


def test_an_unknown_study_and_a_plain_world_are_refused(sentence):
    plain = SimpleNamespace(name="mine")
    refusals = [(("objectz",), "unknown study 'objectz'"), (("objects", plain), "studies need a Benchmark")]
    for arguments, named in refusals:
        with pytest.raises(ValueError) as error:
            studies.run(*arguments)
        assert named in sentence(error)


@pytest.mark.parametrize("part", ["scheduler", "text_encoder"])
def test_a_bundled_world_with_a_part_changed_has_other_records(world, part):
    changed, parts = copy.copy(world), world.pipe.components
    assert studies._identify(world)[0] == studies._identify("emojinette")[0]
    if part == "scheduler":
        other = type(parts[part]).from_config(dict(parts[part].config) | {"beta_end": 0.02})
    else:
        other = copy.deepcopy(parts[part])
        next(other.parameters()).data += 1
    changed.pipe = type(world.pipe)(**parts | {part: other}, requires_safety_checker=False)
    assert studies._identify(changed)[0]["hash"] == changed.version[:16] != studies._identify(world)[0]["hash"]


def test_stable_diffusion_overrides_settings():
    world = SimpleNamespace(train_defaults={"steps": 1000, "batch_size": 1}, styles=("a", "b"), prompt=str)
    assert overrides(SimpleNamespace(train_defaults={}), "fake", "quick", Settings()) == Settings()
    changed = overrides(world, "fake", "quick", Settings())
    assert changed.training_steps == 1000 and changed.operating_points["uce"] == {"settings": {}, "scale": 1.0}
    assert overrides(world, "fake", "smoke", Settings(training_steps=1)).training_steps == 1


# ------------------------------------------------------------------------------------------------- what is in the repository

COMMITTED = sorted(file for world in BUNDLED for file in (paths.ROOT / "records" / world).glob("*/*.json"))


def test_every_study_has_a_record():
    assert {path.stem for path in COMMITTED} == set(studies.STUDIES)


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_records_are_valid(path, monkeypatch):
    monkeypatch.setattr(paths, "RECORDS", path.parent.parent.parent)
    record, reason = studies.find(path.stem, path.parts[-3], path.parent.name)
    assert record and record.path == path, reason


def test_the_commit_is_this_checkout_s(tmp_path, monkeypatch):
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=paths.ROOT, capture_output=True, text=True, check=True)
    assert head.stdout.startswith(provenance.commit().removesuffix("+"))
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    assert provenance.commit() == "unknown"


def test_the_hash_of_the_bundled_world_follows_its_files(tmp_path, monkeypatch):
    """All but the line endings of its JSON."""
    for name, folder in (("ROOT", "."), ("MODELS", "models"), ("DATA", "data")):
        monkeypatch.setattr(provenance, name, tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
    config, art = tmp_path / "models" / "emojinette-sd" / "config.json", tmp_path / "data" / "emojinette.parquet"
    config.parent.mkdir()
    config.write_bytes(b'{\n "a": 1\n}\n')
    art.write_bytes(b"art")
    bundled_hash = provenance.bundled_hash.__wrapped__
    seen = {bundled_hash()}
    config.write_bytes(b'{\r\n "a": 1\r\n}\r\n')
    assert {bundled_hash()} == seen
    for path in (config, config.with_name("unet.safetensors"), art):
        path.write_bytes(b'{"a": 2}')
        seen.add(bundled_hash())
    assert len(seen) == 4
