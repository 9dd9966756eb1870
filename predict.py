"""Cuts the objects out of photos with a network that train.py has trained, at the photos' own size.

    python predict.py photo.jpg folder 'more/*.png'               # predictions/<name>_mask.png: 255 on the car, else 0
    python predict.py folder --cutout --background white          # the car without its background, and on another
    python predict.py data/val_images --mask-dir data/val_masks   # and scores against the truth, worst photos first
    python predict.py test --submission submission.csv.gz         # Kaggle's format; goes on where it was stopped
    torchrun --nproc_per_node=4 predict.py folder                 # shares the photos among four processes

In Python: model = load_model("my_checkpoint_best.pth.tar"), then predict(model, image) gives probabilities.
"""

import argparse
import glob
import gzip
import os
import sys
import tempfile
import threading
import time
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, PngImagePlugin
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from tqdm import tqdm

import utils
from dataset import SUFFIXES, UserError, find_masks, opened, read_image, read_mask, resize, stem_of
from distributed import RANK, WORLD_SIZE, everyones, process_group
from model import DoubleConv, UNet

THREADS = min(8, os.cpu_count() or 1)  # that decode and write while the network computes: Pillow and OpenCV allow it
LARGE = 25_000_000  # pixels; of the photos above, one at a time is worked on, which bounds the memory
ONE_AT_A_TIME = threading.Lock()
SCORES = ("dice", "iou", "pixel_accuracy", "boundary_f1")
TINT, OUTLINE = (255, 0, 80), (255, 230, 0)  # of an overlay

# Every PNG says that it is ours, so that none is taken for a photo, and no other file is overwritten.
SOFTWARE = "predict.py (U-Net for Carvana)"
KINDS = ("mask", "overlay", "cutout", "background", "probabilities")


@dataclass
class Photo:
    path: Path
    name: str  # of its outputs: <name>_mask.png
    mask: Path | None  # the true one, if it is known


# ---------------------------------------------------------------------------------------------------------------------
# The network


class Predictor(nn.Module):
    """A trained network and its preprocessing: uint8 RGB (N, H, W, 3) -> logits, float32 (N, H, W), both in numpy.

    `size` is the (height, width) at which it was trained.
    """

    def __init__(self, checkpoint: dict, device: torch.device, precision: torch.dtype) -> None:
        super().__init__()
        settings = checkpoint["preprocessing"]
        self.size = settings["height"], settings["width"]
        self.mean, self.std = (torch.tensor(settings[name], device=device) for name in ("mean", "std"))
        self.network = UNet(**checkpoint["model"]).eval()
        self.network.load_state_dict(checkpoint["state_dict"])
        for block in self.network.modules():  # BatchNorm becomes part of the convolution before it: 12 % faster
            if isinstance(block, DoubleConv):
                conv1, norm1, relu1, conv2, norm2, relu2 = block.layers
                convs = fuse_conv_bn_eval(conv1, norm1), fuse_conv_bn_eval(conv2, norm2)
                block.layers = nn.Sequential(convs[0], relu1, convs[1], relu2)
        self.network.to(device, precision, memory_format=utils.memory_format(device))
        self.precision = precision

    @torch.inference_mode()
    def forward(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        """With tta the mean of the logits of each image and of its mirror image."""
        pixels = torch.from_numpy(images).to(self.mean.device)
        batch = ((pixels / 255 - self.mean) / self.std).permute(0, 3, 1, 2)  # (N, 3, H, W), in channels_last
        batch = batch.to(self.precision, memory_format=utils.memory_format(pixels.device))
        logits = self.network(batch).float()
        if tta:
            logits = (logits + self.network(batch.flip(-1)).float().flip(-1)) / 2
        return logits[:, 0].cpu().numpy()


def load_model(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> Predictor:
    """A network with its preprocessing from a checkpoint of train.py. Raises UserError if there is none."""
    chosen = utils.choose_device(device)
    return Predictor(utils.load_checkpoint(Path(checkpoint)), chosen, utils.choose_precision(precision, chosen))


def predict(model: Predictor, image: np.ndarray, tta: bool = False) -> np.ndarray:
    """Probabilities of the foreground, float32 (H, W), for an upright RGB image, uint8 (H, W, 3)."""
    small = np.array(resize(Image.fromarray(image), model.size))
    return utils.enlarge(model(small[None], tta)[0], small, image)


def predict_tiled(model: Predictor, image: np.ndarray, tile: int, tta: bool = False) -> np.ndarray:
    """Logits float32 (H, W) for an image, uint8 (H, W, 3), of which the network sees a square of `tile` at a time.

    Neighbours overlap by a quarter. In the middle half of that one fades into the other; what lies nearer to a tile's
    edge knows too little of its surroundings, and counts for nothing. The weights of all tiles add up to 1.
    """
    height, width = image.shape[:2]
    overlap = tile // 4

    def weights(start: int, length: int, total: int) -> np.ndarray:
        position = np.arange(0.5, length, dtype=np.float32)
        before = position if start > 0 else np.inf
        after = length - position if start + length < total else np.inf
        return np.clip(2 * np.minimum(before, after) / overlap - 0.5, 0, 1) * np.ones(length, np.float32)

    logits = np.zeros((height, width), np.float32)
    for top in range(0, max(height - overlap, 1), tile - overlap):
        for left in range(0, max(width - overlap, 1), tile - overlap):
            part = np.s_[top : top + tile, left : left + tile]
            rows, columns = logits[part].shape
            fade = weights(top, rows, height)[:, None] * weights(left, columns, width)
            logits[part] += fade * model(image[part][None], tta)[0]
    return logits


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def soft_edge(probabilities: np.ndarray, threshold: float) -> np.ndarray:
    """Opacity uint8 (H, W), which falls from 255 to 0 within 3 pixels around the contour of the threshold.

    (probability - threshold) / |gradient| is the distance to the contour to first order. The probabilities themselves
    fall slowly where photo or network show no clear edge, which would look like a halo.
    """
    alpha = np.empty(probabilities.shape, np.uint8)
    for rows, inner, kept in bands(len(alpha), 1):
        band = probabilities[rows]
        gradient = cv2.magnitude(cv2.Sobel(band, -1, 1, 0, scale=1 / 8), cv2.Sobel(band, -1, 0, 1, scale=1 / 8))
        alpha[kept] = np.clip(255 * ((band - threshold) / (3 * gradient + 1e-3) + 0.5), 0, 255)[inner]
    return alpha


def clean_edge(photo: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The photo, uint8 (H, W, 3), with colours from the inside along the edge, where background has mixed in.

    A colour within 3 pixels of the edge becomes the mean of those further inside, in 13 x 13 pixels.
    """
    clean = np.empty_like(photo)
    for rows, inner, kept in bands(len(photo), 8):
        inside = cv2.erode(alpha[rows], np.ones((5, 5), np.uint8)) == 255
        share = cv2.blur(inside.astype(np.float32), (13, 13))[..., None]
        total = cv2.blur(photo[rows] * inside[..., None].astype(np.float32), (13, 13))
        clean[kept] = np.where(inside[..., None], photo[rows], total / np.maximum(share, 1e-3) + 0.5)[inner]
    return clean


def bands(height: int, margin: int) -> Iterator[tuple[slice, slice, slice]]:
    """Portions of 512 rows, because floats of a whole large photo take too much memory.

    Yields the rows with a margin, those without it among them, and those without it in the whole.
    """
    for top in range(0, height, 512):
        start = max(0, top - margin)
        yield slice(start, top + 512 + margin), slice(top - start, top - start + 512), slice(top, top + 512)


def draw_overlay(photo: np.ndarray, mask: np.ndarray) -> Image.Image:
    """The photo, uint8 (H, W, 3), with the foreground of a mask, uint8 (H, W) in {0, 255}, tinted and outlined."""
    picture, thickness = Image.fromarray(photo), 1 + 2 * (max(mask.shape) // 1000)
    picture.paste(TINT, mask=Image.fromarray(mask // 3))
    outline = cv2.morphologyEx(mask, cv2.MORPH_GRADIENT, np.ones((thickness + 2, thickness + 2), np.uint8))
    picture.paste(OUTLINE, mask=Image.fromarray(outline))
    return picture


def put_on(background: tuple[int, ...] | Image.Image, cutout: Image.Image, alpha: Image.Image) -> Image.Image:
    """The cut-out on a colour, or on a picture, which covers its size and is cropped to it."""
    is_colour = isinstance(background, tuple)
    canvas = Image.new("RGB", cutout.size, background) if is_colour else ImageOps.fit(background, cutout.size)
    canvas.paste(cutout, mask=alpha)
    return canvas


def load_background(text: str) -> tuple[int, ...] | Image.Image:
    """A colour by name or #rrggbb, or else a picture."""
    try:
        return ImageColor.getcolor(text, "RGB")
    except ValueError as error:
        if Path(text).is_file():
            return Image.fromarray(read_image(Path(text)))
        raise UserError(f"--background {text}: give a colour (white, #rrggbb), or the path of a picture") from error


def write_png(path: Path, picture: Image.Image) -> None:
    """Raises UserError where there is a file that is not ours, and where none can be written."""
    if path.exists() and not is_ours(path):
        raise UserError(f"{path} is not of predict.py's making: move it away, or choose another --output-dir")
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", SOFTWARE)
    with utils.saving(path) as temporary:  # 3 is run lengths: 14 ms a mask instead of 23, 160 a cut-out of 370
        picture.save(temporary, "PNG", compress_type=3, pnginfo=text)


def is_ours(path: Path) -> bool:
    with suppress(Exception), Image.open(path) as image:  # Pillow raises many kinds of errors
        return image.info.get("Software") == SOFTWARE
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Run lengths, the format of the challenge


def rle_encode(mask: np.ndarray) -> str:
    """Runs of a mask (H, W), which is foreground where it is not 0: "start length start length ...".

    Pixels count from 1, row by row from the top left; an empty mask gives "".
    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """
    pixels = np.zeros(mask.size + 2, bool)  # with background before the first and after the last
    pixels[1:-1] = mask.ravel() != 0
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    changes[1::2] -= changes[::2]
    return " ".join(map(str, changes.tolist()))


def rle_decode(runs: str, size: tuple[int, int]) -> np.ndarray:
    """The mask of that (height, width) that rle_encode has encoded: uint8 (H, W) in {0, 1}."""
    numbers = np.array(runs.split(), np.int64)
    mask = np.zeros(size, np.uint8)
    for start, length in zip(numbers[::2] - 1, numbers[1::2], strict=True):
        mask.ravel()[start : start + length] = 1
    return mask


class Submission:
    """Kaggle's file, a row for each photo. Rows gather beside it until all are there, so that a stopped run goes on.

    Every process of every run adds to a file of its own, <path>.<key>-<random>.part. The key stands for what decides
    the masks: rows of another network or threshold are not taken over.
    """

    def __init__(self, path: Path, photos: list[Photo], key: str) -> None:
        self.path, self.names = path, {photo.path.name for photo in photos}
        if len(self.names) < len(photos) or any("," in name for name in self.names):
            raise UserError(f"{path} names photos by file name: give each once, and none with a comma in its name")
        check_writable(path.parent)
        check_table(path, "img,rle_mask")
        self.prefix = f"{path.name}.{key}-"
        self.done = {name for name, _ in self.rows()}
        self.part = tempfile.NamedTemporaryFile(  # noqa: SIM115
            "w", encoding="utf-8", dir=path.parent, prefix=self.prefix, suffix=".part", delete=False
        )

    def parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{glob.escape(self.prefix)}*.part"))

    def rows(self) -> Iterator[tuple[str, str]]:
        """(photo's name, line) of every whole line; the one at which a process was killed lacks its end."""
        for part in self.parts():
            with part.open(encoding="utf-8") as file:
                yield from ((line.partition(",")[0], line) for line in file if line.endswith("\n"))

    def add(self, photo: Photo, runs: str) -> None:
        self.part.write(f"{photo.path.name},{runs}\n")

    def write(self) -> None:
        """The file itself, of all rows that are there."""
        opener = gzip.open if self.path.suffix == ".gz" else open
        with utils.saving(self.path) as temporary, opener(temporary, "wt", encoding="utf-8", newline="\n") as file:
            file.write("img,rle_mask\n")
            missing = set(self.names)
            for name, line in self.rows():
                if name in missing:  # once, should two runs have added it
                    missing.remove(name)
                    file.write(line)


# ---------------------------------------------------------------------------------------------------------------------
# Photos in, files out


def find_photos(inputs: list[str], mask_dir: Path | None) -> list[Photo]:
    """The photos that are given as files, folders (with all below them) and patterns, each once, sorted within those.

    Files of our own making are left out. A name that is taken gets a number: x/a.jpg and y/a.jpg give a and a-2.
    Raises UserError where an input holds none.
    """
    paths: dict[Path, Path] = {}  # by what they resolve to
    for given in inputs:
        folder = Path(given)
        found = [folder]
        if folder.is_dir():
            below = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("*"))}
            found = [path for path, parts in below.items() if not any(part.startswith(".") for part in parts)]
        elif not folder.exists():
            found = sorted(map(Path, glob.glob(given, recursive=True)))  # noqa: PTH207
        if found != [folder]:
            found = [path for path in found if path.suffix.lower() in SUFFIXES]
        found = [path for path in found if not (path.stem.endswith(KINDS) and is_ours(path))]
        if not found:
            raise UserError(f"{given}: no photos there ({', '.join(SUFFIXES)}): correct the path")
        for path in found:
            paths.setdefault(path.resolve(), path)

    masks, unused = find_masks(map(stem_of, paths.values()), mask_dir) if mask_dir else ({}, [])
    photos, taken = [], set()
    for path in paths.values():
        name, number = path.stem, 1
        while name.casefold() in taken:  # some disks take A.jpg and a.jpg for one
            number += 1
            name = f"{path.stem}-{number}"
        taken.add(name.casefold())
        photos.append(Photo(path, name, masks.get(stem_of(path))))
    without = [photo.path for photo in photos if mask_dir and not photo.mask]
    for kind, lonely in (("Masks without photo", unused), ("Photos without mask, not scored", without)):
        if lonely and RANK == 0:
            print(f"{kind}: {len(lonely)}, such as {lonely[0]}")
    return photos


def decode(photo: Photo, size: tuple[int, int] | None) -> tuple[Photo, np.ndarray]:
    with large_ones_wait(photo):
        return photo, read_image(photo.path, size)


def large_ones_wait(photo: Photo) -> AbstractContextManager:
    """Lets one large photo at a time be decoded or written."""
    with opened(photo.path) as header:
        return ONE_AT_A_TIME if header.width * header.height > LARGE else nullcontext()


def in_threads(
    pool: ThreadPoolExecutor, depth: int, function: Callable, items: Iterable[tuple], failures: list[str]
) -> Iterator:
    """Yields function(*item) in order, `depth` of them under way; one that raises UserError is named and left out."""
    items, running = iter(items), deque()
    while True:
        running.extend(pool.submit(function, *item) for item in islice(items, depth - len(running)))
        if not running:
            return
        try:
            result = running.popleft().result()
        except UserError as error:
            failures.append(str(error))
            tqdm.write(f"skipped: {error}", file=sys.stderr)
        else:
            yield result


def run_network(model: Predictor, decoded: Iterator, batch_size: int, args: argparse.Namespace) -> Iterator[tuple]:
    """(photo, image) -> (photo, image, logits), in batches of equal size.

    The last one is filled up with copies of its last image: a network is fastest with one shape throughout.
    """
    while batch := list(islice(decoded, batch_size)):
        images = [image for _, image in batch]
        if args.tile:
            logits = [predict_tiled(model, image, args.tile, args.tta) for image in images]
        else:
            logits = model(np.stack(images + images[-1:] * (batch_size - len(images))), args.tta)
        for (photo, image), photo_logits in zip(batch, logits, strict=False):
            yield photo, image, photo_logits


def finish(photo: Photo, image: np.ndarray, logits: np.ndarray, args: argparse.Namespace) -> tuple:
    """Makes of the network's input, uint8 (h, w, 3), and output, float32 (h, w), all that is asked for.

    Returns the photo, its scores and its run lengths, the last two where they are asked for.
    """

    def save(kind: str, picture: Image.Image) -> None:
        write_png(args.output_dir / f"{photo.name}_{kind}.png", picture)

    scores = runs = None
    with large_ones_wait(photo):
        full = image if args.tile and not args.size else read_image(photo.path)
        probabilities = utils.enlarge(logits, image, full)
        mask = cv2.compare(probabilities, args.threshold, cv2.CMP_GT)  # uint8 (H, W) in {0, 255}
        if args.submission:
            runs = rle_encode(mask)
        else:
            save("mask", Image.fromarray(mask))
        if photo.mask:
            scores = score(mask, photo.mask)
        if args.overlay:
            save("overlay", draw_overlay(full, mask))
        alpha = soft_edge(probabilities, args.threshold) if args.cutout or args.background else None
        if args.probabilities:
            probabilities *= 65535
            save("probabilities", Image.fromarray(probabilities.round(out=probabilities).astype(np.uint16)))
        del probabilities, mask  # for the memory of a large photo
        if alpha is not None:
            cutout, alpha = Image.fromarray(clean_edge(full, alpha)), Image.fromarray(alpha)
            if args.background:
                save("background", put_on(args.background, cutout, alpha))
            if args.cutout:
                cutout.putalpha(alpha)
                save("cutout", cutout)
    return photo, scores, runs


def score(mask: np.ndarray, path: Path) -> dict[str, float]:
    """Scores of a mask, uint8 (H, W) in {0, 255}, against the true one in a file. Raises UserError if sizes differ."""
    truth = read_mask(path)
    if truth.shape != mask.shape:
        height, width = mask.shape
        raise UserError(f"{path} is {truth.shape[1]} x {truth.shape[0]}, but its photo {width} x {height}: mend it")
    hits, found, wanted = map(cv2.countNonZero, (mask & truth, mask, truth))
    tp, fp, fn = torch.tensor((hits, found - hits, wanted - hits))
    return {
        "dice": utils.dice_scores(tp, fp, fn).item(),
        "iou": utils.iou_scores(tp, fp, fn).item(),
        "pixel_accuracy": 1 - (fp + fn).item() / mask.size,
        "boundary_f1": utils.boundary_f1(mask, truth),
    }


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises UserError."""
    parser = utils.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="photo", help="photos, folders with all below them, 'patterns*'")
    add("--output-dir", type=Path, default=Path("predictions"), help="[predictions]")
    add("--overlay", action="store_true", help="<name>_overlay.png: the photo with the mask tinted and outlined")
    add("--cutout", action="store_true", help="<name>_cutout.png: the object on transparency")
    add("--background", metavar="COLOUR|IMAGE", help="<name>_background.png: it on white, #rrggbb or image.jpg")
    add("--probabilities", action="store_true", help="<name>_probabilities.png: 16 bit, 65535 is 1")
    add("--submission", type=Path, metavar="FILE", help="submission.csv or .csv.gz for Kaggle, instead of masks")
    add("--mask-dir", type=Path, help="true masks: scores at the photos' own size, in <output-dir>/scores.csv")
    add("--checkpoint", default="my_checkpoint_best.pth.tar", help="[my_checkpoint_best.pth.tar]")
    add("--threshold", type=float, default=0.5, help="the probability above which a pixel is foreground [0.5]")
    add("--tta", action="store_true", help="averages photo and mirror image: twice the time, a little better")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="the network sees photos at this size [training's]")
    add(
        "--tile",
        type=int,
        nargs="?",
        const=512,
        metavar="N",
        help="it sees N x N of them at once, at --size or their own [512]",
    )
    add("--batch-size", type=int, default=8, help="photos that the network sees at once [8]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first that is there]")
    args = parser.parse_args(argv)
    for name, is_valid, wanted in (
        ("threshold", lambda v: 0 < v < 1, "a number between 0 and 1"),
        ("size", lambda v: v is None or min(v) >= 16, "height and width, at least 16"),
        ("batch_size", lambda v: v >= 1, "a whole number, at least 1"),
    ):
        if not is_valid(value := getattr(args, name)):
            raise UserError(f"--{name.replace('_', '-')} is {value}: set it to {wanted}")
    args.background = args.background and load_background(args.background)
    return args


def check_writable(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): choose another folder") from error


def check_table(path: Path, columns: str) -> None:
    """Raises UserError where a file with other columns is in the way: it is not ours to overwrite."""
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8") as file:
            if file.readline().strip() == columns:
                return
    except FileNotFoundError:
        return
    except (OSError, EOFError, ValueError, zlib.error):  # a folder, or no text
        pass
    raise UserError(f"{path} is not of predict.py's making: move it away, or choose another name")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model = load_model(args.checkpoint, args.device)
    multiple = 4 * 2 ** len(model.network.features)  # tiles are shifted by quarters, which every stage must halve
    if args.tile is not None and (args.tile < multiple or args.tile % multiple):
        raise UserError(f"--tile is {args.tile}: set it to a multiple of {multiple}, such as {8 * multiple}")
    if args.size or args.tile:
        model.size = args.size and tuple(args.size)  # None leaves photos as they are

    photos = find_photos(args.inputs, args.mask_dir)
    if not args.submission or args.mask_dir or args.overlay or args.cutout or args.background or args.probabilities:
        check_writable(args.output_dir)
    if args.mask_dir:
        check_table(args.output_dir / "scores.csv", "photo," + ",".join(SCORES))
    share = photos[RANK::WORLD_SIZE]
    if args.submission:
        stat = Path(args.checkpoint).stat()
        folders = sorted({str(photo.path.resolve().parent) for photo in photos})  # test_hq has the names of test
        decisive = stat.st_size, stat.st_mtime_ns, args.threshold, args.tta, args.size, args.tile, folders
        submission = Submission(args.submission, photos, f"{zlib.crc32(repr(decisive).encode()):08x}")
        share = [photo for photo in share if photo.path.name not in submission.done]

    failures, scores = [], []
    number_of_batches = -(-len(share) // args.batch_size)
    batch_size = 1 if args.tile else -(-len(share) // max(1, number_of_batches))  # 9 photos: 5 and 4, not 8 and 1
    threads, depth = (1, 1) if args.tile else (THREADS, THREADS + batch_size)  # photos for tiles are large: no queue
    start = time.perf_counter()
    bar = utils.progress(total=len(share), desc="predicting", unit="photo")
    with ThreadPoolExecutor(threads) as pool, bar:
        decoded = in_threads(pool, depth, decode, ((photo, model.size) for photo in share), failures)
        predicted = ((*item, args) for item in run_network(model, decoded, batch_size, args))
        for photo, row, runs in in_threads(pool, depth, finish, predicted, failures):
            if row:
                scores.append({"photo": str(photo.path)} | row)
            if args.submission:
                submission.add(photo, runs)
            bar.update()

    if args.submission:
        submission.part.close()
    with process_group(minutes=7 * 24 * 60):  # one may have much larger photos than another
        everyone = everyones((failures, scores))
    if RANK > 0:
        return

    failed = sum(len(failures) for failures, _ in everyone)
    scores = sorted((row for _, rows in everyone for row in rows), key=lambda row: row["dice"])
    seconds = time.perf_counter() - start
    print(f"{len(photos) - failed} photos in {seconds:.1f} s: {args.submission or args.output_dir}")
    if scores:
        utils.save_metrics(scores, args.output_dir / "scores.csv")
        print("".join(f"{name:>16}" for name in SCORES))
        mean = {name: np.mean([row[name] for row in scores]) for name in SCORES}
        for row in (*scores[:5], mean | {"photo": f"mean of {len(scores)}"}):
            print("".join(f"{row[name]:16.4f}" for name in SCORES) + f"  {row['photo']}")
    if args.submission:
        submission.write()
        if not failed:  # else the same command adds what is missing, once the photos are mended
            for part in submission.parts():
                part.unlink()
    if failed:
        raise UserError(f"{failed} of {len(photos)} photos could not be predicted, as said above: mend or remove them")


if __name__ == "__main__":
    utils.run(main)
