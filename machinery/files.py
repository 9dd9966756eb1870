"""Files: which of them are photos and masks, which mask belongs to which photo, and writing that leaves none half."""

import csv
import errno
import glob
import itertools
import os
import re
import secrets
import shlex
import shutil
import tempfile
import unicodedata
from collections import deque
from collections.abc import Container, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from filelock import FileLock, Timeout
from tqdm import tqdm

from machinery.errors import UserError, counted, reason_of

# The endings of photos and masks, in the order in which masks are sought
SUFFIXES = (".gif", ".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg", ".webp", ".jfif", ".jpe", ".avif", ".jp2", ".ppm")
SUFFIXES += (".pgm", ".tga", ".mpo", ".heic", ".heif")
MASK_SUFFIX = "_mask"  # the mask of xxx.jpg is xxx_mask.gif

# What file browsers, packers, network disks and systems leave in any folder, in lower case
CLUTTER = {".ds_store", "__macosx", "icon\r", "thumbs.db", "ehthumbs.db", "desktop.ini", "picasa.ini", "@eadir"}
CLUTTER |= {"#recycle", "#snapshot", "@recycle", "@recently-snapshot", "$recycle.bin", "system volume information"}
CLUTTER |= {"lost+found"}


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def is_clutter(name: str) -> bool:
    """Return whether a file or folder of that name is hidden, or what programs leave in any folder: never a photo."""
    return name.startswith(".") or name.casefold() in CLUTTER


def entries_of(folder: Path) -> list[os.DirEntry]:
    """List what is in a folder and no clutter, sorted by name. Raises UserError if it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted((entry for entry in entries if not is_clutter(entry.name)), key=lambda entry: entry.name)
    except OSError as error:
        advice = "allow yourself to read it, or move it away"
        if not isinstance(error, PermissionError):
            advice = "create the folder, or correct the setting"
        raise UserError(f"{folder} cannot be read ({reason_of(error)}): {advice}") from error


def files_in(folder: Path) -> list[Path]:
    """List what is in a folder and no clutter, folders, too, sorted by name. Raises UserError if it cannot be read."""
    return [Path(folder, entry.name) for entry in entries_of(folder)]


def files_below(folder: Path) -> list[Path]:
    """List the files in a folder and in all folders below it, clutter left out, sorted.

    Links to folders are followed, but to none that is listed already or that holds the link itself; a link that leads
    nowhere counts as a file. Raises UserError for a folder that cannot be read.
    """
    found, listed, waiting = [], set(), deque([folder])
    while waiting:
        place = waiting.popleft()
        real = place.resolve()
        if real in listed:
            continue
        listed.add(real)
        for entry in entries_of(place):
            path = Path(place, entry.name)
            if not os.path.isdir(path) if entry.is_symlink() else entry.is_file():  # noqa: PTH112
                found.append(path)
            elif entry.is_symlink() and not real.is_relative_to(path.resolve()):
                waiting.append(path)  # last: what has a name without links is listed by that
            elif entry.is_dir(follow_symlinks=False):
                waiting.appendleft(path)
    return sorted(found)


def matches_of(pattern: str) -> list[Path]:
    """List what a pattern matches, without clutter, sorted. Brackets in names that are there stand for themselves.

    So 'shots [2024]/*.jpg' is a pattern in a folder, and 'IMG_[12].jpg' is two photos.
    """
    parts = re.split(r"(\[)", pattern)
    readings = itertools.product(*(("[[]", "[") if part == "[" else (part,) for part in parts))
    found = next(filter(None, (glob.glob("".join(reading), recursive=True) for reading in readings)), [])  # noqa: PTH207
    given = set(Path(pattern).parts)
    return [path for path in sorted(map(Path, found)) if not any(map(is_clutter, set(path.parts) - given))]


def is_image(path: Path) -> bool:
    """Return whether a file's ending is one of SUFFIXES."""
    return path.suffix.lower() in SUFFIXES


def passed_over(paths: Sequence[Path], where: str | Path) -> list[str]:
    """Return a line about the files among these paths that are neither photo nor mask, and one about folders.

    The latter says how many photos they hold. Outlines beside a photo (x.json of x.jpg) need no line.
    """
    photos = {path.with_suffix(".json") for path in paths if is_image(path)}
    others = [path for path in paths if not is_image(path) and path not in photos]
    folders = list(filter(Path.is_dir, others))
    names, lines = [path.name for path in others if not path.is_dir()], []
    if names:
        lines.append(f"passed over in {where}, no photos by their endings: {len(names)}, such as {names[0]}")
    if folders:
        photos = counted(sum(map(count_photos, folders)), "photo")
        lines.append(f"folders in {where}, which are not searched: {len(folders)}, such as {folders[0].name}: {photos}")
    return lines


def count_photos(folder: Path) -> int:
    """Return how many photos are below a folder, as far as it can be read."""
    with suppress(UserError):
        return sum(map(is_image, files_below(folder)))
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


def find_pairs(image_dir: Path, mask_dir: Path, suffix: str = MASK_SUFFIX) -> list[tuple[Path, Path]]:
    """Pair every image with its mask, sorted by image name.

    The mask of `xxx.jpg` is `xxx_mask.gif`, else `xxx_mask` with another ending of SUFFIXES, else `xxx` with any of
    them; `suffix` takes the place of `_mask`. Files with other endings and clutter are left alone.

    Raises UserError for a folder that is missing or empty, two images of one stem, an image with several masks, and an
    image or a mask without its partner.
    """
    images = _list_by_stem(image_dir)
    masks, unused = find_masks(images, mask_dir, suffix)
    if image_dir.resolve() == mask_dir.resolve():
        raise UserError(f"{image_dir} is given for both images and masks: put the masks into a folder of their own")
    for stem, (_, *second) in several_masks(masks, unused, suffix, images).items():
        raise UserError(
            f"{second[0]} looks like a second mask of {images[stem][0]}: unite them (python -m tools.split_data "
            f"{shlex.quote(str(image_dir))} {shlex.quote(str(mask_dir))} --unite), or give it the name of its own image"
        )
    for stem, found in sorted(images.items()):
        if len(found) > 1:
            raise UserError(f"{found[0]} and {found[1].name} have one stem: rename one of them and its mask")
        if stem not in masks:
            advice = other_suffix(stem, images, unused) or f"add {mask_dir / stem}{suffix}.gif (or .png)"
            raise UserError(f"{found[0]} has no mask: {advice}, or move the image away")
    if unused:
        raise UserError(f"{unused[0]} has no image in {image_dir}: add the image, or move the mask away")
    return [(found[0], masks[stem]) for stem, found in sorted(images.items())]


def other_suffix(stem: str, images: Iterable[str], masks: list[Path]) -> str | None:
    """Return what to do where an image has no mask, but masks are there that are of no image; None without those."""
    names = {stem_of(mask): mask.name for mask in masks}
    endings = [name.removeprefix(stem) for name in names if name.startswith(stem)]
    if not endings:
        return f"give masks their images' names ({masks[0].name} is of none)" if masks else None
    ending = max(endings, key=lambda ending: sum(image + ending in names for image in images))
    flag = f"--mask-suffix{'=' if ending.startswith('-') else ' '}{shlex.quote(ending)}"
    return f"found {names[stem + ending]}: is it {flag}? If not, add its mask"


def find_masks(stems: Iterable[str], mask_dir: Path, suffix: str = MASK_SUFFIX) -> tuple[dict[str, Path], list[Path]]:
    """Return the mask of each image stem that has one, by find_pairs' rule, and the masks of no stem, sorted."""
    masks, suffix = _list_by_stem(mask_dir), nfc(suffix)
    found, unused = {}, {mask for candidates in masks.values() for mask in candidates}
    for stem in stems:
        if candidates := masks.get(f"{stem}{suffix}", []) + masks.get(stem, []):
            found[stem] = candidates[0]
            unused.difference_update(candidates)
    return found, sorted(unused)


def image_of(mask: str, stems: Container[str], suffix: str) -> str | None:
    """Return the stem of the image of which a mask looks like a further one, by its own stem; None if there is none.

    Such are x_mask_1, x_mask2, "x_mask (2)", x_mask_left, x_1_mask and x_1 for the image x. The longest stem is taken.
    """
    suffix = re.escape(nfc(suffix))
    further = re.compile(rf"{suffix}[\W\d_].*|[ _.-]?[ _.(-]\d+\)?({suffix})?")
    ends = range(len(mask) - 1, 0, -1)
    return next((mask[:end] for end in ends if mask[:end] in stems and further.fullmatch(mask, end)), None)


def several_masks(
    masks: dict[str, Path], unused: list[Path], suffix: str, stems: Container[str]
) -> dict[str, list[Path]]:
    """Return all masks of each image that seems to have several, from what find_masks gives and the images' stems."""
    found: dict[str, list[Path]] = {}
    for mask in unused:
        if stem := image_of(stem_of(mask), stems, suffix):
            found.setdefault(stem, [masks[stem]] if stem in masks else []).append(mask)
    return {stem: paths for stem, paths in found.items() if len(paths) > 1}


def _list_by_stem(folder: Path) -> dict[str, list[Path]]:
    """Return the folder's images by stem, those of one stem in the order of SUFFIXES."""
    found: dict[str, list[Path]] = {}
    files = files_in(folder)
    for path in filter(is_image, files):
        found.setdefault(stem_of(path), []).append(path)
    if not found:
        raise UserError(f"{folder} has no photos or masks{but(files)}: add them, or correct the setting")
    for paths in found.values():
        paths.sort(key=lambda path: SUFFIXES.index(path.suffix.lower()))
    return found


def but(others: list[Path]) -> str:
    """Return what is there where photos were expected, for a sentence that says there are none."""
    if not others:
        return ""
    if others[0].is_dir():
        photos = counted(count_photos(others[0]), "photo")
        return f" of its own, but {others[0].name}, a folder with {photos}, which is not searched"
    more = f" and {counted(len(others) - 1, 'other file')}" if len(others) > 1 else ""
    return f" by their endings (docs/data.md lists those), but {others[0].name}{more}"


def stem_of(path: Path) -> str:
    """Return a file's name without its ending, in NFC."""
    return nfc(path.stem)


def nfc(name: str) -> str:
    """Return a name in Unicode's composed form; macOS writes names decomposed."""
    return unicodedata.normalize("NFC", name)


def key_of(name: str) -> str:
    """Return what names have in common that some disks take for one: A.jpg and a.jpg."""
    return nfc(name).casefold()


def free_name(stem: str, taken: set[str]) -> str:
    """Return the stem, with a number appended if it is taken, and mark it as taken."""
    name, number = stem, 1
    while key_of(name) in taken:
        number += 1
        name = f"{stem}-{number}"
    taken.add(key_of(name))
    return name


# ---------------------------------------------------------------------------------------------------------------------
# Files that are written


def temporary_name(path: Path) -> Path:
    """Return the path of a temporary file beside `path`. Its name is random; remove_leftovers recognises it."""
    return path.with_name(f".{_shortened(path.name)}.{secrets.token_hex(8)}.tmp")


def _shortened(name: str) -> str:
    """Return a name to which more can be added: disks allow 255 bytes, some 143."""
    return name if len(os.fsencode(name)) <= 100 else name[:25]


@contextmanager
def written_whole(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path that takes the place of `path` when the block has ended well: no file is half written.

    The file that was there is kept as `previous`, if that is given. The temporary name is nobody else's.
    """
    temporary = temporary_name(path)
    temporary.touch(exist_ok=False)
    try:
        yield temporary
        if previous and path.exists():
            path.replace(previous)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Remove what killed runs have left of the file of that name, or of all pictures, pages and tables in the folder.

    Nobody may be writing them now, unless their locks are held.
    """
    written = re.escape(_shortened(name)) if name else r".+?\.(png|html|csv|json)"
    for path in folder.glob(".*.tmp*"):
        is_ours = re.fullmatch(rf"\.+{written}(\.[0-9a-f]{{16}}\.tmp)+(\.lock)?", path.name)
        if is_ours and not is_locked(path if path.suffix == ".lock" else lock_of(path)):
            path.unlink(missing_ok=True)


def lock_of(path: Path) -> Path:
    """Return the file whose lock a process holds while it may write `path`."""
    return path.with_name(f".{path.name}.lock")


def is_locked(file: Path) -> bool:
    """Return whether another process holds a lock."""
    try:
        with FileLock(file).acquire(blocking=False) if file.exists() else nullcontext():
            return False
    except Timeout:
        return True
    except (OSError, NotImplementedError):  # a disk without locks
        return False


@contextmanager
def locked(file: Path, used: str, seconds: float = 0) -> Iterator[None]:
    """Hold a lock, for which it waits so long, while the block runs. On a disk without locks only a line is printed.

    Raises UserError, which says that what is `used` is in use, where another run holds it for longer.
    """
    lock = FileLock(file)
    try:
        try:
            lock.acquire(blocking=False)
        except Timeout:
            if seconds:
                tqdm.write(f"Another run is writing there: waiting {seconds} seconds for its end.")
            lock.acquire(timeout=seconds)
    except Timeout as error:
        advice = f"wait for its end, or choose another{if_stale(file)}"
        raise UserError(f"{used} is in use by another run: {advice}") from error
    except (OSError, NotImplementedError):
        tqdm.write(f"{file} cannot be locked on this disk: start no second run that writes there.")
    try:
        yield
    finally:
        lock.release()


def if_stale(file: Path) -> str:
    """Return what to do where a lock may outlive its run: without flock it is a file that names its owner."""
    is_soft = file.exists() and file.stat().st_size > 0  # other locks are empty files
    return f"; if no run is alive, delete {file}" if is_soft else ""


@contextmanager
def in_turn(file: Path) -> Iterator[None]:
    """Hold a lock while the block runs, and wait for it, however long. Raises OSError on a disk without locks."""
    lock = FileLock(file)
    try:
        lock.acquire(timeout=1)
    except Timeout:
        if advice := if_stale(file):
            tqdm.write(f"Waiting for another run, which holds {file}{advice}.")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def copy_file(file: Path, target: Path) -> None:
    """Copy a file, so that the copy appears when it is complete."""
    with written_whole(target) as temporary:
        shutil.copyfile(file, temporary)


def sync(path: Path) -> None:
    """Make a file's content, or the names in a folder, outlive a power cut, on systems that can."""
    with suppress(OSError):  # Windows opens no folders
        descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def link_or_copy(file: Path, target: Path) -> None:
    """Link a file to `target`, which takes no space, or copy it where the disk knows no hard links."""
    try:
        os.link(file, target)
    except OSError:  # another disk, too
        copy_file(file, target)


@contextmanager
def saving(path: Path, previous: Path | None = None) -> Iterator[Path]:
    """Do as written_whole, and raise UserError where `path` cannot be written."""
    with write_errors(path), written_whole(path, previous) as temporary:
        yield temporary


@contextmanager
def write_errors(path: Path) -> Iterator[None]:
    """Raise UserError where the block cannot write `path`."""
    try:
        yield
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        is_too_long = getattr(error, "errno", None) == errno.ENAMETOOLONG
        advice = "shorten the photo's name" if is_too_long else "make room, close the program that uses it, continue"
        raise UserError(f"{path} could not be written ({reason_of(error)}): {advice}") from error


def save_metrics(rows: list[dict], path: Path) -> None:
    """Write metrics.csv, a row for each epoch, or scores.csv, a row for each photo. Rows may lack newer columns."""
    table = {"newline": "", "encoding": "utf-8", "errors": "backslashreplace"}  # a name may be no text
    with saving(path) as temporary, temporary.open("w", **table) as file:
        writer = csv.DictWriter(file, fieldnames=list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def check_writable(folder: Path, setting: str) -> None:
    """Create the folder that a setting names. Raises UserError where no file can be written into it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{setting}: {folder} cannot be written ({reason_of(error)}): choose another folder") from error
