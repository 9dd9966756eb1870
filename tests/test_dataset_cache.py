"""The cache when processes are killed, and when several start together: real processes."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import train
from dataset import CarvanaDataset
from machinery.files import written_whole

ROOT = Path(train.__file__).parent


def build(drawn: Path, cache: Path, delay: float) -> subprocess.Popen:
    script = [sys.executable, str(ROOT / "tests" / "build_cache.py")]
    folders = [str(drawn / "train_images"), str(drawn / "train_masks"), str(cache)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen([*script, *folders, str(delay)], stdout=subprocess.PIPE, text=True, env=environment)


def samples(cache: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in cache.iterdir() if path.suffix in (".samples", ".json")}


def test_a_build_that_is_killed_leaves_nothing_half_written(drawn, tmp_path):
    undisturbed = CarvanaDataset(drawn / "train_images", drawn / "train_masks", (32, 48))
    undisturbed.prepare(tmp_path / "undisturbed")
    cache = tmp_path / "cache"
    for wait in random.Random(0).sample([0.02 * step for step in range(1, 25)], 5):  # the build takes 0.32 s and more
        process = build(drawn, cache, delay=0.01)
        assert process.stdout.readline() == "building\n"
        time.sleep(wait)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if cache.exists():
            assert samples(cache) in ({}, samples(tmp_path / "undisturbed"))
    CarvanaDataset(drawn / "train_images", drawn / "train_masks", (32, 48)).prepare(cache)
    assert samples(cache) == samples(tmp_path / "undisturbed")
    assert not list(cache.glob("*.tmp"))


def test_of_processes_that_start_together_one_builds(drawn, tmp_path):
    processes = [build(drawn, tmp_path / "cache", delay=0.02) for _ in range(3)]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0]
    decoded = sorted(int(output.split()[-1]) for output in outputs)
    assert decoded == [0, 0, 64]


def test_files_are_written_beside_one_another(tmp_path):
    """Two runs may write model_1.pt and model_2.pt at once; a name may be as long as the disk allows."""
    names = ["model_1.pt", "model_2.pt", "a.pt", f"{'n' * 251}.pt"]
    with ExitStack() as files:
        written = [files.enter_context(written_whole(tmp_path / name)) for name in names]
        for path, name in zip(written, names, strict=True):
            path.write_text(name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in names}
