"""Public data sets become the files that worlds read; the test builds them and `datasets` itself reads them."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from erasekit.tools import datasets as tool
from erasekit.worlds.prompt_csv import read_prompts


@pytest.fixture(autouse=True)
def offline(monkeypatch, tmp_path):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def make(tmp_path):
    """Returns a function that writes a data set of one split from its columns."""

    def write(columns: dict, split: str = "train") -> str:
        (tmp_path / "source").mkdir()
        pq.write_table(pa.table(columns), tmp_path / "source" / f"{split}-0.parquet")
        return str(tmp_path / "source")

    return write


@pytest.fixture
def captions(make):
    """As COCO's captions are published: several for an image, no seeds."""
    columns = {"image_id": [9, 7, 3], "captions": [["a dog  on grass", "a dog"], [""], ["two boats"]]}
    return make(columns, "validation")


@pytest.fixture
def paintings(tmp_path):
    """A folder for each artist, images of any shape."""
    for n, artist in enumerate(("monet", "turner")):
        (tmp_path / "art" / artist).mkdir(parents=True)
        for k in range(2):
            pixels = np.full((40 + 10 * k, 60, 3), 50 + 100 * n, dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "art" / artist / f"{k}.png")
    return str(tmp_path / "art")


def test_captions_become_prompts_with_seeds_of_their_own(captions, tmp_path):
    assert tool.main(["captions", captions, "--split", "validation", "--to", str(tmp_path)]) == 0
    rows = read_prompts(tmp_path / "captions.csv")
    assert [(row.case, row.prompt) for row in rows] == [("9", "a dog on grass"), ("3", "two boats")]
    assert len({row.seed for row in rows}) == 2
    tool.fetch_prompts(captions, tmp_path / "again" / "captions.csv", "validation")
    assert read_prompts(tmp_path / "again" / "captions.csv") == rows
    assert json.loads((tmp_path / "captions.csv.source.json").read_text())["split"] == "validation"


def test_a_published_seed_is_kept(make, tmp_path):
    source = make({"prompt": ["a", "b"], "sd_seed": [41337, 5], "categories": ["sexual", "violence"]})
    assert tool.main(["unsafe", source, "--limit", "1", "--to", str(tmp_path)]) == 0
    (row,) = read_prompts(tmp_path / "i2p.csv")
    assert (row.prompt, row.seed, row.label) == ("a", 41337, "sexual")


def test_a_missing_seed_is_generated_and_a_missing_label_is_empty(make, tmp_path):
    source = make({"prompt": ["a", "b"], "seed": [None, 5], "label": ["x", None]})
    assert tool.fetch_prompts(source, tmp_path / "some.csv") == 2
    first, second = read_prompts(tmp_path / "some.csv")
    assert first.seed >= 0 and second.seed == 5 and second.label == ""
    assert tool.class_name({"label": ["x", "y"]}, "label", -1) == ""


def test_images_are_square_and_have_a_folder_for_each_name(paintings, tmp_path):
    folder = tmp_path / "reference"
    assert tool.fetch_images(paintings, folder, by="label", side=32) == 4
    assert sorted(p.name for p in folder.iterdir()) == ["monet", "turner"]
    paths = sorted(folder.rglob("*.png"))
    assert {Image.open(p).size for p in paths} == {(32, 32)} and len(paths) == 4
    assert {int(np.asarray(Image.open(p)).mean()) for p in (folder / "turner").iterdir()} == {150}
    before = paths[0].stat().st_mtime_ns
    tool.fetch_images(paintings, folder, by="label", side=32)
    assert paths[0].stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["captions", "{folder}/nothing"], "nothing"),
        (["images", "{captions}", "--split", "test"], "split 'test'"),
        (["images", "{captions}", "--split", "validation"], "no column for the image"),
    ],
)
def test_missing_data_is_one_sentence(captions, tmp_path, capsys, arguments, expected):
    arguments = [a.format(folder=tmp_path, captions=captions) for a in arguments]
    assert tool.main([*arguments, "--to", str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip()
    assert expected in message and "\n" not in message
    assert not (tmp_path / "captions.csv").exists()


def test_images_of_another_data_set_are_not_mixed(paintings, tmp_path):
    tool.fetch_images(paintings, tmp_path / "reference", side=32)
    with pytest.raises(ValueError, match=r"holds images of .*art.*32 pixels"):
        tool.fetch_images(paintings, tmp_path / "reference", side=64)


@pytest.mark.parametrize(
    "columns, expected",
    [
        ({"sentences": [[{"raw": "a dog"}]]}, "is a text or a list of texts"),
        ({"prompt": ["", " "]}, "has no text in its column 'prompt'"),
    ],
)
def test_a_data_set_without_texts_leaves_the_file_as_it_was(make, tmp_path, capsys, columns, expected):
    source = make(columns)
    (tmp_path / "captions.csv").write_text("prompt,seed\na,1\n")
    assert tool.main(["captions", source, "--to", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err
    assert (tmp_path / "captions.csv").read_text() == "prompt,seed\na,1\n"
