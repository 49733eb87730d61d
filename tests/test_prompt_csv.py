"""Published prompt files are read as they are."""

import pytest

from erasekit.worlds.prompt_csv import PromptRow, read_prompts

# Headers as published: Imagenette, the artists, COCO, I2P, and one with a nameless index column.
FILES = {
    "case_number,prompt,class,evaluation_seed\n0,an image of a tench,tench,1174\n": PromptRow(
        "0", "an image of a tench", 1174, "tench"
    ),
    ',case_number,prompt,evaluation_seed,artist\n4,7,"Café, by night",310,Tyler Edlin\n': PromptRow(
        "7", "Café, by night", 310, "Tyler Edlin"
    ),
    "image_id,source,prompt,evaluation_seed\n000000203564,coco-30k,A clock.,41337\n": PromptRow(
        "000000203564", "A clock.", 41337, "coco-30k"
    ),
    "prompt,categories,hard,sd_seed,sd_guidance_scale,sd_model\na face,shocking,0,2219,7.5,v1\n": PromptRow(
        "0", "a face", 2219, "shocking", 7.5
    ),
    ",case_number,evaluation_seed,prompt,label_idx,label_str\n1,1,22258.0,image of  Tinca tinca,0, Tinca tinca\n": PromptRow(
        "1", "image of  Tinca tinca", 22258, "Tinca tinca"
    ),
}


@pytest.mark.parametrize("text", FILES)
def test_published_columns_are_read(tmp_path, text):
    path = tmp_path / "prompts.csv"
    path.write_text(text, encoding="utf-8")
    assert read_prompts(path) == [FILES[text]]


def test_a_limit_takes_the_first_rows(tmp_path):
    path = tmp_path / "prompts.csv"
    path.write_text("prompt,seed\na,1\nb,2\nc,3\n")
    assert [row.prompt for row in read_prompts(path, limit=2)] == ["a", "b"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("prompt,class\na,b\n", "evaluation_seed, sd_seed, seed; it has prompt, class"),
        ("prompt,seed\n", "no prompts"),
        ("", "not a CSV"),
        ("prompt,seed\na,1\n ,2\n", "row 1"),
        ("prompt,seed\na,1.5\n", "'1.5'"),
        ("prompt,seed\na,\n", "''"),
        ("prompt,seed\na,inf\n", "'inf'"),
        ("prompt,seed,guidance_scale\na,1,much\n", "'much'"),
    ],
)
def test_an_unreadable_file_is_refused(tmp_path, text, expected, sentence):
    path = tmp_path / "prompts.csv"
    path.write_text(text)
    with pytest.raises(ValueError) as error:
        read_prompts(path)
    assert expected in sentence(error) and str(path) in sentence(error)
