"""How uncertain the Dice of a few validation photos is."""

import re
from pathlib import Path

import numpy as np
from conftest import leave_photos

from machinery.runs import doubt
from utils import load_checkpoint


def test_few_validation_photos_are_said_to_be_few_beside_their_dice(project, run_train, capsys):
    leave_photos(64, 3)
    for number, photo in enumerate(sorted(Path("data/val_images").iterdir())):  # no car's
        photo.rename(f"data/val_images/{number}.jpg")
        Path(f"data/val_masks/{photo.stem}_mask.gif").rename(f"data/val_masks/{number}_mask.gif")
    run_train("--num-epochs", "3")
    checkpoint = load_checkpoint(Path("my_checkpoint.pth.tar"))
    best = max(range(3), key=lambda epoch: checkpoint["history"][epoch]["dice"])
    line = doubt([Path(f"{number}.jpg") for number in range(3)], checkpoint["photo_dice"][best])
    assert line.startswith("Validation photos are few, 3: ") and capsys.readouterr().out.count(line) == 1


def test_the_interval_holds_the_mean_of_many_as_often_as_it_says():
    rng = np.random.default_rng(0)
    for count in (2, 3, 8, 19):
        hits = 0
        for scores in rng.normal(0.5, 0.02, (400, count)):
            low, high = map(float, re.findall(r"[01]\.\d{3}", doubt([Path(f"{n}.jpg") for n in range(count)], scores)))
            hits += low - 5e-4 <= 0.5 <= high + 5e-4
        assert 0.92 < hits / 400 < 0.985


def test_photos_of_one_car_count_once():
    images = [Path(f"{car:012x}_{view:02}.jpg") for car in range(4) for view in range(16)]
    assert doubt(images, [0.9, 0.8] * 32).startswith("Validation cars are few, 4: ")
    assert doubt(images[:16], [0.9] * 16) == "One validation car says little about others."
    assert doubt([Path("a.jpg")], [0.9]) == "One validation photo says little about others."
    assert doubt([Path(f"{n}.jpg") for n in range(20)], [0.9] * 20) is None
    assert doubt([Path("a.jpg"), Path("b.jpg")], [0.0, 0.0]) is None
