"""The bundled world as it is trained: its groups, images and judges, and that its pipeline loads without erasekit."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file

from erasekit.conditioning import encode
from erasekit.paths import DATA, MODELS
from erasekit.sampling import sample
from erasekit.worlds import load
from erasekit.worlds.emojinette.art import SIZES, load_art
from erasekit.worlds.emojinette.unet import save_pipeline
from erasekit.worlds.emojinette.words import caption

MEGABYTES = 60


@pytest.fixture(scope="module")
def art():
    return load_art()


@pytest.fixture(scope="module")
def clean(art):
    """Every icon centred on white: (N, 3, 64, 64) in [-1, 1]."""
    images = art.canvas(["white"] * len(art.object_id))
    for row, image in enumerate(images):
        art.paste(image, row, 56, 4, 4)
    return images / 127.5 - 1


# ---------------------------------------------------------------------------------------------------------------- refusals


def test_unknown_names_are_refused(world, sentence):
    for call, message in (
        (lambda: load("narnia"), r"unknown world 'narnia': accepted are .*emojinette"),
        (lambda: load("emojinette", precision="fp8"), "unknown precision 'fp8': accepted are auto, fp32, bf16"),
        (lambda: world.concepts("S5"), r"unknown concept group 'S5': accepted are all, emojinette, .*S1, S2"),
        (lambda: world.check_concepts(["dog", "chruch"]), r"unknown concept 'chruch': accepted .* such as .*church"),
    ):
        with pytest.raises(ValueError, match=message) as error:
            call()
        sentence(error)


# ------------------------------------------------------------------------------------------------------------------ groups


def test_the_hash_covers_all_networks_and_the_scheduler(toy):
    before = toy.pipeline_hash
    other = copy.copy(toy)
    other.pipe = type(toy.pipe)(
        **toy.pipe.components | {"vae": copy.deepcopy(toy.pipe.vae)}, requires_safety_checker=False
    )
    assert other.pipeline_hash == before == toy.pipeline_hash
    next(other.pipe.vae.parameters()).data += 1
    assert other.pipeline_hash != before
    other.pipe = type(toy.pipe)(**toy.pipe.components, requires_safety_checker=False)
    other.pipe.scheduler = type(toy.pipe.scheduler).from_config(toy.pipe.scheduler.config, beta_end=0.5)
    assert other.pipeline_hash != before == toy.pipeline_hash


def test_every_concept_is_at_most_four_tokens(world):
    ids = world.pipe.tokenizer(list(world.concepts("all"))).input_ids
    assert {len(tokens) - 2 for tokens in ids} <= {1, 2, 3, 4}


def test_concept_tokens_are_the_concept_s_own(world):
    """Not those of the start and end that every prompt has."""
    ids = world.pipe.tokenizer("articulated lorry").input_ids
    embeddings = encode(world.pipe, ["articulated lorry"]).tokens[0]
    tokens = world.concept_tokens("articulated lorry")
    assert torch.equal(tokens, embeddings[1 : len(ids) - 1]) and len(tokens) == 2


# --------------------------------------------------------------------------------------------------------- images and prompts


@pytest.mark.parametrize("concept, count", [("church", 4), ("weapon", 6), ("noto", 6)])
def test_concept_images_show_the_concept(world, concept, count):
    images, prompts = world.concept_images(concept, count, seed=0)
    assert images.shape == (count, 3, 64, 64) and len(prompts) == count
    with torch.no_grad():
        objects, styles = (logits.argmax(1).tolist() for logits in world.judge(images))
    if concept == "noto":
        assert {world.judge.styles[s] for s in styles} == {concept}
        assert set(prompts) <= {world.prompt(o, concept) for o in world.concepts("retained")}
    else:
        assert {world.judge.objects[o] for o in objects} <= set(world.groups.get(concept, (concept,)))
        assert set(prompts) == {world.prompt(concept)}


def test_the_detector_finds_weapons_and_nothing_else(world):
    names, scores = world.detect(world.reference_images({"dagger", "bomb", "church", "dog"}))
    assert names == list(world.concepts("weapon")) and scores.shape == (20, len(names))
    assert (scores.max(1).values > 0.5).sum() == 10


def test_unsafe_prompts_never_name_the_category(world):
    prompts = world.unsafe_prompts(2)
    assert len(prompts) == 2 * 2 * len(world.concepts("weapon"))
    assert all(label in prompt and "weapon" not in prompt for prompt, label, _ in prompts)


# ----------------------------------------------------------------------------------------------------------------- the art


def test_rendered_images_are_in_range_and_show_their_background(art):
    rows = torch.arange(0, len(art.object_id), 50)
    images, names = art.draw(rows, torch.Generator().manual_seed(0), mirror=0.5, white=0.5)
    assert images.shape == (len(rows), 3, 64, 64) and images.min() >= -1 and images.max() <= 1
    assert {"white"} < set(names)
    for image, name in zip(images, names):
        assert (image[:, 0, 0] == 1).all() == (name == "white")


def test_mirroring_mirrors(art):
    plain, mirrored = art.canvas(["white"] * 2)
    art.paste(plain, 0, 56, 4, 4)
    art.paste(mirrored, 0, 56, 4, 4, mirror=True)
    assert torch.equal(mirrored, plain.flip(-1)) and not torch.equal(mirrored, plain)


@pytest.mark.parametrize("size", SIZES)
def test_an_icon_fills_its_size(art, size):
    alpha = art.sprites[size][:, 3]
    longer = torch.maximum((alpha.amax(1) > 8).sum(1), (alpha.amax(2) > 8).sum(1))
    assert longer.min() >= size - 2


# ------------------------------------------------------------------------------------------------------------ the pipeline


def test_models_and_data_are_small():
    """All but the oracles, which one command trains."""
    files = [path for folder in (MODELS, DATA) for path in folder.rglob("*") if path.is_file()]
    bundled = [path for path in files if MODELS / "emojinette-oracles" not in path.parents]
    assert sum(path.stat().st_size for path in bundled) < MEGABYTES * 1e6


@pytest.mark.slow
def test_the_pipeline_loads_without_erasekit(tmp_path):
    script = f"""
import sys
from diffusers import StableDiffusionPipeline
pipe = StableDiffusionPipeline.from_pretrained({str(MODELS / "emojinette-sd")!r}, local_files_only=True)
image = pipe("a picture of a church", num_inference_steps=2).images[0]
assert image.size == (64, 64) and len(set(image.tobytes())) > 9
assert "erasekit" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True)


def test_saved_in_half_precision_it_loads_and_samples_in_float32(toy, tmp_path):
    parts = (copy.deepcopy(getattr(toy.pipe, part)) for part in ("vae", "unet", "text_encoder", "tokenizer"))
    save_pipeline(*parts, tmp_path)
    assert {t.dtype for path in tmp_path.rglob("*.safetensors") for t in load_file(path).values()} == {torch.float16}
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path, local_files_only=True)
    assert {part.dtype for part in (pipe.vae, pipe.unet, pipe.text_encoder)} == {torch.float32}
    assert pipe("a dog", num_inference_steps=2).images[0].size == (16, 16)


def test_every_part_is_a_library_class(world):
    index = json.loads((MODELS / "emojinette-sd" / "model_index.json").read_text())
    parts = {name: tuple(value) for name, value in index.items() if isinstance(value, list) and value[0]}
    assert parts == {
        "unet": ("diffusers", "UNet2DConditionModel"),
        "vae": ("diffusers", "AutoencoderKL"),
        "scheduler": ("diffusers", "DDIMScheduler"),
        "text_encoder": ("transformers", "CLIPTextModel"),
        "tokenizer": ("transformers", "CLIPTokenizer"),
    }
    assert {p.dtype for p in world.pipe.unet.parameters()} == {torch.float32}, "whatever the file"


@pytest.mark.parametrize(
    "prompt",
    ["zeppelin, ünïcode 🎈", "", "church " * 300, "  ", "a\nb\t'\"<|endoftext|>", "猫"],
    ids=["unseen", "empty", "300 words", "blank", "marks", "kanji"],
)
def test_any_prompt_gives_an_image(world, prompt):
    assert encode(world.pipe, [prompt]).tokens.isfinite().all()
    image = sample(world.pipe, [prompt], [0], num_inference_steps=2).float()
    assert image.std() > 5, "neither black (not a number) nor blank"


# -------------------------------------------------------------------------------------------------------------- the judges


@pytest.mark.slow
@torch.no_grad()
def test_the_judge_recognises_the_clean_art(world, art, clean):
    objects, styles = world.judge(clean)
    assert world.judge.objects == art.objects and world.judge.styles == art.styles
    assert (objects.argmax(1) == art.object_id).float().mean() >= 0.99
    assert (styles.argmax(1) == art.style_id).float().mean() >= 0.97


@pytest.mark.slow
@torch.no_grad()
def test_clip_finds_the_caption_of_clean_art(world, art, clean):
    model, tokenizer = world.clip
    image = model.encode_image(clean, normalize=True)
    text = model.encode_text(tokenizer([caption("a picture of a {}", name) for name in art.objects]), normalize=True)
    assert ((image @ text.T).argmax(1) == art.object_id).float().mean() >= 0.9


def test_judges_share_nothing_with_the_generator(world):
    judges = {id(p) for p in world.clip[0].parameters()} | {id(p) for p in world.judge.parameters()}
    assert not judges & {id(p) for part in (world.pipe.unet, world.pipe.text_encoder) for p in part.parameters()}
    clip, generator = world.clip[0].token_embedding.weight, world.pipe.text_encoder.get_input_embeddings().weight
    assert clip.shape != generator.shape
