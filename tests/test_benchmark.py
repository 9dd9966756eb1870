"""The benchmarks run, and their figures fit together; how fast anything is depends on the machine."""

import json
from functools import partial
from pathlib import Path

import pytest
from conftest import SMALL

from machinery.errors import UserError
from tools import benchmark


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch):
    monkeypatch.setattr(benchmark, "in_process", lambda work, *args: work(*args))
    monkeypatch.setattr(benchmark, "PEERS", {})


def figures(what: str, *flags: str) -> dict[str, float]:
    benchmark.main([what, "--json", "figures.json", *SMALL, *flags])
    return json.loads(Path("figures.json").read_text())[what]


def test_train_compares_the_classic_step_with_ours(project, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "MATRIX", 512)
    found = figures("train", "--batch-size", "2")
    assert (found["step_ratio"] > 1) == (found["ours_images_per_second"] > found["classic_images_per_second"])
    assert found["ours_gflop_per_image"] == pytest.approx(found["classic_gflop_per_image"])
    assert 0 < found["matmul_share"] < 1 and found["memory_ratio"] > 0
    assert found["ours_optimizer_operations"] > 0


def test_validate_measures_what_surrounds_the_network(project, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "draw_dataset", partial(benchmark.draw_dataset, height=64, width=96))
    found = figures("validate")
    assert 0 < found["scores_and_queue_ms"] < found["pictures_ms"]
    assert min(found.values()) > 0 and len(found) == 5


def test_loader_compares_the_classic_pipeline_with_ours(project, monkeypatch):
    monkeypatch.setattr(benchmark, "ROUNDS", 1)
    monkeypatch.setattr(benchmark, "draw_dataset", partial(benchmark.draw_dataset, height=64, width=96))
    found = figures("loader")
    assert (found["warm_ratio"] > 1) == (found["warm_photos_per_second"] > found["classic_photos_per_second"])
    assert found["warm_photos_per_second"] > found["cold_photos_per_second"]


def test_recipe_compares_what_both_have_learned(project):
    found = figures("recipe", "--num-epochs", "2")
    ours = [found[f"our_dice_seed_{seed}"] for seed in range(3)]
    assert min(ours) < found["our_dice"] < max(ours)
    assert (found["error_ratio"] < 1) == (found["our_dice"] > found["classic_dice"])
    assert not list(Path().glob("*.pth.tar")) and not any(Path("saved_images").iterdir())


def test_flags_that_train_does_not_have_are_named(project):
    with pytest.raises(UserError, match="--nonsense"):
        benchmark.main(["train", "--nonsense"])
