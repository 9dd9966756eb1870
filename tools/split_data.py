"""Sort Kaggle's download into data/, so that all photos of one car are either in training or in validation.

    python -m tools.split_data train.zip train_masks.zip    # as downloaded; train_hq.zip serves as well as train.zip
    python -m tools.split_data ~/Downloads/carvana          # a folder with these files, or with what was in them
    python -m tools.split_data photos masks --move          # your own: masks are the files that end in _mask

Files gather in data/.split first, and move to their places when every pair is there and can be decoded. A run that was
stopped anywhere is simply run again; originals are deleted (--move) last of all, each only beside its equal copy.
"""

import filecmp
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from machinery.decoding import read_sample
from machinery.errors import UserError, run
from machinery.files import (
    MASK_SUFFIX,
    copy_file,
    find_pairs,
    is_image,
    link_or_copy,
    nfc,
    passed_over,
    stem_of,
    written_whole,
)
from machinery.samples import car_of
from machinery.settings import Parser

LARGEST = 2**30  # bytes of a photo in a zip: a larger one is a bomb
NOT_SEARCHED = {"test", "test_hq", "sample", "cache", "saved_images"}  # test photos have no masks; the others are ours

Source = tuple[str, str, Callable[[Path], object]]  # file name, where it comes from, what brings it to a path


def find_sources(paths: list[Path], bring: Callable[[Path, Path], object]) -> Iterator[Source]:
    """Yield every file in these zips and folders, and in the folders' train*.zip, that is not hidden."""
    for path in paths:
        if not path.exists():
            raise UserError(f"{path} does not exist: correct the path")
        if path.suffix.lower() == ".zip":
            yield from zip_sources(path)
        elif path.is_dir():
            for file in sorted(path.rglob("*")):
                folders = file.relative_to(path).parts[:-1]
                if any(name in NOT_SEARCHED or name.startswith(".") for name in folders):
                    continue
                if re.fullmatch(r"train.*\.zip", file.name):
                    yield from zip_sources(file)
                elif file.is_file() and not file.name.startswith("."):
                    yield (
                        file.name,
                        str(file),
                        lambda target, file=file: bring(file.resolve(), target),
                    )  # no links to links
        else:
            raise UserError(f"{path} is neither a folder nor a zip file: give what you downloaded, or its folder")


def zip_sources(path: Path) -> Iterator[Source]:
    """Yield the files in a zip. Raises UserError for a broken one, and for a member that would leave its folder."""
    try:
        archive = zipfile.ZipFile(path)
    except (OSError, ValueError, NotImplementedError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} cannot be opened ({error}): download it again") from error
    for member in archive.infolist():
        name = PurePosixPath(member.filename.replace("\\", "/"))
        if name.is_absolute() or ".." in name.parts or ":" in str(name):
            raise UserError(
                f"{path} has a member named {member.filename}, outside of its folder: do not trust this file"
            )
        if not member.is_dir() and not name.name.startswith("."):
            yield name.name, f"{path}/{member.filename}", lambda target, m=member: extract(archive, m, target)


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
        raise UserError(f"{archive.filename} is damaged at {member.filename} ({error}): download it again") from error


def gather(sources: Iterator[Source], stage: Path, suffix: str) -> dict[str, str]:
    """Bring every photo and mask into stage/images or stage/masks; return where each came from, by its name there.

    Masks are the files whose names end in `suffix`.
    """
    origins: dict[str, str] = {}
    others = []
    for name, origin, bring in tqdm(sources, desc="gathering", unit="file", disable=None):
        if not is_image(Path(name)):
            others.append(Path(origin))
            continue
        if name in origins:
            raise UserError(f"{name} is there twice, as {origins[name]} and as {origin}: give only one of them")
        origins[name] = origin
        bring(stage / ("masks" if stem_of(Path(name)).endswith(suffix) else "images") / name)
    for line in passed_over(others, "the sources"):
        print(line)
    return origins


def verify(stage: Path, origins: dict[str, str], suffix: str) -> list[tuple[Path, Path]]:
    """Decode each pair in the stage, and return them. Raises UserError for a file without partner or a broken one."""
    advice = f"masks, whose names end in {suffix} (--mask-suffix): was train_masks.zip forgotten"
    for kind, rule in (("images", "photos"), ("masks", advice)):
        if not any((stage / kind).iterdir()):
            raise UserError(f"the sources hold no {rule}? Give photos and masks (a zip inside a zip: unpack it first)")
    try:
        pairs = find_pairs(stage / "images", stage / "masks", suffix)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            decoded = pool.map(lambda pair: read_sample(*pair, (16, 16)), pairs)
            for _ in tqdm(decoded, desc="verifying", total=len(pairs), unit="pair", disable=None):
                pass
    except UserError as error:  # names the copy in the stage: the user knows the file by where it came from
        message = str(error)
        for name, origin in origins.items():
            message = message.replace(f"{stage / 'images' / name} ", f"{origin} ")
            message = message.replace(f"{stage / 'masks' / name} ", f"{origin} ")
        raise UserError(message.replace(f"{stage}{os.sep}", "the ")) from error
    return pairs


def group_of(image: Path) -> str:
    """Return a photo's car; one that is not named as Carvana's stands for itself."""
    return car_of(image) or image.stem


def choose_val_cars(cars: set[str], share: float, seed: int) -> set[str]:
    """Choose a random share of the cars, at least one, and never all."""
    if len(cars) < 2:
        raise UserError(f"all photos are of one car, {next(iter(cars))}: a second one is needed to validate on")
    count = min(max(1, round(share * len(cars))), len(cars) - 1)
    return set(np.random.default_rng(seed).permutation(sorted(cars))[:count].tolist())


def gather_all(sources: list[Path], data_dir: Path, val_share: float, seed: int, how: str, suffix: str) -> None:
    """Bring the sources into data_dir/.split, and write its plan.json when nothing can go wrong any more."""
    stage = data_dir / ".split"
    for folder in folders_of(data_dir):
        if folder.exists() and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"{folder} has files already: move what is there away, or choose another --data-dir")
    shutil.rmtree(stage, ignore_errors=True)
    for kind in ("images", "masks"):
        (stage / kind).mkdir(parents=True)
    bring = {"copy": copy_file, "link": os.link, "move": link_or_copy}[how]
    origins = gather(find_sources(sources, bring), stage, suffix)
    pairs = verify(stage, origins, suffix)
    val_cars = choose_val_cars({group_of(image) for image, _ in pairs}, val_share, seed)
    places, originals = {}, {}
    for image, mask in pairs:
        name = "val" if group_of(image) in val_cars else "train"
        mask_name = mask.name if suffix == MASK_SUFFIX else f"{image.stem}{MASK_SUFFIX}{mask.suffix}"
        places[f"images/{image.name}"] = f"{name}_images/{image.name}"
        places[f"masks/{mask.name}"] = f"{name}_masks/{mask_name}"
    if how == "move":
        for file, place in places.items():
            original = Path(origins[Path(file).name]).absolute()
            if original.is_file():  # what came out of a zip is none
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


def split(sources: list[Path], data_dir: Path, val_share: float, seed: int, how: str, suffix: str) -> None:
    """Sort the sources into data_dir's four folders. An error leaves both as they were.

    Args:
        val_share: of the cars, to validate on.
        how: "copy", "link" or "move".
        suffix: what masks' names end in.
    """
    stage = data_dir / ".split"
    if plan := stopped_plan(data_dir):
        print(f"Finishing the split that was stopped in {data_dir}; for another one move its files away and run again.")
    else:
        gather_all(sources, data_dir, val_share, seed, how, suffix)
        plan = json.loads((stage / "plan.json").read_text())
    for folder in folders_of(data_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for file, place in plan["places"].items():
        if (stage / file).exists():
            (stage / file).replace(data_dir / place)
    originals = {Path(original): data_dir / place for place, original in plan["originals"].items() if how == "move"}
    if kept := [original for original, copy in originals.items() if not delete_original(original, copy)]:
        print(f"Originals that differ from their copies or cannot be deleted: {len(kept)}, such as {kept[0]}, kept")
    shutil.rmtree(stage)
    for name in ("train", "val"):
        images = [path for path in (data_dir / f"{name}_images").iterdir() if is_image(path)]
        cars = {group_of(image) for image in images}
        print(f"{name:5}  {len(images)} photos of {len(cars)} cars in {data_dir}/{name}_images")


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.split_data", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="zip files and folders")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the four folders are [data]")
    parser.add_argument("--val-share", type=float, default=0.15, help="share of the cars to validate on [0.15]")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of cars [0]")
    parser.add_argument("--mask-suffix", default=MASK_SUFFIX, help="what masks' names end in; it becomes _mask [_mask]")
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--move", dest="how", action="store_const", const="move", help="delete the originals in folders")
    how.add_argument("--link", dest="how", action="store_const", const="link", help="hard-link them: takes no space")
    args = parser.parse_args(argv)
    if not args.mask_suffix:
        raise UserError("--mask-suffix is empty: give masks and photos names by which they can be told apart")
    if args.seed < 0:
        raise UserError(f"--seed is {args.seed}: choose a whole number, at least 0")
    if not 0 < args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}: choose a share between 0 and 1, such as 0.15")
    try:
        split(args.sources, args.data_dir, args.val_share, args.seed, args.how or "copy", nfc(args.mask_suffix))
    except OSError as error:
        place = error.filename or args.data_dir
        raise UserError(f"{place}: {error.strerror}: make room there, or choose another --data-dir") from error


if __name__ == "__main__":
    run(main)
