"""Export a network that train.py has trained to one ONNX file, with its preprocessing inside, and check the file.

    python -m tools.export                                        # my_checkpoint_best.pth.tar -> unet.onnx
    python -m tools.export --checkpoint other_best.pth.tar --output other.onnx

The file takes "images", uint8 RGB (N, height, width, 3) at the network's size, for any N, and gives "probabilities",
float32 (N, height, width). Its metadata say height, width, threshold and validation Dice. docs/export.md uses it.
"""

import argparse
import importlib
import itertools
import math
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

import utils
from dataset import cut
from machinery.decoding import NUM_THREADS, VOID, in_threads, large_ones_wait, read_sample
from machinery.errors import UserError, counted, run
from machinery.files import MASK_SUFFIX, check_writable, find_pairs, saving
from machinery.sample_data import VIEWS, draw_photo
from machinery.settings import Parser
from predict import Predictor, load_model
from utils import confusion, dice_scores

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
THRESHOLD = 0.5  # the probability above which a pixel is foreground
PHOTOS = 128  # that the file is compared on at most, spread evenly over the validation set
BATCH_SIZE = 8  # of the comparison
SECONDS = 4  # that both together compute at least, so that short runs do not measure noise
TOLERANCE = 0.0005  # between the Dice of PyTorch and of onnxruntime

# In the metadata, so that no other file is overwritten. Files have had this text since the command was export.py.
SOFTWARE = "export.py (U-Net for Carvana)"


class Exported(nn.Module):
    """A trained network and its preprocessing: uint8 RGB (N, H, W, 3) -> probabilities, float32 (N, H, W)."""

    def __init__(self, model: Predictor) -> None:
        super().__init__()
        self.network = model.network
        for name, values in (("mean", model.device.mean), ("std", model.device.std)):
            self.register_buffer(name, 255 * torch.tensor(values))

    def forward(self, images: Tensor) -> Tensor:
        images = (images - self.mean) / self.std
        return self.network(images.permute(0, 3, 1, 2))[:, 0].sigmoid()


def to_onnx(model: Predictor, metadata: dict[str, object]) -> bytes:
    """Return the contents of an ONNX file, whose batch is dynamic, for a network in fp32 on the CPU."""
    images = torch.zeros(2, *model.window, 3, dtype=torch.uint8)  # of one image torch would make a constant
    try:
        with warnings.catch_warnings(), torch.backends.cudnn.flags(allow_tf32=True):  # else torch's exporter fails
            warnings.simplefilter("ignore")  # torch's, of its own deprecated parts
            program = torch.onnx.export(
                Exported(model).eval(),
                (images,),
                input_names=["images"],
                output_names=["probabilities"],
                dynamic_shapes=({0: torch.export.Dim("batch")},),
                dynamo=True,
                verbose=False,
            )
    except ImportError as error:  # of a part of onnxscript that is as new as torch
        raise UserError(f"onnxscript is too old for this torch ({error}): pip install --upgrade onnxscript") from error
    program.model.metadata_props.update({name: str(value) for name, value in metadata.items()})
    return program.model_proto.SerializeToString()


def require_packages() -> None:
    """Import what PyTorch's exporter and the comparison need. Raises UserError where something is missing."""
    for name in PACKAGES:
        try:
            importlib.import_module(name)
        except ImportError as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"tools.export needs {name} ({reason}): pip install {' '.join(PACKAGES)}") from error


# ---------------------------------------------------------------------------------------------------------------------
# The comparison


def comparison_set(model: Predictor, settings: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return images uint8 (N, H, W, 3) and masks uint8 (N, H, W) in {0, 1, VOID}: of validation, else drawn."""
    try:
        folders = [Path(settings[name]) for name in ("val_img_dir", "val_mask_dir")]
        pairs = find_pairs(*folders, settings.get("mask_suffix", MASK_SUFFIX))
    except (KeyError, UserError) as error:
        print(f"The validation photos are not there ({error}): {VIEWS} drawn cars take their place.")
        drawn = [draw_photo(0, 0, view, *model.window)[1:] for view in range(VIEWS)]
        return np.stack([image for image, _ in drawn]), np.stack([mask > 0 for _, mask in drawn]).astype(np.uint8)

    def read(image_path: Path, mask_path: Path) -> tuple[np.ndarray, np.ndarray]:
        with large_ones_wait(image_path):
            image, mask, *_ = read_sample(image_path, mask_path, model.size, model.rule)
            return cut(image, mask, np.subtract(mask.shape, model.window) // 2, model.window)

    chosen = pairs[:: math.ceil(len(pairs) / PHOTOS)]
    print(f"Comparing on {len(chosen)} of {counted(len(pairs), 'photo')} in {folders[0]}.")
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        samples = [future.result() for future in in_threads(pool, 2 * NUM_THREADS, read, chosen)]
    return tuple(np.stack(parts) for parts in zip(*samples, strict=True))


def open_session(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function, images -> probabilities, that runs an ONNX file on as many cores as PyTorch takes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return lambda images: session.run(None, {"images": images})[0]


def side_by_side(runs: dict[str, Callable], images: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return each run's probabilities, float32 (N, H, W), and its images/s; they take turns, batch by batch."""
    batches = [images[start : start + BATCH_SIZE] for start in range(0, len(images), BATCH_SIZE)]
    results, seconds, computed = {name: [] for name in runs}, dict.fromkeys(runs, 0.0), 0
    for run_ in runs.values():
        run_(batches[0])  # the first one takes longer
    for number in itertools.count():
        if number >= len(batches) and sum(seconds.values()) >= SECONDS:
            break
        batch = batches[number % len(batches)]
        for name, run_ in runs.items():
            start = time.perf_counter()
            probabilities = run_(batch)
            seconds[name] += time.perf_counter() - start
            if number < len(batches):
                results[name].append(probabilities)
        computed += len(batch)
    return {name: np.concatenate(parts) for name, parts in results.items()}, {
        name: computed / taken for name, taken in seconds.items()
    }


def mean_dice(probabilities: np.ndarray, masks: np.ndarray) -> float:
    """Return the mean Dice of probabilities, (N, H, W), against masks in {0, 1, VOID}."""
    parts = probabilities > THRESHOLD, masks == 1, masks != VOID
    tp, fp, fn, _ = (count.double() for count in confusion(*map(torch.from_numpy, parts)))
    return dice_scores(tp, fp, fn).mean().item()


def compare(content: bytes, model: Predictor, settings: dict, output: Path) -> None:
    """Print Dice and speed of PyTorch and onnxruntime. Raises UserError where Dice differs by more than TOLERANCE."""
    images, masks = comparison_set(model, settings)
    runs = {
        "PyTorch": lambda batch: torch.from_numpy(model(batch)).sigmoid().numpy(),
        "onnxruntime": open_session(content),
    }
    results, speeds = side_by_side(runs, images)
    dice = {name: mean_dice(probabilities, masks) for name, probabilities in results.items()}
    print(f"{'fp32, on the CPU':<18}{'dice':>10}{'images/s':>10}")
    for name in runs:
        print(f"{name:<18}{dice[name]:10.4f}{speeds[name]:10.1f}")
    ours, theirs = (probabilities > THRESHOLD for probabilities in results.values())
    print(f"{1e4 * (ours != theirs).mean():.2f} of 10,000 pixels differ between their masks.")
    if not abs(dice["PyTorch"] - dice["onnxruntime"]) <= TOLERANCE:  # nan is not, either
        raise UserError(
            f"{output} was not written, because Dice is {dice['onnxruntime']:.4f} with onnxruntime and "
            f"{dice['PyTorch']:.4f} with PyTorch: pip install --upgrade torch {' '.join(PACKAGES)}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Parse and check the command line. Raises UserError."""
    parser = Parser("python -m tools.export", __doc__)
    parser.add_argument("--checkpoint", default="my_checkpoint_best.pth.tar", help="[my_checkpoint_best.pth.tar]")
    parser.add_argument("--output", type=Path, default=Path("unet.onnx"), help="[unet.onnx]")
    args = parser.parse_args(argv)
    if args.output.suffix != ".onnx":
        raise UserError(f"--output is {args.output}: give it the ending .onnx")
    return args


def is_ours(path: Path) -> bool:
    """Return whether a file is one that tools.export has written."""
    import onnx

    with suppress(Exception):  # protobuf raises many kinds of errors on other files
        metadata = onnx.load(path, load_external_data=False).metadata_props
        return any(entry.key == "software" and entry.value == SOFTWARE for entry in metadata)
    return False


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    print(f"Exporting {args.checkpoint} to {args.output}, and comparing both: a few minutes.", flush=True)
    require_packages()
    model, checkpoint = load_model(args.checkpoint, "cpu", "fp32"), utils.load_checkpoint(Path(args.checkpoint))
    check_writable(args.output.parent, "--output")
    if args.output.exists() and not is_ours(args.output):
        raise UserError(f"{args.output} was not written by tools.export: move it away, or choose another --output")

    metadata = {"software": SOFTWARE, "height": model.window[0], "width": model.window[1], "threshold": THRESHOLD}
    if isinstance(model.size, float):
        metadata["scale"] = model.size  # of photos, of which the file takes a part of height x width
    if checkpoint.get("history"):
        metadata["dice"] = f"{checkpoint['history'][-1]['dice']:.4f}"  # on the validation photos, in training
    content = to_onnx(model, metadata)
    compare(content, model, checkpoint.get("settings", {}), args.output)
    with saving(args.output) as temporary:
        temporary.write_bytes(content)
    print(f"{args.output} has {len(content) / 1e6:.1f} MB.")


if __name__ == "__main__":
    run(main)
