"""A set of pairs, decoded once into a memory-mapped file, and the report of what it holds."""

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import threading
import zlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from copy import copy as shallow_copy
from dataclasses import asdict
from itertools import accumulate
from pathlib import Path
from typing import BinaryIO

import numpy as np
from filelock import FileLock
from tqdm import tqdm

from machinery.decoding import (
    NUM_THREADS,
    VOID,
    Note,
    Rule,
    image_size,
    in_threads,
    large_ones_wait,
    read_sample,
    resized,
    rule_from,
    value_shares,
)
from machinery.errors import UserError, counted, reason_of
from machinery.files import MASK_SUFFIX, files_in, find_pairs, in_turn, is_locked, passed_over, stem_of, written_whole

DECODER = 7  # part of the cache's key: raise it when decoding changes
SMALL = 2**20  # bytes of masks whose content is part of the key, too

# What is known of a pair: the photo's original size; the shares of foreground in the known part of the sample's mask,
# of foreground along its edge, and of void; checksums of the sample's image and of the photo's file; some of the
# foreground's pixels, counted row by row, or -1 where there is none.
PLACES = 64
INFO = np.dtype(
    [("height", "i8"), ("width", "i8"), ("foreground", "f8"), ("border", "f8"), ("void", "f8"), ("checksum", "i8"),
     ("file", "i8"), ("places", "i4", PLACES)]
)  # fmt: skip


def info_of(image: np.ndarray, mask: np.ndarray, own_size: tuple[int, int], photo: Path) -> tuple:
    """Return the INFO of a pair's sample."""
    border = np.concatenate((mask[0], mask[-1], mask[:, 0], mask[:, -1]))
    void = float((mask == VOID).mean())
    foreground = float((mask == 1).mean()) / (1 - void) if void < 1 else 0.0
    places = np.flatnonzero(mask == 1) if foreground else np.array([-1])
    places = places[np.linspace(0, len(places) - 1, PLACES).astype(int)].tolist()
    checksums = zlib.crc32(image), checksum_of(photo)
    return (*own_size, foreground, float((border == 1).mean()), void, *checksums, places)


def checksum_of(file: Path) -> int:
    """Return the CRC-32 of a file, which may be larger than memory."""
    value = 0
    with file.open("rb") as opened:
        while part := opened.read(2**20):
            value = zlib.crc32(part, value)
    return value


class Samples:
    """Pairs of an image and a binary mask, decoded by one rule, in memory-mapped files.

    Args:
        image_dir, mask_dir, mask_suffix: folders whose files pair as find_pairs says.
        size: (height, width) of every sample, or its share of its photo's.
    """

    def __init__(
        self, image_dir: Path, mask_dir: Path, size: tuple[int, int] | float, mask_suffix: str = MASK_SUFFIX
    ) -> None:
        self.image_dir, self.mask_dir = Path(image_dir), Path(mask_dir)
        self.pairs = find_pairs(self.image_dir, self.mask_dir, mask_suffix)  # others may join them before prepare
        self.size = size if isinstance(size, float) else tuple(size)
        self.cache_file: Path | None = None
        self._cache: np.ndarray | None = None
        self._starts: list[int] = []  # of the samples in the cache, and its end
        self._held: FileLock | None = None
        # Once prepared:
        self.infos: np.ndarray | None = None  # (n,) of INFO
        self.notes: list[Note] = []
        self.rule: Rule | None = None
        self.chosen: tuple | None = None  # what was to be foreground

    def sample(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the decoded pair, uint8 image (H, W, 3) and mask (H, W), from the cache if there is one."""
        if self.cache_file is None:
            return read_sample(*self.pairs[index], self.size, self.rule)[:2]
        if self._cache is None:
            try:
                self._map_cache()
            except FileNotFoundError:  # somebody has deleted it
                self.cache_file = None
                return self.sample(index)
        size, start = self.size_of(index), self._starts[index]
        mask, end = start + 3 * math.prod(size), start + 4 * math.prod(size)
        return self._cache[start:mask].reshape(*size, 3), self._cache[mask:end].reshape(size)

    def size_of(self, index: int) -> tuple[int, int]:
        """Return the (height, width) of a prepared sample."""
        return resized((self.infos["height"][index], self.infos["width"][index]), self.size)

    def part(self, count: int) -> "Samples":
        """Return at most `count` of the prepared pairs, evenly spaced, from the same cache."""
        return self.only(np.linspace(0, len(self.pairs) - 1, min(count, len(self.pairs))).round().astype(int))

    def only(self, chosen: np.ndarray) -> "Samples":
        """Return the prepared pairs at these indices, int (n,), from the same cache."""
        part = shallow_copy(self)
        part.infos = self.infos[chosen]
        part.pairs, part.notes = ([rows[index] for index in chosen] for rows in (self.pairs, self.notes))
        part._starts = [self._starts[index] for index in chosen] if self._starts else []
        return part

    def __getstate__(self) -> dict:
        # A spawned worker maps the file anew instead of receiving its contents
        return self.__dict__ | {"_cache": None, "_held": None}

    def fingerprint(self) -> str:
        """Return a digest of the prepared pairs' names and contents: other data have another one."""
        optional = {"void"} if not self.infos["void"].any() else set()  # as before there was void
        fields = [name for name in INFO.names if name not in optional | {"file", "places"}]
        return _digest([image.name for image, _ in self.pairs], self.infos[fields].tolist())

    def prepare(self, cache_dir: Path | None, rule: Rule | None = None, foreground_values: tuple | None = None) -> None:
        """Decode every pair once, which checks it, and keep the samples in a memory-mapped file in cache_dir.

        They are decoded by `rule`. Where none is given, these files make one: each is first read by its own values, and
        those that the whole set contradicts are read again. `foreground_values` are then what Rule.of calls `chosen`.

        The file serves later runs while the names, sizes and times of all files and the content of masks stay as they
        are; after a change, samples of unchanged files are copied from it. It appears when it is complete. With
        cache_dir None, or on a disk that is full, samples are decoded whenever they are needed.

        Sets `infos`, `notes` and `rule`. Raises UserError for a pair that is broken, for foreground_values that no mask
        holds, and if every mask is empty or every mask is full.
        """
        self.rule, self.chosen = rule, foreground_values
        keys = [(self._name(image), mask.name, *_stamp(image), *_stamp(mask, True)) for image, mask in self.pairs]
        self.infos = self.cache_file = None
        if cache_dir is not None:
            try:
                self.infos = self._cached(Path(cache_dir), keys)
            except (OSError, NotImplementedError) as error:  # the latter is filelock's, of a disk without locks
                tqdm.write(f"No cache in {cache_dir} ({reason_of(error)}): every epoch decodes the photos again.")
        if self.infos is None:
            self.infos = np.array([row[1] for row in self._decode_all(keys, {}, None)], INFO)
        for state, value in (("empty", 0), ("full", 1)):
            if (self.infos["foreground"] == value).all():
                size = f"SCALE {self.size}" if isinstance(self.size, float) else "{1} x {0} pixels".format(*self.size)
                raise UserError(f"every mask in {self.mask_dir} is {state} at {size}: {self._advice(state)}")

    def _name(self, image: Path) -> str:
        """Return an image's name; with its folder where it is from another one, in which the same name may be."""
        return image.name if image.parent == self.image_dir else str(image)

    def _advice(self, state: str) -> str:
        """Return what to do where every mask is empty, or full."""
        shares = value_shares([note for note in self.notes if note.kind != "colours"])
        if state == "empty" or len(shares) < 2:
            return "masks must be white on the object and black elsewhere, and objects larger than a pixel"
        foreground = min(shares.keys() - {0}, key=shares.get)
        return f"they hold {listed(shares)}: choose the object's, such as --foreground-values {foreground:g}"

    def _cached(self, cache_dir: Path, keys: list[tuple]) -> np.ndarray:
        """Find or build a file for these keys, and serve from it. Raises OSError where it cannot be written."""
        cache_dir.mkdir(parents=True, exist_ok=True)
        place = cache_dir / _digest(DECODER, self.size, str(self.image_dir.resolve()), str(self.mask_dir.resolve()))
        with in_turn(place.with_suffix(".lock")):  # of several processes one builds and the others wait
            if (index := self._find_index(place, keys)) is None:
                self._build(place, keys)
                index = self._find_index(place, keys)
            self.cache_file, _, rows, self._starts = index
            self._map_cache()
            self._hold()
            self._remove_others(place)
        self.notes = [note for _, _, note in rows]
        self.rule = self.rule or self._settled()
        return np.array([info for _, info, _ in rows], INFO)

    def _find_index(self, place: Path, keys: list[tuple]) -> tuple[Path, Rule, list, list[int]] | None:
        """Return the index of a file with these keys' samples as the rule, or the files' own, decodes them; or None."""
        for path in place.parent.glob(f"{place.name}-*.json"):
            if index := self._read_index(path):
                _, rule, rows, _ = index
                if [key for key, _, _ in rows] == keys and self._suits(rule, rows):
                    return index
        return None

    def _read_index(self, path: Path) -> tuple[Path, Rule, list, list[int]] | None:
        """Return the file of samples, its rule, the (key, info, note) of each row, and where the samples start in it.

        None if the index or that file is not there or not whole.
        """
        try:
            index = json.loads(path.read_text())
            rows = [(tuple(key), tuple(info), Note(**note)) for key, info, note in index["rows"]]
            starts, data = self._starts_of([info[:2] for _, info, _ in rows]), path.with_name(index["samples"])
            return (data, rule_from(index["rule"]), rows, starts) if data.stat().st_size == starts[-1] else None
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def _hold(self) -> None:
        """Keep other runs from removing the file while this object lives: workers may open it late."""
        self._held = FileLock(self.cache_file.with_name(f"{self.cache_file.name}-{secrets.token_hex(4)}.lock"))
        self._held.acquire()

    def _remove_others(self, place: Path) -> None:
        """Remove the other caches of these folders at this size, unless a run holds them, and what kills have left."""
        for data in place.parent.glob(f"{place.name}-*.samples"):
            locks = list(place.parent.glob(f"{data.name}-*.lock"))
            unused = [lock for lock in locks if not is_locked(lock)]
            if len(unused) == len(locks) and data != self.cache_file:
                unused.append(data)
            for file in unused:
                with suppress(OSError):  # on Windows a file that another run reads cannot be deleted
                    file.unlink()
        for path in place.parent.glob(f"{place.name}-*.json"):
            if self._read_index(path) is None:
                path.unlink(missing_ok=True)

    def _suits(self, rule: Rule, rows: list) -> bool:
        """Return whether samples that were read by a rule are what the given one, or the files' own, makes of them."""
        wanted = self.rule or Rule.of([note for _, _, note in rows], self.chosen)
        return all(rule.meaning(note) == wanted.meaning(note) for _, _, note in rows)

    def _map_cache(self) -> None:
        self._cache = np.memmap(self.cache_file, np.uint8, mode="c").view(np.ndarray)

    def _starts_of(self, own_sizes: list[tuple[int, int]]) -> list[int]:
        """Return where the samples of photos of these sizes start in the cache, and where the last one ends."""
        return [0, *accumulate(4 * math.prod(resized(own_size, self.size)) for own_size in own_sizes)]

    def _build(self, place: Path, keys: list[tuple]) -> None:
        """Decode into a file with a name of its own, and then write the index that makes it known."""
        known = {}
        for path in place.parent.glob(f"{place.name}-*.json"):
            if index := self._read_index(path):
                data, rule, rows, starts = index
                for (key, info, note), start in zip(rows, starts, strict=False):
                    known[key] = data, start, info, note, rule

        is_share = isinstance(self.size, float)
        self._starts = self._starts_of([image_size(image) if is_share else self.size for image, _ in self.pairs])
        needed, free = self._starts[-1], shutil.disk_usage(place.parent).free
        if needed > free:
            raise OSError(f"it needs {needed / 1e6:.0f} MB, and {free / 1e6:.0f} MB are free")
        pairs = counted(len(self.pairs), "pair")
        tqdm.write(f"Caching {pairs} of {self.image_dir} in {place.parent}: {needed / 1e6:.1f} MB.")
        index_file = place.with_name(f"{place.name}-{_digest(keys, self.chosen, self.rule and asdict(self.rule))}.json")
        data = index_file.with_name(f"{index_file.stem}-{secrets.token_hex(4)}.samples")
        try:
            with data.open("xb") as file:
                rows = [(key, info, asdict(note)) for key, info, note in self._decode_all(keys, known, file)]
                os.fsync(file.fileno())
        except BaseException:
            data.unlink(missing_ok=True)
            raise
        with written_whole(index_file) as temporary:
            temporary.write_text(json.dumps({"samples": data.name, "rule": asdict(self.rule), "rows": rows}))

    def _decode_all(self, keys: list[tuple], known: dict[tuple, tuple], file: BinaryIO | None) -> list[tuple]:
        """Read every sample, from an older cache if `known` has its key, and write it to `file`. Settle the rule.

        Return the (key, info, note) of each.
        """
        writing, is_share = threading.Lock(), isinstance(self.size, float)

        def write(row: int, *arrays: np.ndarray) -> None:
            if file is not None:
                with writing:  # at once: samples that wait for their turn would pile up in memory
                    file.seek(self._starts[row])
                    for array in arrays:
                        file.write(np.ascontiguousarray(array))

        def read(row: int, rule: Rule | None) -> tuple[tuple, Note]:
            with large_ones_wait(self.pairs[row][0]) if is_share else nullcontext():
                image, mask, own_size, note = read_sample(*self.pairs[row], self.size, rule)
                write(row, image, mask)
                return info_of(image, mask, own_size, self.pairs[row][0]), note

        def first(row: int) -> tuple[tuple, Note, Rule]:
            if keys[row] not in known:
                info, note = read(row, self.rule)
                return info, note, self.rule or Rule.of([note])
            path, start, info, note, rule = known[keys[row]]
            write(row, np.fromfile(path, np.uint8, self._starts[row + 1] - self._starts[row], offset=start))
            return info, note, rule

        rows, rules = [], []
        progress = tqdm(total=len(keys), desc="reading", unit="pair", disable=None)
        with progress, ThreadPoolExecutor(NUM_THREADS) as pool:
            for key, future in zip(keys, in_threads(pool, 8 * NUM_THREADS, first, zip(range(len(keys)))), strict=True):
                info, note, rule = future.result()
                rows.append((key, info, note))
                rules.append(rule)
                progress.update()
            self.notes = [note for _, _, note in rows]
            self.rule = self.rule or self._settled()
            again = [
                (row, self.rule)
                for row, (note, rule) in enumerate(zip(self.notes, rules, strict=True))
                if rule.meaning(note) != self.rule.meaning(note)
            ]
            progress.reset(total=len(keys) + len(again))
            progress.update(len(keys))
            for (row, _), future in zip(again, in_threads(pool, 8 * NUM_THREADS, read, again), strict=True):
                info, note = future.result()
                rows[row] = keys[row], info, note
                progress.update()
        return rows

    def _settled(self) -> Rule:
        """Return the rule that the notes make. Raises UserError."""
        rule = Rule.of(self.notes, self.chosen)
        labels = sorted({value for note in self.notes for value, _ in note.values or [] if value})
        most = max((note.brightest for note in self.notes if not note.values and rule.is_labels), default=0)
        if missing := {value for value in rule.chosen or () if value not in labels and value > most}:
            listed = f"choose from {', '.join(f'{value:g}' for value in labels if not rule.has_void or value != 255)}"
            raise UserError(
                f"FOREGROUND_VALUES: {', '.join(f'{value:g}' for value in sorted(missing))} is in no mask of "
                f"{self.mask_dir}: {listed if labels else 'they hold no labels, so set it to None'}"
            )
        if rule.low is not None and rule.low == rule.high:
            raise UserError(
                f"{self.image_dir}: its photos with more than 8 bits a channel hold nothing but {rule.low:g}: export "
                "them again"
            )
        return rule


def _stamp(path: Path, is_mask: bool = False) -> tuple[int, ...]:
    """Return a file's size and time, and a checksum of a mask's content: a corrected one may have both of the other's.

    Of a large mask the time of its last change in any way takes that place: links change it, so that it is read again.
    """
    try:
        status = path.stat()
        stamp = status.st_size, status.st_mtime_ns
        if is_mask:
            stamp += (zlib.crc32(path.read_bytes()) if status.st_size <= SMALL else status.st_ctime_ns,)
    except OSError as error:
        advice = "replace it, or move it and its partner away"
        raise UserError(f"{path} cannot be read ({reason_of(error)}): {advice}") from error
    return stamp


def _digest(*parts: object) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def car_of(image: Path) -> str | None:
    """Return Carvana's name of the car: 00087a6bd4dc of 00087a6bd4dc_01.jpg; None for other names."""
    match = re.fullmatch(r"([0-9a-f]{12})_\d\d", image.stem)
    return match[1] if match else None


def group_of(image: Path, pattern: re.Pattern | None = None) -> str:
    """Return what names the object on a photo, by which photos of one object are known.

    With a pattern it is what that finds in the stem, or what its first group does; without one, Carvana's car. A photo
    that has neither stands for itself.
    """
    stem = stem_of(image)
    if pattern is None:
        return car_of(image) or stem
    match = pattern.search(stem)
    return (match and match[min(1, pattern.groups)]) or stem


def check_group(pattern: re.Pattern | None, images: Iterable[Path]) -> None:
    """Raise UserError where --group finds nothing in any photo's name."""
    stems = list(map(stem_of, images))
    if pattern and not any(map(pattern.search, stems)):
        raise UserError(f"--group {pattern.pattern} finds nothing in any photo's name, such as {stems[0]}: correct it")


def describe_rule(data: Samples) -> list[str]:
    """Say what the values of the files mean, a line for each thing that is not plain."""
    rule, lines = data.rule, []
    if rule.low is not None:
        lines.append(f"photos with more than 8 bits a channel: {rule.low:.6g} becomes 0, {rule.high:.6g} becomes 255")
    lines += describe_values(rule, data.chosen, data.notes)
    if rule.has_void:
        lines.append(
            f"void (255) in the masks: {100 * data.infos['void'].mean():.1f} %, ignored in the loss and in all scores"
        )
    return lines


def listed(shares: dict[float, float]) -> str:
    """Return values and their shares of the pixels, such as "1 (80.0 %), 2 (20.0 %)"."""
    return ", ".join(f"{value:g} ({100 * share:.1f} %)" for value, share in sorted(shares.items()))


def describe_values(rule: Rule, chosen: tuple | None, notes: list[Note]) -> list[str]:
    """Say what the values of the masks mean, where there are more than two, and how much hangs on it."""
    shares = value_shares(notes)
    foreground = {value: share for value, share in shares.items() if value and not (rule.has_void and value == 255)}
    unsure = [note for note in notes if note.softness is not None and chosen is None]
    whole, bright = (sum(getattr(note, name) for note in unsure) for name in ("not_black", "bright"))
    if rule.is_labels is False:
        line = "values of the masks: many or fractions: foreground is above half of the brightest"
        if unsure:
            more = whole / max(bright, 1e-9) - 1
            line += f" (--foreground-values labels takes all but 0, which is {100 * more:.0f} % more)"
        ones = sum(note.is_zeros_and_ones for note in notes)
        meaning = "foreground" if rule.ones else "background, because it covers little"
        return [line, f"masks of 0 and 1 beside them: {ones}, in which 1 is {meaning}"][: 1 + bool(ones)]
    most = max((note.brightest for note in notes if note.values is None and note.softness is not None), default=0)
    if len(foreground) < 2 and not most:
        return []
    line = f"labels up to {max([most, *foreground]):g}" if most or len(foreground) > 32 else listed(foreground)
    if rule.chosen is not None:
        return [f"values of the masks: {line}: foreground is {', '.join(f'{value:g}' for value in rule.chosen)}"]
    line = f"values of the masks: {line}: all are foreground; FOREGROUND_VALUES chooses"
    if unsure:
        line += f" (--foreground-values brightness leaves out {100 * (1 - bright / whole):.0f} % of them)"
    return [line]


def describe(train: Samples, val: Samples) -> str:
    """Say what two prepared sets hold, a line each, and a line for everything that looks like a mistake."""
    lines = ["set    pairs  photos                      foreground min, median, max     empty masks"]
    for name, data in (("train", train), ("val", val)):
        sizes = sorted({(width, height) for height, width in data.infos[["height", "width"]].tolist()})
        photos = " to ".join(f"{width} x {height}" for width, height in sizes[:: max(1, len(sizes) - 1)])
        foreground, border = data.infos["foreground"], data.infos["border"]
        shares = ", ".join(f"{100 * share:.1f} %" for share in np.quantile(foreground, (0, 0.5, 1)))
        lines.append(f"{name:5}  {len(data.pairs):5}  {photos:26}  {shares:30}  {(foreground == 0).sum():11}")
        if foreground.max() < 0.001:
            lines.append(f"WARNING: no mask in {data.mask_dir} covers 0.1 % of its photo: are these the right masks?")
        elif foreground.min() > 0.99:
            lines.append(f"WARNING: every mask in {data.mask_dir} covers over 99 % of its photo: are these right?")
        elif np.median(foreground) > 0.5 and np.median(border) > 0.5:
            lines.append(f"WARNING: masks in {data.mask_dir} look inverted: the object must be white, the rest black")

    cars = [{car_of(image) for image, _ in data.pairs} - {None} for data in (train, val)]
    if both := cars[0] & cars[1]:
        lines.append(
            f"WARNING: cars in both sets: {len(both)}, such as {min(both)}: scores will flatter "
            "(python -m tools.split_data sorts by car)"
        )
    lines += describe_rule(train)
    for data in (train, val):
        if turned := sum(note.is_turned for note in data.notes):
            lines.append(f"photos turned by EXIF in {data.image_dir}: {turned}; their masks are taken as upright")
        for folder in (data.image_dir, data.mask_dir):
            lines += passed_over(files_in(folder), folder)
    known = set(train.infos["checksum"].tolist())
    copies = [image for (image, _), info in zip(val.pairs, val.infos, strict=True) if int(info["checksum"]) in known]
    if copies:
        lines.append(f"WARNING: photos in both sets: {len(copies)}, such as {copies[0]}: scores will flatter")
    return "\n".join(lines)
