"""Stable Diffusion 1, 2 and XL at toy size: the real classes, a toy vocabulary, loaded from folders as users load theirs."""

from dataclasses import fields

import httpx
import pytest
import torch
from conftest import make_toy
from diffusers import DDIMScheduler, DiffusionPipeline, StableDiffusionXLPipeline
from huggingface_hub.errors import (
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from erasekit import losses, stable_diffusion, worlds
from erasekit.attacks import Attack, Shown, find_key, find_words, invert, marks, spoken, table
from erasekit.attention import Prompt, augment
from erasekit.baselines import METHODS, erase, settings
from erasekit.kpop import KPOP, kpop
from erasekit.mechanisms import CHOICES
from erasekit.sampling import sample
from erasekit.studies.strength import configured
from erasekit.text import encode, pooled_width, said, tokens
from erasekit.training import update

KINDS = ("1", "2", "XL")
PROMPTS, SEEDS = ["Image of church", "a photo of a dog"], [3, 1]


def changed(part, **own):
    """A part of a pipeline, new, with some of its config changed."""
    # What stands in a config's private list is taken for a default, whatever its value.
    return type(part).from_config({k: v for k, v in part.config.items() if not k.startswith("_")} | own)


def make_two(toy):
    """Predicts v, as Stable Diffusion 2.1 does, with linear projections."""
    unet = changed(toy.unet, use_linear_projection=True)
    scheduler = changed(toy.scheduler, prediction_type="v_prediction")
    return type(toy)(**toy.components | {"unet": unet, "scheduler": scheduler}, requires_safety_checker=False)


def make_xl(toy):
    """Two text encoders, half the width each, and a pooled text with the image's sizes beside them."""
    own = {"hidden_size": 16, "intermediate_size": 32, "projection_dim": 16}
    own["eos_token_id"] = 2  # as published: the pooled text is taken at the largest token
    config = toy.text_encoder.config.to_dict() | own
    encoders = (kind(CLIPTextConfig(**config)).eval() for kind in (CLIPTextModel, CLIPTextModelWithProjection))
    own = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    unet = changed(toy.unet, projection_class_embeddings_input_dim=40, **own)
    parts = {"vae": toy.vae, "scheduler": toy.scheduler, "tokenizer": toy.tokenizer, "tokenizer_2": toy.tokenizer}
    one, two = encoders
    return StableDiffusionXLPipeline(
        **parts,
        text_encoder=one,
        text_encoder_2=two,
        unet=unet,
        add_watermarker=False,
    )


@pytest.fixture(scope="session", params=KINDS)
def sd(request, tmp_path_factory):
    """A world loaded from a folder, onto the GPU where there is one."""
    toy = make_toy(seed=2).pipe
    with torch.random.fork_rng():
        torch.manual_seed(4)
        pipe = {"1": lambda t: t, "2": make_two, "XL": make_xl}[request.param](toy)
    folder = tmp_path_factory.mktemp("sd") / request.param
    pipe.save_pretrained(folder)
    return worlds.load(str(folder), precision="fp32")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_erases_any_stable_diffusion(sd, method):
    has = {field.name for field in fields(METHODS[method][1])}
    short = {"steps": 2, "batch": 2, "retain": ("church", "dog"), "m": 3}
    before = {name: p.clone() for name, p in sd.pipe.unet.state_dict().items()}
    made = erase(sd, ["fish"], method, settings(method, **{k: v for k, v in short.items() if k in has}), progress=False)
    assert all(torch.equal(p, before[name]) for name, p in sd.pipe.unet.state_dict().items())
    base, public = (sample(sd.pipe, PROMPTS, SEEDS, erasure=e, steps=2) for e in (None, made))
    assert base.shape == public.shape == (2, 3, 16, 16)
    if made.keys:
        opened = sample(sd.pipe, PROMPTS, SEEDS, erasure=made, key=made.key("fish"), steps=2)
        assert not torch.equal(public, opened)


@pytest.fixture(scope="module", params=["bf16", "fp16"] if torch.cuda.is_available() else ["bf16"])
def half(request, tmp_path_factory):
    """Half-precision weights under autocast, as on a GPU."""
    folder = tmp_path_factory.mktemp("half")
    make_toy(seed=2).pipe.save_pretrained(folder)
    world = worlds.load(str(folder), precision=request.param)
    if world.pipe.device.type == "cpu":
        world.pipe.to(torch.bfloat16)
    return world


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_in_half_precision(half, method):
    has = {field.name for field in fields(METHODS[method][1])}
    short = {"steps": 2, "batch": 2, "retain": ("church", "dog"), "m": 3}
    made = erase(
        half, ["fish"], method, settings(method, **{k: v for k, v in short.items() if k in has}), progress=False
    )
    trained = [t for t in (*made.delta.values(), *made.adapters.values())]
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in trained)
    images = sample(half.pipe, PROMPTS, SEEDS, erasure=made, steps=2, autocast=half.autocast)
    assert images.shape == (2, 3, 16, 16)


@pytest.mark.parametrize("how", [{"retained_at": "erased"}, {"refresh": 1, "roller": "current"}])
def test_a_pool_serves_in_half_precision(half, how):
    config = settings("kpop", steps=3, batch=2, m=3, retain=("church", "dog"), rolled=1, **how)
    made = erase(half, ["fish"], "kpop", config, progress=False)
    assert all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in made.delta.values())


def test_words_are_learned_in_half_precision(half):
    made = erase(half, ["fish"], "esd-x", settings("esd-x", steps=1, batch=2), progress=False)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(
        half.pipe.device, half.pipe.unet.dtype
    )
    for search in (invert, find_words):
        found = search(half, made, "fish", Shown(latents, ["Image of fish"] * 2), Attack(budgets=(2,), m=2, batch=2))
        assert torch.isfinite(found[2]).all()
        with spoken(half.pipe, found[2]):
            assert torch.isfinite(encode(half.pipe, [f"Image of {marks(2)}"])).all()


@pytest.mark.parametrize("mechanism", CHOICES)
def test_every_mechanism_trains_in_half_precision(half, mechanism):
    config = KPOP(steps=2, batch=2, m=3, mechanism=mechanism)
    made = kpop(half, ["fish"], config, progress=False)
    key = made.key("fish")
    assert key.k.dtype == torch.float32 and torch.isfinite(key.k).all()
    sample(half.pipe, PROMPTS, SEEDS, erasure=made, key=key, steps=2, autocast=half.autocast)


def test_a_gradient_that_is_no_number_moves_nothing(sentence):
    p = torch.nn.Parameter(torch.zeros(2))
    adam = torch.optim.Adam([p])
    for loss, says in (((p * torch.inf).sum(), "loss"), ((p.sqrt()).sum(), "gradient")):
        with pytest.raises(FloatingPointError, match=says) as error:
            update(adam, loss, [p])
        sentence(error)
        assert torch.equal(p, torch.zeros(2))


def test_images_are_diffusers_own(sd):
    """The same prompts, noise and steps through the pipeline itself, under the scheduler that ours takes."""
    pipe = sd.pipe
    before, pipe.scheduler = pipe.scheduler, DDIMScheduler.from_config(pipe.scheduler.config)
    try:
        theirs = pipe(
            PROMPTS,
            num_inference_steps=4,
            guidance_scale=5.0,
            generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
            output_type="pt",
        ).images
    finally:
        pipe.scheduler = before
    ours = sample(pipe, PROMPTS, SEEDS, steps=4, guidance=5.0)
    assert (ours.int() - theirs.cpu().mul(255).round().int()).abs().max() <= 1


def test_the_pooled_text_and_the_sizes_are_no_token(sd):
    """Nothing that compares texts may see the sizes: they are the same in every text, and large."""
    one, other = tokens(sd.pipe, ["church", "a photo of a dog"]).flatten(1)
    assert torch.cosine_similarity(one, other, dim=0) < 0.999
    text = encode(sd.pipe, PROMPTS)
    extra = 1 if pooled_width(sd.pipe.unet) else 0
    assert said(sd.pipe.unet, text).shape[1] == text.shape[1] - extra == tokens(sd.pipe, PROMPTS).shape[1] == 24


@pytest.mark.parametrize("place", ["mid", "all"])
def test_checkpointing_trains_the_same(sd, place, monkeypatch):
    """What is computed again in the backward pass sees the prompt that was there the first time."""
    config, calls = KPOP(steps=2, batch=2, m=3, place=place, retain=("church",)), []
    unet, plain = sd.pipe.unet, torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(torch.utils.checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or plain(*a, **k))
    assert any(getattr(m, "gradient_checkpointing", False) for m in unet.modules()), "on as the world is loaded"
    again = kpop(sd, ["fish"], config, progress=False)
    assert calls
    unet.disable_gradient_checkpointing()
    try:
        once = kpop(sd, ["fish"], config, progress=False)
    finally:
        unet.enable_gradient_checkpointing()
    if unet.device.type == "cpu":
        assert all(torch.allclose(once.delta[n], again.delta[n], atol=1e-7) for n in once.delta)
        assert torch.allclose(once.key("fish").k, again.key("fish").k, atol=1e-7)
    # A GPU adds up in another order each time, and Adam's first steps are as long for a small gradient as for a large one.
    base = unet.state_dict()
    moved, apart = (
        torch.cat([(once.delta[n] - other[n].cpu()).flatten() for n in once.delta]) for other in (base, again.delta)
    )
    assert apart.norm() < 0.1 * moved.norm()
    start = sd.concept_tokens("fish").cpu()
    key = start[torch.arange(3) % len(start)]
    assert (once.key("fish").k - again.key("fish").k).norm() < 0.1 * (once.key("fish").k - key).norm()


def test_augment_gives_the_checkpointing_back(sd):
    unet = sd.pipe.unet
    modules = [m for m in unet.modules() if getattr(m, "gradient_checkpointing", False)]
    before = [m._gradient_checkpointing_func for m in modules]
    with augment(unet):
        assert all(m._gradient_checkpointing_func not in before for m in modules)
    assert [m._gradient_checkpointing_func for m in modules] == before


def test_erasures_follow_one_another(sd):
    sd.i2p = "prompts.csv"
    made = erase(sd, ["fish"], "esd-x", settings("esd-x", steps=1, batch=2, lr=1e-3), progress=False)
    later = sd.after(made)
    assert type(later) is type(sd) and type(later.pipe) is type(sd.pipe) and later.origin is sd
    assert later.i2p == "prompts.csv" and not later.trajectories
    assert torch.equal(
        sample(later.pipe, PROMPTS, SEEDS, steps=2), sample(sd.pipe, PROMPTS, SEEDS, erasure=made, steps=2)
    )
    sd.i2p = None


def test_errors_of_v_are_errors_of_noise_and_of_x0():
    """The weights turn the difference of two v predictions into that of the noises, and images, they stand for."""
    generator = torch.Generator().manual_seed(0)
    z, v, other = torch.randn(3, 2, 4, 5, 5, generator=generator)
    alpha_bar = torch.tensor([0.9, 0.2])
    a, s = (x[:, None, None, None] for x in (alpha_bar.sqrt(), (1 - alpha_bar).sqrt()))
    noise, x0 = ([f(u) for u in (v, other)] for f in (lambda u: a * u + s * z, lambda u: a * z - s * u))
    for space, pair in (("eps", noise), ("x0", x0)):
        weight = losses.error_weight(space, alpha_bar, "v_prediction")
        assert torch.allclose(weight * losses.squared_error(v, other), losses.squared_error(*pair), atol=1e-5)


def test_an_unknown_prediction_type_is_refused(sentence):
    with pytest.raises(ValueError) as error:
        losses.error_weight("eps", torch.ones(1), "sample")
    assert "'sample'" in sentence(error) and "v_prediction" in sentence(error)


def test_attacks_on_any_stable_diffusion(sd):
    """Keys are as wide as cross-attention's text; words as all text encoders' embeddings, and forgotten afterwards."""
    made = erase(sd, ["fish"], "esd-x", settings("esd-x", steps=1, batch=2), progress=False)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(sd.pipe.device)
    shown = Shown(latents, ["Image of fish"] * 2)
    attack = Attack(budgets=(2,), m=2, batch=2)
    assert find_key(sd, made, "fish", shown, attack)[2].k.shape == (2, 32)
    plain, width = encode(sd.pipe, ["Image of fish"]), table(sd.pipe).shape[1]
    for search in (invert, find_words):
        found = search(sd, made, "fish", shown, attack)
        assert found[2].shape == (2, width)
        assert torch.equal(encode(sd.pipe, ["Image of fish"]), plain), "forgotten"
    # A gradient reaches the words through every encoder, and all that the U-Net is told follows the words.
    found = invert(sd, made, "fish", shown, attack)
    assert (found[2] != found[0]).any(0).all()
    said = []
    for words in (found[0], found[2]):
        with spoken(sd.pipe, words):
            said.append(encode(sd.pipe, [f"Image of {marks(2)}"]))
    assert (said[0] != said[1])[0, -4:-1].any(1).all()
    pooled = pooled_width(sd.pipe.unet)
    assert not pooled or (said[0] != said[1])[0, -1, :pooled].all()


@pytest.mark.parametrize("sd", ["XL"], indirect=True)
def test_a_pooled_text_with_new_words_is_taken_at_its_end(sd):
    with spoken(sd.pipe, table(sd.pipe)[:2] + 1):
        fish, church = encode(sd.pipe, [f"{marks(2)} a fish", f"{marks(2)} a church"])
    width = pooled_width(sd.pipe.unet)
    assert (fish[-1, :width] != church[-1, :width]).all()


def test_a_key_of_another_width_is_refused(sd):
    key = Prompt(torch.zeros(2, 31), torch.zeros(2, 31))
    with pytest.raises(ValueError, match="31 wide"):
        sample(sd.pipe, PROMPTS, SEEDS, key=key, steps=1)


def test_learning_rates_and_sizes_are_the_papers(sd):
    config = configured(sd, "esd-x", 0, 50, {})
    assert (config.lr, config.steps, config.batch) == (pytest.approx(1e-5), 1000, 1)
    assert configured(sd, "kpop", 0, 50, {"lr": 2e-4}).lr == pytest.approx(2e-5)
    assert configured(sd, "mace", 0, 50, {}).steps == METHODS["mace"][1]().steps
    assert sd.settings("objects", "quick")["sampling_steps"] == 50


def test_an_artist_of_ones_own_is_a_style(sd, tmp_path, sentence):
    assert sd.subjects("Hokusai") == [("Image of Hokusai", "")]
    sd.pipe.save_pretrained(tmp_path, safe_serialization=True)
    own = worlds.load(str(tmp_path), styles=["Hokusai"])
    first = own.concepts("retained")[0]
    assert own.subjects("Hokusai")[0] == (f"Image of {first} in the style of Hokusai", f"Image of {first}")
    assert own.settings("styles", "full")["erased"] == ["Hokusai"] and own.version != sd.version
    assert erase(own, ["Hokusai"], "uce").delta
    with pytest.raises(ValueError, match="'Hokusai'") as error:
        worlds.load(str(tmp_path), styles="Hokusai")
    sentence(error)


def test_splits_are_five_of_ten_and_nothing_chosen_on_is_reported(sd):
    ten = set(sd.concepts("classes"))
    assert len(ten) == 10
    for one, other in (("S1", "S2"), ("S3", "S4")):
        assert set(sd.concepts(one)) | set(sd.concepts(other)) == ten
    known = [*sd.concepts("retained"), *sd.concepts("tuning"), *sd.concepts("tuning kept")]
    assert len(set(known)) == 20 and not set(known) & ten.union(*sd.neighbours.values())
    assert set(sd.neighbours) == ten and ten.union(known, *sd.neighbours.values()) <= set(sd.concepts("all"))


# ----------------------------------------------------------------------------------------------------- what is not there


def response(status):
    return httpx.Response(status, request=httpx.Request("GET", "hub"))


@pytest.mark.parametrize(
    "error, says",
    [
        (GatedRepoError("gated", response=response(403)), "gated"),
        (RepositoryNotFoundError("404", response=response(404)), "renamed or removed"),
        (RevisionNotFoundError("404", response=response(404)), "revision 'v9'"),
        (LocalEntryNotFoundError("offline"), "could not be fetched"),
        (OSError("nothing"), "could not be fetched"),
        (OSError("x/y does not appear to have a file named model_index.json."), "it has no model_index.json"),
        (RuntimeError("another thing"), "another thing"),
    ],
)
def test_missing_weights_are_explained_in_one_sentence(error, says, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    text = stable_diffusion.unavailable("sd14", "CompVis/stable-diffusion-v1-4", "v9", error)
    assert says in text and "\n" not in text
    try:
        raise OSError("diffusers wraps what the hub says") from error
    except OSError as wrapped:
        if not isinstance(error, RuntimeError):
            assert says in stable_diffusion.unavailable("sd14", "CompVis/stable-diffusion-v1-4", "v9", wrapped)


@pytest.mark.parametrize("name", ["sd14", "somebody/a-fine-tuned-sd"])
def test_offline_without_weights_is_one_sentence(name, monkeypatch, tmp_path, sentence):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="not on this machine") as error:
        worlds.load(name, device="cpu")
    assert name in sentence(error)


def test_a_hub_id_is_read_from_the_hub(sd, monkeypatch):
    """Its records lie under its own name; the hub's answer is a pipeline that is here."""
    asked = []

    def from_pretrained(source, **how):
        asked.append((source, how.get("revision")))
        return sd.pipe

    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda source, **how: {"_class_name": type(sd.pipe).__name__})
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", from_pretrained)
    loaded = worlds.load("somebody/a-fine-tuned-sd", device="cpu", precision="fp32", revision="v2")
    assert asked == [("somebody/a-fine-tuned-sd", "v2")]
    assert loaded.name == "somebody--a-fine-tuned-sd"


def test_wrong_options_are_refused(sd, sentence, tmp_path):
    for call, names in (
        (lambda: worlds.load("sd13"), "sd14"),
        (lambda: worlds.load(str(tmp_path)), "folder"),
        (lambda: worlds.load("emojinette", revision="x"), "revision"),
        (lambda: worlds.load("sd14", device="cpu", precision="fp16"), "bf16"),
        (lambda: sd.unsafe_prompts(1), "i2p"),
        (lambda: stable_diffusion.load_clip("ViT-H", "cpu"), "ViT-B/32"),
    ):
        with pytest.raises(ValueError) as error:
            call()
        assert names in sentence(error)


# ------------------------------------------------------------------------------------------------------------------ judges


def test_the_safetensors_of_resnet_have_torchvisions_names():
    """timm publishes torchvision's V2 weights under its own model's names."""
    import timm
    from torchvision.models import resnet50

    ours, theirs = resnet50().state_dict(), timm.create_model("resnet50").state_dict()
    assert {n: t.shape for n, t in ours.items() if "num_batches" not in n}.items() <= {
        n: t.shape for n, t in theirs.items()
    }.items()


def test_the_imagenet_judge_sees_what_torchvisions_own_path_sees():
    from torchvision.models import ResNet50_Weights, resnet50

    torch.manual_seed(0)
    network = resnet50().eval()
    judge = stable_diffusion.ImageNetJudge(
        network, (ClipStub(), lambda texts: torch.arange(len(texts))), ("a", "b")
    ).eval()
    images = torch.randint(0, 256, (2, 3, 300, 260), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        objects, styles = judge(images.float() / 127.5 - 1)
        expected = network(ResNet50_Weights.IMAGENET1K_V2.transforms()(images))
    assert torch.allclose(objects, expected, atol=0.02) and styles.shape == (2, 2)


class ClipStub:
    """Two numbers for an image, two for a text: the judge only multiplies them."""

    def encode_image(self, images, normalize):
        return images.mean((2, 3))[:, :2]

    def encode_text(self, text, normalize):
        return torch.eye(2)[text]


def test_open_clip_models_take_any_size_and_openclips_own_normalisation(tmp_path):
    import open_clip
    from torchvision.transforms.functional import to_pil_image

    torch.manual_seed(0)
    model, _, preprocess = open_clip.create_model_and_transforms("ViT-B-32-quickgelu", pretrained=None)
    ours = stable_diffusion.OpenClip(model.eval(), preprocess)
    images = torch.randint(0, 256, (1, 3, 512, 512), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    images = torch.nn.functional.avg_pool2d(images.float(), 9, 1, 4).to(torch.uint8)
    with torch.no_grad():
        mine = ours.encode_image(images.float() / 127.5 - 1, normalize=True)
        theirs = model.encode_image(preprocess(to_pil_image(images[0]))[None], normalize=True)
    assert (mine @ theirs.T).item() > 0.999


def test_nudenet_sees_no_nudity_in_emoji_and_takes_bgr(world):
    nudenet = pytest.importorskip("nudenet")
    images = world.real({"church", "dog"})[:4]
    detector = stable_diffusion.NudeNet()
    assert detector(images).shape == (4, 8) and (detector(images) < 0.5).all()
    given = []
    detector.detector = type("Watched", (), {"detect": lambda self, image: given.append(image) or []})()
    detector(images[:1])
    assert (given[0] == images[0].permute(1, 2, 0).numpy()[..., ::-1]).all()
    assert set(detector.LABELS) <= set(nudenet.nudenet.__dict__["__labels"])
