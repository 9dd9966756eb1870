"""Cuts the objects out of photos with a network that train.py has trained, at the photos' original size.

    python predict.py photo.jpg folder 'more/*.png'               # predictions/<name>_mask.png: 255 on the car, else 0
    python predict.py folder --cutout --background white          # the car without its background, and on another
    python predict.py data/val_images --mask-dir data/val_masks   # and scores against the truth, worst photos first
    python predict.py folder --labelme --label car                # outlines, to be corrected in LabelMe
    python predict.py test --submission submission.csv.gz         # Kaggle's format; continues where it was stopped
    torchrun --nproc_per_node=4 predict.py folder                 # shares the photos among four processes

In Python: model = load_model("my_checkpoint_best.pth.tar"), then predict(model, image) gives probabilities.
"""

import argparse
import glob
import sys
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import cv2
import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps, PngImagePlugin
from torch import nn
from tqdm import tqdm

import utils
from annotations import made_by_hand, write_labelme
from dataset import NUM_THREADS, in_threads, large_ones_wait
from decoding import VOID, Rule, Size, UserError, decode_mask, enlarge, read_image, read_opacity, resize, rule_from
from device import Device, choose_device, memory_errors
from distributed import RANK, WORLD_SIZE, all_gather_object, process_group, run
from metrics import boundary_f1, confusion, image_scores, uncertain_share
from model import UNet
from pairing import MASK_SUFFIX, SUFFIXES, find_masks, free_name, is_image, other_suffix, passed_over, stem_of
from settings import Parser, check_ranges, check_writable
from submission import Submission, check_table, rle_encode

THREADS = min(8, NUM_THREADS)  # that decode and write while the network computes
SCORES = ("dice", "iou", "pixel_accuracy", "boundary_f1")  # the columns of scores.csv
TINT, OUTLINE = (255, 0, 80), (255, 230, 0)  # of an overlay

# Every PNG says that it is ours, so that none is taken for a photo, and no other file is overwritten.
SOFTWARE = "predict.py (U-Net for Carvana)"


@dataclass
class Photo:
    path: Path
    name: str  # of its outputs: <name>_mask.png
    mask: Path | None = None  # the true one, if it is known


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
        self.size: Size = before.get("scale") or (before["height"], before["width"])
        self.rule, self.photo_size = rule_from(checkpoint["rule"]), checkpoint["photo_size"]
        self.network = UNet(**checkpoint["model"]).eval()
        self.network.load_state_dict(checkpoint["state_dict"])
        self.network.fold_batch_norm()
        self.network.to(device.device, device.precision, memory_format=device.memory_format)
        self.device = device

    @property
    def window(self) -> tuple[int, int]:
        """(height, width) of what the network sees at once."""
        return tuple(self.network.tile or self.size)

    @torch.inference_mode()
    def forward(self, images: np.ndarray, tta: bool = False) -> np.ndarray:
        """With tta the mean of the logits of each image and of its mirror image."""
        batch = self.device.normalised(torch.from_numpy(images)).to(self.device.precision)
        logits = self.network(batch).float()
        if tta:
            logits = (logits + self.network(batch.flip(-1)).float().flip(-1)) / 2
        return logits[:, 0].cpu().numpy()


def load_model(checkpoint: str | Path, device: str = "auto", precision: str = "auto") -> Predictor:
    """A network with its preprocessing from a checkpoint of train.py. Raises UserError if there is none."""
    trained = utils.load_checkpoint(Path(checkpoint))
    normalisation = {name: trained["preprocessing"][name] for name in ("mean", "std")}
    chosen = choose_device(device, precision, **normalisation)
    torch.backends.cudnn.conv.fp32_precision = "ieee" if chosen.precision == torch.float32 else "tf32"
    return Predictor(trained, chosen)


def predict(model: Predictor, image: np.ndarray, tta: bool = False) -> np.ndarray:
    """Probabilities of the foreground, float32 (H, W), for an upright RGB image, uint8 (H, W, 3)."""
    small = np.array(resize(Image.fromarray(image), model.size))
    return enlarge(model(small[None], tta)[0], small, image)


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

    A colour within 3 pixels of the edge becomes the mean of those further inside, in 13 x 13 pixels. Where there are
    none, as in things up to 6 pixels thin, it stays as it is.
    """
    clean = np.empty_like(photo)
    for rows, inner, kept in bands(len(photo), 8):
        inside = cv2.erode(alpha[rows], np.ones((5, 5), np.uint8)) == 255
        share = cv2.blur(inside.astype(np.float32), (13, 13))[..., None]
        total = cv2.blur(photo[rows] * inside[..., None].astype(np.float32), (13, 13))
        is_own = inside[..., None] | (share < 1 / 200)  # one pixel of 13 x 13 is 1 / 169
        clean[kept] = np.where(is_own, photo[rows], total / np.maximum(share, 1e-3) + 0.5)[inner]
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


class Prediction:
    """What the outputs are drawn from: a photo, uint8 (H, W, 3), its probabilities, float32 (H, W), and the flags.

    `path` is the photo's.
    """

    def __init__(self, path: Path, photo: np.ndarray, probabilities: np.ndarray, args: argparse.Namespace) -> None:
        self.path, self.photo, self.probabilities, self.args = path, photo, probabilities, args
        self.mask = (probabilities > args.threshold) * np.uint8(255)  # (H, W) in {0, 255}

    def sixteen_bits(self) -> Image.Image:
        picture = np.empty(self.probabilities.shape, np.uint16)
        for rows, _, _ in bands(len(picture), 0):
            picture[rows] = (self.probabilities[rows] * 65535).round()
        return Image.fromarray(picture)

    @cached_property
    def alpha(self) -> Image.Image:
        """The object's opacity, and no more than the photo's own, which may be larger than what is drawn."""
        alpha, opacity = soft_edge(self.probabilities, self.args.threshold), read_opacity(self.path)
        if opacity is not None:
            alpha = np.minimum(alpha, resize(Image.fromarray(opacity), alpha.shape))
        return Image.fromarray(alpha)

    @cached_property
    def object(self) -> Image.Image:
        """The photo, with the object's own colours along its edge."""
        return Image.fromarray(clean_edge(self.photo, np.asarray(self.alpha)))

    def on_background(self) -> Image.Image:
        """The object on a colour, or on a picture, which covers the photo's size and is cropped to it."""
        background, size = self.args.background, self.alpha.size
        is_colour = isinstance(background, tuple)
        canvas = Image.new("RGB", size, background) if is_colour else ImageOps.fit(background, size)
        canvas.paste(self.object, mask=self.alpha)
        return canvas

    def cutout(self) -> Image.Image:
        return Image.merge("RGBA", (*self.object.split(), self.alpha))


# <name>_<kind>.png: what draws it, in this order, and its flag's help. A new output is an entry here.
OUTPUTS: dict[str, tuple[Callable[[Prediction], Image.Image], str]] = {
    "mask": (lambda p: Image.fromarray(p.mask), "255 on the object, else 0; the default without --submission"),
    "overlay": (lambda p: draw_overlay(p.photo, p.mask), "the photo with the mask tinted and outlined"),
    "probabilities": (Prediction.sixteen_bits, "16 bit, 65535 is 1"),
    "background": (Prediction.on_background, "the object on white, #rrggbb or image.jpg"),
    "cutout": (Prediction.cutout, "the object on transparency"),
}


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
    text = PngImagePlugin.PngInfo()
    text.add_text("Software", SOFTWARE)
    with utils.saving(path) as temporary:  # 3 is run lengths: 14 ms a mask instead of 23, 160 a cut-out of 370
        if path.exists() and not is_ours(path):
            raise UserError(f"{path} was not written by predict.py: move it away, or choose another --output-dir")
        picture.save(temporary, "PNG", compress_type=3, pnginfo=text)


def is_ours(path: Path) -> bool:
    with suppress(Exception), Image.open(path) as image:  # Pillow raises many kinds of errors
        return image.info.get("Software") == SOFTWARE
    return False


# ---------------------------------------------------------------------------------------------------------------------
# Photos in, files out


def find_photos(inputs: list[str]) -> list[Photo]:
    """The photos that are given as files, folders (with all below them) and patterns, each once, sorted within those.

    Files that predict.py wrote are left out. A name that is taken gets a number: x/a.jpg and y/a.jpg give a and a-2.
    Raises UserError where an input holds none.
    """
    paths: dict[Path, Path] = {}  # by what they resolve to
    taken, lines = set(), []
    for given in inputs:
        folder = Path(given)
        found = [folder]
        if folder.is_dir():
            below = {path: path.relative_to(folder).parts for path in sorted(folder.rglob("*"))}
            found = [path for path, parts in below.items() if not any(part.startswith(".") for part in parts)]
            lines += passed_over(filter(Path.is_file, found), folder)
        elif not folder.exists():
            found = sorted(map(Path, glob.glob(given, recursive=True)))  # noqa: PTH207
        if found != [folder]:
            found = [path for path in found if is_image(path) and path.is_file()]
        found = [path for path in found if not (path.stem.endswith(tuple(OUTPUTS)) and is_ours(path))]
        if not found:
            raise UserError(f"{given}: no photos there ({', '.join(SUFFIXES)}): correct the path")
        for path in found:
            paths.setdefault(path.resolve(), path)

    if RANK == 0 and lines:
        print("\n".join(lines))
    return [Photo(path, free_name(path.stem, taken)) for path in paths.values()]


def add_masks(photos: list[Photo], mask_dir: Path, suffix: str) -> None:
    """Finds the photos' true masks. Raises UserError where one would serve two photos."""
    stems = [stem_of(photo.path) for photo in photos]
    masks, unused = find_masks(stems, mask_dir, suffix)
    of: dict[Path, Path] = {}
    for photo, stem in zip(photos, stems, strict=True):
        photo.mask = masks.get(stem)
        if photo.mask and (other := of.setdefault(photo.mask, photo.path)) != photo.path:
            raise UserError(f"{photo.mask} is the mask of both {other} and {photo.path}: give one of them at a time")
    without = [photo.path for photo in photos if not photo.mask]
    if len(without) == len(photos):
        raise UserError(f"no photo has a mask in {mask_dir}: {other_suffix(stems[0], stems, unused)}")
    for kind, lonely in (("Masks without photo", unused), ("Photos without mask, not scored", without)):
        if lonely and RANK == 0:
            print(f"{kind}: {len(lonely)}, such as {lonely[0]}")


def decode(photo: Photo, size: Size, rule: Rule | None) -> tuple[Photo, np.ndarray]:
    with large_ones_wait(photo.path):
        return photo, read_image(photo.path, size, rule)


def without_failures(futures: Iterable[Future], failures: list[str]) -> Iterator:
    """Yields the futures' results; one that raises UserError is named and left out."""
    for future in futures:
        try:
            result = future.result()
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
        logits = model(np.stack(images + images[-1:] * (batch_size - len(images))), args.tta)
        for (photo, image), photo_logits in zip(batch, logits, strict=False):
            yield photo, image, photo_logits


def finish(
    photo: Photo, image: np.ndarray, logits: np.ndarray, is_original: bool, rule: Rule | None, args: argparse.Namespace
) -> tuple:
    """Writes all that is asked for, from the network's input, uint8 (h, w, 3), and output, float32 (h, w).

    `is_original` says that the input has the photo's original size. Returns the photo, its scores and its run lengths,
    the last two where they are asked for.
    """
    with large_ones_wait(photo.path):
        full = image if is_original else read_image(photo.path, None, rule)
        prediction = Prediction(photo.path, full, enlarge(logits, image, full), args)
        runs = rle_encode(prediction.mask) if args.submission else None
        for kind in args.outputs:
            write_png(args.output_dir / f"{photo.name}_{kind}.png", OUTPUTS[kind][0](prediction))
        scores = score(prediction.mask, photo.mask, rule) if photo.mask else None
        shapes = args.output_dir / f"{photo.name}.json"
        if args.labelme and (kept := made_by_hand(photo.path, shapes)):
            tqdm.write(f"kept: {kept}, which was made or corrected by hand")
        elif args.labelme:
            write_labelme(shapes, prediction.mask, photo.path, args.label, args.min_area)
            scores = scores or {"uncertain": uncertain_share(prediction.probabilities)}
    return photo, scores, runs


def score(mask: np.ndarray, path: Path, rule: Rule | None) -> dict[str, float]:
    """Scores of a mask, uint8 (H, W) in {0, 255}, against the true one in a file. Raises UserError if sizes differ."""
    true_mask = decode_mask(path, None, rule)[0]
    if true_mask.shape != mask.shape:
        sizes = [f"{width} x {height}" for height, width in (true_mask.shape, mask.shape)]
        raise UserError(f"{path} is {sizes[0]}, but its photo {sizes[1]}: make the mask again at that size")
    pixels = mask > 0, true_mask == 1, true_mask != VOID
    counts = confusion(*(torch.from_numpy(part)[None] for part in pixels))
    scores = {name: value.item() for name, value in image_scores(*(part.double() for part in counts)).items()}
    scores |= {"boundary_f1": boundary_f1(*pixels)}
    return {name: scores[name] for name in SCORES}


# ---------------------------------------------------------------------------------------------------------------------
# The whole run


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    add = parser.add_argument
    add("inputs", nargs="+", metavar="photo", help="photos, folders with all below them, 'patterns*'")
    add("--output-dir", type=Path, default=Path("predictions"), help="[predictions]")
    for kind, (_, text) in OUTPUTS.items():
        takes_value = {"metavar": "COLOUR|IMAGE"} if kind == "background" else {"action": "store_true"}
        add(f"--{kind}", help=f"<name>_{kind}.png: {text}".replace("%", "%%"), **takes_value)
    add("--labelme", action="store_true", help="<name>.json: the object's outlines, to correct them in LabelMe")
    add("--label", default="object", help="the object's label in LabelMe's files [object]")
    add("--min-area", type=int, default=10, help="smaller objects and holes are left out of these, in pixels [10]")
    add("--submission", type=Path, metavar="FILE", help="submission.csv or .csv.gz for Kaggle, instead of masks")
    add("--mask-dir", type=Path, help="true masks: scores at the photos' original size, in <output-dir>/scores.csv")
    add("--mask-suffix", default=MASK_SUFFIX, help="the mask of xxx.jpg is xxx_mask.gif (or .png, ...) [_mask]")
    add("--checkpoint", default="my_checkpoint_best.pth.tar", help="[my_checkpoint_best.pth.tar]")
    add("--threshold", type=float, default=0.5, help="the probability above which a pixel is foreground [0.5]")
    add("--tta", action="store_true", help="averages photo and mirror image: twice the time, a little better")
    add("--size", type=int, nargs=2, metavar=("H", "W"), help="the network sees photos at this size [training's]")
    tiles = "it sees N x N of them at once, at --size or their own [512]"
    add("--tile", type=int, nargs="?", const=512, metavar="N", help=tiles)
    add("--batch-size", type=int, default=8, help="photos that the network sees at once [8]")
    add("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first that is there]")
    args = parser.parse_args(argv)
    check_ranges(
        args,
        (
            ("threshold", float, lambda v: 0 < v < 1, "a number between 0 and 1"),
            ("size", list | None, lambda v: v is None or min(v) >= 16, "height and width, at least 16"),
            ("label", str, bool, "the object's name"),
            ("min_area", int, lambda v: v >= 0, "a whole number of pixels, at least 0"),
            ("batch_size", int, lambda v: v >= 1, "a whole number, at least 1"),
        ),
        lambda name: f"--{name.replace('_', '-')}",
    )
    args.mask = args.mask or not args.submission
    args.outputs = [kind for kind in OUTPUTS if getattr(args, kind.replace("-", "_"))]
    args.background = args.background and load_background(args.background)
    return args


def load_network(args: argparse.Namespace) -> Predictor:
    """The network, set to the size or the tiles that are asked for. Raises UserError."""
    model = load_model(args.checkpoint, args.device)
    smallest = 4 * model.network.multiple
    if args.tile is not None and args.tile < smallest:
        raise UserError(f"--tile is {args.tile}: set it to at least {smallest}, such as {8 * smallest}")
    is_whole = not isinstance(model.size, float)  # the network was trained on whole photos
    if model.photo_size and (args.tile and not args.size if is_whole else args.size):
        trained = model.size if is_whole else [round(model.size * side) for side in model.photo_size]
        factors = [now / before for now, before in zip(args.size or model.photo_size, trained, strict=True)]
        if not all(2 / 3 <= factor <= 3 / 2 for factor in factors):
            raise UserError(
                f"{'--size' if args.size else '--tile without --size'} shows the network photos {factors[0]:.2g} times "
                f"as high and {factors[1]:.2g} times as wide as in training: give --size {trained[0]} {trained[1]}"
            )
    if args.tile:
        model.network.tile = args.tile, args.tile
    if args.size or (args.tile and is_whole):
        model.size = tuple(args.size) if args.size else 1.0
    return model


def open_submission(args: argparse.Namespace, photos: list[Photo]) -> Submission:
    """The submission file, with the rows that an earlier run with the same network and flags has left."""
    stat = Path(args.checkpoint).stat()
    folders = sorted({str(photo.path.resolve().parent) for photo in photos})  # test_hq has the names of test
    decisive = stat.st_size, stat.st_mtime_ns, args.threshold, args.tta, args.size, args.tile, folders
    key = f"{zlib.crc32(repr(decisive).encode()):08x}"
    return Submission(args.submission, [photo.path for photo in photos], key)


def predict_all(
    photos: list[Photo], model: Predictor, args: argparse.Namespace, submission: Submission | None
) -> tuple[list[str], list[dict]]:
    """Decodes, predicts and writes, all three side by side. Returns what failed, a sentence each, and the scores."""
    failures, scores = [], []
    batches = -(-len(photos) // args.batch_size)
    batch_size = -(-len(photos) // max(1, batches))  # 9 photos: 5 and 4, not 8 and 1
    threads, depth = THREADS, THREADS + batch_size
    if model.network.tile:  # such photos differ in size, and are large: few wait
        batch_size, threads, depth = 1, 2, 2
    bar = utils.progress(total=len(photos), desc="predicting", unit="photo")
    with ThreadPoolExecutor(threads) as pool, bar:
        decoded = in_threads(pool, depth, decode, ((photo, model.size, model.rule) for photo in photos))
        logits = run_network(model, without_failures(decoded, failures), batch_size, args)
        finished = in_threads(pool, depth, finish, ((*item, model.size == 1, model.rule, args) for item in logits))
        for photo, row, runs in without_failures(finished, failures):
            if row:
                scores.append({"photo": str(photo.path)} | row)
            if submission:
                submission.add(photo.path, runs)
            bar.update()
    return failures, scores


def print_scores(scores: list[dict]) -> None:
    """The five worst photos and the mean."""
    print("".join(f"{name:>16}" for name in SCORES))
    mean = {name: np.mean([row[name] for row in scores]) for name in SCORES}
    for row in (*scores[:5], mean | {"photo": f"mean of {len(scores)}"}):
        print("".join(f"{row[name]:16.4f}" for name in SCORES) + f"  {row['photo']}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    model = load_network(args)
    photos = find_photos(args.inputs)
    if args.outputs or args.mask_dir or args.labelme:
        check_writable(args.output_dir, "--output-dir")
    if args.mask_dir:
        add_masks(photos, args.mask_dir, args.mask_suffix)
        check_table(args.output_dir / "scores.csv", "photo," + ",".join(SCORES))
    shard, submission = photos[RANK::WORLD_SIZE], None
    if args.submission:
        submission = open_submission(args, photos)
        shard = [photo for photo in shard if args.mask_dir or photo.path.name not in submission.done]  # all are scored

    start = time.perf_counter()
    with memory_errors(f"at --batch-size {args.batch_size}: set it to 1, or --size or --tile to less"):
        results = predict_all(shard, model, args, submission)
    if submission:
        submission.part.close()
    with process_group(minutes=7 * 24 * 60):  # one may have much larger photos than another
        everyone = all_gather_object(results)
    if RANK > 0:
        return

    failed = sum(len(failures) for failures, _ in everyone)
    rows = [row for _, rows in everyone for row in rows]
    scores = sorted((row for row in rows if "dice" in row), key=lambda row: row["dice"])
    uncertain = sorted((row for row in rows if "uncertain" in row), key=lambda row: -row["uncertain"])
    print(f"{len(photos) - failed} photos in {time.perf_counter() - start:.1f} s: {args.submission or args.output_dir}")
    if scores:
        utils.save_metrics(scores, args.output_dir / "scores.csv")
        print_scores(scores)
    if uncertain:
        print(f"The least certain of {len(uncertain)} photos, and the share of the object that is:")
        print("\n".join(f"{row['uncertain']:16.4f}  {row['photo']}" for row in uncertain[:20]))
    if submission:
        submission.write(is_complete=not failed)
    if failed:
        raise UserError(f"{failed} of {len(photos)} photos could not be predicted, as said above: fix or remove them")


if __name__ == "__main__":
    run(main)
