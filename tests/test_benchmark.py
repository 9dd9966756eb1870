"""The benchmarks run, and their figures fit together; how fast anything is depends on the machine."""

import json
from pathlib import Path

import pytest
from conftest import SMALL

import benchmark
import utils


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(benchmark, "in_process", lambda work, *args: work(*args))
    monkeypatch.setattr(benchmark, "PEERS", {})


def figures(what: str, *flags: str) -> dict[str, float]:
    benchmark.main([what, "--json", "figures.json", *SMALL, *flags])
    return json.loads(Path("figures.json").read_text())[what]


def test_train_compares_the_classic_step_with_ours(project, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    found = figures("train", "--batch-size", "2")
    assert found["step_ratio"] == pytest.approx(found["ours_images_per_second"] / found["classic_images_per_second"])
    assert found["ours_gflop_per_image"] == pytest.approx(found["classic_gflop_per_image"])
    assert 0 < found["matmul_share"] < 1 and found["memory_ratio"] > 0


def test_recipe_compares_what_both_have_learned(project, capsys):
    found = figures("recipe", "--num-epochs", "2")
    ours = [found[f"our_dice_seed_{seed}"] for seed in range(3)]
    assert found["our_dice"] == pytest.approx(sum(ours) / 3) and len(set(ours)) == 3
    assert found["error_ratio"] == pytest.approx((1 - found["our_dice"]) / (1 - found["classic_dice"]))
    assert not list(Path().glob("*.pth.tar")) and not any(Path("saved_images").iterdir())


def test_flags_that_train_does_not_have_are_named(project):
    with pytest.raises(utils.UserError, match="--nonsense"):
        benchmark.main(["train", "--nonsense"])
