"""Make masks of what annotation tools export: LabelMe, COCO, CVAT for images, YOLO, label images, run-length tables.

    python -m tools.make_masks photos --label car                # LabelMe's files beside the photos -> masks_of_car/
    python -m tools.make_masks instances.json photos --label car --label van  # COCO's file, and its photos' folder
    python -m tools.make_masks VOC/SegmentationClass VOC/JPEGImages --label 7 --ignore-label 255
    python -m tools.make_masks photos predictions --corrected    # what was outlined by hand or corrected in LabelMe

Then `python -m tools.split_data masks_of_car/images masks_of_car/masks` sorts them into data/. The output appears as a
whole, or not at all. docs/annotation.md says more.
"""

import argparse
import io
import json
import re
import shlex
import shutil
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import takewhile
from pathlib import Path, PureWindowsPath
from urllib.parse import unquote

import numpy as np
from filelock import FileLock, Timeout
from PIL import Image
from tqdm import tqdm

from machinery.decoding import NUM_THREADS, VOID, Note, holds_void, opened, orientation_of, upright, upright_size
from machinery.errors import UserError, counted, reason_of, remedy_of, run
from machinery.files import (
    CLUTTER,
    MASK_SUFFIX,
    SUFFIXES,
    files_below,
    files_in,
    free_name,
    if_stale,
    image_of,
    is_image,
    key_of,
    link_or_copy,
    nfc,
    stem_of,
)
from machinery.outputs import is_output
from machinery.settings import Parser
from machinery.shapes import line_rings, polygon_mask
from tools.annotations import Annotation, label_image, read_file, reading

MANIFEST = "make_masks.json"  # in the output folder: what was written, so that nothing else is ever replaced
Pair = tuple[Annotation, Path | None]  # with its photo; None where only the annotation's file holds it


# ---------------------------------------------------------------------------------------------------------------------
# Files in


class Photos:
    """The photos below the sources, by name and by stem. Pictures that predict.py has made are none."""

    def __init__(self, paths: list[Path]) -> None:
        paths = [path for path in paths if not is_output(path)]
        self.paths: dict[str, list[Path]] = {}
        self.count = sum(not path.stem.endswith(MASK_SUFFIX) for path in paths)
        for path in paths:
            for name in {path.name, path.stem, path.stem.removesuffix("_leftImg8bit")}:  # the last: Cityscapes
                self.paths.setdefault(key_of(name), []).append(path)

    def photo_of(self, annotation: Annotation) -> Path | None:
        """Return an annotation's photo, or None where only its file holds it. Raises UserError.

        After photos and files were renamed together, the name in the file is that of no photo, or of another one. A
        label image may be one of several of its photo: x_mask_1 of x.
        """
        file = annotation.file
        found = self.find(annotation.photo, file) or self.find(name_in_address(annotation.photo), file)
        if not found and is_image(file) and (stem := image_of(key_of(file.stem), self.paths, MASK_SUFFIX)):
            found = self.find(stem, file)
        own = None
        if annotation.has_photos_name and not (found and key_of(file.stem) in (key_of(found.stem), key_of(found.name))):
            own = self.find(file.stem, file)
        if found and own:
            raise UserError(
                f"{file} names {found} as its photo, but {own} has the file's own name: correct its imagePath, or "
                "move the photo away that it does not show"
            )
        if not (found or own or annotation.embedded):
            name = PureWindowsPath(annotation.photo).name or file.stem
            raise UserError(f"{file}: its photo {name} is not there: give the folder that holds it, too")
        return found or own

    def find(self, name: str, file: Path) -> Path | None:
        """Return the photo that a file names: where it says, seen from the file, else of that name among the sources.

        Paths of other machines end alike: of several photos it is the one that shares the most folders' names with the
        path, and then with the file's own. Raises UserError where there are two.
        """
        path = PureWindowsPath(name)  # takes / and \\ alike
        if not path.anchor and is_image(path) and (file.parent / path.as_posix()).is_file():
            return file.parent / path.as_posix()
        ranks = {found: self.rank(found, path, file) for found in self.paths.get(key_of(path.name), ())}
        highest = max(ranks.values(), default=None)
        best = [found for found, rank in ranks.items() if rank == highest]
        if any(not best[0].samefile(other) for other in best[1:]):
            raise UserError(f"{file}: {path.name} is there twice, as {best[0]} and {best[1]}: give only one of them")
        return best[0] if best else None

    @staticmethod
    def rank(found: Path, wanted: PureWindowsPath, file: Path) -> tuple[bool, int, int]:
        ends = zip(reversed(found.absolute().parts[:-1]), reversed(wanted.parts[:-1]), strict=False)
        starts = zip(found.absolute().parts, file.absolute().parts, strict=False)
        is_exact = nfc(wanted.name) in (nfc(found.name), nfc(found.stem))
        return is_exact, count_same(ends), count_same(starts)


def name_in_address(address: str) -> str:
    """Return the photo that a web address names: https://x.org/my%20photo.jpg?v=2, or Label Studio's /data/?d=a.jpg."""
    path, _, query = unquote(address).partition("?")
    return path if is_image(PureWindowsPath(path)) else query.removeprefix("d=")


def count_same(pairs: Iterable[tuple[str, str]]) -> int:
    """Count the pairs that are equal before the first that is not."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def list_files(sources: list[Path]) -> tuple[list[Path], list[Path]]:
    """List the files that are given, with those in the folders, and the images among and beside them, each once.

    Clutter and what tools.make_masks wrote are left out.
    """
    files, images = [], []
    for source in sources:
        if not source.exists():
            raise UserError(f"{source} does not exist: correct the path")
        folder = source if source.is_dir() else source.parent
        below = files_below(source) if source.is_dir() else list(filter(Path.is_file, files_in(folder)))
        ours = {path.parent for path in below if path.name == MANIFEST}
        for path in below:
            if ours.intersection(path.parents):
                continue
            if is_image(path):
                images.append(path)
            if source.is_dir() or path == source:
                files.append(path)
    return [list({path.resolve(): path for path in paths}.values()) for paths in (files, images)]


def read_sources(sources: list[Path]) -> tuple[list[Annotation], Photos]:
    """Return what all files say, and the photos. Label images count only where nothing else is annotated."""
    files, images = list_files(sources)
    others = [file for file in files if not is_image(file)]
    progress = partial(tqdm, desc="reading", unit="file", disable=None)
    photos = Photos(images)
    read = {file: read_file(file, key_of(file.stem) in photos.paths) for file in progress(others)}
    annotations = [annotation for found in read.values() for annotation in found or ()]
    if not annotations:
        found = {image: label_image(image) for image in progress([file for file in files if file not in others])}
        annotations = [annotation for annotation in found.values() if annotation]
        photos = Photos([image for image in images if not found.get(image)])
    unknown = [file for file in others if not read[file] and file.suffix.lower() not in (".yaml", ".yml")]
    if not annotations:
        raise UserError(
            f"{(*unknown, *sources)[0]} holds no annotations that are read: export COCO, LabelMe, CVAT for images 1.1 "
            "or YOLO segmentation from your tool, unpack archives, and save colour masks as label images of one "
            "channel (docs/annotation.md lists the formats)"
        )
    if unknown:
        files = counted(len(unknown), "file")
        print(f"Passed over, because they are no annotations: {files}, such as {unknown[0]}")
    return annotations, photos


def match(annotations: list[Annotation], photos: Photos, is_united: bool) -> list[Pair]:
    """Pair annotations with their photos.

    What one file says of a photo in several places, as COCO does under two ids, is united; what several files say of
    it, if `is_united`. Raises UserError for a photo that is missing, or annotated in several files otherwise.
    """
    pairs: dict[Path, Pair] = {}
    for annotation in annotations:
        with reading(annotation.file):
            photo = photos.photo_of(annotation)
            known, _ = pairs.setdefault(photo.resolve() if photo else annotation.file, (annotation, photo))
            if known.file == annotation.file and known.size != annotation.size:
                raise ValueError(f"{annotation.photo} has two sizes in it")
        if known.file != annotation.file and not (is_united and known.size == annotation.size):
            advice = "give only one of them"
            advice += ", for they say two sizes" if is_united else ", or add --unite, which takes what both show"
            if annotation.is_prediction or known.is_prediction:
                advice += ", or add --corrected to leave out predictions"
            raise UserError(f"{photo} is annotated in {known.file} and in {annotation.file}: {advice}")
        if known is not annotation:
            known.shapes += annotation.shapes
    return list(pairs.values())


def choose_labels(annotations: list[Annotation], wanted: list[str], ignored: list[str]) -> list[str]:
    """Return the labels that are the object: the wanted ones, or the only one there is. Raises UserError."""
    counts = Counter(shape.label for annotation in annotations for shape in annotation.shapes if shape.draw)
    listed = ", ".join(f"{label} ({count})" for label, count in counts.most_common(20))
    listed += f" and {len(counts) - 20} more" if len(counts) > 20 else ""
    if not counts:
        advice = "outline the objects (--line-width draws lines)"
        raise UserError(f"{annotations[0].file} and the others hold no shapes with an area: {advice}")
    if unknown := [label for label in (*wanted, *ignored) if label not in counts]:
        raise UserError(f"no shape with an area is labelled {unknown[0]}: choose from {listed}")
    if both := set(wanted) & set(ignored):
        raise UserError(f"{both.pop()} is given as --label and as --ignore-label: choose one of them")
    labels = wanted or [label for label in counts if label not in ignored and not is_background(label)]
    if not labels:
        raise UserError(f"every label is ignored or background ({listed}): leave one for the object")
    if len(labels) != 1 and not wanted:
        raise UserError(f"there are the labels {listed}: choose with --label, which may be given more than once")
    return labels


def is_background(label: str) -> bool:
    """Return whether shapes of a label cut holes, as LabelMe and CVAT draw them: _background_, background."""
    return label.strip("_").casefold() == "background"


def draw_lines(annotations: list[Annotation], width: int) -> None:
    """Give lines an area, so many pixels wide."""
    for annotation in annotations:
        for shape in annotation.shapes:
            if shape.line is not None:
                shape.draw = partial(polygon_mask, line_rings(shape.line, width))


def leave_out_unclear(pairs: list[Pair], labels: list[str], ignored: list[str]) -> list[Pair]:
    """Return the pairs but those with a shape of these labels that has no area: its object would be background.

    Raises UserError where no object is left.
    """
    asked = {*labels, *ignored}
    kept = [pair for pair in pairs if all(shape.draw or shape.label not in asked for shape in pair[0].shapes)]
    if not any(shape.label in labels for annotation, _ in kept for shape in annotation.shapes):
        raise UserError(
            f"{pairs[0][0].file} and the others hold points, lines or boxes beside every outline, so that no photo has "
            "all its objects outlined: outline these, too (--line-width draws lines)"
        )
    return kept


# ---------------------------------------------------------------------------------------------------------------------
# Masks out


@dataclass
class Row:
    """The result of drawing an annotation."""

    areas: Counter  # pixels of each label's shapes
    covered: Counter  # pixels of the object that each other label covers
    size: int  # pixels of the photo
    has_object: bool
    is_turned: bool  # the tool took the photo as it lies in the file, without EXIF's orientation
    note: Note  # of the mask


def draw(annotation: Annotation, photo: Path, args: argparse.Namespace) -> tuple[np.ndarray, Row]:
    """Draw the mask of a photo, uint8 (H, W), upright: 255 on the labels, or 1 where there are ignored ones, then VOID.

    Where the tool has an order, later shapes of other labels cover the object. Raises UserError.
    """
    size, is_turned = size_as_taken(annotation, photo)
    mask, areas, covered, foreground = np.zeros(size, np.uint8), Counter(), Counter(), 1 if args.ignore_label else 255
    for shape in sorted(annotation.shapes, key=lambda shape: shape.label in args.ignore_label):  # void lies on top
        if not shape.draw:
            continue
        with reading(f"{annotation.file}: {shape.place}"):
            pixels = shape.draw(size)
        areas[shape.label] += np.count_nonzero(pixels)
        if shape.label in args.label:
            mask[pixels] = foreground
        elif shape.label in args.ignore_label:
            mask[pixels] = VOID
        elif annotation.has_order or is_background(shape.label):
            covered[shape.label] += np.count_nonzero(mask[pixels])
            mask[pixels] = 0
    if is_turned:
        with opened(photo) as image:
            mask = np.asarray(upright(mask, image))
    values, counts = np.unique(mask, return_counts=True)
    note = Note(None, "uint8", [[float(v), c / mask.size] for v, c in zip(values, counts, strict=True)], 255)
    return mask, Row(areas, covered, mask.size, foreground in values, is_turned, note)


def size_as_taken(annotation: Annotation, photo: Path) -> tuple[tuple[int, int], bool]:
    """Return (height, width) of a photo as the tool took it, and whether it took it as it lies in the file.

    Raises UserError for a photo of another size.
    """
    with opened(photo) as image:
        upright_as = lies_as = upright_size(image)
        if orientation_of(image) >= 5 and image.format != "TIFF":  # which Pillow turns itself
            lies_as = upright_as[::-1]
    size = annotation.size or upright_as
    if size not in (upright_as, lies_as):
        written, own = (f"{width} x {height}" for height, width in (size, upright_as))
        raise UserError(f"{annotation.file} is of a photo of {written} pixels, but {photo} has {own}: give that photo")
    return size, size != upright_as


def write_pair(annotation: Annotation, photo: Path | None, name: str, folder: Path, args: argparse.Namespace) -> Row:
    """Write images/<name> and masks/<name>_mask.png into the folder, unless there is no object and --skip-empty."""
    photo = photo or extract(annotation, folder / "embedded" / name)
    mask, row = draw(annotation, photo, args)
    if row.has_object or not args.skip_empty:
        link_or_copy(photo.resolve(), folder / "images" / f"{name}{photo.suffix.lower()}")
        Image.fromarray(mask).save(folder / "masks" / f"{name}{MASK_SUFFIX}.png")
    return row


def extract(annotation: Annotation, path: Path) -> Path:
    """Write the photo that an annotation's file holds to the path, to which its kind's ending is added."""
    with reading(f"{annotation.file}: its imageData"):
        content = annotation.embedded()
        with Image.open(io.BytesIO(content)) as image:
            path = path.with_name(f"{path.name}.{image.format.lower().replace('mpo', 'jpeg')}")
        if path.suffix not in SUFFIXES:
            raise ValueError(f"{path.suffix} is no kind of photo")
    path.write_bytes(content)
    return path


def plain(text: str) -> str:
    """Return a text with _ for what may not be part of a file's name everywhere."""
    return re.sub(r"[^\w.-]", "_", text)


def check_ours(folder: Path) -> None:
    """Raise UserError where there are files that tools.make_masks did not write, or masks that were changed since."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another --output-dir")
    known = {}
    if (folder / MANIFEST).is_file():
        with reading(folder / MANIFEST):
            known = dict(json.loads((folder / MANIFEST).read_text("utf-8")))
    for path in sorted(folder.rglob("*")):
        name, is_folder = path.relative_to(folder).as_posix(), path.is_dir() and not path.is_symlink()
        is_clutter = path.name.startswith("._") or CLUTTER.intersection(map(str.casefold, Path(name).parts))
        if is_folder or name == MANIFEST or is_clutter:
            continue
        if name not in known or known[name] != checksum(path):
            raise UserError(
                f"{path} was not written by tools.make_masks, or changed since: choose another --output-dir"
            )


def checksum(path: Path) -> int:
    return zlib.crc32(path.read_bytes())


@contextmanager
def hidden_folder(output: Path) -> Iterator[Path]:
    """Yield an empty hidden folder beside the output, which is removed afterwards.

    What a killed run has left in it is removed first, and an output that this run had set aside is put back. Raises
    UserError while another run has the folder.
    """
    folder = output.with_name(f".make_masks-{output.name}")
    folder.mkdir(exist_ok=True)
    if others := {path.name for path in folder.iterdir()} - {"lock", "new", "old"}:
        raise UserError(f"{folder / others.pop()} was not written by tools.make_masks: move it away")
    lock_file = folder / "lock"
    lock = FileLock(lock_file, timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{output} is being written by another run: wait for it{if_stale(lock_file)}") from error
    except (OSError, NotImplementedError):  # a disk without locks
        pass
    try:
        put_back(folder / "old", output)
        for name in ("new", "old"):
            shutil.rmtree(folder / name, ignore_errors=True)
        yield folder
    finally:
        put_back(folder / "old", output)
        shutil.rmtree(folder, ignore_errors=True)
        lock.release()


def put_back(old: Path, output: Path) -> None:
    """Give an output that was set aside its place again, where no new one has it."""
    if old.exists() and not output.exists():
        old.replace(output)


def make(pairs: list[Pair], args: argparse.Namespace) -> list[Row]:
    """Write all pairs, into a hidden folder which then takes the output's place. Return a row for each."""
    output = args.output_dir.resolve()  # a link stays one
    check_ours(args.output_dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    with hidden_folder(output) as temporary:
        rows = write_all(pairs, temporary / "new", args)
        if output.exists():
            output.replace(temporary / "old")
        (temporary / "new").replace(output)
    return rows


def write_all(pairs: list[Pair], folder: Path, args: argparse.Namespace) -> list[Row]:
    """Write all pairs and the manifest into a new folder. Return a row for each."""
    for kind in ("images", "masks", "embedded"):
        (folder / kind).mkdir(parents=True)
    annotations, photos = zip(*pairs, strict=True)
    embedded = (Path(plain(PureWindowsPath(annotation.photo).name)) for annotation in annotations)
    stems = [stem_of(photo or other) for photo, other in zip(photos, embedded, strict=True)]
    stems = [stem.removesuffix(MASK_SUFFIX).lstrip(".") or "photo" for stem in stems]  # no hidden files
    taken: set[str] = set()
    names = [free_name(stem, taken) for stem in stems]
    with ThreadPoolExecutor(NUM_THREADS) as pool:
        rows = pool.map(partial(write_pair, folder=folder, args=args), annotations, photos, names)
        rows = list(tqdm(rows, desc="drawing", total=len(names), unit="photo", disable=None))
    notes = [row.note for row in rows if row.has_object or not args.skip_empty]
    if not notes:
        raise UserError("no photo shows an object: nothing is left by --skip-empty")
    if args.ignore_label and not holds_void(notes):
        raise UserError(
            f"--ignore-label {args.ignore_label[0]}: too few masks with void hold an object, too, so that train.py "
            "would take void for the object: add --skip-empty, or leave it out"
        )
    shutil.rmtree(folder / "embedded")
    written = sorted((*(folder / "images").iterdir(), *(folder / "masks").iterdir()))
    manifest = {path.relative_to(folder).as_posix(): checksum(path) for path in written}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    return rows


def print_table(annotations: list[Annotation], rows: list[Row], args: argparse.Namespace) -> None:
    """Print a row for each label, and lines about what is special."""
    counts = Counter(shape.label for annotation in annotations for shape in annotation.shapes if shape.draw)
    areas, covered = (sum((getattr(row, kind) for row in rows), Counter()) for kind in ("areas", "covered"))
    width = max(map(len, ("label", *counts)))
    print(f"{'label':{width}}  photos  objects     area")
    for label, count in sorted(counts.items(), key=lambda item: (item[0] not in args.label, -item[1])):
        showing = sum(row.areas[label] > 0 for row in rows)
        share = areas[label] / sum(row.size for row in rows)
        use = "" if label in args.label else "  void" if label in args.ignore_label else "  not asked for"
        if covered[label]:
            share_of_object = covered[label] / sum(areas[wanted] for wanted in args.label)
            use += f", covers {100 * share_of_object:.1f} % of the object"
        print(f"{label:{width}}  {showing:6}  {count:7}  {100 * share:5.1f} %{use}")
    if empty := sum(not row.has_object for row in rows):
        fate = "left out" if args.skip_empty else "with an empty mask; --skip-empty leaves them out"
        print(f"Photos without an object: {empty}, {fate}")
    if turned := sum(row.is_turned for row in rows):
        print(f"Photos that were annotated as they lie, without EXIF's orientation: {turned}; their masks are upright")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.make_masks", __doc__)
    add = parser.add_argument
    add("sources", nargs="+", type=Path, help="annotation files, and folders with them and with photos")
    add("--label", action="append", default=[], help="the object's label; several are united [the only one]")
    add("--ignore-label", action="append", default=[], help="255 in the masks: void, which counts nowhere")
    add("--line-width", type=int, metavar="N", help="draws lines, N pixels wide, which have no area otherwise")
    add("--skip-empty", action="store_true", help="leaves out photos without an object")
    add("--corrected", action="store_true", help="leaves out predict.py's files that nobody has saved since")
    add("--unite", action="store_true", help="takes several files of a photo together, such as x_mask_1 and x_mask_2")
    add("--output-dir", type=Path, help="where images/ and masks/ are written [masks_of_<label>]")
    args = parser.parse_args(argv)
    if args.line_width is not None and args.line_width < 1:
        raise UserError(f"--line-width {args.line_width}: give a width of 1 pixel or more")
    try:
        annotations, photos = read_sources(args.sources)
        predictions = sum(annotation.is_prediction for annotation in annotations)
        if args.corrected:
            annotations = [annotation for annotation in annotations if not annotation.is_prediction]
            if not annotations:
                raise UserError("none of these files was saved in LabelMe: correct some, or leave out --corrected")
        if args.line_width:
            draw_lines(annotations, args.line_width)
        args.label = choose_labels(annotations, args.label, args.ignore_label)
        args.output_dir = args.output_dir or Path("_".join(("masks_of", *map(plain, args.label))))
        matched = match(annotations, photos, args.unite)
        pairs = leave_out_unclear(matched, args.label, args.ignore_label)
        rows = make(pairs, args)
    except OSError as error:
        advice = f"{remedy_of(error)}, or choose another --output-dir"
        raise UserError(f"{error.filename}: {reason_of(error)}: {advice}") from error
    print_table([annotation for annotation, _ in pairs], rows, args)
    if unclear := len(matched) - len(pairs):
        shapes = "points, lines, or boxes of COCO and YOLO"
        print(f"Photos with shapes that have no area ({shapes}): {unclear}, left out; --line-width draws lines")
    left_out = predictions if args.corrected else 0  # a line of their own counts them
    if (others := photos.count - left_out - sum(photo is not None for _, photo in matched)) > 0:
        print(f"Photos that no file mentions: {others}, left out")
    if predictions:
        fate = "left out" if args.corrected else "taken; --corrected leaves them out"
        print(f"Predictions that nobody has saved in LabelMe since: {predictions}, {fate}")
    print("python -m tools.split_data", *(shlex.quote(str(args.output_dir / kind)) for kind in ("images", "masks")))


if __name__ == "__main__":
    run(main)
