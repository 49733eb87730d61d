"""The floors of pyproject.toml beside what Colab brings and holds: another version there breaks its notebooks."""

import subprocess
import sys
import tomllib

import pytest
from packaging.requirements import Requirement

from erasekit.paths import ROOT

# google-colab 1.0.0 requires the first three in exactly these versions; the others came with it in the autumn of 2025.
COLAB = {
    "ipython": "7.34.0",
    "pandas": "2.2.2",
    "requests": "2.32.4",
    "numpy": "2.0.2",
    "pillow": "11.3.0",
    "matplotlib": "3.10.0",
    "pyarrow": "18.1.0",
    "scikit-learn": "1.6.1",
    "scipy": "1.16.3",
    "psutil": "5.9.5",
    "tqdm": "4.67.1",
    "accelerate": "1.10.1",
    "torch": "2.8.0",
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize("requirement", [Requirement(d) for d in PROJECT["dependencies"]], ids=lambda r: r.name)
def test_colabs_own_versions_are_kept(requirement):
    if requirement.name in COLAB:
        assert COLAB[requirement.name] in requirement.specifier


def test_what_the_package_imports_is_pinned():
    pinned = {
        Requirement(line.split("#")[0]).name.replace("_", "-").lower()
        for line in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    }
    needed = {Requirement(line).name.replace("_", "-").lower() for line in PROJECT["dependencies"]}
    # ipython comes with ipykernel, and the hub's client with diffusers.
    assert needed - pinned <= {"ipython", "huggingface-hub"}


@pytest.mark.slow
def test_pip_finds_a_set_with_colabs_versions(tmp_path):
    """Needs a package index. torch is left out: Colab's build is not on every index."""
    held = [f"{name}=={version}" for name, version in COLAB.items() if name != "torch"]
    (tmp_path / "colab.txt").write_text("\n".join(held))
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    found = subprocess.run([*command, "-c", tmp_path / "colab.txt", ROOT], capture_output=True, text=True, timeout=900)
    assert found.returncode == 0, found.stderr[-2000:]
