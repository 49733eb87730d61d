"""Public data sets become the files that worlds read; here they are made, and read by `datasets` itself."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from erasekit import fetch
from erasekit.prompts import read_prompts


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def captions(tmp_path):
    """As COCO's captions are published: several to a picture, no seeds."""
    rows = {"image_id": [9, 7, 3], "captions": [["a dog  on grass", "a dog"], [""], ["two boats"]]}
    (tmp_path / "coco").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "coco" / "validation-0.parquet")
    return tmp_path / "coco"


@pytest.fixture
def paintings(tmp_path):
    """A folder for each artist, pictures of any shape."""
    for n, artist in enumerate(("monet", "turner")):
        (tmp_path / "art" / artist).mkdir(parents=True)
        for k in range(2):
            pixels = np.full((40 + 10 * k, 60, 3), 50 + 100 * n, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "art" / artist / f"{k}.png")
    return tmp_path / "art"


def test_captions_become_prompts_with_seeds_of_their_own(captions, tmp_path):
    assert fetch.main(["captions", str(captions), "--split", "validation", "--to", str(tmp_path)]) == 0
    asked = read_prompts(tmp_path / "captions.csv")
    assert [(a.case, a.prompt) for a in asked] == [("9", "a dog on grass"), ("3", "two boats")]
    assert len({a.seed for a in asked}) == 2
    again = tmp_path / "again"
    fetch.prompts(str(captions), again / "captions.csv", "validation")
    assert read_prompts(again / "captions.csv") == asked
    assert json.loads((tmp_path / "captions.csv.source.json").read_text())["split"] == "validation"


def test_a_published_seed_is_kept(tmp_path):
    rows = {"prompt": ["a", "b"], "sd_seed": [41337, 5], "categories": ["sexual", "violence"]}
    (tmp_path / "i2p").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "i2p" / "train-0.parquet")
    assert fetch.main(["unsafe", str(tmp_path / "i2p"), "--limit", "1", "--to", str(tmp_path)]) == 0
    (only,) = read_prompts(tmp_path / "i2p.csv")
    assert (only.prompt, only.seed, only.label) == ("a", 41337, "sexual")


def test_pictures_are_square_and_have_a_folder_for_each_name(paintings, tmp_path):
    made = tmp_path / "reference"
    assert fetch.pictures(str(paintings), made, by="label", side=32) == 4
    assert sorted(p.name for p in made.iterdir()) == ["monet", "turner"]
    paths = sorted(made.rglob("*.png"))
    assert {Image.open(p).size for p in paths} == {(32, 32)} and len(paths) == 4
    assert {int(np.asarray(Image.open(p)).mean()) for p in (made / "turner").iterdir()} == {150}
    before = paths[0].stat().st_mtime_ns
    fetch.pictures(str(paintings), made, by="label", side=32)
    assert paths[0].stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "more, says",
    [
        (["--split", "test"], "split 'test'"),
        (["--split", "validation"], "picture"),
    ],
)
def test_what_is_missing_is_named(captions, tmp_path, capsys, more, says):
    assert fetch.main(["pictures", str(captions), "--to", str(tmp_path), *more]) == 2
    said = capsys.readouterr().err.strip()
    assert says in said and "\n" not in said


def test_no_such_data_set_is_one_sentence(tmp_path, capsys, monkeypatch):
    assert fetch.main(["captions", str(tmp_path / "nothing"), "--to", str(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert "nothing" in said and "\n" not in said
    assert not (tmp_path / "captions.csv").exists()


def test_a_column_that_is_not_there_is_refused(paintings, tmp_path):
    with pytest.raises(ValueError, match="accepted are artist; it has image, label"):
        fetch.pictures(str(paintings), tmp_path / "out", by="artist")


def test_pictures_of_another_data_set_are_not_mixed(paintings, captions, tmp_path):
    made = tmp_path / "reference"
    fetch.pictures(str(paintings), made, side=32)
    with pytest.raises(ValueError, match=r"holds pictures of .*art.*32 pixels"):
        fetch.pictures(str(paintings), made, side=64)


def test_a_missing_seed_is_given_and_a_missing_name_is_none(tmp_path):
    rows = {"prompt": ["a", "b"], "seed": [None, 5], "label": ["x", None]}
    (tmp_path / "some").mkdir()
    pq.write_table(pa.table(rows), tmp_path / "some" / "train-0.parquet")
    assert fetch.prompts(str(tmp_path / "some"), tmp_path / "some.csv") == 2
    first, second = read_prompts(tmp_path / "some.csv")
    assert first.seed >= 0 and second.seed == 5 and second.label == ""
    assert fetch.named({"label": ["x", "y"]}, "label", -1) == ""


def test_what_is_no_text_is_refused(tmp_path, capsys):
    (tmp_path / "some").mkdir()
    pq.write_table(pa.table({"sentences": [[{"raw": "a dog"}]]}), tmp_path / "some" / "train-0.parquet")
    assert fetch.main(["captions", str(tmp_path / "some"), "--to", str(tmp_path)]) == 2
    assert "is a text or a list of texts" in capsys.readouterr().err
    assert not (tmp_path / "captions.csv").exists()


def test_a_data_set_without_texts_leaves_the_file_there_is(tmp_path, capsys):
    (tmp_path / "some").mkdir()
    pq.write_table(pa.table({"prompt": ["", " "]}), tmp_path / "some" / "train-0.parquet")
    (tmp_path / "captions.csv").write_text("prompt,seed\na,1\n")
    assert fetch.main(["captions", str(tmp_path / "some"), "--to", str(tmp_path)]) == 2
    assert "has no text in its column 'prompt'" in capsys.readouterr().err
    assert (tmp_path / "captions.csv").read_text() == "prompt,seed\na,1\n"
