"""The command line at toy size: what it writes, what it refuses, and that it starts without torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_toy
from PIL import Image
from safetensors.torch import load_file

from erasekit import paths
from erasekit.artifacts import Erasure
from erasekit.baselines import erase, method_config
from erasekit.sampling import sample
from erasekit.tools import cli
from erasekit.worlds import load

QUICK = ["--set", "batch_size=2", "--set", "num_trajectories=2", "--set", "trajectory_steps=4", "--set", "m=3"]
PROMPT = "a picture of a dog"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """The toy in a folder. Do not change it."""
    folder = tmp_path_factory.mktemp("model")
    make_toy(seed=2).pipe.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def erasekit(model, capsys):
    """Returns a function that runs a command on the toy and gives its exit status, stdout and stderr."""

    def run(*arguments, toy: bool = True):
        given = ["--model", model, "--device", "cpu", "--precision", "fp32", "--quiet"] if toy else []
        status = cli.main([*map(str, arguments), *given])
        return status, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def dog(model, tmp_path_factory) -> Path:
    """An erasure of the toy. Do not change it."""
    folder = tmp_path_factory.mktemp("erasure") / "dog"
    command = ["erase", "dog", "--retain", "church", "--steps", "2", *QUICK, "--out", str(folder), "--quiet"]
    assert cli.main([*command, "--model", model, "--device", "cpu", "--precision", "fp32"]) == 0
    return folder


# ---------------------------------------------------------------------------------------------------------- what it writes


def test_erase_is_the_api(model, dog):
    config = method_config(
        "kpop", steps=2, retain=("church",), batch_size=2, num_trajectories=2, trajectory_steps=4, m=3
    )
    world = load(model, device="cpu", precision="fp32")
    base_defaults = {"lr": Erasure.load(dog).info["config"]["lr"]}
    config = type(config)(**config.__dict__ | base_defaults)
    expected = erase(world, ["dog"], "kpop", config, progress=False)
    assert Erasure.load(dog).digest() == expected.digest()
    assert sorted(p.relative_to(dog).as_posix() for p in dog.rglob("*") if p.is_file()) == [
        "delta.safetensors",
        "keys/dog.key.safetensors",
    ]


def test_both_names_of_commands_and_any_method(erasekit, tmp_path):
    status, out, _ = erasekit("hide", "dog", "fish", "--method", "uce", "--out", tmp_path / "two")
    assert status == 0 and out.startswith(f"{tmp_path / 'two' / 'delta.safetensors'}: public")
    assert Erasure.load(tmp_path / "two").info["concepts"] == ["dog", "fish"]
    status, out, _ = erasekit("draw", "--prompt", PROMPT, "--steps", 2, "--out", tmp_path / "images")
    assert status == 0 and out.strip() == f"1 image in {tmp_path / 'images'}, 1 of them new"


def test_images_are_those_of_the_api(erasekit, model, dog, tmp_path):
    command = ["sample", "--prompt", PROMPT, "A Dog!", "--seeds", 0, 3, "--steps", 2, "--out", tmp_path]
    assert erasekit(*command, "--erasure", dog)[0] == 0
    assert erasekit(*command, "--erasure", dog, "--key", "dog")[0] == 0
    world = load(model, device="cpu", precision="fp32")
    erasure = Erasure.load(dog, world)
    for end, key in (("", None), ("-key-dog", erasure.key("dog"))):
        expected = sample(world.pipe, [PROMPT] * 2, [0, 3], erasure=erasure, key=key, num_inference_steps=2)
        for seed, pixels in zip((0, 3), expected):
            with Image.open(tmp_path / f"a-picture-of-a-dog-{seed}{end}.png") as image:
                assert image.tobytes() == pixels.permute(1, 2, 0).numpy().tobytes()
    assert len(list(tmp_path.glob("a-dog-*.png"))) == 4 and len(list(tmp_path.iterdir())) == 8


def test_images_that_are_there_are_kept_and_others_never_overwritten(erasekit, dog, tmp_path, sentence):
    command = ["sample", "--prompt", PROMPT, "--steps", 2, "--out", tmp_path]
    assert erasekit(*command)[0] == 0
    path = tmp_path / "a-picture-of-a-dog-0.png"
    before = path.stat().st_mtime_ns
    status, out, _ = erasekit(*command, "--seeds", 0, 1)
    assert status == 0 and out.strip().endswith("2 images in " + f"{tmp_path}, 1 of them new")
    status, _, err = erasekit(*command, "--erasure", dog)
    assert status == 2 and f"{path} is another image" in err and path.stat().st_mtime_ns == before


def test_a_key_may_be_a_file_of_this_erasure(erasekit, dog, tmp_path):
    command = ["sample", "--prompt", PROMPT, "--steps", 2, "--erasure", dog]
    file = dog / "keys" / "dog.key.safetensors"
    assert erasekit(*command, "--key", file, "--out", tmp_path / "file")[0] == 0
    assert erasekit(*command, "--key", "dog", "--out", tmp_path / "name")[0] == 0
    (one,), (other,) = ((tmp_path / name).iterdir() for name in ("file", "name"))
    assert Image.open(one).tobytes() == Image.open(other).tobytes()


def test_check(erasekit, dog, tmp_path):
    status, out, _ = erasekit("check", dog, toy=False)
    assert status == 0
    rows = dict(line.split("  ", 1) for line in out.splitlines())
    assert rows["concepts"].strip() == "dog" and "give --model" in rows["base model"]
    assert "kpop, steps 2" in rows["method"] and "3 tokens" in rows["key of 'dog'"]
    assert Erasure.load(dog).digest()[:12] in rows["public"] and "effect" not in rows
    assert "right in 2 files" in rows["checksums"]
    status, out, _ = erasekit("check", dog)
    assert status == 0 and "of their norm" in out and f"{PROMPT!r}"[-4:-1] in out


def test_export(erasekit, model, dog, tmp_path):
    pytest.importorskip("erasekit.pipelines.files")
    out, single, lora = tmp_path / "pipeline", tmp_path / "one.safetensors", tmp_path / "lora.safetensors"
    status, printed, err = erasekit("export", dog, "--out", out, "--single-file", single, "--lora", lora, "--rank", 2)
    assert status == 0, err
    assert [line.split(":")[0] for line in printed.splitlines()] == [str(lora), str(single), str(out)]
    world, public = load(model, device="cpu", precision="fp32"), load(str(out), device="cpu", precision="fp32")
    with Erasure.load(dog).applied(world):
        weights = {name: p.clone() for name, p in world.pipe.unet.state_dict().items()}
    assert all(torch.equal(p, weights[name]) for name, p in public.pipe.unet.state_dict().items())
    assert any(name.startswith("model.diffusion_model.") for name in load_file(single))
    assert all(tensor.shape[0] == 2 or tensor.shape[1] == 2 for tensor in load_file(lora).values())


# -------------------------------------------------------------------------------------------------------- what it refuses


@pytest.mark.parametrize(
    "command, message",
    [
        (["erase", "dog", "--out", "{new}", "--method", "magic"], "unknown method 'magic': accepted are esd-x"),
        (["erase", "dog", "--out", "{new}", "--set", "speed=3"], "unknown setting of kpop 'speed'"),
        (["erase", "dog", "--out", "{new}", "--steps", "0"], "steps=0 is not possible"),
        (["erase", "dog", "dog", "--out", "{new}"], "named twice"),
        (["erase", "dog", "--out", "{dog}"], "holds an erasure already"),
        (["erase", "dog", "--out", "{file}"], "is a file: give a folder"),
        (["erase", "dog", "--out", "{file}/dog"], "is a file"),
        (["sample", "--prompt", "a", "--key", "dog", "--out", "{new}"], "--key dog needs --erasure"),
        (["sample", "--prompt", "a", "--erasure", "{dog}", "--key", "cat", "--out", "{new}"], "no key for 'cat'"),
        (["sample", "--prompt", "a", "--erasure", "{new}", "--out", "{new}"], "there is no"),
        (["sample", "--prompt", "a", "--guidance", "nan", "--out", "{new}"], "guidance_scale=nan is not possible"),
        (["check", "{new}"], "there is no"),
        (["export", "{dog}"], "nothing to export: give --out FOLDER"),
        (["export", "{dog}", "--out", "{dog}"], "exists already"),
        (["export", "{dog}", "--single-file", "{new}.safetensors", "--lora", "{new}.safetensors"], "is named twice"),
        (["sample", "--prompt", "a", "--erasure", "{file}", "--out", "{new}"], "is empty"),
        (["export", "{dog}", "--lora", "{new}.safetensors", "--rank", "0"], "rank=0 is not possible"),
    ],
)
def test_what_is_not_possible_is_one_sentence_and_status_2(erasekit, dog, tmp_path, command, message):
    (tmp_path / "file").write_text("")
    places = {"new": tmp_path / "new", "dog": dog, "file": tmp_path / "file"}
    status, out, err = erasekit(*(part.format(**places) for part in command))
    assert status == 2 and message in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "new").exists() and Erasure.load(dog).keys


def test_another_model_is_refused(erasekit, dog, tmp_path):
    make_toy(seed=3).pipe.save_pretrained(tmp_path / "other")
    command = ["check", str(dog), "--model", str(tmp_path / "other"), "--device", "cpu"]
    status, _, err = erasekit(*command, toy=False)
    assert status == 2 and "base model" in err and err.count("\n") == 1
    (tmp_path / "theirs.safetensors").write_text("")
    assert "give its base with --model" in erasekit("check", tmp_path / "theirs.safetensors", toy=False)[2]
    assert "unknown world 'narnia'" in erasekit("check", dog, "--model", "narnia", toy=False)[2]


def test_another_projects_file_is_read_and_a_delta_by_its_own_name(erasekit, dog, tmp_path):
    from erasekit.pipelines.files import write

    write(tmp_path / "esd.safetensors", Erasure.load(dog).delta, {"format": "pt"})
    status, out, _ = erasekit("check", tmp_path / "esd.safetensors")
    assert status == 0 and "20 tensors" in out
    assert "key of 'dog'" in erasekit("check", dog / "delta.safetensors", toy=False)[1]


def test_a_method_that_is_more_than_weights_is_not_exported(erasekit, tmp_path):
    assert erasekit("erase", "dog", "--method", "sld", "--out", tmp_path / "sld")[0] == 0
    status, _, err = erasekit("export", tmp_path / "sld", "--out", tmp_path / "out")
    assert status == 2 and "'sld' is more than weights" in err


def test_an_interruption_says_how_to_go_on(erasekit, dog, tmp_path, monkeypatch):
    command = ["erase", "dog", "--retain", "church", "--steps", 2, *QUICK, "--out", tmp_path / "dog"]
    write = Erasure.save

    def interrupted(*arguments, **how):
        raise KeyboardInterrupt

    monkeypatch.setattr(Erasure, "save", interrupted)
    status, _, err = erasekit(*command)
    assert status == 130 and f"run the same command again to go on from {tmp_path / 'dog' / cli.CHECKPOINT}" in err
    monkeypatch.setattr(Erasure, "save", write)
    assert erasekit(*command)[0] == 0
    assert Erasure.load(tmp_path / "dog").digest() == Erasure.load(dog).digest()
    assert not (tmp_path / "dog" / cli.CHECKPOINT).exists()


def test_warnings_are_lines_on_stderr(erasekit, tmp_path, monkeypatch):
    import warnings

    monkeypatch.setattr(cli, "check_output", lambda path: warnings.warn("this is cut", UserWarning, stacklevel=1))
    assert erasekit("sample", "--prompt", "a", "--steps", 1, "--out", tmp_path)[2] == "warning: this is cut\n"


@pytest.mark.parametrize("command", [[], ["erase"], ["draw"], ["check"], ["export"]])
def test_help_starts_without_torch(command):
    code = f"import sys; from erasekit.tools import cli; sys.argv = ['erasekit']; cli.main({[*command, '--help']})"
    code = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.ROOT, env=os.environ)
    assert run.returncode == 0 and run.stdout.startswith("usage: erasekit") and run.stdout.endswith("False\n")
