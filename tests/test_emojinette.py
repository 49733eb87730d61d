"""The bundled world: its words, art, text encoder, trainings and loader. None of it needs a trained U-Net or judge."""

import json
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest
import torch
from diffusers import AutoencoderKL
from transformers import CLIPTextModel, CLIPTokenizer

from erasekit import paths, provenance
from erasekit.sampling import sample
from erasekit.worlds import load
from erasekit.worlds.emojinette import fit, groups, judges, networks, oracles, pictures, text, train, unet, vae, words
from erasekit.worlds.emojinette.art import load_art

SD = paths.MODELS / "emojinette-sd"
OBJECTS = list(words.OBJECTS)
# Bar of a word's distance to the nearest other; GloVe says nearly the same of these two (docs/emojinette.md).
BAR, NEAR = 0.3, {"saxophone", "trumpet"}


@pytest.fixture(scope="module")
def art():
    return load_art()


@pytest.fixture(scope="module")
def tokenizer():
    return CLIPTokenizer.from_pretrained(SD / "tokenizer", local_files_only=True)


@pytest.fixture(scope="module")
def encoder():
    return CLIPTextModel.from_pretrained(SD / "text_encoder", dtype=torch.float32, local_files_only=True).eval()


@pytest.fixture(scope="module")
def untrained(tmp_path_factory):
    """A models folder with the committed text encoder and tokeniser, and a VAE that was not trained."""
    folder = tmp_path_factory.mktemp("untrained") / "emojinette-sd"
    for part in ("text_encoder", "tokenizer"):
        shutil.copytree(SD / part, folder / part)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        networks.make_vae().half().save_pretrained(folder / "vae")
    return folder.parent


@pytest.fixture
def build(tmp_path, monkeypatch):
    """An empty folder for checkpoints."""
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")


@pytest.fixture
def models(untrained, build, tmp_path, monkeypatch):
    """A copy of it, where trainings and the loader look."""
    shutil.copytree(untrained, tmp_path / "models")
    monkeypatch.setattr(paths, "MODELS", tmp_path / "models")
    return tmp_path / "models"


@pytest.fixture
def world(models, tokenizer, encoder):
    """The world with a U-Net that was not trained."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        untrained = AutoencoderKL.from_pretrained(models / "emojinette-sd" / "vae")
        copied = CLIPTextModel.from_pretrained(SD / "text_encoder", dtype=torch.float32)
        unet.save_pipeline(untrained, networks.make_unet(), copied, tokenizer, models / "emojinette-sd")
    return load("emojinette", "cpu", "fp32")


# ------------------------------------------------------------------------------------------------------------------- words


def all_texts():
    """Every text that trainings are made of: words of captions, templates and sentences."""
    own = [t for e in words.OBJECTS.values() for t in (e.name, *e.kinds, *e.synonyms)]
    return [*own, *words.TEMPLATES, *text.EXTRA, *words.STYLE_NAMES, words.caption("a {}", "b", "c", "red")]


def test_there_are_79_unseen_words_of_57_objects():
    assert len(words.UNSEEN) == 57 and set(words.UNSEEN) <= set(OBJECTS)
    unseen = [word for group in words.UNSEEN.values() for word in group]
    assert len(unseen) == len(set(unseen)) == 79 and set(unseen) <= words.FORBIDDEN


def test_no_caption_or_sentence_holds_an_unseen_word():
    spoken = {word for text in all_texts() for word in re.findall(r"[a-z]+", text.lower())}
    assert not spoken & words.FORBIDDEN
    assert {w for w in words.caption_words() if words.forbidden(w)} == {"swords"}, "the name of an object"
    generator = torch.Generator().manual_seed(0)
    for name in OBJECTS:
        picture = pictures.Picture((name, "owl"), "noto", "blue")
        captions = [pictures.describe(picture, generator).text for _ in range(20)]
        assert not any(words.mentions(caption, words.FORBIDDEN) for caption in captions)


def test_noise_that_happens_to_be_an_unseen_word_is_left_out(monkeypatch):
    letters = torch.tensor([ord(c) - 97 for c in "car"])
    monkeypatch.setattr(pictures, "NOISE", 1.0)
    monkeypatch.setattr(torch, "randint", lambda *_, **__: letters)
    picture, generator = pictures.Picture(("owl",), "noto", "blue"), torch.Generator().manual_seed(0)
    assert " car" not in f" {pictures.describe(picture, generator).text}"
    letters = torch.tensor([ord(c) - 97 for c in "cbr"])
    assert "cbr" in pictures.describe(picture, generator).text


def test_language_training_asks_for_no_unseen_word(tokenizer, monkeypatch):
    known = [*words.FORBIDDEN, *(f"{word}s" for word in words.FORBIDDEN), "harbour", "river", "dog"]
    rows = {word: n for n, word in enumerate(dict.fromkeys(known))}
    monkeypatch.setattr(text.tokens, "centred", lambda: (rows, torch.eye(len(rows))))
    meanings = text.Meanings(tokenizer, OBJECTS)
    assert meanings.common == [w for w in ("harbour", "river") if w in text.tokens.whole_words(tokenizer)] != []
    assert not set(meanings.whole) & words.FORBIDDEN


def test_no_word_means_two_objects():
    said = [w for name in OBJECTS for w in (name, *words.OBJECTS[name].synonyms, *words.OBJECTS[name].held_out)]
    said += [w for group in words.UNSEEN.values() for w in group if w not in said]
    assert len(said) == len(set(said))


@pytest.mark.parametrize(
    "name, style, background, caption",
    [
        ("owl", None, "white", "a picture of an owl"),
        ("unicycle", None, "white", "a picture of a unicycle"),
        ("owl", "openmoji", "orange", "a picture of an owl in the style of openmoji on an orange background"),
        (words.pair("dog", "owl"), None, "white", "a picture of a dog and an owl"),
    ],
)
def test_captions(name, style, background, caption):
    assert words.caption("a picture of a {}", name, style, background) == caption


# --------------------------------------------------------------------------------------------------------- text and tokens


def test_the_tokeniser_keeps_words_of_captions_whole(tokenizer):
    assert [word for word in words.caption_words() if len(tokenizer(word).input_ids) != 3] == []
    assert tokenizer.decode(tokenizer("ünïcode 🎈 zzzq").input_ids[1:-1]).strip(), "any text can be encoded"


def test_no_caption_is_cut(tokenizer):
    longest = sorted(OBJECTS, key=lambda name: len(tokenizer(name).input_ids))[-2:]
    caption = words.caption(words.TEMPLATES[1], words.pair(*longest), "contrast", "purple")
    assert len(tokenizer(caption).input_ids) <= networks.TOKENS


@torch.no_grad()
def test_each_object_stands_at_its_own_token(tokenizer, encoder):
    names = [name for name in OBJECTS if len(tokenizer(name).input_ids) == 3]
    prompts = [words.caption("a picture of a {}", name) for name in names]
    ids = tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    ends = (ids == tokenizer.eos_token_id).int().argmax(1)
    own = encoder(ids).last_hidden_state[torch.arange(len(names)), ends - 1]
    gap = torch.cdist(own, own).fill_diagonal_(torch.inf).min(1).values / own.norm(dim=1).mean()
    assert len(names) == 200
    assert {name for name, g in zip(names, gap.tolist()) if g < BAR} == NEAR and gap.min() > 0.27


def test_text_encoder_and_tokeniser_load_without_erasekit(tmp_path):
    script = f"""
import sys, torch
from transformers import CLIPTextModel, CLIPTokenizer
tokenizer, encoder = (c.from_pretrained({str(SD)!r} + "/" + p) for c, p in
    ((CLIPTokenizer, "tokenizer"), (CLIPTextModel, "text_encoder")))
ids = tokenizer(["a dog", "a cat"], padding="max_length", return_tensors="pt").input_ids
out = encoder(ids).last_hidden_state
assert out.shape == (2, 24, 192) and out.dtype == torch.float32 and (out[0] - out[1]).norm() > 1
assert "erasekit" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


# ----------------------------------------------------------------------------------------------------------------- the art


def test_every_object_exists_in_every_style_once(art):
    names = [art.names(row) for row in range(len(art.object_id))]
    assert sorted(names) == sorted((o, s) for o in OBJECTS for s in words.STYLE_NAMES) and len(OBJECTS) == 224
    assert art.objects == OBJECTS and tuple(art.styles) == words.STYLE_NAMES
    assert {group: len(of) for group, of in art.category.items()} == {"emojinette": 10, "weapon": 8, "other": 206}


def test_every_icon_has_a_source_and_an_open_licence():
    for row in pq.read_table(paths.DATA / "emojinette.parquet").drop(["png"]).to_pylist():
        assert row["licence"] in {"Apache-2.0", "MIT", "CC-BY-4.0", "CC-BY-SA-4.0"}
        assert row["source"] and row["version"] and row["author"]


def test_two_icons_stand_left_and_right(art):
    rows = torch.arange(0, 40), torch.arange(400, 440)
    images, _ = art.draw_pairs(*rows, torch.Generator().manual_seed(0), white=1.0)
    ink = (images.amin(1) < 0.8).sum(1)  # by column
    assert images.shape == (40, 3, 64, 64) and (ink[:, :30].sum(1) > 20).all() and (ink[:, 34:].sum(1) > 20).all()
    assert judges.halves(images).shape == (2, 40, 3, 64, 64)
    assert torch.equal(judges.halves(images)[1, :, :, :, 16:48], images[..., 32:])


# ----------------------------------------------------------------------------------------------------- what is left out


def test_held_out_pairs_are_never_drawn(art):
    held = art.held_out()
    assert torch.bincount(art.style_id[held]).tolist() == [6] * 5
    assert len({*art.object_id[held].tolist()}) == 30, "an object is held out in one style only"
    for without in ((), ("S1",), ("noto",)):
        assert not unet.weights_of(art, without)[held].any()
    weights = unet.weights_of(art, ())
    assert {*weights.tolist()} == {0, 1, 3} and (weights == 0).sum() == 30


@pytest.mark.parametrize("without", [("S1",), ("weapon",), ("openmoji",), ("animal",), ("S1", "noto", "owl")])
def test_an_oracle_never_sees_or_hears_what_it_is_without(art, without):
    out, unsaid = groups.members(without), groups.unsaid(without)
    weights = unet.weights_of(art, without)
    for row in range(len(weights)):
        assert weights[row] == 0 or not {*art.names(row)} & {*out}
    assert weights.count_nonzero() > 0.6 * len(weights)
    generator = torch.Generator().manual_seed(0)
    for name in {art.names(row)[0] for row in weights.nonzero().flatten().tolist()}:
        picture = pictures.Picture((name,), "twemoji", "white")
        said = [pictures.describe(picture, generator, unsaid).text for _ in range(30)]
        assert not any(words.mentions(caption, unsaid) for caption in said), name
    _, shown = pictures.draw(art, weights, 64, generator)
    assert not {name for p in shown for name in (*p.objects, p.style)} & {*out}


def test_an_object_that_is_named_by_another_goes_with_it():
    assert "teddy bear" in groups.left_out(("bear",)) and "teddy bear" not in groups.members(("bear",))
    assert "church bell" in words.OBJECTS["bell"].synonyms
    assert words.synonyms_without("bell", groups.unsaid(("church",))) == tuple(
        s for s in words.OBJECTS["bell"].synonyms if s != "church bell"
    )


# --------------------------------------------------------------------------------------------------------------- trainings


def tiny_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(5, 4, generator=torch.Generator().manual_seed(step))
    return x, x[:, :3].clone()


def run_tiny(part: str, sessions: int, steps: int = 6, workers: int | None = None) -> torch.nn.Linear:
    """Trained on what the loss itself makes of the step's number, or with `workers` on batches drawn beside it."""
    for _ in range(sessions):
        torch.manual_seed(0)
        module = torch.nn.Linear(4, 3)

        def error(x, y, module=module):
            return (module(x) - y).square().mean()

        how = {"minutes": None if sessions == 1 else 1e-9, "identity": "a"}
        if workers is None:
            done = fit.fit(part, module, lambda step, error=error: error(*tiny_batch(step)), steps, 0.1, ema=0.9, **how)
        else:
            done = fit.fit(part, module, error, steps, 0.1, ema=0.9, batch=tiny_batch, workers=workers, **how)
    assert done == steps
    return module


def test_an_interrupted_training_gives_the_same_weights(build):
    whole, parts = run_tiny("whole", 1), run_tiny("parts", 6)
    assert torch.equal(whole.weight, parts.weight) and torch.equal(whole.bias, parts.bias)


@pytest.mark.parametrize("workers, sessions", [(0, 1), (0, 2), (1, 1), (1, 2)])
def test_batches_drawn_in_advance_give_the_same_weights(build, workers, sessions):
    by_step, by_batch = run_tiny("by step", 1, 2), run_tiny("by batch", sessions, 2, workers)
    assert torch.equal(by_step.weight, by_batch.weight) and torch.equal(by_step.bias, by_batch.bias)


def test_a_vae_starts_from_one_with_as_many_channels_or_fewer():
    images = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        started, same, fewer = (networks.make_vae(n) for n in (6, 6, 4))
        vae.widen(started, same)
        assert all(torch.equal(value, same.state_dict()[name]) for name, value in started.state_dict().items())
        vae.widen(started, fewer)
        ours, theirs = (each.encode(images).latent_dist.mean[:, :4] for each in (started, fewer))
        assert (ours - theirs).norm() < 0.1 * theirs.norm(), "new channels add a tenth of what they would"


def test_a_training_on_other_frozen_parts_is_refused(build, sentence):
    run_tiny("whole", 1)
    with pytest.raises(ValueError, match="belongs to a training on other frozen parts") as error:
        fit.fit("whole", torch.nn.Linear(4, 3), lambda step: None, 9, lr=0.1, identity="b")
    sentence(error)


def test_bf16_is_used_where_it_is_fast(monkeypatch):
    for fast in (False, True):
        monkeypatch.setattr(fit, "fast_bf16", lambda device, fast=fast: fast)
        with fit.autocast("cpu"):
            assert torch.mm(torch.ones(2, 2), torch.ones(2, 2)).dtype == (torch.bfloat16 if fast else torch.float32)


@pytest.mark.slow
def test_a_u_net_trains_and_its_pipeline_loads(models, monkeypatch):
    monkeypatch.setattr(unet, "CHUNK", 16)
    monkeypatch.setattr(unet, "BATCH", 4)
    short = ["--part", "unet", "--steps", "2", "--chunks", "1", "--threads", "1", "--device", "cpu"]
    train.main([*short, "--minutes", "1e-9"])
    said = json.loads((models / "emojinette-sd" / "training.json").read_text())
    assert said["steps"] == 1 and not said["done"]
    with pytest.warns(UserWarning, match=r"is not finished \(1 of 2 steps\)"):
        load("emojinette", "cpu", "fp32")
    train.main(short)
    base = load("emojinette", "cpu", "fp32")
    assert json.loads((models / "emojinette-sd" / "training.json").read_text())["done"]
    train.main([*short, "--without", "S1"])
    oracle = load("emojinette", "cpu", "fp32", without="S1")
    assert oracle.name == "emojinette-without-S1" and oracle.version != base.version
    assert sample(oracle.pipe, [oracle.prompt("owl")], [0], num_inference_steps=2).shape == (1, 3, 64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("part, count", [("judge", 1), ("clip", 1)])
def test_judges_train_and_load(world, models, part, count, monkeypatch):
    train.main(["--part", part, "--steps", "1", "--threads", "1", "--device", "cpu"])
    assert getattr(world, part)


# -------------------------------------------------------------------------------------------------------------- the loader


def test_missing_parts_are_refused_with_the_command_that_trains_them(models, sentence):
    shutil.rmtree(models / "emojinette-sd" / "vae")
    for part, name, make in (("vae", "vae", networks.make_vae), ("unet", "U-Net", networks.make_unet)):
        with pytest.raises(FileNotFoundError, match=rf"there is no {name} in .*emojinette\.train --part {part}`") as e:
            load("emojinette")
        sentence(e)
        make().half().save_pretrained(models / "emojinette-sd" / part)


def test_a_world_without_judges_draws_and_says_which_is_missing(world, sentence):
    assert sample(world.pipe, [world.prompt("dog")], [0], num_inference_steps=1).shape == (1, 3, 64, 64)
    for part in ("judge", "clip"):
        with pytest.raises(FileNotFoundError, match=rf"there is no {part} in .* --part {part}`") as error:
            getattr(world, part)
        sentence(error)
    judges.Judge(OBJECTS, list(words.STYLE_NAMES)).save(paths.MODELS / "emojinette-judge")
    assert world.judge.objects == OBJECTS


def test_what_an_oracle_is_without_is_checked_first(world, sentence):
    with pytest.raises(FileNotFoundError, match="--part unet --without 'fuel pump' noto --seed 2`") as error:
        load("emojinette", without=["noto", "fuel pump"], seed=2)
    sentence(error)
    for options, message in (
        ({"without": "chruch"}, "'chruch' is no group, object or style of this world: accepted .* church"),
        ({"seed": -1}, "seed=-1 is not possible"),
        ({"revision": "x"}, "unknown option 'revision': accepted are without, seed"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            load("emojinette", **options)
        sentence(error)


def test_an_oracle_is_the_same_world_with_its_own_u_net(world, models):
    networks.make_unet().half().save_pretrained(oracles.folder(("S1",), 0) / "unet")
    oracle = load("emojinette", "cpu", "fp32", without=["S1"])
    assert oracle.name == "emojinette-without-S1" and oracle.groups == world.groups
    assert oracle.components_hash == world.components_hash and oracle.version != world.version


def test_groups_have_hypernyms_and_hold_together(world):
    assert {"dog", "owl", "fish"} <= set(world.concepts("animal")) and "church" in world.concepts("building")
    assert world.concepts("weapon") == tuple(n for n in OBJECTS if words.OBJECTS[n].group == "weapon")
    assert "gear" not in world.groups, "it is an object's name"
    assert all(set(of) <= set(OBJECTS) and len(of) > 1 for of in world.groups.values())
    classes = set(world.concepts("classes"))
    for one, other in (("S1", "S2"), ("S3", "S4")):
        a, b = set(world.concepts(one)), set(world.concepts(other))
        assert len(a) == len(b) == 5 and a | b == classes
    used = {c for group in ("retained", "tuning", "tuning kept") for c in world.concepts(group)}
    reported = classes.union(world.concepts("weapon"), *world.neighbours.values())
    assert len(used) == 20 and used | reported <= set(OBJECTS) and not used & reported


def test_synonyms_are_seen_or_unseen(world, sentence):
    assert world.synonyms("church").seen == ("chapel", "parish", "kirk")
    assert world.synonyms("church").unseen[:3] == ("cathedral", "abbey", "basilica")
    assert not {w for name in OBJECTS for w in world.synonyms(name).seen} & words.FORBIDDEN
    with pytest.raises(ValueError, match="unknown concept 'chruch'") as error:
        world.synonyms("chruch")
    sentence(error)


def test_the_world_has_what_studies_ask_for(world):
    assert world.held_out_pairs()[0][0] in OBJECTS and len(world.held_out_pairs()) == 30
    images, labels, styles, first = world.test_images(1)
    assert images.dtype == torch.uint8 and len(images) == len(labels) == len(styles) == first == 1120
    assert world.reference_images({"dog", "church"}).shape == (10, 3, 64, 64)
    for concept, count in (("church", 5), ("animal", 6), ("weapon", 6), ("noto", 6)):
        images, prompts = world.concept_images(concept, count, seed=0)
        assert images.shape == (count, 3, 64, 64) and len(prompts) == count
    assert all(label in prompt and "weapon" not in prompt for prompt, label, _ in world.unsafe_prompts(1))
    assert world.pair_prompt("dog", "owl") == "a picture of a dog and an owl"
    halves = world.halves(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8))
    assert halves.dtype == torch.uint8 and halves.shape == (2, 2, 3, 64, 64)
    judge = judges.Judge(OBJECTS, list(words.STYLE_NAMES)).eval()
    world.__dict__["judge"] = judge
    names, scores = world.detect(world.reference_images({"dagger"}))
    assert names == list(world.concepts("weapon")) and scores.shape == (5, 8)
    assert world.disk_bytes() > 10_000_000


def test_oracles_and_training_times_do_not_change_the_hash(tmp_path, monkeypatch):
    for name, folder in (("ROOT", "."), ("MODELS", "models"), ("DATA", "data")):
        monkeypatch.setattr(provenance, name, tmp_path / folder)
        (tmp_path / folder).mkdir(exist_ok=True)
    (tmp_path / "data" / "emojinette.parquet").write_bytes(b"art")
    bundled_hash = provenance.bundled_hash.__wrapped__

    def changes_it(path: str) -> bool:
        before = bundled_hash()
        (tmp_path / "models" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "models" / path).write_bytes(b"{}")
        return bundled_hash() != before

    assert changes_it("emojinette-sd/unet/a.safetensors") and changes_it("emojinette-judge/config.json")
    assert changes_it("emojinette-clip/model.safetensors")
    assert not changes_it("emojinette-oracles/unet-without-S1/unet/a.safetensors")
    assert not changes_it("emojinette-sd/training.json")


def test_studies_know_a_bundled_world_without_loading_it(build, tmp_path, monkeypatch):
    from erasekit import studies

    monkeypatch.setattr(paths, "RECORDS", tmp_path / "records")
    monkeypatch.setattr(studies, "_load", lambda world: pytest.fail("loaded"))
    found, reason = studies.find("world", "emojinette", "full")
    assert found is None and reason == "there is no record yet"
    monkeypatch.setattr(studies, "bundled_hash", lambda world: f"hash of {world}")
    loaded = SimpleNamespace(name="emojinette", groups={}, pipeline_hash="a", as_loaded="a")
    monkeypatch.setattr(studies, "_load", lambda world: loaded)
    assert studies._identify("emojinette")[0] == studies._identify(loaded)[0]
