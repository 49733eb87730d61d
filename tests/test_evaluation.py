"""Metrics, the image cache, the protocol's rates, profiling, and what the studies' kit chooses and caches."""

import copy
import json
import math
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from erasekit import paths, sampling
from erasekit.artifacts import Erasure
from erasekit.base import weights_of
from erasekit.baselines import METHODS, method_config
from erasekit.evaluation import images as image_cache
from erasekit.evaluation import metrics, protocol
from erasekit.evaluation import oracle as oracle_distance
from erasekit.evaluation.images import image_strip, sample_images
from erasekit.evaluation.profiling import count_evaluations, measure
from erasekit.kpop import KPOP, kpop
from erasekit.studies.kit import erasures
from erasekit.studies.kit.attack_sweep import best_lr
from erasekit.studies.kit.cache import cached, earlier_parts, settings_dict
from erasekit.studies.operating_points import METHOD_NAMES
from erasekit.worlds.benchmark import Benchmark, Synonyms
from erasekit.worlds.emojinette import networks, oracles

PROMPTS = [(f"a {label}", label, seed) for seed in (0, 1) for label in ("church", "dog")] + [("a fish", "fish", 2)]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """A build folder of the test's own."""
    monkeypatch.setattr(paths, "BUILD", tmp_path / "build")
    return tmp_path / "build"


@pytest.fixture
def keeping(toy, build):
    """The toy world, as one that stores its images and erasures."""
    world = copy.copy(toy)
    world.keeps_images, world.batch_size = True, 2
    return world


# ----------------------------------------------------------------------------------------------------------------- metrics


def test_fid_of_two_gaussians():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 3, generator=generator, dtype=torch.float64)
    y = 2 * torch.randn(20_000, 3, generator=generator, dtype=torch.float64) + torch.tensor([3.0, 0.0, 0.0])
    # |mean|^2 = 9, and (2 - 1)^2 in each of three dimensions
    assert metrics.fid(x, y) == pytest.approx(12.0, rel=0.03)
    assert metrics.fid(x, x) == pytest.approx(0.0, abs=1e-9)


def test_kid_is_unbiased_and_detects_a_shift():
    values = []
    for seed in range(200):
        x, y = torch.randn(2, 20, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        values.append((metrics.kid(x, y), metrics.kid(x, y + 1)))
    same, shifted = torch.tensor(values).mean(0)
    assert abs(same) < 0.1 < 1 < shifted


def test_roc_auc_is_the_chance_to_rank_correctly():
    assert metrics.roc_auc([3, 2, 1, 0], [True, True, False, False]) == 1.0
    assert metrics.roc_auc([0, 1, 2, 3], [True, True, False, False]) == 0.0
    assert metrics.roc_auc([1, 1, 1], [True, False, False]) == 0.5
    assert metrics.roc_auc([0.9, 0.4, 0.6, 0.1], [True, True, False, False]) == 0.75
    assert math.isnan(metrics.roc_auc([1.0, 2.0], [True, True]))


# ---------------------------------------------------------------------------------------------------------------- protocol

OBJECTS = ["a", "b", "c", "d", "e", "f", "g"]


class JudgeStub(torch.nn.Module):
    """Ranks objects by their distance to the number that every pixel has."""

    objects, styles, temperature = OBJECTS, ["plain"], 0.5

    def forward(self, x):
        number = ((x[:, 0, 0, 0] + 1) * 127.5).round()
        distance = (torch.arange(len(OBJECTS)) - number[:, None]).abs()
        return -distance / self.temperature, torch.zeros(len(x), 1)


@pytest.fixture
def judged(monkeypatch):
    """A benchmark whose images of "a" look like "b", and of "b" like "g"."""
    groups = {"all": tuple(OBJECTS), "classes": ("a", "b", "c", "d"), "retained": (), "tuning": (), "tuning kept": ()}
    world = Benchmark(
        SimpleNamespace(device="cpu"),
        groups=groups,
        neighbours={"a": ("e",), "b": ("e", "f")},
        eval_templates={"sketch": ("a sketch of a {}", None, "white")},
    )
    world.judge = JudgeStub()
    shown = {"a": "b", "b": "g"}

    def sample_images(world, erasure, prompts, steps, key=None):
        numbers = torch.tensor([OBJECTS.index(label if key else shown.get(label, label)) for _, label, _ in prompts])
        return numbers[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8)

    monkeypatch.setattr(protocol, "sample_images", sample_images)
    return world


def test_rates_of_a_split(judged):
    found, strip = protocol.evaluate_split(judged, None, ("a", "b"), seeds=3, few_seeds=2, other_seeds=2, steps=1)
    assert found == {
        "ESR-1": 100.0,
        "ESR-5": 50.0,  # "b" is sixth where "g" is first
        "PSR-1": 100.0,
        "PSR-5": 100.0,
        "others": 100.0,
        "neighbours": 100.0,
        "templates": {"sketch": 100.0},
        "by_class": {"a": 0.0, "b": 0.0, "c": 100.0, "d": 100.0},
        "others_found": [2, 2, 2],
        "replaced": {"still it": 0.0, "another object": 100.0, "nothing told": 0.0},
    }
    assert strip.size == (4 * 4, 4) and [strip.getpixel((4 * n, 0))[0] for n in range(4)] == [1, 6, 2, 3]
    prompts = [("", label, 0) for label in "acd"]
    assert protocol.rates(judged, None, prompts, 1, 1) == {"ESR-1": 100, "ESR-5": 0, "PSR-1": 100, "PSR-5": 100}


def test_prompts_of_a_split(judged):
    parts = protocol.eval_prompts(judged, ("a", "b"), seeds=2, few_seeds=1, other_seeds=2)
    assert parts["kept"] == [(f"a picture of a {c}", c, seed) for c in "cd" for seed in (0, 1)]
    assert [label for _, label, _ in parts["neighbours"]] == ["e", "f"]  # each once
    assert [label for _, label, _ in parts["others"]] == list("eeffgg")
    assert parts["sketch"] == [("a sketch of a a", "a", 0), ("a sketch of a b", "b", 0)]


@pytest.fixture
def worded(judged, monkeypatch):
    """The same with words: "a" and "b" are letters, as "c" is."""
    judged.groups["letter"] = ("a", "b", "c")
    words = {"a": Synonyms(("alpha", "ay", "eh", "fourth"), ("aleph",))}
    monkeypatch.setattr(Benchmark, "synonyms", lambda self, concept: words.get(concept, Synonyms()))
    monkeypatch.setattr(Benchmark, "kinds", lambda self, concept: ("letter",))
    return judged


def test_words_of_a_split(worded):
    parts = protocol.eval_prompts(worded, ("a", "b"), seeds=2, few_seeds=1, other_seeds=1)
    assert parts["synonyms seen"] == [(f"a picture of a {w}", "a", 0) for w in ("alpha", "ay", "eh")]  # three at most
    assert parts["synonyms unseen"] == [("a picture of a aleph", "a", 0)]
    assert parts["hypernyms"] == [("a picture of a letter", "letter", seed) for seed in (0, 1)]  # one of both classes


def test_rates_of_words(worded, monkeypatch):
    """ "a" is drawn, and not named, by "alpha"; "letter" gives "b" and "c"."""

    def sample_images(world, erasure, prompts, steps, key=None):
        words = [text.split()[-1] for text, _, _ in prompts]
        drawn = {"alpha": "a", "ay": "g", "eh": "g", "aleph": "a", "letter": "b"}
        numbers = torch.tensor([OBJECTS.index(drawn.get(word, word)) for word in words])
        numbers[[n for n, word in enumerate(words) if word == "letter"][1]] = OBJECTS.index("c")
        return numbers[:, None, None, None].expand(-1, 3, 4, 4).to(torch.uint8)

    monkeypatch.setattr(protocol, "sample_images", sample_images)
    found, _ = protocol.evaluate_split(worded, None, ("a", "b"), seeds=2, few_seeds=1, other_seeds=1, steps=1)
    assert found["synonyms seen"] == 66.7 and found["synonyms unseen"] == 0.0
    assert found["hypernyms"] == {"a member": 100.0, "an erased class": 50.0}
    assert found["replaced"] == {"still it": 100.0, "another object": 0.0, "nothing told": 0.0}


def test_what_replaces_a_concept_must_be_told(judged):
    """A judge that is less sure than a half tells nothing."""
    judged.judge.temperature = 5.0
    found, _ = protocol.evaluate_split(judged, None, ("a", "b"), seeds=3, few_seeds=2, other_seeds=2, steps=1)
    assert found["replaced"] == {"still it": 0.0, "another object": 0.0, "nothing told": 100.0}


def test_the_distance_is_0_for_the_oracle_and_1_for_the_base(own):
    about = own.identity | {"method": "oracle", "concepts": ["church"], "config": {}}
    theta = {name: p.detach().clone() for name, p in weights_of({"": own.pipe.unet}).items()}
    oracle = Erasure({name: p * 1.1 for name, p in theta.items()}, {}, about)
    prompts = {"erased": ["a picture of a church"], "kept": ["a picture of a dog", "a picture of a fish"]}

    def distances(erasure):
        return oracle_distance.distances(own, erasure, oracle, prompts, count=2, steps=3)

    assert distances(oracle) == pytest.approx({"erased": 0.0, "kept": 0.0}, abs=1e-4)
    assert distances(Erasure(theta, {}, about)) == pytest.approx({"erased": 1.0, "kept": 1.0})
    kept = len(own.trajectories)
    half = distances(oracle.scaled(own, 0.5))
    assert 0.2 < half["erased"] < 0.8 and len(own.trajectories) == kept  # what all methods share is computed once
    guided = Erasure({}, {}, about | {"guidance": {"kind": "negative prompt", "concept_text": "church"}})
    assert distances(guided) == {"erased": None, "kept": None}
    at = oracle_distance.reference(own, oracle, prompts["kept"], 2, 3)
    assert (
        len(at.latents) == len(at.timesteps) == len(at.prompts) == 2 * 2 * 2 * 3
    )  # models, prompts, trajectories, steps
    expected = oracle_distance.predictions(own, oracle, at.latents, at.timesteps, at.prompts)
    torch.testing.assert_close(at.eps, expected)


def test_the_bundled_worlds_oracle_draws_as_its_own_u_net(world, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MODELS", tmp_path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = networks.make_unet().half().float().eval()
    erased = world.concepts("S1")
    assert world.oracle(erased) is None
    for without in (("S1",), ("church", "dog")):
        unet.half().save_pretrained(oracles.folder(without, 0) / "unet")
    oracle = world.oracle(erased[::-1])  # in any order
    assert world.oracle(erased[:4]) is None and world.oracle(world.concepts("S2")) is None
    assert world.oracle(("dog", "church")).digest() == oracle.digest()
    other = copy.copy(world)
    other.pipe = type(world.pipe)(**world.pipe.components | {"unet": unet.float()}, requires_safety_checker=False)
    asked = [world.prompt("owl"), world.prompt("church")], [0, 1]
    drawn = sampling.sample(world, *asked, erasure=oracle, num_inference_steps=2)
    expected = sampling.sample(other, *asked, num_inference_steps=2)
    assert (drawn.int() - expected.int()).abs().max() <= 1
    other.name = "emojinette-seed1"
    assert other.oracle(erased) is None


def test_hypernyms_of_the_bundled_world(world):
    assert world.kinds("dog") == ("animal", "pet")
    assert world.kinds("parachute") == ()  # "gear" is an object's name there
    assert all(c in world.concepts(kind) for c in world.concepts("classes") for kind in world.kinds(c))
    with pytest.raises(ValueError, match="unknown concept 'dgo'"):
        world.kinds("dgo")


def test_an_adapter_counts_in_the_distance(own):
    """SPM's adapter acts for its concept's prompt, and hardly for another."""
    about = own.identity | {"method": "oracle", "concepts": ["church"], "config": {}}
    delta = {name: 1.1 * p.detach() for name, p in weights_of({"": own.pipe.unet}).items()}
    config = method_config("spm", own, steps=2, lr=0.5, retain=(), num_trajectories=1, trajectory_steps=2)
    adapted = METHODS["spm"].function(own, ["church"], config, progress=False)
    prompts = {"erased": ["a picture of a church"]}
    found = oracle_distance.distances(own, adapted, Erasure(delta, {}, about), prompts, 1, 2)
    assert found["erased"] != 1.0


def test_recovery_uses_each_concepts_own_key(judged):
    erasure = SimpleNamespace(key=lambda concept: concept == "a")
    assert protocol.recovery_rate(judged, erasure, ["a", "b"], seeds=2, steps=1) == 50.0


# ------------------------------------------------------------------------------------------------------------- image cache

SCRIPT = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import torch
from conftest import make_toy
from erasekit import paths
from erasekit.worlds.distributed import rank_and_count
from erasekit.evaluation.images import image_strip, sample_images
from erasekit.studies.kit.cache import cached

out = Path(sys.argv[1])
paths.BUILD = out / "build"
torch.set_num_threads(1)
toy = make_toy(0)
toy.keeps_images, toy.batch_size = True, 2

def compute():
    images = sample_images(toy, None, [("a picture of a church", "church", n) for n in range(5)], 2)
    torch.save(images, out / f"images.{{rank_and_count()[0]}}.pt")
    return {{"mean": images.float().mean().item()}}, image_strip(images)

cached("test", 1, toy, compute)
"""


def run_script(folder, processes, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(paths.ROOT / "tests")))
    folder.mkdir()
    # What accelerate's launcher starts on several GPUs; on CPUs it needs MPI.
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [sys.executable, *(launch if processes > 1 else []), str(script), str(folder)]
    done = subprocess.run(command, cwd=paths.ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    [cell] = (folder / "build" / "cells" / "test").glob("*.json")
    assert len(list((folder / "build" / "images").glob("*/*.png"))) == 5
    images = [torch.load(folder / f"images.{n}.pt", weights_only=True) for n in range(processes)]
    return images, json.loads(cell.read_text())["numbers"], cell.with_suffix(".png").read_bytes()


def test_two_processes_sample_and_cache_what_one_does(tmp_path):
    [alone], numbers, strip = run_script(tmp_path / "one", 1, tmp_path)
    both, shared_numbers, shared_strip = run_script(tmp_path / "two", 2, tmp_path)
    assert len(alone) == 5 and all(torch.equal(images, alone) for images in both)
    assert numbers == shared_numbers and strip == shared_strip


def test_interrupted_sampling_continues_with_the_same_images(toy, keeping, build, monkeypatch):
    expected = sample_images(toy, None, PROMPTS, 2)
    decode, decoded = sampling.decode, []

    def stopping(pipe, latents):
        if len(decoded) == 2:
            raise KeyboardInterrupt
        decoded.append(len(latents))
        return decode(pipe, latents)

    monkeypatch.setattr(sampling, "decode", stopping)
    with pytest.raises(KeyboardInterrupt):
        sample_images(keeping, None, PROMPTS, 2)
    assert len(list(build.rglob("*.png"))) == 4
    decoded.clear()
    assert torch.equal(sample_images(keeping, None, PROMPTS, 2), expected)
    assert decoded == [1], "only what was missing"
    assert not list(build.rglob("*.part"))


def test_each_key_has_its_own_cached_images(toy, keeping, build, monkeypatch):
    erasure = kpop(toy, ["church"], KPOP(steps=2, batch_size=2, m=2, prompt_lr=1.0), progress=False)
    key = erasure.key("church")
    keys, prompts = (None, key, replace(key, log_weight=-1.0)), [("a picture of a church", "church", 0)]
    expected = [sample_images(toy, erasure, prompts, 2, k) for k in keys]
    first = [sample_images(keeping, erasure, prompts, 2, k) for k in keys]
    monkeypatch.setattr(sampling, "decode", None)
    again = [sample_images(keeping, erasure, prompts, 2, k) for k in keys]
    assert all(torch.equal(a, b) and torch.equal(a, c) for a, b, c in zip(expected, first, again))
    assert len({images.numpy().tobytes() for images in expected}) == 3
    assert len(list((build / "images").iterdir())) == 3


def test_images_that_do_not_fit_on_the_disk_are_refused_before_sampling(keeping, monkeypatch, sentence):
    monkeypatch.setattr(image_cache.shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    monkeypatch.setattr(sampling, "decode", None)
    with pytest.raises(OSError, match="5 images") as error:
        sample_images(keeping, None, PROMPTS, 2)
    assert "free some space" in sentence(error)


# --------------------------------------------------------------------------------------------------------------- profiling


def compute_for(seconds: float) -> None:
    start = time.process_time()
    while time.process_time() - start < seconds:
        sum(range(1000))


def test_memory_allocated_and_freed_inside_the_block_counts():
    with measure("cpu") as usage:
        block = torch.ones(20_000_000)  # 80 MB
        compute_for(0.1)
        del block
    assert 70 <= usage.peak_mb <= 200
    assert 0.1 <= usage.seconds < 5


def test_a_block_that_fails_and_allocates_nothing_is_measured_too():
    with pytest.raises(KeyError), measure("cpu") as usage:
        compute_for(0.1)
        raise KeyError
    assert usage.seconds >= 0.1 and 0 <= usage.peak_mb < 20


def test_the_time_of_other_processes_does_not_count():
    with measure("cpu") as usage:
        time.sleep(0.5)
    assert usage.seconds < 0.25


def test_evaluations_are_counted_by_sample_and_gradient(toy):
    with count_evaluations(toy.pipe.unet) as count:
        sample_images(toy, None, PROMPTS, 2)
    assert (count.evaluations, count.calls, count.with_gradient) == (5 * 2 * 2, 2 * 2, 0)
    with count_evaluations(toy.pipe.unet) as count:
        toy.pipe.unet(torch.zeros(3, 4, 8, 8), 5, torch.zeros(3, 4, 32))
    assert (count.evaluations, count.calls, count.with_gradient) == (3, 1, 3)


# ------------------------------------------------------------------------------------------------------------ studies' kit


def test_cached_parts_report_the_seconds_of_an_earlier_run(toy, build):
    def part(n, version=1):
        return cached("test", version, toy, lambda: ({"part": n}, image_strip(torch.zeros(1, 3, 2, 2).byte())), n)

    assert part(0)[0] == {"part": 0}
    [path] = (build / "cells" / "test").glob("*.json")
    content = json.loads(path.read_text())
    assert {"precision", "device", "versions"} <= set(content["provenance"])
    content["provenance"]["seconds"] = 5000.0
    path.write_text(json.dumps(content))
    with earlier_parts() as earlier:
        numbers, image = part(0)
        assert part(1)[0] == {"part": 1}
    assert numbers == {"part": 0} and image.size == (2, 2) and [part["seconds"] for part in earlier] == [5000.0]
    part(0, version=2)
    assert len(list(path.parent.glob("*.json"))) == 3


@pytest.mark.parametrize("method", ["esd-x", "uce"])
def test_a_world_that_keeps_images_keeps_erasures(toy, keeping, monkeypatch, method):
    config = method_config(method, **({"steps": 2, "batch_size": 2} if method == "esd-x" else {}))
    once, _ = erasures.train_cached(keeping, ["church"], method, config)
    monkeypatch.setattr(erasures, "inspect", None)  # a second training would look at the method's signature
    again, _ = erasures.train_cached(keeping, ["church"], method, config)
    assert once.digest() == again.digest() != erasures.train_cached(toy, ["dog"], method, config)[0].digest()


def test_a_worlds_defaults_reach_the_configs_they_are_for(toy):
    world = Benchmark(
        toy.pipe, groups={"retained": ("dog",)}, pool_defaults={"num_trajectories": 2, "trajectory_steps": 4}
    )
    world.train_defaults, world.lr_scale = {"steps": 1000, "batch_size": 1}, 0.1

    def make(method, **changes):
        return erasures.make_config(world, method, 3, 50, changes)

    config = make("esd-x")
    assert (config.steps, config.batch_size, config.retain, config.seed) == (1000, 1, ("dog",), 3)
    assert config.lr == pytest.approx(1e-5) and make("kpop", lr=2e-4).lr == 2e-4
    assert erasures.at_lr_scale(world, "kpop", {"lr": 2e-4, "m": 3}) == {"lr": pytest.approx(2e-5), "m": 3}
    assert erasures.at_lr_scale(world, "receler", {"lr": 2e-3}) == {"lr": 2e-3}
    assert config.trajectories == make("spm").trajectories == {"count": 2, "steps": 4, "guidance": 3.0}
    spm = settings_dict(make("spm"))  # an adapter: its own steps and rate
    assert (spm["steps"], spm["batch_size"], spm["lr"]) == (100, 8, 3e-3)
    assert make("kpop", latents="on_policy").num_trajectories is None
    assert make("kpop", num_trajectories=6).num_trajectories == 6
    assert make("sld").sampling_steps == 50
    assert erasures.make_config(world, "esd-x", 0, 50, {}, steps=7, retain=("",)).steps == 7


def test_of_runs_that_erase_enough_the_one_that_keeps_most_is_chosen():
    points = ((1, 0.8, 60.0, 99.0), (1, 1.0, 95.0, 80.0), (2, 0.8, 96.0, 90.0), (2, 1.0, 100.0, 85.0))
    runs = [
        {"settings": {"lr": lr}, "scale": scale, "ESR-1": esr, "ESR-5": 0.0, "PSR-1": psr}
        for lr, scale, esr, psr in points
    ]

    def chosen(runs, **options):
        found = erasures.choose_operating_point(runs, **options)
        return found["settings"]["lr"], found["scale"], found["reached"]

    assert chosen(runs) == (2, 0.8, True)
    assert chosen(runs[:2]) == (1, 1.0, True)
    assert chosen(runs[:1]) == (1, 0.8, False)
    assert chosen(runs, target=50.0) == (1, 0.8, True)


def test_methods_are_compared_where_they_erase_95_percent():
    def line(lr, *points):
        return [{"settings": {"lr": lr}, "scale": s, "ESR-1": esr, "PSR-1": psr} for s, esr, psr in points]

    runs = line(1.0, (0.8, 90.0, 99.0), (1.0, 100.0, 79.0)) + line(2.0, (0.6, 85.0, 92.0), (0.8, 95.0, 88.0))
    found = erasures.choose_operating_point(runs)
    assert found == {"settings": {"lr": 1.0}, "scale": 0.9, "ESR-1": 95.0, "PSR-1": 89.0, "reached": True}
    assert erasures.choose_operating_point(runs[2:])["scale"] == 0.8  # a point of the line itself
    most = erasures.choose_operating_point(line(1.0, (0.8, 60.0, 99.0), (1.0, 70.0, 90.0)))
    assert (most["scale"], most["reached"]) == (1.0, False)
    assert erasures.at_target(line(1.0, (0.8, 97.0, 70.0), (1.0, 99.0, 60.0)), 95.0)["scale"] == 0.8


def test_a_grid_goes_on_beyond_the_edge_that_is_taken():
    sweep = [{"lr": 1e-4}, {"lr": 2e-4}, {"lr": 4e-4}]
    assert erasures.beyond_edge(sweep, {"lr": 2e-4}) is None
    assert erasures.beyond_edge(sweep, {"lr": 4e-4}) == {"lr": 8e-4}
    assert erasures.beyond_edge(sweep, {"lr": 1e-4}) == {"lr": 5e-5}
    both = [{"lam": x, "round_lam": x, "wordings": "bare"} for x in (100.0, 200.0)]  # changed together
    assert erasures.beyond_edge(both, both[1]) == {"lam": 400.0, "round_lam": 400.0, "wordings": "bare"}


def test_no_concept_used_for_tuning_or_training_is_reported(world):
    reported = set(world.concepts("classes")).union(*world.neighbours.values())
    assert not any(reported & set(world.concepts(group)) for group in ("tuning", "tuning kept", "retained"))
    assert all(method.sweep for method in METHODS.values())


def test_a_missing_operating_point_is_named(sentence):
    with pytest.raises(ValueError) as error:
        erasures.require_operating_points({"uce": {"settings": {}, "scale": 1.0}}, "uce", "kpop")
    assert "kpop" in sentence(error) and "uce" not in sentence(error)


def test_every_compared_method_has_a_committed_operating_point():
    assert set(erasures.operating_points()) == set(METHOD_NAMES) <= set(METHODS)
    assert erasures.operating_points("no such study") == {}


def test_an_attacks_learning_rate_is_the_one_that_ends_highest():
    def row(attack, lr, steps, rate, method="m"):
        return {"attack": attack, "lr": lr, "steps": steps, "rate": rate, "method": method}

    sweep = [row("a", 0.1, 5, 90), row("a", 0.1, 9, 40), row("a", 0.2, 5, 10), row("a", 0.2, 9, 40)]
    sweep += [row("a", 0.3, 5, 0), row("a", 0.3, 9, 50), row("b", 0.1, 9, 100)]
    assert best_lr(sweep, "a") == 0.3  # the highest at the end
    sweep.append(row("a", 0.3, 9, 0, "other"))
    sweep += [row("a", lr, 9, 30, "other") for lr in (0.1, 0.2)]
    assert best_lr(sweep, "a") == 0.1  # a mean over methods; of equals, the one that succeeds sooner
    assert best_lr(sweep, "b") == 0.1
