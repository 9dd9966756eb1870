"""The photos that are given to predict.py: where they lie, what their outputs are called, and their true masks."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from machinery.errors import UserError
from machinery.files import (
    but,
    files_below,
    find_masks,
    free_name,
    is_image,
    matches_of,
    other_suffix,
    passed_over,
    stem_of,
)
from machinery.outputs import is_output, made_by_hand
from machinery.processes import RANK


@dataclass
class Photo:
    """A photo, the name of its outputs, and its true mask."""

    path: Path
    name: str  # of its outputs: <name>_mask.png
    mask: Path | None = None  # the true one, if it is known


def find_photos(inputs: list[str]) -> list[Photo]:
    """List the photos in files, folders with their subfolders, and patterns: each once, sorted in those.

    Files that predict.py wrote are left out. A name that is taken gets a number: x/a.jpg and y/a.jpg give a and a-2.
    Raises UserError where an input holds none, and for a folder that cannot be read.
    """
    paths: dict[Path, Path] = {}  # by what they resolve to
    taken, lines = set(), []
    for given in map(Path, inputs):
        is_there = os.path.exists(given)  # noqa: PTH110, which fails for names that are too long
        files = []
        for path in [given] if is_there else matches_of(str(given)):
            below = files_below(path) if path.is_dir() else [path]
            files += below
            lines += passed_over(below, path) if path.is_dir() else []
        found = [path for path in files if is_image(path) or path == given]
        found = [path for path in found if not is_output(path)]
        if not found:
            others = [path for path in files if not is_image(path)]
            what = f"no photos there{but(others)}" if files or is_there else "nothing is there"
            raise UserError(f"{given}: {what}: correct the path")
        for path in found:
            paths.setdefault(path.resolve(), path)

    if RANK == 0 and lines:
        print("\n".join(lines))
    return [Photo(path, free_name(path.stem, taken)) for path in paths.values()]


def without_outlined(photos: list[Photo], output_dir: Path) -> tuple[list[Photo], list[dict]]:
    """Return the photos that have no outlines by hand, and `finish`'s rows of the others, which are kept."""
    others, rows = [], []
    for photo in photos:
        kept = None
        with suppress(UserError):  # of a file that cannot be read: `finish` says so
            kept = made_by_hand(photo.path, output_dir / f"{photo.name}.json")
        if kept:
            rows.append({"photo": str(photo.path), "kept": str(kept)})
        else:
            others.append(photo)
    return others, rows


def add_masks(photos: list[Photo], mask_dir: Path, suffix: str) -> None:
    """Find the photos' true masks. Raises UserError where one would serve two photos, or no photo has one."""
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
