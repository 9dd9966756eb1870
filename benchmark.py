"""Measures every speed that the README claims, side by side in one run.

python benchmark.py loader                     # photos/s from files to batches, against the classic pipeline
python benchmark.py loader --json speed.json   # the same figures in a file
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A
import numpy as np
from PIL import Image

import dataset
import train
import utils
from dataset import CarvanaDataset, find_pairs, written_whole
from sample_data import draw_dataset

ROUNDS = 5  # each contender runs once a round, in turn, so that a noisy machine is noisy for all


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def benchmark_loader() -> dict[str, float]:
    """Photos per second of one worker, from 1918 x 1280 JPEGs and GIFs to augmented tensors of the default size.

    classic: in every epoch Pillow decodes both in full, and albumentations resizes. cold: the first epoch, which builds
    the cache, with one thread. warm: every later one.
    """
    dataset.NUM_THREADS = 1
    settings = utils.parse_settings(vars(train), [])
    size = settings.image_height, settings.image_width
    augment, _ = train.make_transforms(settings)
    classic_transform = A.Compose([A.Resize(*size), *augment.transforms])
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        draw_dataset(photos, train_cars=3, val_cars=1)
        pairs = find_pairs(photos / "train_images", photos / "train_masks")

        def classic_epoch() -> None:
            Image.core.set_blocks_max(0)  # Pillow's default, which dataset.py changes
            for image_path, mask_path in pairs:
                image = np.array(Image.open(image_path).convert("RGB"))
                mask = np.array(Image.open(mask_path).convert("L"), dtype=np.float32)
                mask[mask == 255.0] = 1.0
                classic_transform(image=image, mask=mask)
            Image.core.set_blocks_max(16)

        def epoch(data: CarvanaDataset) -> None:
            for index in range(len(data)):
                data[index]

        times = {"classic": [], "cold": [], "warm": []}
        for number in range(ROUNDS):
            data = CarvanaDataset(photos / "train_images", photos / "train_masks", size, augment)
            times["classic"].append(seconds(classic_epoch))
            building = seconds(lambda: data.prepare(Path(folder, f"cache{number}")))  # noqa: B023
            times["cold"].append(building + seconds(lambda: epoch(data)))  # noqa: B023
            times["warm"].append(seconds(lambda: epoch(data)))  # noqa: B023
    rates = {name: len(pairs) / statistics.median(values) for name, values in times.items()}
    return {
        "classic_photos_per_second": rates["classic"],
        "cold_photos_per_second": rates["cold"],
        "warm_photos_per_second": rates["warm"],
        "cold_ratio": rates["cold"] / rates["classic"],
        "warm_ratio": rates["warm"] / rates["classic"],
    }


BENCHMARKS = {"loader": benchmark_loader}


def main(argv: list[str] | None = None) -> None:
    parser = utils.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="writes the figures to this file, too")
    args = parser.parse_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        raise utils.UserError(f"--json {args.json}: its folder does not exist, create it first")
    figures = BENCHMARKS[args.what]()
    for name, value in figures.items():
        print(f"{args.what + '.' + name:36} {value:10.2f}")
    if args.json:
        with written_whole(args.json) as temporary:
            temporary.write_text(json.dumps({args.what: figures}, indent=2))


if __name__ == "__main__":
    utils.run(main)
