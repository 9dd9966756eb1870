"""Sort Kaggle's download into data/, so that all photos of one car are either in training or in validation.

    python -m tools.split_data train.zip train_masks.zip    # as downloaded; train_hq.zip serves as well as train.zip
    python -m tools.split_data ~/Downloads/carvana          # a folder with these files, or with what was in them
    python -m tools.split_data photos masks --move          # your own, in this order

Masks are the files whose names end in _mask. Where there are none, they are those in folders that are named for masks,
or else those of the second of two sources, and have their photos' names.

Files gather in data/.split first, and move to their places when every pair is there and can be decoded. A run that was
stopped anywhere is simply run again; originals are deleted (--move) last of all, each only beside its equal copy.
"""

import errno
import filecmp
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image
from tqdm import tqdm

from machinery.decoding import Rule, decode_mask, read_sample
from machinery.errors import UserError, counted, reason_of, remedy_of, run
from machinery.files import (
    MASK_SUFFIX,
    copy_file,
    files_below,
    files_in,
    find_masks,
    find_pairs,
    image_of,
    is_clutter,
    is_image,
    link_or_copy,
    locked,
    nfc,
    passed_over,
    several_masks,
    stem_of,
    sync,
    written_whole,
)
from machinery.samples import car_of
from machinery.settings import Parser

LARGEST = 2**30  # bytes of a photo in a zip: a larger one is a bomb
MASKS_FOLDER = re.compile(r"mask|label|annot|seg|truth|^gt$", re.IGNORECASE)  # in such a name
NOT_SEARCHED = {"test", "test_hq", "sample", "cache", "saved_images"}  # test photos have no masks; the others are ours


@dataclass(eq=False)
class Source:
    """A photo, a mask or another file, and what brings it to a path."""

    name: str
    origin: str  # where it comes from, for messages
    given: int  # the number of the zip or folder that was given, from 0
    folders: list[str]  # the folder or zip file that was given, and those in it above the file
    bring: Callable[[Path], object]
    size: int = 0  # bytes, of what is unpacked

    @property
    def stem(self) -> str:
        return stem_of(Path(self.name))

    @property
    def place(self) -> Path:
        """The folder, or the zip file's folder, in which it lies."""
        return Path(self.origin).parent


def find_sources(paths: list[Path], bring: Callable[[Path, Path], object]) -> Iterator[Source]:
    """Yield every file in these zips and folders, and in the folders' train*.zip, that is no clutter."""
    for number, path in enumerate(paths):
        if not path.exists():
            raise UserError(f"{path} does not exist: correct the path")
        if path.suffix.lower() == ".zip":
            yield from zip_sources(path, number)
        elif path.is_dir():
            for file in files_below(path):
                folders = file.relative_to(path).parts[:-1]
                if NOT_SEARCHED.intersection(folders):
                    continue
                if re.fullmatch(r"train.*\.zip", file.name):
                    yield from zip_sources(file, number)
                else:
                    real = partial(bring, file.resolve())  # no links to links
                    yield Source(file.name, str(file), number, [path.name, *folders], real)
        else:
            raise UserError(f"{path} is neither a folder nor a zip file: give what you downloaded, or its folder")


def zip_sources(path: Path, number: int) -> Iterator[Source]:
    """Yield the files in a zip. Raises UserError for a broken one, and for a member that would leave its folder."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be opened ({reason_of(error)}): download it again") from error
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in str(name):
            raise UserError(
                f"{path} has a member named {member.filename}, outside of its folder: do not trust this file"
            )
        if not member.is_dir() and not any(map(is_clutter, name.parts)):
            folders = [path.stem, *name.parts[:-1]]
            bring = partial(extract, archive, member)
            yield Source(name.name, f"{path}/{member.filename}", number, folders, bring, member.file_size)


def extract(archive: zipfile.ZipFile, member: zipfile.ZipInfo, target: Path) -> None:
    """Write a member of a zip to `target`. Raises UserError where it is damaged, or too large."""
    if member.file_size > LARGEST:  # zipfile unpacks no more than the size that is declared
        raise UserError(f"{archive.filename}: {member.filename} is larger than a photo: do not trust this file")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others unpack without a bound
        raise UserError(
            f"{archive.filename}: {member.filename} is packed in an unusual way: unpack it, give its folder"
        )
    try:
        with written_whole(target) as temporary, archive.open(member) as packed, temporary.open("wb") as file:
            shutil.copyfileobj(packed, file)
    except (zipfile.BadZipFile, zlib.error, RuntimeError, NotImplementedError, EOFError) as error:
        raise UserError(
            f"{archive.filename} is damaged at {member.filename} ({reason_of(error)}): download it again"
        ) from error


def link(file: Path, target: Path) -> None:
    """Make a hard link. Raises UserError where the disk has none, or is another one."""
    try:
        os.link(file, target)
    except OSError as error:
        reason = "it is on another disk" if error.errno == errno.EXDEV else reason_of(error)
        advice = "leave out --link, which copies, or choose a --data-dir on its disk"
        raise UserError(f"{file} cannot be linked into {target.parents[2]} ({reason}): {advice}") from error


def masks_among(files: list[Source], suffix: str) -> list[Source]:
    """Return those of photos and masks that are masks, as the module's docstring says.

    Beside files that end in the suffix these are x_mask_1 of x, and in folders without photos those of equal names.
    """
    stems, named = {file.stem for file in files}, re.compile(rf"(.+){re.escape(suffix)}([\W\d_].*)?")
    found = [(named.fullmatch(file.stem), file) for file in files if suffix]
    if masks := [file for match, file in found if match and (not match[2] or match[1] in stems)]:
        places = {file.place for file in masks}
        photos = {file.stem for file in files if file.place not in places}
        beside = [file for file in files if file.place in places]
        return masks + [file for file in beside if file.stem in photos or image_of(file.stem, photos, suffix)]
    shared = set.intersection(*(set(file.folders) for file in files)) if files else set()
    masks = [file for file in files if any(MASKS_FOLDER.search(name) for name in set(file.folders) - shared)]
    if 0 < len(masks) < len(files):
        return masks
    are_two = {file.given for file in files} == {0, 1}
    return [file for file in files if are_two and file.given == 1]


def gather(sources: Iterator[Source], stage: Path, suffix: str) -> dict[str, str]:
    """Bring every photo and mask into stage/images or stage/masks; return where each came from, by its path there."""
    found = list(sources)
    files = [source for source in found if is_image(Path(source.name))]
    masks, origins = set(masks_among(files, suffix)), {}
    ending = f"whose names end in {suffix} (--mask-suffix)" if suffix else "by their folders' names or their order"
    missing = "photos" if len(masks) == len(files) else f"masks, {ending}: was train_masks.zip forgotten"
    if len(masks) in (0, len(files)):
        raise UserError(f"the sources hold no {missing}? Give photos and masks (a zip inside a zip: unpack it first)")
    needed, free = sum(source.size for source in files), shutil.disk_usage(stage).free
    if needed > free:
        size = f"{needed / 1e9:.1f} GB are packed, and {free / 1e9:.1f} GB are free in {stage.parent}"
        raise UserError(f"{size}: make room there, or choose another --data-dir")
    for source in tqdm(files, desc="gathering", unit="file", disable=None):
        place = f"{'masks' if source in masks else 'images'}/{source.name}"
        if place in origins:
            raise UserError(
                f"{source.name} is there twice, as {origins[place]} and as {source.origin}: give only one of them"
            )
        origins[place] = source.origin
        source.bring(stage / place)
    for line in passed_over((Path(source.origin) for source in found), "the sources"):
        print(line)
    return origins


def unite_masks(stage: Path, origins: dict[str, str], suffix: str, is_wanted: bool) -> None:
    """Unite the several masks that photos in the stage have: a pixel is foreground if it is in one of them.

    Raises UserError where that is not wanted.
    """
    stems = {stem_of(path) for path in (stage / "images").iterdir()}
    several = several_masks(*find_masks(stems, stage / "masks", suffix), suffix, stems)
    if not several:
        return
    if not is_wanted:
        stem, masks = next(iter(several.items()))
        first, second = (origins[f"masks/{mask.name}"] for mask in masks[:2])
        raise UserError(
            f"{second} looks like a second mask of the photo {stem}, as {first} is: add --unite, which makes one mask "
            "of those of a photo, or give it the name of its own photo"
        )
    rule = Rule.of([decode_mask(mask, None)[2] for mask in sorted((stage / "masks").iterdir())])
    for stem, masks in several.items():
        parts = [decode_mask(mask, None, rule)[0] for mask in masks]
        if len({part.shape for part in parts}) > 1:
            raise UserError(f"{origins[f'masks/{masks[0].name}']} and the photo's other masks differ in size")
        united = np.where((np.stack(parts) == 1).any(0), np.uint8(1 if rule.has_void else 255), np.max(parts, axis=0))
        for mask in masks:
            mask.unlink()
            del origins[f"masks/{mask.name}"]
        Image.fromarray(united).save(stage / "masks" / f"{stem}{suffix}.png")
    print(f"Masks that were united: {sum(map(len, several.values()))}, into {len(several)}; the originals stay")


def verify(stage: Path, origins: dict[str, str], suffix: str) -> list[tuple[Path, Path]]:
    """Decode each pair in the stage, and return them. Raises UserError for a file without partner or a broken one."""
    try:
        pairs = find_pairs(stage / "images", stage / "masks", suffix)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = pool.map(lambda pair: read_sample(*pair, (16, 16)), pairs)
            progress = tqdm(decoded, desc="verifying", total=len(pairs), unit="pair", disable=None)
            look_like_photos = [note.kind in ("colours", "jpeg") and mask.all() for _, mask, _, note in progress]
    except UserError as error:  # names the copy in the stage: the user knows the file by where it came from
        message = str(error)
        for place, origin in origins.items():
            message = message.replace(f"{stage / place} ", f"{origin} ")
        raise UserError(message.replace(f"{stage}{os.sep}", "the ")) from error
    if all(look_like_photos):
        mask = origins.get(f"masks/{pairs[0][1].name}")
        raise UserError(f"{mask} and all other masks have colours everywhere: give the photos first, then the masks")
    return pairs


def group_of(image: Path) -> str:
    """Return a photo's car; one that is not named as Carvana's stands for itself."""
    return car_of(image) or image.stem


def choose_val_cars(cars: set[str], share: float, seed: int) -> set[str]:
    """Choose a random share of the cars or single photos, at least one, and never all."""
    if len(cars) < 2:
        one = next(iter(cars))
        what = f"all photos are of one car, {one}" if car_of(Path(f"{one}_01.jpg")) else f"{one} is the only photo"
        raise UserError(f"{what}: a second one is needed to validate on")
    count = min(max(1, round(share * len(cars))), len(cars) - 1)
    return set(np.random.default_rng(seed).permutation(sorted(cars))[:count].tolist())


def gather_all(
    sources: list[Path], data_dir: Path, val_share: float, seed: int, how: str, suffix: str, is_united: bool
) -> None:
    """Bring the sources into data_dir/.split, and write its plan.json when nothing can go wrong any more."""
    stage = data_dir / ".split"
    for folder in folders_of(data_dir):
        if folder.exists() and files_in(folder):
            raise UserError(f"{folder} has files already: move what is there away, or choose another --data-dir")
    shutil.rmtree(stage, ignore_errors=True)
    for kind in ("images", "masks"):
        (stage / kind).mkdir(parents=True)
    bring = {"copy": copy_file, "link": link, "move": link_or_copy}[how]
    origins = gather(find_sources(sources, bring), stage, suffix)
    unite_masks(stage, origins, suffix, is_united)
    pairs = verify(stage, origins, suffix)
    val_cars = choose_val_cars({group_of(image) for image, _ in pairs}, val_share, seed)
    places, originals = {}, {}
    for image, mask in pairs:
        name = "val" if group_of(image) in val_cars else "train"
        places[f"images/{image.name}"] = f"{name}_images/{image.name}"
        places[f"masks/{mask.name}"] = f"{name}_masks/{image.stem}{MASK_SUFFIX}{mask.suffix}"
    if how == "move":
        for file, place in places.items():
            original = Path(origins.get(file, "")).absolute()
            if original.is_file():  # what came out of a zip is none, and a united mask has none
                originals[place] = str(original)
    with written_whole(stage / "plan.json") as temporary:
        temporary.write_text(json.dumps({"places": places, "originals": originals}))


def folders_of(data_dir: Path) -> list[Path]:
    return [data_dir / f"{name}_{kind}" for name in ("train", "val") for kind in ("images", "masks")]


def stopped_plan(data_dir: Path) -> dict[str, dict[str, str]] | None:
    """Return the plan of a run that was stopped while it brought files to their places or deleted originals, or None.

    It is void where files have been taken out of the four folders, or added in the place of others.
    """
    stage = data_dir / ".split"
    if not (stage / "plan.json").exists():
        return None
    plan = json.loads((stage / "plan.json").read_text())
    placed = [(data_dir / place).exists() for place in plan["places"].values()]
    waiting = [(stage / file).exists() for file in plan["places"]]
    is_whole = any(placed) and all(one != other for one, other in zip(placed, waiting, strict=True))
    return plan if is_whole else None


def delete_original(original: Path, copy: Path) -> bool:
    """Delete a file, but only while another one, its copy or hard link, is equal to it. Return whether it is gone."""
    try:
        if not original.samefile(copy):
            has_copy = filecmp.cmp(original, copy, shallow=False)
        else:  # two names of one file, not one name that is reached by two paths
            has_copy = original.resolve() != copy.resolve() and copy.stat().st_nlink > 1
        if has_copy:
            original.unlink()
    except OSError:  # it may not be read or deleted
        pass
    return not original.exists()


def split(
    sources: list[Path], data_dir: Path, val_share: float, seed: int, how: str, suffix: str, is_united: bool = False
) -> None:
    """Sort the sources into data_dir's four folders. An error leaves both as they were.

    Args:
        val_share: of the cars, to validate on.
        how: "copy", "link" or "move".
        suffix: what masks' names end in; "" where they have their photos' names.
        is_united: whether several masks of a photo become one.
    """
    stage = data_dir / ".split"
    if plan := stopped_plan(data_dir):
        print(f"Finishing the split that was stopped in {data_dir}; for another one move its files away and run again.")
    else:
        gather_all(sources, data_dir, val_share, seed, how, suffix, is_united)
        plan = json.loads((stage / "plan.json").read_text())
    for folder in folders_of(data_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for file, place in plan["places"].items():
        if (stage / file).exists():
            (stage / file).replace(data_dir / place)
    originals = {Path(original): data_dir / place for place, original in plan["originals"].items() if how == "move"}
    for path in (*originals.values(), *folders_of(data_dir)):
        sync(path)
    if kept := [original for original, copy in originals.items() if not delete_original(original, copy)]:
        print(f"Originals that differ from their copies or cannot be deleted: {len(kept)}, such as {kept[0]}, kept")
    shutil.rmtree(stage)
    for name in ("train", "val"):
        images = [path for path in (data_dir / f"{name}_images").iterdir() if is_image(path)]
        cars = {group_of(image) for image in images}
        of_cars = f" of {counted(len(cars), 'car')}" if any(map(car_of, images)) else ""
        print(f"{name:5}  {counted(len(images), 'photo')}{of_cars} in {data_dir}/{name}_images")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.split_data", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="zip files and folders")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the four folders are [data]")
    parser.add_argument("--val-share", type=float, default=0.15, help="share of cars or photos to validate on [0.15]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of these [0]")
    suffix = "what masks' names end in, '' where they have their photos' names; it becomes _mask [_mask]"
    parser.add_argument("--mask-suffix", default=MASK_SUFFIX, help=suffix)
    parser.add_argument("--unite", action="store_true", help="several masks of a photo (x_mask, x_mask_1) become one")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--move", dest="how", action="store_const", const="move", help="delete the originals in folders")
    how.add_argument("--link", dest="how", action="store_const", const="link", help="hard-link them: takes no space")
    args = parser.parse_args(argv)
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}: choose a whole number, at least 0")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}: choose a share between 0 and 1, such as 0.15")
    how, suffix = args.how or "copy", nfc(args.mask_suffix)
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with locked(args.data_dir / ".split.lock", f"--data-dir {args.data_dir}"):
            split(args.sources, args.data_dir, args.val_share, args.seed, how, suffix, args.unite)
    except OSError as error:
        place, advice = error.filename or args.data_dir, remedy_of(error)
        raise UserError(f"{place}: {reason_of(error)}: {advice}, or choose another --data-dir") from error


if __name__ == "__main__":
    run(main)
