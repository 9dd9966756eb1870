"""The cache when processes are killed, and when several start together: real processes."""

import json
import os
import pickle
import random
import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest
from forked import Script
from PIL import Image

from dataset import CarvanaDataset
from machinery import samples as samples_room
from machinery.decoding import Rule
from machinery.errors import UserError
from machinery.files import written_whole


def build(drawn: Path, cache: Path, delay: float, number: int = 0) -> Script:
    folders = map(str, (drawn / "train_images", drawn / "train_masks", cache))
    return Script(Path(__file__).with_name("build_cache.py"), *folders, str(delay), rank=number)


def samples(cache: Path) -> list[tuple[dict, bytes]]:
    """Each index of a cache, and the samples that it names."""
    indices = [json.loads(path.read_text()) for path in cache.glob("*.json")]
    return [(index, (cache / index.pop("samples")).read_bytes()) for index in indices]


def test_a_build_that_is_killed_leaves_nothing_half_written(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    undisturbed = CarvanaDataset(drawn / "train_images", drawn / "train_masks", (32, 48))
    undisturbed.prepare(tmp_path / "undisturbed")
    cache = tmp_path / "cache"
    for wait in random.Random(0).sample([0.02 * step for step in range(1, 25)], 5):  # the build takes 0.32 s and more
        process = build(drawn, cache, delay=0.01)
        process.wait_for("building\n")
        time.sleep(wait)
        process.kill()
        process.join()
        if cache.exists():
            assert samples(cache) in ([], samples(tmp_path / "undisturbed"))
    CarvanaDataset(drawn / "train_images", drawn / "train_masks", (32, 48)).prepare(cache)
    assert samples(cache) == samples(tmp_path / "undisturbed")
    assert len(list(cache.glob("*.samples"))) == 1 and not list(cache.glob("*.tmp"))


def test_a_run_that_continues_and_a_new_one_use_the_same_cache(drawn, tmp_path):
    folders = drawn / "train_images", drawn / "train_masks"
    rule = None
    for _ in range(3):  # decoded by the files' own rule, by the checkpoint's, and by the files' again
        data = CarvanaDataset(*folders, (32, 48))
        data.prepare(tmp_path, rule)
        rule = None if rule else data.rule
        assert len(list(tmp_path.glob("*.samples"))) == len(list(tmp_path.glob("*.json"))) == 1
    with pytest.raises(UserError, match="99 is in no mask"):
        CarvanaDataset(*folders, (32, 48)).prepare(tmp_path, foreground_values=(1, 99))


def test_a_cache_that_another_experiment_has_rebuilt_is_still_this_ones(drawn, tmp_path):
    """As long as this one lives; a worker that does not fork opens it later."""
    folders = drawn / "train_images", drawn / "train_masks"
    mine, cache = CarvanaDataset(*folders, (32, 48)), tmp_path / "cache"
    mine.prepare(cache, Rule(brightest={"colours": 1.0}))
    worker = pickle.loads(pickle.dumps(mine))
    CarvanaDataset(*folders, (32, 48)).prepare(cache, Rule(chosen=(0,)))
    assert len(list(cache.glob("*.samples"))) == 2
    np.testing.assert_array_equal(worker[3][1], mine[3][1])
    assert worker.cache_file == mine.cache_file

    before = mine[3]
    del mine, worker
    CarvanaDataset(*folders, (32, 48)).prepare(cache)
    assert len(list(cache.glob("*.samples"))) == 1  # what nobody holds any more is gone
    assert before[0].any()


def test_a_cache_that_somebody_deletes_is_decoded_again(drawn, tmp_path):
    data = CarvanaDataset(drawn / "train_images", drawn / "train_masks", (32, 48))
    data.prepare(tmp_path / "cache")
    worker, expected = pickle.loads(pickle.dumps(data)), data[0]
    shutil.rmtree(tmp_path / "cache")
    for found, wanted in zip(worker[0], expected, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_kill_before_the_index_is_there_leaves_the_old_samples(drawn, tmp_path, monkeypatch):
    """The same files by another rule: the index and the samples that are found belong together."""
    folders, cache = (drawn / "train_images", drawn / "train_masks"), tmp_path / "cache"
    first = CarvanaDataset(*folders, (32, 48))
    first.prepare(cache)
    before = samples(cache)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        CarvanaDataset(*folders, (48, 32)).prepare(cache)
    with pytest.raises(KeyboardInterrupt):
        CarvanaDataset(*folders, (32, 48)).prepare(cache, Rule(chosen=(0,)))
    assert samples(cache) == before
    monkeypatch.undo()
    again = CarvanaDataset(*folders, (32, 48))
    again.prepare(cache)
    for found, wanted in zip(again[5], first[5], strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_of_processes_that_start_together_one_builds(drawn, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    processes = [build(drawn, tmp_path / "cache", 0.02, number) for number in range(3)]
    assert [process.status() for process in processes] == [0, 0, 0]
    decoded = sorted(int(process.output().split()[-1]) for process in processes)
    assert decoded == [0, 0, 64]


def test_files_are_written_beside_one_another(tmp_path):
    """Two runs may write model_1.pt and model_2.pt at once; a name may be as long as the disk allows."""
    names = ["model_1.pt", "model_2.pt", "a.pt", f"{'n' * 251}.pt"]
    with ExitStack() as files:
        written = [files.enter_context(written_whole(tmp_path / name)) for name in names]
        for path, name in zip(written, names, strict=True):
            path.write_text(name)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {name: name for name in names}


@pytest.mark.parametrize("small", [2**20, 0])
def test_a_corrected_mask_of_the_same_size_and_date_is_read_again(drawn, tmp_path, monkeypatch, small):
    """As an archive that is unpacked over the old files restores both; above `small` by the time of the last change."""
    monkeypatch.setattr(samples_room, "SMALL", small)
    shutil.copytree(drawn, tmp_path / "data")
    folders = tmp_path / "data/train_images", tmp_path / "data/train_masks"
    for mask in folders[1].iterdir():
        Image.open(mask).convert("L").save(mask.with_suffix(".bmp"))
        mask.unlink()
    before = CarvanaDataset(*folders, (32, 48))
    before.prepare(tmp_path / "cache")
    mask = before.pairs[3][1]
    status = mask.stat()
    Image.fromarray(255 - np.asarray(Image.open(mask))).save(mask)
    os.utime(mask, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (mask.stat().st_size, mask.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    after = CarvanaDataset(*folders, (32, 48))
    after.prepare(tmp_path / "cache")
    assert (after.sample(3)[1] != before.sample(3)[1]).mean() > 0.9
    np.testing.assert_array_equal(after.sample(4)[1], before.sample(4)[1])


def test_a_hard_link_is_no_change_and_decodes_nothing_again(drawn, tmp_path, monkeypatch):
    """As split_data --link makes them of every file."""
    folders = tmp_path / "images", tmp_path / "masks"
    for kind, folder in zip(("images", "masks"), folders, strict=True):
        shutil.copytree(drawn / f"train_{kind}", folder)
    decoded, read_sample = [], samples_room.read_sample
    monkeypatch.setattr(samples_room, "read_sample", lambda *args: decoded.append(args[0]) or read_sample(*args))
    CarvanaDataset(*folders, (32, 48)).prepare(tmp_path / "cache")
    assert sorted(decoded) == sorted(folders[0].iterdir())
    for path in (*folders[0].iterdir(), *folders[1].iterdir()):
        os.link(path, tmp_path / path.name)
    CarvanaDataset(*folders, (32, 48)).prepare(tmp_path / "cache")
    assert len(decoded) == len(list(folders[0].iterdir()))
