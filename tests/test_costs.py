"""What is counted of a training, and the tables made of it."""

import time
from types import SimpleNamespace

import pytest
import torch

from erasekit.artifacts import Erasure
from erasekit.attention import Prompt
from erasekit.costs import relative, table_recipes
from erasekit.counting import spending
from erasekit.studies.cost import shipped


def test_memory_taken_and_given_back_inside_the_block_is_seen():
    with spending("cpu") as spent:
        block = torch.ones(20_000_000)  # 80 MB
        time.sleep(0.1)
        del block
    assert 70 <= spent.peak_mb <= 200
    assert 0.1 <= spent.seconds < 5


def test_a_block_that_takes_nothing_peaks_at_nothing():
    with spending("cpu") as spent:
        time.sleep(0.1)
    assert 0 <= spent.peak_mb < 20


def test_a_block_that_fails_is_measured_too():
    with pytest.raises(KeyError), spending("cpu") as spent:
        raise KeyError
    assert spent.seconds > 0


def test_what_is_shipped_is_the_public_part_and_the_keys():
    key = Prompt(torch.zeros(3, 4), torch.zeros(3, 4))
    made = Erasure({"a": torch.zeros(2, 5)}, {"church": key}, {}, {"b": torch.zeros(7, dtype=torch.float16)})
    assert shipped(made) == {"numbers shipped": 10 + 7 + 24, "bytes, public": 40 + 14, "bytes, keys": 96}


def test_recipes_are_compared_with_the_papers_on_their_split():
    def run(recipe, split, evaluations, rate):
        point = {
            "evaluations": evaluations,
            "seconds": evaluations / 10,
            "ESR-1": rate,
            "PSR-1": 100.0,
            "others": rate - 1,
        }
        return {"recipe": recipe, "split": split, "points": [{"evaluations": 1}, point]}

    runs = [run("ours", "S1", 10, 90.0), run("ours", "S1", 20, 94.0), run("kpop, paper's recipe", "S1", 150, 80.0)]
    runs += [run("ours", "S3", 30, 90.0), run("kpop, paper's recipe", "S3", 60, 80.0)]
    table = table_recipes(SimpleNamespace(data={"runs": runs}))
    assert table["evaluations, %"].to_dict() == {
        "S1: ours": 10.0,
        "S1: kpop, paper's recipe": 100.0,
        "S3: ours": 50.0,
        "S3: kpop, paper's recipe": 100.0,
    }
    assert table.loc["S1: ours", ["ESR-1", "others"]].to_list() == ["92.0 ± 2.0", "91.0 ± 2.0"]


def test_drawing_is_timed_against_the_base():
    timed = {"base": 2.0, "hidden": 2.0, "with the key": 2.1}
    record = SimpleNamespace(data={"drawn": [{"method": "base"}, {"method": "kpop", "timed": timed}]})
    assert relative(record) == {"base": 100.0, "hidden": 100.0, "with the key": pytest.approx(105.0)}
