"""Cut the objects out of photos with a network that train.py has trained, at the photos' original size.

    python predict.py photo.jpg folder 'more/*.png'               # predictions/<name>_mask.png: 255 on objects, else 0
    python predict.py folder --cutout --background white          # the object without its background, and on another
    python predict.py data/val_images --mask-dir data/val_masks   # and scores against the truth, worst photos first
    python predict.py folder --labelme --label car                # outlines, to be corrected in LabelMe
    python predict.py folder --objects --min-area 20              # objects.csv: how many, how large, where
    python predict.py folder --checkpoint a.pth.tar b.pth.tar     # the mean of several networks' probabilities
    python predict.py test --submission submission.csv.gz         # Kaggle's format; continues where it was stopped
    torchrun --nproc_per_node=4 predict.py folder                 # shares the photos among four processes

In Python: model = load_model("my_checkpoint_best.pth.tar"), then predict(model, "photo.jpg") gives probabilities,
predict_files(model, "folder") those of many photos, and objects(probabilities) the rows of objects.csv.
"""

import argparse
import math
import os
import re
import sys
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from functools import partial
from itertools import islice
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # threads wait briefly; else two runs take five times as long

import cv2
import numpy as np
import torch
from PIL import Image
from torch import nn
from tqdm import tqdm

import utils
from machinery.decoding import (
    NUM_THREADS,
    VOID,
    Rule,
    Size,
    decode_mask,
    in_threads,
    large_ones_wait,
    read_image,
    rule_from,
    source_of,
)
from machinery.device import Device, choose_device, memory_errors
from machinery.errors import UserError, counted, run
from machinery.files import (
    MASK_SUFFIX,
    check_writable,
    lock_of,
    locked,
    matches_of,
    remove_leftovers,
    save_metrics,
)
from machinery.formats import Source
from machinery.objects import Objects
from machinery.objects import objects as objects  # `from predict import objects` works
from machinery.outputs import (
    COCO_HEAD,
    OUTPUTS,
    Found,
    Prediction,
    Submission,
    check_table,
    is_written,
    load_background,
    made_by_hand,
    write_found,
    write_labelme,
    write_output,
)
from machinery.photos import Photo, add_masks, find_photos, without_outlined
from machinery.processes import (
    RANK,
    WORLD_SIZE,
    all_gather_object,
    all_reduce_sum,
    broadcast_object,
    process_group,
    progress,
)
from machinery.samples import Samples
from machinery.settings import Parser, check_ranges
from machinery.shapes import rle_encode
from model import build_network, check_logits

THREADS = min(8, NUM_THREADS)  # that decode and write while the network computes


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Predictor(nn.Module):
    """A trained network and its preprocessing: uint8 RGB (N, H, W, 3) -> logits, float32 (N, H, W), both in numpy.

    `size` is the (height, width) at which it sees photos, or their share of the original one; `rule` what files mean;
    `photo_size` the (height, width) of the photos that it was trained on.
    """

    def __init__(self, checkpoint: dict, device: Device) -> None:
        super().__init__()
        before = checkpoint["preprocessing"]
        self.window = before["height"], before["width"]  # of what it sees at once, a crop or a whole photo
        self.size: Size = before.get("scale") or self.window
        self.rule, self.photo_size = rule_from(checkpoint["rule"]), checkpoint["photo_size"]
        self.network = build_network(checkpoint["model"]).eval()
        self.network.load_state_dict(checkpoint["state_dict"])
        if hasattr(self.network, "fold_batch_norm"):
            self.network.fold_batch_norm()
            self.network.to(device.precision)
            for layer in self.network.modules():
                if getattr(layer, "running_mean", None) is not None:
                    layer.float()  # BatchNorm that is not folded, as in an encoder, would be rounded too much
        self.network.register_forward_hook(check_logits)
        self.network.to(device.device, memory_format=device.memory_format)
        self.device = device

    @property
    def tile(self) -> tuple[int, int] | None:
        """Return the (height, width) of the tiles in which the network sees larger photos, or None."""
        return getattr(self.network, "tile", None)

    @property
    def value_range(self) -> tuple[float | None, float | None]:
        """Return what becomes 0 and 255 in photos with more than 8 bits a channel."""
        return (self.rule.low, self.rule.high) if self.rule else (None, None)

    @property
    def has_large_inputs(self) -> bool:
        """Return whether photos come at their original sizes, which differ."""
        return bool(self.tile) or isinstance(self.size, float)

    @property
    def learned(self) -> str | None:
        """Return which part of the masks it has learned to find; None where nothing is known of it."""
        if self.rule is None or (self.rule.chosen is None and self.rule.is_labels is None):
            return None
        if self.rule.chosen is not None:
            return f"the values {', '.join(f'{value:g}' for value in self.rule.chosen)}"
        return "all values but 0" if self.rule.is_labels else "what is bright"

    @torch.inference_mode()
    def forward(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        """Return logits; with tta the mean of those of each image and of its mirror image."""
        batch = self.device.normalised(torch.from_numpy(images))
        with self.device.autocast():
            logits = self.network(batch).float()
            if tta:
                logits = (logits + self.network(batch.flip(-1)).float().flip(-1)) / 2
        if not logits.isfinite().all():
            advice = "choose another checkpoint, or --device cpu if this GPU's fp16 has too small a range"
            raise UserError(f"the network gives nan or infinity, which are no numbers: {advice}")
        return logits[:, 0].cpu().numpy()

    def logits(self, images: list[np.ndarray], tta: bool) -> Sequence[np.ndarray]:
        """Return the logits of images from `read`."""
        return self(np.stack(images), tta)

    def read(self, source: Source) -> np.ndarray:
        """Return a photo as the network sees it, uint8 (h, w, 3)."""
        return read_image(source, self.size, self.rule)

    def at_original_size(self, source: Source, image: np.ndarray, logits: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return a photo, uint8 (H, W, 3), and its probabilities, float32 (H, W), from `read`'s image and logits."""
        photo = image if self.size == 1 else read_image(source, None, self.rule)
        return photo, enlarge(logits, image, photo)


class Ensemble:
    """Several networks, used like one Predictor: probabilities are the mean of theirs at original size.

    `read` gives a list of what each network sees of a photo, and `logits` gives their logits of each photo.
    """

    def __init__(self, networks: list[Predictor]) -> None:
        self.networks, self.rule = networks, networks[0].rule

    @property
    def has_large_inputs(self) -> bool:
        """Return whether photos come at their original sizes, which differ."""
        return any(network.has_large_inputs for network in self.networks)

    def read(self, source: Source) -> list[np.ndarray]:
        """Return a photo as each network sees it; it is decoded once for all that see the same."""
        ways = {(network.size, network.value_range): network for network in self.networks}
        images = {way: network.read(source) for way, network in ways.items()}
        return [images[network.size, network.value_range] for network in self.networks]

    def logits(self, images: list[list[np.ndarray]], tta: bool) -> list[tuple[np.ndarray, ...]]:
        """Return each network's logits of each photo."""
        each = zip(self.networks, zip(*images, strict=True), strict=True)
        return list(zip(*(network.logits(list(own), tta) for network, own in each), strict=True))

    def at_original_size(
        self, source: Source, images: list[np.ndarray], logits: Sequence[np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return a photo, uint8 (H, W, 3), and the mean of its probabilities, float32 (H, W)."""
        photos = {n.value_range: image for n, image in zip(self.networks, images, strict=True) if n.size == 1}
        total = np.float32(0)
        for network, image, own in zip(self.networks, images, logits, strict=True):
            if network.value_range not in photos:
                photos[network.value_range] = read_image(source, None, network.rule)
            probabilities = enlarge(own, image, photos[network.value_range])
            total = np.add(probabilities, total, out=probabilities)
        return photos[self.networks[0].value_range], np.divide(total, len(self.networks), out=total)


def load_model(
    checkpoint: str | Path | Sequence[str | Path], device: str = "auto", precision: str = "auto"
) -> Predictor | Ensemble:
    """Return a network with its preprocessing from a checkpoint of train.py, or the Ensemble of a list of them.

    Raises UserError for what is no checkpoint, and for networks that have learned different things.
    """
    if isinstance(checkpoint, str | os.PathLike):
        trained = utils.load_checkpoint(Path(checkpoint))
        normalisation = {name: trained["preprocessing"][name] for name in ("mean", "std")}
        chosen = choose_device(device, precision, **normalisation)
        torch.backends.cudnn.allow_tf32 = chosen.precision != torch.float32
        return Predictor(trained, chosen)

    if not checkpoint:
        raise UserError("the list of checkpoints is empty: give one at least")
    networks = [load_model(path, device, precision) for path in checkpoint]
    known = {learned: path for network, path in zip(networks, checkpoint, strict=True) if (learned := network.learned)}
    if len(known) > 1:
        (one, first), (other, second) = list(known.items())[:2]
        raise UserError(
            f"{first} has learned to find {one} of its masks, and {second} {other}: give networks that were trained on "
            "masks of the same kind"
        )
    return Ensemble(networks) if len(networks) > 1 else networks[0]


def predict(model: Predictor | Ensemble, image: str | Path | Image.Image | np.ndarray, tta: bool = False) -> np.ndarray:
    """Return probabilities of the foreground, float32 (H, W), at an image's own size.

    The image is a file's path, a PIL image, or an array, uint8: grey (H, W), RGB (H, W, 3) or RGBA (H, W, 4). EXIF
    turns it upright, and what is transparent lies on white. Raises UserError for anything else.
    """
    source = source_of(image)
    small = model.read(source)
    return model.at_original_size(source, small, model.logits([small], tta)[0])[1]


def predict_files(
    model: Predictor | Ensemble, *inputs: str | Path, batch_size: int = 8, tta: bool = False
) -> Iterator[tuple[Path, np.ndarray]]:
    """Yield the path and `predict`'s probabilities of each photo: files, folders with all below them, and patterns.

    Threads decode and enlarge beside the network, as in the command. A photo that cannot be read is named and left out;
    after the last one, UserError says how many these are.
    """
    photos, failures = find_photos([os.fspath(given) for given in inputs]), []

    def finish(photo: Photo, image: np.ndarray, logits: np.ndarray) -> tuple[Path, np.ndarray]:
        with large_ones_wait(photo.path):
            return photo.path, model.at_original_size(photo.path, image, logits)[1]

    yield from predict_all(photos, model, partial(decode, model=model), finish, batch_size, tta, failures)
    check_failures(len(failures), len(photos))


def enlarge(logits: np.ndarray, image: np.ndarray, photo: np.ndarray) -> np.ndarray:
    """Return probabilities at a photo's original size, float32 (H, W), whose edges follow the photo's.

    A fast guided filter (He and Sun 2015, https://arxiv.org/abs/1505.00996): over 5 x 5 pixels of the network each, the
    probabilities are fitted by a linear function of the brightness, which is enlarged, and applied to the photo. That
    took a fifth of the quick start's error of that day: Dice 0.9852, with logits enlarged linearly 0.9811. Photos of
    less than twice the network's size would lose by it, and get their logits enlarged linearly.

    Args:
        logits, image: the network's output float32 (h, w), and its input uint8 (h, w, 3).
        photo: uint8 (H, W, 3).
    """
    if photo.size < 3.9 * image.size:  # 4, but half a photo's size was rounded
        how = cv2.INTER_AREA if photo.size < image.size else cv2.INTER_LINEAR
        enlarged = cv2.resize(logits, photo.shape[1::-1], interpolation=how) if image.shape != photo.shape else logits
        return torch.from_numpy(enlarged).sigmoid().numpy()
    probabilities = torch.from_numpy(logits).sigmoid().numpy()
    mean = partial(cv2.blur, ksize=(5, 5))
    brightness = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float32)
    variance = mean(brightness**2) - mean(brightness) ** 2
    covariance = mean(brightness * probabilities) - mean(brightness) * mean(probabilities)
    slope = covariance / (variance + 15)  # 15 is about 4 squared: what varies by less than 4 levels is no edge
    offset = mean(probabilities) - slope * mean(brightness)

    enlarged = cv2.resize(mean(slope), photo.shape[1::-1])
    brightness = cv2.cvtColor(photo, cv2.COLOR_RGB2GRAY)
    enlarged *= cv2.GaussianBlur(brightness, (5, 5), 0)  # without its grain, which would fray the edges
    enlarged += cv2.resize(mean(offset), photo.shape[1::-1])
    return enlarged.clip(0, 1, out=enlarged)  # in place: a large photo has large arrays


# ---------------------------------------------------------------------------------------------------------------------
# The pipeline: threads decode, the network predicts, threads write


def decode(photo: Photo, model: Predictor | Ensemble) -> np.ndarray:
    """Return the network's input."""
    with large_ones_wait(photo.path):
        return model.read(photo.path)


def predict_all(
    items: Sequence,
    model: Predictor | Ensemble,
    decode: Callable[[object], np.ndarray],
    finish: Callable[[object, np.ndarray, np.ndarray], object],
    batch_size: int,
    tta: bool = False,
    failures: list[str] | None = None,
) -> Iterator:
    """Decode, predict and finish items side by side: threads work around the network. Yield finish's results in order.

    Args:
        decode: item -> the network's input, uint8 (h, w, 3); with an Ensemble a list of them, and of logits.
        finish: item, that input, and its logits, float32 (h, w) -> a result.
        failures: where UserErrors are noted, of items which are then left out; without it they are raised.
    """
    batch_size = math.ceil(len(items) / max(1, math.ceil(len(items) / batch_size)))  # 9 photos: 5 and 4, not 8 and 1
    threads, depth = THREADS, THREADS + batch_size
    if model.has_large_inputs:  # which differ in size: few wait
        batch_size, threads, depth = 1, 2, 2
    with ThreadPoolExecutor(threads) as pool:
        decoded = in_threads(pool, depth, lambda item: (item, decode(item)), ((item,) for item in items))
        logits = run_network(model, without_failures(decoded, failures), batch_size, tta)
        yield from without_failures(in_threads(pool, depth, finish, logits), failures)


def without_failures(futures: Iterable[Future], failures: list[str] | None) -> Iterator:
    """Yield the futures' results; where `failures` is a list, one that raises UserError is named and left out."""
    for future in futures:
        try:
            result = future.result()
        except UserError as error:
            if failures is None:
                raise
            failures.append(str(error))
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        else:
            yield result


def run_network(model: Predictor | Ensemble, decoded: Iterator, batch_size: int, tta: bool) -> Iterator[tuple]:
    """Turn (item, image) into (item, image, logits), in batches of equal size.

    The last one is filled up with copies of its last image: a network is fastest with one shape throughout.
    """
    while batch := list(islice(decoded, batch_size)):
        images = [image for _, image in batch]
        logits = model.logits(images + images[-1:] * (batch_size - len(images)), tta)
        for (item, image), item_logits in zip(batch, logits, strict=False):
            yield item, image, item_logits


def write_all(
    photos: list[Photo],
    model: Predictor | Ensemble,
    args: argparse.Namespace,
    submission: Submission | None,
    found: Found | None,
) -> tuple[list[str], list[dict]]:
    """Predict photos and write what is asked for. Return what failed, a sentence each, and `finish`'s rows."""
    failures, all_rows = [], []
    write = partial(finish, model=model, args=args)
    with progress(total=len(photos), desc="predicting", unit="photo") as bar:
        read = partial(decode, model=model)
        results = predict_all(photos, model, read, write, args.batch_size, args.tta, failures)
        for photo, rows, runs, measured in results:
            all_rows += [{"photo": str(photo.path)} | row for row in rows]
            if submission:
                submission.add(photo.path, runs)
            if found:
                found.add({"photo": str(photo.path)} | measured)
            if args.objects:
                areas = [row["area_px"] for row in measured["rows"]]
                tqdm.write(f"{photo.path}: {len(areas)} object{'s' * (len(areas) != 1)}, {sum(areas)} pixels")
            bar.update()
    return failures, all_rows


def finish(
    photo: Photo, image: np.ndarray, logits: np.ndarray, model: Predictor | Ensemble, args: argparse.Namespace
) -> tuple:
    """Write all that is asked for, from the network's input, uint8 (h, w, 3), and output, float32 (h, w).

    Return the photo, rows of its scores, its uncertain share and its outlines that are kept, its run lengths and its
    objects, as far as they are asked for.
    """
    with large_ones_wait(photo.path):
        full, probabilities = model.at_original_size(photo.path, image, logits)
        prediction = Prediction(photo.path, full, probabilities, args, args.min_area or 0, args.largest)
        runs = rle_encode(prediction.mask) if args.submission else None
        measured = measure(prediction, args) if args.objects or args.coco else None
        for kind in args.outputs:
            write_output(args.output_dir, photo.name, kind, prediction)
        rows = [score(prediction.mask, photo.mask, model.rule, prediction.specks)] if photo.mask else []
        shapes = args.output_dir / f"{photo.name}.json"
        if args.labelme and (kept := made_by_hand(photo.path, shapes)):
            rows.append({"kept": str(kept)})
        elif args.labelme:
            min_area = 10 if args.min_area is None else args.min_area
            write_labelme(shapes, prediction.mask, photo.path, args.label, min_area)
            rows = rows or [{"uncertain": uncertain_share(prediction.probabilities)}]
    return photo, rows, runs, measured


def measure(prediction: Prediction, args: argparse.Namespace) -> dict:
    """Return what Found keeps of a photo's objects. With --objects, the overlay shows their numbers."""
    found = Objects(prediction.mask, prediction.probabilities)
    prediction.numbered = found if args.objects else None
    rows, annotations = found.rows() if args.objects else [], list(found.annotations()) if args.coco else []
    return {"size": prediction.mask.shape, "rows": rows, "annotations": annotations}


# ---------------------------------------------------------------------------------------------------------------------
# Scores


def score(mask: np.ndarray, path: Path, rule: Rule | None, specks: np.ndarray | None = None) -> dict[str, float]:
    """Return the scores of a mask, uint8 (H, W) in {0, 255}, against the true one in a file, as scores.csv has them.

    They are those of utils.image_scores, Dice and IoU first, and boundary F1. Where --min-area or --largest
    has removed `specks`, bool (H, W), the Dice with them is there, too. Raises UserError if sizes differ.
    """
    true_mask = decode_mask(path, None, rule)[0]
    if true_mask.shape != mask.shape:
        sizes = [f"{width} x {height}" for height, width in (true_mask.shape, mask.shape)]
        raise UserError(f"{path} is {sizes[0]}, but its photo {sizes[1]}: make the mask again at that size")
    pixels = mask > 0, true_mask == 1, true_mask != VOID
    counts = utils.confusion(*(torch.from_numpy(part)[None] for part in pixels))
    scores = {name: value.item() for name, value in utils.image_scores(*(part.double() for part in counts)).items()}
    first = {name: scores[name] for name in ("dice", "iou") if name in scores}
    if specks is not None:
        counts = utils.confusion(*(torch.from_numpy(part)[None] for part in (pixels[0] | specks, *pixels[1:])))
        scores["dice_with_specks"] = utils.dice_scores(*counts[:3]).item()
    return first | scores | {"boundary_f1": utils.boundary_f1(*pixels)}


def uncertain_share(probabilities: np.ndarray) -> float:
    """Return the share of what may be the object (above 0.2) that is not certain (below 0.8); 0 where nothing may be.

    Probabilities are float32 (H, W). An object that the threshold loses altogether counts, too.
    """
    possible, certain = (np.count_nonzero(probabilities >= limit) for limit in (0.2, 0.8))
    return 1 - certain / possible if possible else 0.0


def full_size_dice(checkpoint: Path, val_set: Samples, device: Device, batch_size: int) -> tuple[float, float, float]:
    """Return the mean Dice of validation photos at their original size, as predict.py --mask-dir measures it.

    At threshold 0.5; then the best of 19 thresholds, and the mean Dice at that. The processes share the photos. All are
    nan, with a line, where a file has broken or vanished since it was decoded for training.
    """
    model = Predictor(broadcast_object(utils.load_checkpoint, checkpoint), device)

    def decode(index: int) -> np.ndarray:
        return val_set.sample(index)[0]

    def dice(index: int, image: np.ndarray, logits: np.ndarray) -> np.ndarray:
        image_path, mask_path = val_set.pairs[index]
        with large_ones_wait(image_path):
            photo = image if val_set.size == 1 else read_image(image_path, None, val_set.rule)
            mask = decode_mask(mask_path, None, val_set.rule)[0]
            return utils.dice_at_thresholds(enlarge(logits, image, photo), mask == 1, mask != VOID)

    mine, total = range(len(val_set.pairs))[RANK::WORLD_SIZE], np.zeros(19)
    with progress(total=len(mine), desc="at original size", unit="photo") as bar:
        try:
            for thresholds in predict_all(mine, model, decode, dice, batch_size):
                total += thresholds
                bar.update()
        except UserError as error:
            tqdm.write(f"No Dice at the photos' original size: {error}")
            total[:] = np.nan  # the sum of all processes, too
    means = all_reduce_sum(torch.from_numpy(total)).numpy() / len(val_set.pairs)
    best = max(range(len(means)), key=lambda number: (means[number], -abs(number - 9)))  # of equals, nearest to 0.5
    return means[9], (best + 1) / 20, means[best]


def print_scores(scores: list[dict]) -> None:
    """Print the five worst photos, which come first, and the mean."""
    widths = {name: max(16, len(name) + 2) for name in scores[0] if name != "photo"}
    print("".join(f"{name:>{width}}" for name, width in widths.items()))
    mean = {name: np.mean([row[name] for row in scores]) for name in widths}
    for row in (*scores[:5], mean | {"photo": f"mean of {len(scores)}"}):
        print("".join(f"{row[name]:{width}.4f}" for name, width in widths.items()) + f"  {row['photo']}")


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line's arguments, checked. Raises UserError."""
    parser = Parser("python predict.py", __doc__)
    add = parser.add_argument
    add("inputs", nargs="*", metavar="photo", help="photos, folders with all below them, 'patterns*'")
    add("--output-dir", type=Path, default=Path("predictions"), help="[predictions]")
    for kind, (_, text) in OUTPUTS.items():
        takes_value = {"metavar": "COLOUR|IMAGE"} if kind == "background" else {"action": "store_true"}
        add(f"--{kind}", help=f"<name>_{kind}: {text}".replace("%", "%%"), **takes_value)
    add("--labelme", action="store_true", help="<name>.json: the object's outlines, to correct them in LabelMe")
    add("--label", default="object", help="the object's label for LabelMe and COCO [object]")
    small = "smaller objects are left out everywhere, in pixels; in LabelMe smaller holes, too [0, in LabelMe 10]"
    add("--min-area", type=int, metavar="N", help=small)
    add("--largest", action="store_true", help="only the largest object; all others are left out everywhere")
    add("--objects", action="store_true", help="objects.csv: a row for each object; their numbers on --overlay")
    add("--coco", type=Path, metavar="FILE.json", help="the objects of all photos as annotations in COCO's format")
    add("--submission", type=Path, metavar="FILE", help="submission.csv or .csv.gz for Kaggle, instead of masks")
    add("--mask-dir", type=Path, help="true masks: scores at the photos' original size, in <output-dir>/scores.csv")
    add("--mask-suffix", default=MASK_SUFFIX, help="the mask of xxx.jpg is xxx_mask.gif (or .png, ...) [_mask]")
    several = "several networks' probabilities are averaged [my_checkpoint_best.pth.tar]"
    add("--checkpoint", nargs="+", action="extend", metavar="FILE", help=several)
    add("--threshold", type=float, default=0.5, help="the probability above which a pixel is foreground [0.5]")
    add("--tta", action="store_true", help="averages photo and mirror image: twice the time, a little better")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="the network sees photos at this size [training's]")
    tiles = "it sees N x N of them at once, at --size or their own [512]"
    add("--tile", type=int, nargs="?", const=512, metavar="N", help=tiles)
    add("--batch-size", type=int, default=8, help="photos that the network sees at once [8]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first that is there]")
    args = parser.parse_args(argv)
    args.checkpoint, photos = split_checkpoints(args.checkpoint or ["my_checkpoint_best.pth.tar"])
    args.inputs += photos
    if not args.inputs:
        parser.error("the following arguments are required: photo")
    check_ranges(
        args,
        (
            ("threshold", float, lambda v: 0 < v < 1, "a number between 0 and 1"),
            (
                "size",
                list | None,
                lambda v: v is None or 16 <= min(v) <= max(v) <= 65535,
                "height and width, 16 to 65535",
            ),
            ("label", str, bool, "the object's name"),
            ("submission", Path | None, lambda v: v is None or len(os.fsencode(v.name)) <= 200, "a name of 200 bytes"),
            ("min_area", int | None, lambda v: v is None or v >= 0, "a whole number of pixels, at least 0"),
            ("coco", Path | None, lambda v: v is None or v.suffix == ".json", "a name that ends in .json"),
            ("batch_size", int, lambda v: 1 <= v <= 10**5, "a whole number, at least 1 and at most 100000"),
        ),
        lambda name: f"--{name.replace('_', '-')}",
    )
    args.outputs = [kind for kind in OUTPUTS if getattr(args, kind.replace("-", "_"))]
    others = args.outputs or args.submission or args.mask_dir or args.objects or args.coco
    args.outlines_alone = args.labelme and not others  # then photos that have theirs are not predicted
    if not (args.mask or args.submission):
        args.outputs.insert(0, "mask")
    args.background = args.background and load_background(args.background)
    return args


def split_checkpoints(names: list[str]) -> tuple[list[str], list[str]]:
    """Return the checkpoints and the photos that follow --checkpoint, which takes them all.

    The first name is a checkpoint; others are by their ending, or as a ZIP file, which torch.save writes. Names may be
    patterns, which a shell of Windows leaves as they are.
    """
    names = [str(path) for name in names for path in ("*" in name and matches_of(name)) or [name]]
    checkpoints, photos = names[:1], []
    for name in names[1:]:
        has_ending = name.lower().endswith((".pth.tar", ".pth", ".pt", ".ckpt"))
        is_checkpoint = not Path(name).is_dir() and (has_ending or zipfile.is_zipfile(name))
        (checkpoints if is_checkpoint else photos).append(name)
    return checkpoints, photos


def load_network(args: argparse.Namespace) -> Predictor | Ensemble:
    """Return the networks, set to the size or the tiles that are asked for. Raises UserError."""
    model = load_model(args.checkpoint, args.device)
    for path, network in zip(args.checkpoint, getattr(model, "networks", [model]), strict=True):
        try:
            set_input_size(network, args)
        except UserError as error:
            raise UserError(f"{path}: {error}" if len(args.checkpoint) > 1 else str(error)) from error
    return model


def set_input_size(model: Predictor, args: argparse.Namespace) -> None:
    """Set a network to --size and --tile. Raises UserError where it cannot be."""
    if args.tile is not None and not hasattr(model.network, "tile"):
        raise UserError("--tile needs a network that has `tile` (build_network in model.py): leave --tile out")
    smallest = 4 * getattr(model.network, "multiple", 1)
    if args.tile is not None and args.tile < smallest:
        raise UserError(f"--tile is {args.tile}: set it to at least {smallest}, such as {8 * smallest}")
    is_whole = not isinstance(model.size, float)  # the network was trained on whole photos
    is_another_scale = args.size
    if is_whole:
        is_another_scale = args.tile and not args.size  # which shows it photos at their original size
    if model.photo_size and is_another_scale:
        trained = model.size if is_whole else [round(model.size * side) for side in model.photo_size]
        factors = [now / before for now, before in zip(args.size or model.photo_size, trained, strict=True)]
        if not all(2 / 3 <= factor <= 3 / 2 for factor in factors):
            raise UserError(
                f"{'--size' if args.size else '--tile without --size'} shows the network photos {factors[0]:.2g} times "
                f"as high and {factors[1]:.2g} times as wide as in training: give --size {trained[0]} {trained[1]}"
            )
    if args.tile:
        model.network.tile = args.tile, args.tile
    if args.size:
        model.size = tuple(args.size)
    elif args.tile and is_whole:
        model.size = 1.0
    encoder = getattr(model.network, "encoder", None)
    if (args.size or args.tile) and hasattr(encoder, "check_size"):
        encoder.check_size(*(model.tile or model.size))


def open_submission(args: argparse.Namespace, photos: list[Photo]) -> Submission:
    """Open the submission file, with the rows that an earlier run with the same networks and flags has left."""
    stats = [Path(path).stat() for path in args.checkpoint]
    folders = sorted({str(photo.path.resolve().parent) for photo in photos})  # test_hq has the names of test
    flags = args.threshold, args.tta, args.size, args.tile, args.min_area or 0, args.largest
    decisive = [(stat.st_size, stat.st_mtime_ns) for stat in stats], *flags, folders
    key = f"{zlib.crc32(repr(decisive).encode()):08x}"
    return Submission(args.submission, [photo.path for photo in photos], key)


def main(argv: list[str] | None = None) -> None:
    """Predict the photos that the command line names. Raises UserError."""
    args = parse_arguments(argv)
    model = load_network(args)
    photos = find_photos(args.inputs)
    if args.outputs or args.mask_dir or args.labelme or args.objects:
        check_writable(args.output_dir, "--output-dir")
    if args.objects:
        check_table(args.output_dir / "objects.csv", "photo,object,area_px,.+")
    if args.coco:
        check_writable(args.coco.parent, "--coco")
        check_table(args.coco, re.escape(COCO_HEAD))
        if args.labelme and args.coco.resolve() in {(args.output_dir / f"{p.name}.json").resolve() for p in photos}:
            raise UserError(f"--coco {args.coco} is where LabelMe's outlines of a photo go: choose another name")
    if args.mask_dir:
        add_masks(photos, args.mask_dir, args.mask_suffix)
        check_table(args.output_dir / "scores.csv", "photo,dice,(.+,)?boundary_f1")
    is_written_over_time = args.submission and RANK == 0
    if is_written_over_time:
        check_writable(args.submission.parent, "--submission")
    with locked(lock_of(args.submission), f"--submission {args.submission}") if is_written_over_time else nullcontext():
        if is_written_over_time:
            remove_leftovers(args.submission.parent, args.submission.name)
        predict_photos(photos, model, args)


def predict_photos(photos: list[Photo], model: Predictor | Ensemble, args: argparse.Namespace) -> None:
    """Share the photos among the processes, and write what is asked for. Raises UserError."""
    shard, submission = photos[RANK::WORLD_SIZE], None
    if args.submission:
        submission = open_submission(args, photos)
        if not (args.mask_dir or args.objects or args.coco or args.labelme):  # which need every photo
            shard = [photo for photo in shard if not is_done(photo, submission, args)]
    shard, kept = without_outlined(shard, args.output_dir) if args.outlines_alone else (shard, [])

    start = time.perf_counter()
    table = args.output_dir / "objects.csv" if args.objects else None
    with Found(table or args.coco) if table or args.coco else nullcontext() as found:
        with memory_errors(f"at --batch-size {args.batch_size}: set it to 1, or --size or --tile to less"):
            failures, rows = write_all(shard, model, args, submission, found)
        if submission:
            submission.part.close()
        with process_group(minutes=7 * 24 * 60):  # one may have much larger photos than another
            everyone = all_gather_object((failures, kept + rows, found.part if found else None))
    if RANK > 0:
        return

    failed = sum(len(failures) for failures, *_ in everyone)
    rows = [row for _, rows, _ in everyone for row in rows]
    scores = sorted((row for row in rows if "dice" in row), key=lambda row: row["dice"])
    uncertain = sorted((row for row in rows if "uncertain" in row), key=lambda row: -row["uncertain"])
    kept, seconds = sorted(row["kept"] for row in rows if "kept" in row), time.perf_counter() - start
    done = len(photos) - failed - len(kept) * args.outlines_alone
    print(f"{counted(done, 'photo')} in {seconds:.1f} s: {args.submission or args.output_dir}")
    if kept:
        files = "which was" if len(kept) == 1 else f"{len(kept)} files that were"
        end = "; their photos are not predicted" if args.outlines_alone else ""
        print(f"kept: {', '.join(kept[:3])}{', ...' if len(kept) > 3 else ''}, {files} made or corrected by hand{end}")
    if scores:
        save_metrics(scores, args.output_dir / "scores.csv")
        print_scores(scores)
    if uncertain:
        print(f"The least certain of {counted(len(uncertain), 'photo')}, and the share of the object that is:")
        print("\n".join(f"{row['uncertain']:16.4f}  {row['photo']}" for row in uncertain[:20]))
    if found:
        write_found([part for *_, part in everyone], [photo.path for photo in photos], table, args.coco, args.label)
    if submission:
        submission.write(is_complete=not failed)
    check_failures(failed, len(photos))


def is_done(photo: Photo, submission: Submission, args: argparse.Namespace) -> bool:
    """Return whether an earlier run has written a photo's row and all its files."""
    has_files = all(is_written(args.output_dir, photo.name, kind) for kind in args.outputs)
    return has_files and photo.path.name in submission.done


def check_failures(failed: int, given: int) -> None:
    """Raise UserError where photos have failed. Each has been named already."""
    if failed:
        photos = counted(given, "photo")
        raise UserError(f"{failed} of {photos} could not be predicted, as said above: fix them, or leave them out")


if __name__ == "__main__":
    run(main)
