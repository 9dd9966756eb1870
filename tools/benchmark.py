"""Measure speed and recipe against the classic ways, side by side in one run (docs/measurements.md).

    python -m tools.benchmark loader    # photos/s from files to batches, against the classic pipeline
    python -m tools.benchmark train     # images/s of the training step and its memory, against the classic step
    python -m tools.benchmark validate  # ms a photo that pictures and scores take beside the network
    python -m tools.benchmark recipe    # Dice after NUM_EPOCHS, and seconds until the classic Dice, against that recipe
    python -m tools.benchmark predict   # photos/s from photos to masks at 1918 x 1280, against the plain way

--json FILE writes the figures to a file, too. train.py's flags are taken as well: --batch-size 16 --device cuda
"""

import csv
import importlib.util
import io
import json
import platform
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import predict
import train
import utils
from dataset import CarvanaDataset
from machinery import processes, samples
from machinery.checkpoints import Beginning, settle
from machinery.device import Device, choose_device, choose_num_workers
from machinery.errors import UserError, run
from machinery.files import find_pairs, written_whole
from machinery.report import Report
from machinery.sample_data import draw_dataset
from machinery.settings import Parser, check_settings, parse_settings
from model import build_network, size_multiple
from predict import full_size_dice
from train import A  # albumentations, once train.py has prepared its import

MATRIX = 2048  # rows and columns of those whose product shows what a CPU can do; a GPU's are four times as large
ROUNDS = 3  # each contender runs once a round, in turn, so that a noisy machine is noisy for all


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_process(work: Callable, *args: object) -> object:
    """Return what work returns in a process of its own, whose memory and switches are nobody else's."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(work, *args).result()


def peak_memory() -> float:
    """Return how many MB this process has had at most."""
    if Path("/proc/self/status").exists():  # getrusage would count what the parent had when it started this one
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 1e3
    import resource  # which Windows does not have

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)


def network_config(s: SimpleNamespace) -> dict:
    return {"features": s.features, "encoder": None, "tile": None}


def save_random_network(config: dict, s: SimpleNamespace, checkpoint: Path) -> None:
    preprocessing = {"height": s.image_height, "width": s.image_width, "mean": s.mean, "std": s.std}
    state = {"model": config, "preprocessing": preprocessing, "state_dict": build_network(config).state_dict()}
    utils.save_checkpoint(state, checkpoint)


# ---------------------------------------------------------------------------------------------------------------------
# loader: from files to samples


def classic_augmentation(s: SimpleNamespace) -> A.Compose:
    """Return what the classic pipeline does to a photo; its changes at random are train.py's."""
    changes = train.make_augmentation().transforms
    return A.Compose([A.Resize(s.image_height, s.image_width), *changes, A.Normalize(s.mean, s.std), A.ToTensorV2()])


def benchmark_loader(s: SimpleNamespace) -> dict[str, float]:
    """Measure photos per second of one thread, from JPEGs and GIFs of 1918 x 1280 to augmented samples.

    classic: in every epoch Pillow decodes both in full, and albumentations resizes, augments as train.py does, and
    normalises. cold: the first epoch, which builds the cache. warm: every later one.
    """
    samples.NUM_THREADS = 1
    size = s.image_height, s.image_width
    augmentation = train.make_augmentation()
    classic_transform = classic_augmentation(s)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder, "photos")
        draw_dataset(photos, train_cars=3, val_cars=1)
        pairs = find_pairs(photos / "train_images", photos / "train_masks")

        def classic_epoch() -> None:
            Image.core.set_blocks_max(0)  # Pillow's default, which machinery/decoding.py changes
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
            data = CarvanaDataset(photos / "train_images", photos / "train_masks", size, augmentation)
            times["classic"].append(seconds(classic_epoch))
            building = seconds(lambda: data.prepare(Path(folder, f"cache{number}")))  # noqa: B023
            times["cold"].append(building + seconds(lambda: epoch(data)))  # noqa: B023
            times["warm"].append(seconds(lambda: epoch(data)))  # noqa: B023
    rates = {name: len(pairs) / statistics.median(values) for name, values in times.items()}
    return {
        "classic_photos_per_second": rates["classic"],
        "cold_photos_per_second": rates["cold"],
        "warm_photos_per_second": rates["warm"],
        "warm_ms": 1000 / rates["warm"],
        "cold_ratio": rates["cold"] / rates["classic"],
        "warm_ratio": rates["warm"] / rates["classic"],
    }


# ---------------------------------------------------------------------------------------------------------------------
# train: the step


def classic_network(s: SimpleNamespace) -> nn.Module:
    """Return the same network with PyTorch's own initialisation, as a plain U-Net repository has it."""
    torch.manual_seed(s.seed)
    model = build_network(network_config(s))
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            layer.reset_parameters()
    return model


def classic_step(model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, masks: Tensor) -> None:
    """Take a step in fp32, with contiguous tensors and plain Adam."""
    loss = F.binary_cross_entropy_with_logits(model(images), masks)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def smp_network() -> nn.Module:
    import segmentation_models_pytorch

    return segmentation_models_pytorch.Unet("resnet34", encoder_weights=None)


def monai_network() -> nn.Module:
    from monai.networks.nets import BasicUNet

    return BasicUNet(spatial_dims=2, in_channels=3, out_channels=1)


PEERS = {"segmentation_models_pytorch": smp_network, "monai": monai_network}  # measured where they are installed


class OperationCount(TorchDispatchMode):
    """Counts the operations that a device is asked for; views cost it nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, function: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None
    ) -> object:
        self.count += not function.is_view
        return function(*args, **(kwargs or {}))


def matmul_speed(device: Device, wait: Callable) -> float:
    """Measure the GFLOP/s of a product of two large matrices in the device's precision."""
    size = MATRIX if device.device.type == "cpu" else 4 * MATRIX
    some, other = (torch.randn(size, size, device=device.device, dtype=device.precision) for _ in range(2))

    def products() -> None:
        for _ in range(10):
            some @ other
        wait()

    products()
    return 10 * 2 * size**3 / 1e9 / min(seconds(products) for _ in range(5))


def measure_step(name: str, s: SimpleNamespace) -> dict[str, float]:
    """Measure a step: seconds and GFLOP, the optimizer's seconds and operations, the peak memory in MB; and `matmul`.

    That is the GFLOP/s of a product of two matrices.
    """
    chosen = choose_device(s.device, s.precision)
    device = chosen.device
    wait = {"cuda": partial(torch.cuda.synchronize, device), "mps": torch.mps.synchronize, "cpu": int}[device.type]
    images = torch.randn(s.batch_size, 3, s.image_height, s.image_width, device=device)
    masks = (torch.rand(s.batch_size, 1, s.image_height, s.image_width, device=device) < 0.2).float()
    if name == "classic":
        model = classic_network(s).to(device)
        optimizer = torch.optim.Adam(model.parameters(), 1e-4)
        step = partial(classic_step, model, optimizer, images, masks)
    else:
        if name in PEERS or s.compile == "auto":  # as in a long run
            s.compile = "no" if name in PEERS or device.type != "cuda" else "yes"
        state = train.new_state(s, chosen, foreground=0.2, photos=s.batch_size, beginning=Beginning())
        if name in PEERS:
            state.model = state.forward = PEERS[name]().to(device, memory_format=chosen.memory_format)
            state.optimizer = torch.optim.AdamW(state.model.parameters(), fused=True)
        model, optimizer = state.model, state.optimizer
        images = images.contiguous(memory_format=chosen.memory_format)
        step = partial(train.train_step, state, images, masks, chosen, s)

    def steps(number: int) -> None:
        for _ in range(number):
            step()
        wait()

    steps(3)  # to warm up
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    number = 3 if device.type == "cpu" else 30
    step_seconds = seconds(lambda: steps(number)) / number
    memory = torch.cuda.max_memory_allocated(device) / 1e6 if device.type == "cuda" else peak_memory()

    def optimize() -> None:
        optimizer.step()
        wait()

    optimizer_seconds = statistics.median(seconds(optimize) for _ in range(5))
    with OperationCount() as operations:
        optimizer.step()
    with FlopCounterMode(display=False) as counter:
        model(images[:1]).sum().backward()

    return {
        "seconds": step_seconds,
        "gflop": s.batch_size * counter.get_total_flops() / 1e9,
        "optimizer_seconds": optimizer_seconds,
        "optimizer_operations": operations.count,
        "memory": memory,
        "matmul": matmul_speed(chosen, wait),
    }


def benchmark_train(s: SimpleNamespace) -> dict[str, float]:
    """Measure the training step on BATCH_SIZE images that are there: images/s, GFLOP/s, the process's peak memory.

    classic: fp32, contiguous, Adam. ours: train.train_step. The share is of what the product of two matrices of 2048 x
    2048 (8192 on a GPU) reaches in the same process and precision; GFLOP are the convolutions, forward and backward,
    counted by torch's FlopCounterMode.
    """
    contenders = ["classic", "ours", *(name for name in PEERS if importlib.util.find_spec(name))]
    found = {name: [] for name in contenders}
    for _ in range(ROUNDS):
        for name in contenders:
            found[name].append(in_process(measure_step, name, s))
    figures = {}
    for name, rows in found.items():
        found_here = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        figures[f"{name}_images_per_second"] = s.batch_size / found_here["seconds"]
        figures[f"{name}_gflop_per_image"] = found_here["gflop"] / s.batch_size
        figures[f"{name}_gflop_per_second"] = found_here["gflop"] / found_here["seconds"]
        figures[f"{name}_memory_mb"] = found_here["memory"]
        figures[f"{name}_optimizer_ms"] = 1000 * found_here["optimizer_seconds"]
        figures[f"{name}_optimizer_operations"] = found_here["optimizer_operations"]
        if name == "ours":
            figures["matmul_gflop_per_second"] = found_here["matmul"]
    figures["step_ratio"] = figures["ours_images_per_second"] / figures["classic_images_per_second"]
    figures["matmul_share"] = figures["ours_gflop_per_second"] / figures["matmul_gflop_per_second"]
    figures["memory_ratio"] = figures["ours_memory_mb"] / figures["classic_memory_mb"]
    return figures


# ---------------------------------------------------------------------------------------------------------------------
# validate: what surrounds the network in validation


def benchmark_validate(s: SimpleNamespace) -> dict[str, float]:
    """Measure the milliseconds that a photo of 1918 x 1280 takes beside a network that costs next to nothing.

    scores: check_accuracy alone. pictures: the same, until every picture and the page are drawn in threads; training
    waits for `scores_and_queue` of that. full_size: Dice at the photos' original size, in one thread and in all.
    """
    device = Device(torch.device("cpu"), torch.float32, s.mean, s.std)
    network = nn.Conv2d(3, 1, 1)
    times = {name: [] for name in ("scores", "scores_and_queue", "pictures", "full_size_one_thread", "full_size")}
    with tempfile.TemporaryDirectory() as folder:
        draw_dataset(Path(folder, "data"), train_cars=1, val_cars=4)
        sets = [
            CarvanaDataset(Path(folder, f"data/{name}_images"), Path(folder, f"data/{name}_masks"), (160, 240))
            for name in ("train", "val")
        ]
        for data in sets:
            data.prepare(Path(folder, "cache"))
        checkpoint = Path(folder, "smallest.pth.tar")
        save_random_network(network_config(s) | {"features": (1,)}, s, checkpoint)
        loader = utils.get_loaders(*sets, s.batch_size)[1]
        validate = partial(utils.check_accuracy, loader, network, device, train.image_losses)
        for number in range(ROUNDS):
            times["scores"].append(seconds(validate))
            start = time.perf_counter()
            with Report(folder, *sets, sets[1], vars(s), utils.save_predictions_as_imgs) as report:
                metrics, photo_dice = validate(report.begin(1, is_last=True))
                times["scores_and_queue"].append(time.perf_counter() - start)
                report.finish([{"epoch": number + 1, **metrics}], [photo_dice])
            times["pictures"].append(time.perf_counter() - start)
            for name, threads in (("full_size_one_thread", 1), ("full_size", predict.THREADS)):
                with mock.patch.object(predict, "THREADS", threads):
                    times[name].append(seconds(partial(full_size_dice, checkpoint, sets[1], device, s.batch_size)))
    return {f"{name}_ms": 1000 * statistics.median(values) / len(sets[1]) for name, values in times.items()}


# ---------------------------------------------------------------------------------------------------------------------
# recipe: what is learned


def classic_run(s: SimpleNamespace) -> list[tuple[float, float]]:
    """Return (seconds so far, validation Dice) after each epoch of the classic recipe: Adam at 1e-4, batches of 16."""
    device = Device(choose_device(s.device).device, torch.float32)
    size = s.image_height, s.image_width
    rotation = A.Rotate(limit=35, border_mode=cv2.BORDER_REFLECT_101, p=1.0)
    augmentation = A.Compose([rotation, A.HorizontalFlip(p=0.5), A.VerticalFlip(p=0.1)])
    train_set = CarvanaDataset(s.train_img_dir, s.train_mask_dir, size, augmentation, s.seed)
    val_set = CarvanaDataset(s.val_img_dir, s.val_mask_dir, size)
    for data in (train_set, val_set):
        data.prepare(s.cache_dir)
    workers = choose_num_workers(s.num_workers, device)
    train_loader, val_loader = utils.get_loaders(train_set, val_set, 16, workers, seed=s.seed)
    model = classic_network(s).to(device.device)
    optimizer = torch.optim.Adam(model.parameters(), 1e-4)
    start, found = time.perf_counter(), []
    for epoch in range(s.num_epochs):
        for images, masks in train_loader.epoch(epoch):
            classic_step(model, optimizer, *device.to(images, masks))
        dice = utils.check_accuracy(val_loader, model, device, train.image_losses)[0]["dice"]
        found.append((time.perf_counter() - start, dice))
    return found


def our_run(s: SimpleNamespace) -> list[tuple[float, float]]:
    """Return the same of train.py with its settings."""
    with tempfile.TemporaryDirectory() as folder:
        train.train(SimpleNamespace(**vars(s) | {"checkpoint": f"{folder}/c.pth.tar", "saved_images_dir": folder}))
        with Path(folder, "metrics.csv").open() as file:
            rows = list(csv.DictReader(file))
    elapsed = np.cumsum([float(row["seconds"]) for row in rows])
    return [(float(now), float(row["dice"])) for now, row in zip(elapsed, rows, strict=True)]


def benchmark_recipe(s: SimpleNamespace) -> dict[str, float]:
    """Compare both recipes on the same data and network, with three seeds each: mean Dice after NUM_EPOCHS epochs.

    error_ratio compares 1 - Dice. time_ratio compares the seconds until the classic recipe's last mean Dice, which ours
    may reach in this run or in one of an eighth of the NUM_EPOCHS. Both read the cache: decoding is in neither.
    """
    settle(s, utils.load_checkpoint)
    short = SimpleNamespace(**vars(s) | {"num_epochs": max(1, s.num_epochs // 8)})
    classic, ours, our_short = [], [], []
    for seed in range(3):
        s.seed = short.seed = seed
        classic.append(in_process(classic_run, s))
        ours.append(in_process(our_run, s))
        our_short.append(in_process(our_run, short))
    classic_dice, our_dice = (statistics.mean(run[-1][1] for run in runs) for runs in (classic, ours))
    classic_seconds = statistics.mean(run[-1][0] for run in classic)
    reached = [
        min((now for run in runs for now, dice in run if dice >= classic_dice), default=float("inf"))
        for runs in zip(ours, our_short, strict=True)
    ]
    return {
        **{f"classic_dice_seed_{seed}": run[-1][1] for seed, run in enumerate(classic)},
        **{f"our_dice_seed_{seed}": run[-1][1] for seed, run in enumerate(ours)},
        "classic_dice": classic_dice,
        "our_dice": our_dice,
        "classic_seconds": classic_seconds,
        "our_seconds_to_classic_dice": statistics.mean(reached),
        "error_ratio": (1 - our_dice) / (1 - classic_dice),
        "time_ratio": statistics.mean(reached) / classic_seconds,
    }


# ---------------------------------------------------------------------------------------------------------------------
# predict: from photos to masks


def predict_plainly(checkpoint: Path, photos: list[Path], output_dir: Path, device: torch.device) -> None:
    """Predict the plain way: one photo at a time, fp32, decoded in full, nearest neighbour, PNG as Pillow writes it."""
    state = utils.load_checkpoint(checkpoint)
    model = build_network(state["model"]).eval().to(device)
    model.load_state_dict(state["state_dict"])
    settings = state["preprocessing"]
    mean, std = np.float32(settings["mean"]), np.float32(settings["std"])
    for photo in photos:
        image = Image.open(photo).convert("RGB")
        pixels = np.array(image.resize((settings["width"], settings["height"]), Image.Resampling.BILINEAR))
        batch = torch.from_numpy((pixels / np.float32(255) - mean) / std).permute(2, 0, 1)[None].contiguous()
        with torch.no_grad():
            prediction = torch.sigmoid(model(batch.to(device)))[0, 0] > 0.5
        mask = Image.fromarray(prediction.cpu().numpy().astype(np.uint8) * 255)
        mask.resize(image.size, Image.Resampling.NEAREST).save(output_dir / f"{photo.stem}_mask.png")


def measure_prediction(
    is_plain: bool, checkpoint: Path, photos: list[Path], output_dir: Path, device: str
) -> tuple[float, float]:
    """Measure the seconds from the checkpoint to the last mask, and this process's peak of memory in MB."""

    def work(photos: list[Path]) -> None:
        if is_plain:
            predict_plainly(checkpoint, photos, output_dir, choose_device(device).device)
        else:
            with redirect_stdout(io.StringIO()):
                flags = "--checkpoint", str(checkpoint), "--output-dir", str(output_dir), "--device", device
                predict.main([*map(str, photos), *flags])

    work(photos[:1])
    return seconds(lambda: work(photos)), peak_memory()


def benchmark_predict(settings: SimpleNamespace) -> dict[str, float]:
    """Measure photos per second and the peak of memory, from 1918 x 1280 JPEGs to masks, with the default network."""
    measured = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = Path(folder, "network.pth.tar")
        save_random_network(network_config(settings), settings, checkpoint)
        draw_dataset(Path(folder, "data"), train_cars=1, val_cars=1)
        photos = sorted(Path(folder, "data").glob("*_images/*.jpg"))
        for number in range(ROUNDS):
            for is_plain in measured:
                output_dir = Path(folder, f"{number}_{is_plain}")
                output_dir.mkdir()
                work = measure_prediction, is_plain, checkpoint, photos, output_dir, settings.device
                measured[is_plain].append(in_process(*work))
    (plain, plain_memory), (ours, our_memory) = (np.median(values, axis=0) for values in measured.values())
    return {
        "plain_photos_per_second": len(photos) / plain,
        "photos_per_second": len(photos) / ours,
        "ratio": plain / ours,
        "plain_memory_mb": plain_memory,
        "memory_mb": our_memory,
    }


def describe_machine(device: torch.device) -> dict[str, str | int]:
    """Return what figures depend on: CPU's or GPU's name, cores, the instruction sets that matter here, and PyTorch."""
    cpu = platform.processor() or platform.machine()
    flags = set()
    if Path("/proc/cpuinfo").exists():
        fields = dict(re.findall(r"^(.+?)\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE))
        cpu, flags = fields.get("model name", cpu), set(fields.get("flags", fields.get("Features", "")).split())
    wanted = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "bf16", "sve")
    return {
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type.replace("cpu", "none"),
        "cpu": cpu,
        "cores": torch.get_num_threads(),
        "instructions": " ".join(flag for flag in wanted if flag in flags),
        "torch": torch.__version__,
    }


BENCHMARKS = {
    "loader": benchmark_loader,
    "train": benchmark_train,
    "validate": benchmark_validate,
    "recipe": benchmark_recipe,
    "predict": benchmark_predict,
}


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.benchmark", __doc__)
    parser.add_argument("what", choices=BENCHMARKS)
    parser.add_argument("--json", type=Path, help="writes the figures to this file, too")
    args, flags = parser.parse_known_args(argv)
    if args.json and not args.json.absolute().parent.is_dir():
        raise UserError(f"--json {args.json}: its folder does not exist, create it first")
    settings = parse_settings(vars(train), flags)
    check_settings(settings, size_multiple, processes.WORLD_SIZE)
    machine = describe_machine(choose_device(settings.device).device)
    print("\n".join(f"{name:13} {value}" for name, value in machine.items()), flush=True)
    figures = BENCHMARKS[args.what](settings)
    for name, value in figures.items():
        print(f"{args.what + '.' + name:52} {value:10.4f}")
    if args.json:
        with written_whole(args.json) as temporary:
            temporary.write_text(json.dumps({"machine": machine, args.what: figures}, indent=2))


if __name__ == "__main__":
    run(main)
