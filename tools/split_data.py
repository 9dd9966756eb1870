"""Sort photos and masks into data/, part of them for validation. Run it again when there are more.

    python -m tools.split_data photos masks                 # your own, in this order; --move deletes them there
    python -m tools.split_data ~/Downloads/carvana          # a folder with photos and masks, or with Kaggle's zip files
    python -m tools.split_data train.zip train_masks.zip    # as downloaded; train_hq.zip serves as well as train.zip

Masks are the files whose names end in _mask. Where there are none, they are those in folders that are named for masks,
or else those of the second of two sources, and have their photos' names. All photos of one of Carvana's cars are on
one side, or of what --group finds in their names: with --group '^[^_]+' those whose names begin alike.

The next run adds new photos and takes masks that have changed. A photo stays on its side, and what is no longer in the
sources stays, too. New photos are for training, so that scores compare; --val-share or --seed shares them out. Where
the four folders were emptied, these two choose anew, and without them photos return to their sides.

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
from dataclasses import dataclass, field
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
    key_of,
    link_or_copy,
    locked,
    nfc,
    passed_over,
    remove_leftovers,
    several_masks,
    stem_of,
    sync,
    written_whole,
)
from machinery.samples import check_group, group_of
from machinery.settings import Parser, regex

LARGEST = 2**30  # bytes of a photo in a zip: a larger one is a bomb
MASKS_FOLDER = re.compile(r"mask|label|annot|seg|truth|^gt$", re.IGNORECASE)  # in such a name
SIDES = "train", "val"
VAL_SHARE = 0.15  # of the cars or photos, by default
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
        """Return the folder, or the zip file's folder, in which it lies."""
        return Path(self.origin).parent


def find_sources(paths: list[Path], bring: Callable[[Path, Path], object], targets: set[Path]) -> Iterator[Source]:
    """Yield every file in these zips and folders, and in the folders' train*.zip, that is no clutter.

    `targets` are the resolved folders into which they will be sorted: they are no sources.
    """
    for number, path in enumerate(paths):
        if not path.exists():
            raise UserError(f"{path} does not exist: correct the path")
        if path.resolve() in targets:
            raise UserError(f"{path} is one of the folders that photos are sorted into: choose another --data-dir")
        if path.suffix.lower() == ".zip":
            yield from zip_sources(path, number)
        elif path.is_dir():
            for file in files_below(path):
                folders = file.relative_to(path).parts[:-1]
                if NOT_SEARCHED.intersection(folders) or file.parent.resolve() in targets:
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
    """Make a hard link, or a symbolic one where the disk has none or is another. Raises UserError without either."""
    try:
        os.link(file, target)
    except OSError:
        try:
            target.symlink_to(file.resolve())
        except OSError as error:
            raise UserError(
                f"{file} cannot be linked into {target.parents[2]} ({reason_of(error)}): leave out --link, which copies"
            ) from error


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
    missing = "photos" if len(masks) == len(files) else f"masks, {ending}"
    if len(masks) in (0, len(files)):
        both = "photos and masks, such as train.zip and train_masks.zip (unpack a zip inside a zip first)"
        raise UserError(f"the sources hold no {missing}: give {both}")
    needed, free = sum(source.size for source in files), shutil.disk_usage(stage).free
    if needed > free:
        size = f"{needed / 1e9:.1f} GB are packed, and {free / 1e9:.1f} GB are free in {stage.parent}"
        raise UserError(f"{size}: make room there, or choose another --data-dir")
    for source in tqdm(files, desc="gathering", unit="file", disable=None):
        place = f"{'masks' if source in masks else 'images'}/{source.name}"
        if (stage / place).exists():  # also where the disk takes A.jpg and a.jpg for one
            other = next(origin for known, origin in origins.items() if key_of(known) == key_of(place))
            raise UserError(f"{source.name} is there twice, as {other} and as {source.origin}: give only one of them")
        origins[place] = source.origin
        source.bring(stage / place)
    for line in passed_over([Path(source.origin) for source in found], "the sources"):
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


def gather_all(sources: list[Path], data_dir: Path, how: str, suffix: str, is_united: bool) -> dict[str, str]:
    """Bring the sources into data_dir/.split, and return what `gather` does."""
    stage, targets = data_dir / ".split", {folder.resolve() for folder in folders_of(data_dir)}
    shutil.rmtree(stage, ignore_errors=True)
    for kind in ("images", "masks"):
        (stage / kind).mkdir(parents=True)
    bring = {"copy": copy_file, "link": link, "move": link_or_copy}[how]
    origins = gather(find_sources(sources, bring, targets), stage, suffix)
    unite_masks(stage, origins, suffix, is_united)
    return origins


# ---------------------------------------------------------------------------------------------------------------------
# What is in data/ already


def folders_of(data_dir: Path) -> list[Path]:
    return [data_dir / f"{side}_{kind}" for side in SIDES for kind in ("images", "masks")]


@dataclass
class Placed:
    """A photo in data/, and its mask, if it has one."""

    side: str
    photo: Path
    mask: Path | None


def find_placed(data_dir: Path) -> dict[str, list[Placed]]:
    """Return what is in the four folders, by its stem, of which each side may have one."""
    placed: dict[str, list[Placed]] = {}
    for side in SIDES:
        photos, masks = (images_in(data_dir / f"{side}_{kind}") for kind in ("images", "masks"))
        found = find_masks({stem_of(photo) for photo in photos}, data_dir / f"{side}_masks")[0] if masks else {}
        for photo in photos:
            placed.setdefault(stem_of(photo), []).append(Placed(side, photo, found.get(stem_of(photo))))
    return placed


def images_in(folder: Path) -> list[Path]:
    return list(filter(is_image, files_in(folder))) if folder.exists() else []


@dataclass
class Memory:
    """The content of data/.split.json, by the photos' stems: their sides, and checksums of the masks in the sources."""

    sides: dict[str, str]
    masks: dict[str, int]

    @classmethod
    def read(cls, data_dir: Path) -> "Memory":
        file = data_dir / ".split.json"
        try:
            return cls(**json.loads(file.read_text()))
        except FileNotFoundError:
            return cls({}, {})
        except (ValueError, TypeError) as error:
            raise UserError(f"{file}, which remembers the sides of photos, is damaged: delete it") from error

    def write(self, data_dir: Path) -> None:
        with written_whole(data_dir / ".split.json") as temporary:
            temporary.write_text(json.dumps(vars(self), indent=0, sort_keys=True))


def checksum(file: Path) -> int:
    return zlib.crc32(file.read_bytes())


# ---------------------------------------------------------------------------------------------------------------------
# The split


def choose_val_cars(cars: set[str], share: float, seed: int, old: dict[str, str]) -> set[str]:
    """Choose new cars or single photos at random until a share of all is for validation, but neither none nor all.

    `old` are the sides of the others, which stay. Raises UserError where one side has none.
    """
    count, old_val = len(cars) + len(old), list(old.values()).count("val")
    if count < 2:
        one = next(iter(cars | old.keys()))
        raise UserError(f"all photos are of one object, {one}: a second one is needed to validate on")
    wanted = min(max(1, round(share * count)), count - 1) - old_val
    chosen = np.random.default_rng(seed).permutation(sorted(cars))[: max(0, wanted)].tolist()
    if not 0 < old_val + len(chosen) < count:
        one, other = ("val", "train") if old_val else ("train", "val")
        raise UserError(f"all photos are on the side of {one}: move some, with their masks, to that of {other}")
    return set(chosen)


def choose_sides(
    photos: list[Path],
    placed: dict[str, list[Placed]],
    sides: dict[str, str],
    share: float | None,
    seed: int | None,
    pattern: re.Pattern | None,
) -> dict[str, str]:
    """Return the side of each photo by its stem: where it is, else where it was, else its object's, else a chosen one.

    `sides` are those where photos were. With neither share nor seed new photos are for training, unless all are new.
    """
    group = partial(group_of, pattern=pattern)
    there = [pair for pairs in placed.values() for pair in pairs]
    check_group(pattern, [*photos, *(pair.photo for pair in there)])
    sides = sides | {stem_of(pair.photo): pair.side for pair in there}
    old = {group(photo): sides[stem_of(photo)] for photo in photos if stem_of(photo) in sides}
    old |= {group(pair.photo): pair.side for pair in there}
    new = {group(photo) for photo in photos} - old.keys()
    if share is None:
        share = 0 if old and seed is None else VAL_SHARE
    val = choose_val_cars(new, share, seed or 0, old)
    of_group = old | {group: "val" if group in val else "train" for group in new}
    return {stem_of(photo): of_group[group(photo)] for photo in photos} | sides


@dataclass
class Plan:
    """The changes that a run makes in data/."""

    placed: dict[str, list[Placed]]  # what was there before
    stems: set[str]  # of the sources' photos
    before: Memory
    after: Memory
    copies: dict[str, Path] = field(default_factory=dict)  # where each file of the stage is, or will be
    added: dict[str, Path] = field(default_factory=dict)  # those of them that are to be brought there
    replaced: list[Path] = field(default_factory=list)  # masks that go, or get another content
    kept: list[Path] = field(default_factory=list)  # masks that were retouched there, and not in the sources

    def write_originals(self, origins: dict[str, str], path: Path) -> None:
        """List the files of the sources by their copies; what came out of a zip, or was united, has none."""
        originals = {str(copy.absolute()): Path(origins.get(file, "")).absolute() for file, copy in self.copies.items()}
        listed = {copy: str(original) for copy, original in originals.items() if original.is_file()}
        with written_whole(path) as temporary:
            temporary.write_text(json.dumps(listed))


def make_plan(
    pairs: list[tuple[Path, Path]],
    origins: dict[str, str],
    data_dir: Path,
    share: float | None,
    seed: int | None,
    pattern: re.Pattern | None,
) -> Plan:
    """Compare the pairs in the stage with those in data/. Raises UserError where a file would be lost or left alone."""
    placed, before = find_placed(data_dir), Memory.read(data_dir)
    if not placed and (share, seed) != (None, None):  # the user wants another choice
        before = Memory({}, {})
    sides = choose_sides([image for image, _ in pairs], placed, before.sides, share, seed, pattern)
    after = Memory(sides, before.masks.copy())
    plan = Plan(placed, {stem_of(image) for image, _ in pairs}, before, after)
    for image, mask in pairs:
        stem, (image_file, mask_file) = stem_of(image), (f"images/{image.name}", f"masks/{mask.name}")
        same = next((pair for pair in placed.get(stem, []) if filecmp.cmp(pair.photo, image, shallow=False)), None)
        if stem in placed and not same:
            raise UserError(
                f"{origins[image_file]} differs from {placed[stem][0].photo}, which has its name: rename it and its "
                "mask, or delete that one if this is to replace it"
            )
        side = same.side if same else after.sides[stem]
        after.masks[stem] = checksum(mask)
        photo = same.photo if same else data_dir / f"{side}_images" / image.name
        old, new = same and same.mask, data_dir / f"{side}_masks" / f"{photo.stem}{MASK_SUFFIX}{mask.suffix}"
        plan.copies |= {image_file: photo, mask_file: new}
        if not same:
            plan.added[image_file] = photo
        if old and (filecmp.cmp(old, mask, shallow=False) or before.masks.get(stem) == after.masks[stem]):
            plan.copies[mask_file] = old
            if checksum(old) != after.masks[stem]:
                plan.kept.append(old)
            continue
        plan.added[mask_file] = new
        if old:
            if before.masks.get(stem, checksum(old)) != checksum(old):
                origin = origins.get(mask_file, f"the united mask of {stem}")
                raise UserError(f"{old} was retouched, and {origin} has changed, too: delete the one that is worse")
            plan.replaced.append(old)
    check_partners(data_dir, plan)
    return plan


def check_partners(data_dir: Path, plan: Plan) -> None:
    """Raise UserError for a photo or mask in data/ that would have no partner when the plan is done."""
    new = set(plan.added.values())
    for pair in (pair for pairs in plan.placed.values() for pair in pairs):
        mask = data_dir / f"{pair.side}_masks" / f"{pair.photo.stem}{MASK_SUFFIX}"
        if not pair.mask and not any(path.with_suffix("") == mask for path in new):
            raise UserError(f"{pair.photo} has no mask: add it, or move the photo away")
    for side in SIDES:
        folder, images = data_dir / f"{side}_masks", data_dir / f"{side}_images"
        stems = {stem_of(path) for path in (*images_in(images), *new) if path.parent == images}
        if images_in(folder) and (unused := find_masks(stems, folder)[1]):
            raise UserError(f"{unused[0]} has no photo in {images}: add the photo, or move the mask away")


def carry_out(plan: Plan, data_dir: Path) -> None:
    """Bring the plan's files from the stage to their places. After a kill the next run finds the rest to do."""
    # Sides before there are photos, so that the same ones are for validation after a kill. Checksums afterwards: until
    # then a mask that differs from the source's is one to replace.
    Memory(plan.after.sides, plan.before.masks).write(data_dir)
    for folder in folders_of(data_dir):
        folder.mkdir(parents=True, exist_ok=True)
    for mask in set(plan.replaced) - set(plan.added.values()):  # of another ending: no photo ever has two masks
        mask.unlink()
    for file, place in plan.added.items():
        (data_dir / ".split" / file).replace(place)
    for path in (*plan.added.values(), *folders_of(data_dir)):
        sync(path)
    plan.after.write(data_dir)


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


def delete_originals(file: Path) -> None:
    """Delete the files that a JSON file lists by their copies, and say which stay."""
    originals = {Path(original): Path(copy) for copy, original in json.loads(file.read_text()).items()}
    kept = [original for original, copy in originals.items() if not delete_original(original, copy)]
    if kept:
        print(f"Originals that differ from their copies or cannot be deleted: {len(kept)}, such as {kept[0]}, kept")


def split(
    sources: list[Path],
    data_dir: Path,
    val_share: float | None,
    seed: int | None,
    how: str,
    suffix: str,
    is_united: bool = False,
    pattern: re.Pattern | None = None,
) -> None:
    """Sort the sources into data_dir's four folders. An error leaves both as they were.

    Args:
        val_share, seed: of the cars or photos to validate on; None as choose_sides says.
        how: "copy", "link" or "move".
        suffix: what masks' names end in; "" where they have their photos' names.
        is_united: whether several masks of a photo become one.
        pattern: what names the object in photos' names; without it Carvana's cars are known.
    """
    stage, plan = data_dir / ".split", None
    remove_leftovers(data_dir, ".split.json")
    if (stage / "originals.json").exists():
        print(f"Finishing the split that was stopped in {data_dir}; run again for what is new.")
    else:
        try:
            origins = gather_all(sources, data_dir, how, suffix, is_united)
            plan = make_plan(verify(stage, origins, suffix), origins, data_dir, val_share, seed, pattern)
        except UserError:
            shutil.rmtree(stage, ignore_errors=True)  # copies that nobody needs
            raise
        carry_out(plan, data_dir)
        if how == "move":
            plan.write_originals(origins, stage / "originals.json")
    if how == "move":
        delete_originals(stage / "originals.json")
    shutil.rmtree(stage)
    for side in SIDES:
        images = images_in(data_dir / f"{side}_images")
        objects, noun = {group_of(image, pattern) for image in images}, "object" if pattern else "car"
        of_them = f" of {counted(len(objects), noun)}" if len(objects) < len(images) else ""
        print(f"{side:5}  {counted(len(images), 'photo')}{of_them} in {data_dir}/{side}_images")
    for line in changes(plan) if plan and plan.placed else ():
        print(line)


def changes(plan: Plan) -> Iterator[str]:
    """Say what a plan has changed in folders that had photos, a line each."""
    train, val = (sum(path.parent.name == f"{side}_images" for path in plan.added.values()) for side in SIDES)
    yield f"New photos: {train} for training, {val} for validation"
    if train and not val:
        yield f"They are all for training, so that scores compare; --val-share {VAL_SHARE} shares new ones out"
    missing = [stem for stem in plan.placed if stem not in plan.stems]
    for what, found in (
        ("Masks that have changed in the sources, and are replaced", plan.replaced),
        ("Masks that have changed here, and stay", plan.kept),
        ("Photos that are not in the sources, and stay", missing),
    ):
        if found:
            yield f"{what}: {len(found)}, such as {found[0]}"


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.split_data", __doc__)
    parser.add_argument("sources", nargs="+", type=Path, help="zip files and folders")
    parser.add_argument("--data-dir", type=Path, default=Path("data"), help="where the four folders are [data]")
    share = f"share of photos, or of Carvana's cars, to validate on [{VAL_SHARE}; 0 where there are some already]"
    parser.add_argument("--val-share", type=float, help=share)
    parser.add_argument("--seed", type=int, help="of the choice of these [0]")
    suffix = "what masks' names end in, '' where they have their photos' names; it becomes _mask [_mask]"
    parser.add_argument("--mask-suffix", default=MASK_SUFFIX, help=suffix)
    parser.add_argument("--unite", action="store_true", help="several masks of a photo (x_mask, x_mask_1) become one")
    group = "photos in whose names this, or its first (group), finds the same show one object [Carvana's cars]"
    parser.add_argument("--group", type=regex, metavar="REGEX", help=group)
    how = parser.add_mutually_exclusive_group()
    how.add_argument("--move", dest="how", action="store_const", const="move", help="delete the originals in folders")
    how.add_argument(
        "--link",
        dest="how",
        action="store_const",
        const="link",
        help="hard-link them, or symbolically from another disk: takes no space",
    )
    args = parser.parse_args(argv)
    if args.seed is not None and args.seed < 0:
        raise UserError(f"--seed is {args.seed}: choose a whole number, at least 0")
    if args.val_share is not None and not 0 < args.val_share < 1:
        raise UserError(f"--val-share is {args.val_share}: choose a share between 0 and 1, such as 0.15")
    how, suffix = args.how or "copy", nfc(args.mask_suffix)
    try:
        args.data_dir.mkdir(parents=True, exist_ok=True)
        with locked(args.data_dir / ".split.lock", f"--data-dir {args.data_dir}"):
            split(args.sources, args.data_dir, args.val_share, args.seed, how, suffix, args.unite, args.group)
    except OSError as error:
        place, advice = error.filename or args.data_dir, remedy_of(error)
        raise UserError(f"{place}: {reason_of(error)}: {advice}, or choose another --data-dir") from error


if __name__ == "__main__":
    run(main)
