"""COCO-Stuff's and WikiArt's names as groups, zero-shot CLIP as their judge, and reference images in those sets' layouts."""

import json
import warnings

import numpy as np
import pytest
import torch
from conftest import make_toy
from PIL import Image

from erasekit.baselines import erase
from erasekit.baselines.sld import joint_prompt
from erasekit.evaluation.metrics import features, object_correct, style_correct
from erasekit.tools import datasets as tool
from erasekit.worlds import load
from erasekit.worlds.groups import annotated, load_groups


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A toy Stable Diffusion loaded from a folder. Do not change it."""
    folder = tmp_path_factory.mktemp("model")
    make_toy(seed=2).pipe.save_pretrained(folder)
    return load(str(folder), device="cpu", precision="fp32")


class ClipStub:
    """An image's or a text's number as a direction: image n is nearest to text n."""

    def encode_image(self, images, normalize):
        return torch.eye(300)[images.mean((1, 2, 3)).add(1).mul(127.5).round().long()]

    def encode_text(self, text, normalize):
        return torch.eye(300)[text]


@pytest.fixture
def blind(base, monkeypatch):
    """The toy, whose CLIP numbers texts in their order."""
    monkeypatch.setitem(base.__dict__, "clip", (ClipStub(), lambda texts: torch.arange(len(texts))))
    return base


def picture(path, value=0, mode="L", side=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((side, side), value, np.uint8), mode).save(path)


def shown(base, folder, *names):
    base.reference = folder
    try:
        return [path.relative_to(folder).as_posix() for path in base.reference_files(set(names))]
    finally:
        base.reference = None


# ------------------------------------------------------------------------------------------------------- names and prompts


def test_groups_have_the_published_members_in_words(base):
    coco = base.concepts("coco-stuff")
    assert len(coco) == len(set(coco)) == 182
    assert coco == base.concepts("coco-stuff things") + base.concepts("coco-stuff stuff")
    assert (coco[0], coco[16], coco[-1]) == ("person", "cat", "wood")
    assert {"building", "brick wall", "marble floor", "desk", "writing desk"} <= set(coco)
    assert not any("-" in name for name in coco)
    artists, styles = (base.styles_of(f"wikiart {kind}") for kind in ("artists", "styles"))
    assert (len(artists), len(styles), len(base.concepts("wikiart genres"))) == (23, 27, 10)
    assert "Vincent van Gogh" in artists and {"Ukiyo-e", "Baroque"} <= set(styles)
    assert load_groups()["wikiart styles"]["Mannerism"] == "Mannerism_Late_Renaissance"
    assert not any("_" in name for name in artists + styles)


def test_prompts_and_seeds_of_groups(base):
    prompts = base.prompts_of("coco-stuff", 2)
    assert len(prompts) == 364 and prompts[:2] == [("Image of person", "person", 0), ("Image of person", "person", 1)]
    first, second = base.concepts("retained")[:2]
    assert base.prompts_of("wikiart artists", 2)[:2] == [
        (f"Image of {first} in the style of Albrecht Durer", "Albrecht Durer", 0),
        (f"Image of {second} in the style of Albrecht Durer", "Albrecht Durer", 1),
    ]


@pytest.mark.filterwarnings("ignore:.*is cut off")
def test_members_of_style_groups_are_styles(base):
    first = base.concepts("retained")[0]
    assert base.is_style("Claude Monet") and not base.is_style("brick wall")
    pair = (f"Image of {first} in the style of Claude Monet", f"Image of {first}")
    assert base.prompt_pairs("Claude Monet")[0] == pair
    assert joint_prompt(base, ["Claude Monet"]) == "in the style of Claude Monet"
    assert base.prompt_pairs("brick wall") == [("Image of brick wall", "")]
    assert erase(base, ["Claude Monet"], "uce").delta
    assert "Claude Monet" not in base.styles, "the judge's list stays the paper's"


def test_a_style_group_may_be_loaded_as_the_worlds_styles(base, tmp_path, sentence):
    base.pipe.save_pretrained(tmp_path)
    world = load(str(tmp_path), styles="wikiart artists")
    assert world.styles == base.styles_of("wikiart artists") == world.styles_of("judged")
    for call, message in (
        (lambda: load(str(tmp_path), styles="wikiart"), "'wikiart'.*'wikiart artists'"),
        (lambda: base.styles_of("artists"), "unknown style group 'artists': accepted are judged, wikiart artists"),
        (lambda: base.concepts("coco"), "unknown concept group 'coco': .*coco-stuff"),
        (lambda: base.judged_by("coco"), "unknown concept group 'coco'"),
        (
            lambda: base.prompts_of("wikiart", 1),
            "unknown concept group 'wikiart': .*wikiart genres; styles_of.*artists",
        ),
        (lambda: base.judged_by("nudity"), "the group 'nudity' has one label alone"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        sentence(error)


def test_names_of_groups_are_known_and_a_closed_vocabulary_refuses_others(base, world, toy, sentence):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        base.check_names(["brick wall", "Claude Monet", "nudity", "church"])
        world.check_names(["dog", "weapon", "noto"])
    with pytest.warns(UserWarning, match="'brikc wall'"):
        base.check_names(["brikc wall"])
    with pytest.warns(UserWarning, match="'xyz'"):
        toy.check_names(["xyz"])
    with pytest.raises(ValueError, match=r"unknown concept 'dgo'.*dog") as error:
        world.check_names(["dog", "dgo"])
    sentence(error)


# ------------------------------------------------------------------------------------------------------------------- judge


def test_zero_shot_clip_judges_a_group_of_concepts(blind):
    world, names = blind.judged_by("coco-stuff"), blind.concepts("coco-stuff")
    images = torch.tensor([0, 16, 181, 16], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    labels = [names[0], names[16], names[181], names[3]]
    assert object_correct(world, images, labels).tolist() == [True, True, True, False]
    assert features(world, images).shape == (4, 300)
    world.check_concepts(["brick wall"])
    assert world.concepts("all") == names and world.version != blind.version
    assert blind.judged is None and "church" in blind.concepts("classes"), "the world itself is as it was"


def test_zero_shot_clip_judges_a_group_of_styles(blind, monkeypatch):
    monkeypatch.setattr("erasekit.worlds.stable_diffusion.resnet50", lambda: torchvision_resnet())
    world = blind.judged_by("wikiart artists")
    images = torch.tensor([0, 4], dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4)
    assert style_correct(world, images, ["Albrecht Durer", "Claude Monet"]).all()
    assert tuple(world.judge.styles) == world.styles == blind.styles_of("wikiart artists")
    assert "judge" not in blind.__dict__ and blind.styles != world.styles


def torchvision_resnet():
    from torchvision.models import resnet50

    return resnet50()


# -------------------------------------------------------------------------------------------------------- reference images


def test_wikiarts_folders(base, tmp_path):
    """<style>/<artist>_<title>.jpg, as the data set of ArtGAN is unpacked."""
    for file in (
        "Impressionism/claude-monet_water-lilies-1914.jpg",
        "Impressionism/pierre-auguste-renoir_la-loge_1874.jpg",
        "Mannerism_Late_Renaissance/el-greco_view.jpg",
        "Post_Impressionism/vincent-van-gogh_irises.jpg",
    ):
        picture(tmp_path / file)
    assert shown(base, tmp_path, "Claude Monet") == ["Impressionism/claude-monet_water-lilies-1914.jpg"]
    assert len(shown(base, tmp_path, "Impressionism")) == 2
    assert len(shown(base, tmp_path, "Mannerism", "Pierre-Auguste Renoir", "Vincent van Gogh")) == 3
    assert len(shown(base, tmp_path, "")) == 4 and shown(base, tmp_path, "Rembrandt") == []
    base.reference = tmp_path
    try:
        assert base.reference_images({"Impressionism"}).shape == (2, 3, 16, 16)
    finally:
        base.reference = None


def test_cocostuffs_label_maps(base, tmp_path):
    """images/<split>/*.jpg beside annotations/<split>/*.png, whose pixels are ids less one, 255 for none."""
    for stem in ("000000000139", "000000000285"):
        picture(tmp_path / f"images/val2017/{stem}.jpg")
    labels = load_groups()["coco-stuff"]
    number = {label: n for n, label in enumerate(labels.values())}
    pixels = np.full((20, 20), 255, np.uint8)
    pixels[:10], pixels[10, 0] = number["wall-brick"], number["dog"]  # the dog is 1 of 400 pixels
    (tmp_path / "annotations/val2017").mkdir(parents=True)
    Image.fromarray(pixels, "L").save(tmp_path / "annotations/val2017/000000000139.png")
    picture(tmp_path / "annotations/val2017/000000000285.png", number["bear"])
    assert shown(base, tmp_path, "brick wall") == ["images/val2017/000000000139.jpg"]
    assert shown(base, tmp_path, "bear") == ["images/val2017/000000000285.jpg"]
    assert shown(base, tmp_path, "dog") == []
    assert len(shown(base, tmp_path, "")) == 2, "label maps are no pictures"


def test_annotations_in_cocos_format(base, tmp_path, sentence):
    """instances_*.json has the things and stuff_*.json the stuff of an image; small areas do not count, crowds add up."""
    picture(tmp_path / "val2017/000000000139.jpg")
    image = {"id": 139, "file_name": "000000000139.jpg", "width": 20, "height": 20}

    def write(file, categories, *annotations):
        content = {"images": [image], "categories": [{"id": i, "name": n} for i, n in categories.items()]}
        content["annotations"] = [{"image_id": 139, "category_id": c, "area": a} for c, a in annotations]
        (tmp_path / "annotations").mkdir(exist_ok=True)
        (tmp_path / "annotations" / file).write_text(json.dumps(content))

    write("instances_val2017.json", {18: "dog", 17: "cat"}, (18, 12.5), (18, 12.5), (17, 3))
    write("stuff_val2017.json", {157: "sky-other", 183: "other"}, (157, 200.0), (183, 100.0))
    assert shown(base, tmp_path, "dog") == shown(base, tmp_path, "sky") == ["val2017/000000000139.jpg"]
    assert shown(base, tmp_path, "cat") == []
    (tmp_path / "annotations/instances_val2017.json").write_text("[]")
    with pytest.raises(ValueError, match="is not a file of annotations in COCO's format") as error:
        annotated(tmp_path)
    sentence(error)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """Returns a function that writes a data set with the hub's features and fetches its images."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    def fetch(by: str, columns: dict, features: dict):
        source, count = tmp_path / "source", len(columns["image"])
        source.mkdir()
        kinds = datasets.Features({"image": datasets.Image()} | features)
        datasets.Dataset.from_dict(columns, kinds).to_parquet(source / "train-0.parquet")
        assert tool.fetch_images(str(source), tmp_path / "reference", by=by, side=16) == count
        return tmp_path / "reference"

    return fetch


def gray(value):
    return Image.fromarray(np.full((20, 20), value, np.uint8), "L")


def test_wikiart_on_the_hub(base, hub):
    """Columns image, artist, genre and style, the last three numbered classes."""
    from datasets import ClassLabel

    kinds = {"artist": ClassLabel(names=["Unknown Artist", "boris-kustodiev", "claude-monet"])}
    kinds |= {"style": ClassLabel(names=["Baroque", "Impressionism"])}
    folder = hub("artist", {"image": [gray(1), gray(2)], "artist": [2, 0], "style": [1, 0]}, kinds)
    assert shown(base, folder, "Claude Monet") == ["claude-monet/000000.png"]


@pytest.mark.parametrize("layout", ["objects.category", "label"])
def test_cocostuff_on_the_hub(base, hub, layout):
    """A record of lists with an image's objects, or a column with its label map."""
    import datasets

    if layout == "label":
        columns, kinds = {"label": [gray(15), gray(170)]}, {"label": datasets.Image()}
        names = list(load_groups()["coco-stuff"])
        one, other = names[15], names[170]
    else:
        category = datasets.ClassLabel(names=["person", "bicycle", "car"])
        kinds = {"objects": {"area": datasets.List(datasets.Value("int64")), "category": datasets.List(category)}}
        columns = {"objects": [{"area": [5, 9], "category": [2, 0]}, {"area": [7], "category": [1]}]}
        one, other = "car", "bicycle"
    folder = hub(layout, {"image": [gray(1), gray(2)]} | columns, kinds)
    assert shown(base, folder, one) == ["000000.png"] and shown(base, folder, other) == ["000001.png"]
    assert len(shown(base, folder, one, other)) == 2
