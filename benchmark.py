"""Measures every speed that the README claims, side by side in one run.

python benchmark.py loader                     # photos/s from files to batches, against the classic pipeline
python benchmark.py predict                    # photos/s from photos to masks at 1918 x 1280, against the plain way
python benchmark.py loader --json speed.json   # the same figures in a file
"""

import io
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from multiprocessing import get_context
from pathlib import Path

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"
import albumentations as A
import numpy as np
import torch
from albumentations.pytorch import ToTensorV2
from PIL import Image

import dataset
import predict
import train
import utils
from dataset import CarvanaDataset, find_pairs, written_whole
from model import UNet
from sample_data import draw_dataset

ROUNDS = 5  # each contender runs once a round, in turn, so that a noisy machine is noisy for all
PROCESSES = 3  # likewise, where each contender runs in a process of its own, so that its memory can be told


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


def predict_plainly(checkpoint: Path, photos: list[Path], output_dir: Path) -> None:
    """The plain way: one photo at a time, fp32, decoded in full, nearest neighbour, PNG as Pillow writes it."""
    state = utils.load_checkpoint(checkpoint)
    model = UNet(**state["model"]).eval()
    model.load_state_dict(state["state_dict"])
    settings = state["preprocessing"]
    transform = A.Compose(
        [A.Resize(settings["height"], settings["width"]), A.Normalize(settings["mean"], settings["std"]), ToTensorV2()]
    )
    for photo in photos:
        image = np.array(Image.open(photo).convert("RGB"))
        with torch.no_grad():
            prediction = torch.sigmoid(model(transform(image=image)["image"][None]))[0, 0] > 0.5
        mask = Image.fromarray(prediction.numpy().astype(np.uint8) * 255)
        mask.resize(image.shape[1::-1], Image.Resampling.NEAREST).save(output_dir / f"{photo.stem}_mask.png")


def measure_prediction(is_plain: bool, checkpoint: Path, photos: list[Path], output_dir: Path) -> tuple[float, float]:
    """Seconds, from the checkpoint to the last mask, and this process's peak of memory in GB."""
    import resource  # which Windows does not have

    def work(photos: list[Path]) -> None:
        if is_plain:
            predict_plainly(checkpoint, photos, output_dir)
        else:
            with redirect_stdout(io.StringIO()):
                predict.main([*map(str, photos), "--checkpoint", str(checkpoint), "--output-dir", str(output_dir)])

    work(photos[:1])
    unit = 1 if sys.platform == "darwin" else 1024
    return seconds(lambda: work(photos)), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def benchmark_predict() -> dict[str, float]:
    """Photos per second and the peak of memory, from 1918 x 1280 JPEGs to masks, with the default network."""
    settings = utils.parse_settings(vars(train), [])
    network = {"in_channels": 3, "out_channels": 1, "features": list(settings.features)}
    preprocessing = {"height": settings.image_height, "width": settings.image_width}
    preprocessing |= {"mean": settings.mean, "std": settings.std}
    measured = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "network.pth.tar")
        state = {"model": network, "preprocessing": preprocessing, "state_dict": UNet(**network).state_dict()}
        utils.save_checkpoint(state, checkpoint)
        draw_dataset(Path(folder, "data"), train_cars=1, val_cars=1)
        photos = sorted(Path(folder, "data").glob("*_images/*.jpg"))
        for number in range(PROCESSES):
            for is_plain in measured:
                output_dir = Path(folder, f"{number}_{is_plain}")
                output_dir.mkdir()
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                    work = pool.submit(measure_prediction, is_plain, checkpoint, photos, output_dir)
                    measured[is_plain].append(work.result())
    (plain, plain_memory), (ours, our_memory) = (np.median(values, axis=0) for values in measured.values())
    return {
        "plain_photos_per_second": len(photos) / plain,
        "photos_per_second": len(photos) / ours,
        "ratio": plain / ours,
        "plain_memory_gb": plain_memory,
        "memory_gb": our_memory,
    }


BENCHMARKS = {"loader": benchmark_loader, "predict": benchmark_predict}


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
