"""Measure Dice on every photo of a small set: train without a fifth of them, predict that fifth, and so on.

    python -m tools.cross_validate                                # five folds of the photos in data/, all four folders
    python -m tools.cross_validate --train-img-dir photos --train-mask-dir masks --num-epochs 60
    python -m tools.cross_validate --folds 10 --group '^[^_]+'    # photos whose names begin alike are of one object

Every flag of train.py is taken: each fold is a run of it, in runs/fold_1, runs/fold_2, ... Stopped or killed anywhere,
the same command continues. runs/index.html shows all photos as the networks see them that never learned from them, and
runs/suspects.csv lists the masks that these networks contradict.
"""

import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import predict
import train
import utils
from dataset import CarvanaDataset, CropDataset
from machinery import processes
from machinery.checkpoints import LOCK_SECONDS, settle, sibling
from machinery.decoding import VOID, decode_mask, large_ones_wait, read_image
from machinery.device import memory_errors
from machinery.errors import Stopped, UserError, counted, reason_of, run
from machinery.files import files_in, find_pairs, locked, remove_leftovers, save_metrics, saving
from machinery.folds import contradiction, deal, groups_of, interval
from machinery.processes import progress
from machinery.report import PAGE_PHOTOS, PAGE_WIDTH, errors, hatched, page_pictures, pooled, reduced, write_page
from machinery.runs import STUDENT
from machinery.samples import Samples, describe_rule
from machinery.settings import Parser, read_settings, regex
from model import size_multiple

CHECKPOINT = Path("my_checkpoint.pth.tar")  # of each fold, in its folder
OURS = "--checkpoint", "--saved-images-dir"  # flags of train.py that the folders take the place of
# Settings that may be others when the command is given again
FREE = "checkpoint", "saved_images_dir", "cache_dir", "num_workers", "device", "checkpoint_minutes"
FREE += "activation_checkpointing", "tensorboard_dir"


# ---------------------------------------------------------------------------------------------------------------------
# Photos and folds


def folders_of(s: SimpleNamespace, given: set[str]) -> list[tuple[Path, Path]]:
    """Return the folders of photos and masks to take: training's, and validation's if they are wanted.

    They are where a flag names them. Otherwise flags that name both of training's stand alone, and folders that are
    missing or empty are left out. `given` are the names of all flags.
    """
    train_dirs = Path(s.train_img_dir), Path(s.train_mask_dir)
    val_dirs = Path(s.val_img_dir), Path(s.val_mask_dir)
    is_wanted = any(folder.is_dir() and files_in(folder) for folder in val_dirs)
    if {"--train-img-dir", "--train-mask-dir"} <= given:
        is_wanted = False
    if {"--val-img-dir", "--val-mask-dir"} & given:
        is_wanted = True
    return list(dict.fromkeys([train_dirs, val_dirs] if is_wanted else [train_dirs]))


@dataclass
class Folds:
    """All photos, and those that each fold holds out."""

    learned: CarvanaDataset  # as training reads them
    shown: CarvanaDataset  # the same photos in the same order, as validation reads them
    groups: np.ndarray  # the number of each photo's object, int (n,)
    fold_of: np.ndarray  # the number of each photo's fold, int (n,), from 1

    @classmethod
    def of(cls, s: SimpleNamespace, folders: list[tuple[Path, Path]], count: int, group: re.Pattern | None) -> "Folds":
        """Decode all photos, once and by one rule, and deal them. Raises UserError where that cannot be."""
        size = float(s.scale) if s.crop else (s.image_height, s.image_width)
        dataset = partial(CropDataset, crop=s.crop) if s.crop else CarvanaDataset
        (images, masks), *others = folders
        learned = dataset(images, masks, size, train.make_augmentation(), s.seed, s.mask_suffix)
        shown = CarvanaDataset(images, masks, size, mask_suffix=s.mask_suffix)
        for data in (learned, shown):
            data.pairs += [pair for folder in others for pair in find_pairs(*folder, s.mask_suffix)]
            data.prepare(s.cache_dir, None, s.foreground_values)
        foreground = shown.infos["foreground"]
        groups = groups_of([image for image, _ in shown.pairs], shown.infos["checksum"].tolist(), group)
        folds = cls(learned, shown, groups, 1 + deal(groups, foreground, count, s.seed))
        for fold in folds:
            for state, value in (("empty", 0), ("full", 1)):
                if (foreground[folds.fold_of != fold] == value).all():
                    raise UserError(
                        f"without fold {fold} of {count} every mask is {state}: add photos, or give fewer --folds"
                    )
        return folds

    def __len__(self) -> int:
        return int(self.fold_of.max())

    def __iter__(self) -> Iterator[int]:
        return iter(range(1, len(self) + 1))

    def held_out(self, fold: int) -> np.ndarray:
        return np.flatnonzero(self.fold_of == fold)

    def sets(self, fold: int) -> tuple[Samples, Samples]:
        """Return the photos to train on, and those that are held out."""
        return self.learned.only(np.flatnonzero(self.fold_of != fold)), self.shown.only(self.held_out(fold))

    def lines(self) -> list[str]:
        """Say what each fold holds out, and what the files' values mean."""
        lines = ["fold  photos  objects  foreground"]
        for fold in self:
            mine = self.held_out(fold)
            share = f"{100 * self.shown.infos['foreground'][mine].mean():.1f} %"
            lines.append(f"{fold:4}  {len(mine):6}  {len(np.unique(self.groups[mine])):7}  {share:>10}")
        return lines + describe_rule(self.shown)


# ---------------------------------------------------------------------------------------------------------------------
# The runs


def best_of(folder: Path, fold: int) -> Path:
    """Return the file of a fold's best weights."""
    return sibling(folder / f"fold_{fold}" / CHECKPOINT, "_best")


def flags_of(fold: int, folder: Path, s: SimpleNamespace) -> list[str]:
    """Return the flags that a fold's run has beside those that are given: where it writes, and whether it continues."""
    checkpoint = folder / f"fold_{fold}" / CHECKPOINT
    is_begun = any(sibling(checkpoint, tag).exists() for tag in ("", ".prev"))
    flags = ["--checkpoint", str(checkpoint), "--saved-images-dir", str(checkpoint.parent / "saved_images")]
    flags.append("--load-model" if is_begun else "--no-load-model")
    flags += ["--train-img-dir", s.train_img_dir, "--train-mask-dir", s.train_mask_dir]  # or drawn cars are announced
    if s.tensorboard_dir:
        flags += ["--tensorboard-dir", str(Path(s.tensorboard_dir, f"fold_{fold}"))]
    return flags


def train_fold(fold: int, folds: Folds, flags: list[str]) -> None:
    """Train or continue the run that holds out a fold, with these flags. Raises UserError, which says the fold."""
    name = f"fold {fold} of {len(folds)}"

    def load_data(*_: object) -> tuple[Samples, Samples]:
        return folds.sets(fold)

    print(f"\n{name.capitalize()}", flush=True)
    try:
        train.main(flags, load_data)
    except Stopped:
        print(f"That was {name}: the same command continues it.")
        raise
    except UserError as error:  # from a worker it arrives with the worker's traceback before it
        raise UserError(f"{name}: {str(error).rpartition('errors.UserError: ')[2].strip()}") from error


def remembered(file: Path, now: dict[str, object]) -> dict[str, object]:
    """Return what folds.json keeps: settings, photos, their folds, and which runs have ended. Begin it with `now`.

    Raises UserError where the settings or photos are others now.
    """
    folder = file.parent
    if not file.exists():
        if others := sorted(folder.glob(f"fold_*/{CHECKPOINT.name.partition('.')[0]}*")):
            raise UserError(f"{others[0]} is of other folds, and {file} is missing: choose another --output-dir")
        write_json(file, now)
        return now
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
        changed = [differing(kept[kind], now[kind]) for kind in ("settings", "photos")]
        kept["fold_of"] = [int(fold) for fold in kept["fold_of"]]
        kept["ended"] = [int(fold) for fold in kept["ended"]]
    except OSError as error:
        raise UserError(f"{file} cannot be read ({reason_of(error)}): choose another --output-dir") from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{file} is damaged: choose another --output-dir") from error
    setting, photo = changed
    if setting:
        before = f"{setting} = {kept['settings'].get(setting)}"
        raise UserError(f"{folder} was begun with {before}: set that again, or choose another --output-dir")
    if photo:
        what = f"{photo} or its mask was added, changed or removed since {folder} was begun"
        raise UserError(f"{what}: choose another --output-dir")
    return kept


def differing(some: dict, others: dict) -> str | None:
    """Return the first name of which two dictionaries have different values; None where they are equal."""
    return next((name for name in some | others if some.get(name) != others.get(name)), None)


def write_json(file: Path, content: dict[str, object]) -> None:
    with saving(file) as temporary:
        temporary.write_text(json.dumps(content, indent=0), encoding="utf-8")


def train_all(s: SimpleNamespace, args: SimpleNamespace, folds: Folds, flags: list[str]) -> None:
    """Train the folds that have not ended, one after the other."""
    settings = {name.upper(): repr(value) for name, value in vars(s).items() if name not in FREE}
    settings |= {"--folds": str(args.folds), "--group": args.group and args.group.pattern}
    photos = {}
    for index, (image, mask) in enumerate(folds.shown.pairs):
        checksum = folds.shown.infos["checksum"][index].item()
        photos[str(image)] = [mask.name, checksum, zlib.crc32(folds.shown.sample(index)[1])]
    file = args.output_dir / "folds.json"
    kept = remembered(file, {"settings": settings, "photos": photos, "fold_of": folds.fold_of.tolist(), "ended": []})
    folds.fold_of = np.array(kept["fold_of"])
    for fold in folds:
        if fold not in kept["ended"] or not best_of(args.output_dir, fold).exists():
            train_fold(fold, folds, [*flags, *flags_of(fold, args.output_dir, s)])
            write_json(file, kept := kept | {"ended": [*kept["ended"], fold]})


# ---------------------------------------------------------------------------------------------------------------------
# What the networks say of photos that they have not learned from


@dataclass
class HeldOut:
    """A network's verdict on a photo that it has not learned from."""

    index: int
    dice: float  # at the photo's original size
    small_dice: float  # at training size
    suspect: dict[str, object]  # what speaks against its mask
    pictures: dict[str, str] | None  # for the page


def dice_of(prediction: np.ndarray, mask: np.ndarray) -> float:
    """Return Dice of a prediction, bool (H, W), and a mask, uint8 (H, W) in {0, 1, VOID}."""
    pixels = (torch.from_numpy(part)[None] for part in (prediction, mask == 1, mask != VOID))
    return utils.dice_scores(*utils.confusion(*pixels)[:3]).item()


def look(data: Samples, on_page: set[int], index: int, image: np.ndarray, logits: np.ndarray) -> HeldOut:
    """Compare a mask with logits, float32 (h, w), for the photo as the network sees it, uint8 (h, w, 3)."""
    (photo_file, mask_file), small_mask = data.pairs[index], data.sample(index)[1]
    with large_ones_wait(photo_file):
        photo = image if data.size == 1 else read_image(photo_file, None, data.rule)
        mask = decode_mask(mask_file, None, data.rule)[0]
        probabilities = predict.enlarge(logits, image, photo)
        suspect = contradiction(probabilities, mask == 1, mask != VOID)
        dice = dice_of(probabilities > 0.5, mask)
    pictures = pictures_of(image, small_mask, logits) if index in on_page else None
    return HeldOut(index, dice, dice_of(logits > 0, small_mask), suspect, pictures)


def pictures_of(image: np.ndarray, mask: np.ndarray, logits: np.ndarray) -> dict[str, str]:
    """Return the page's pictures, from an image uint8 (h, w, 3), its mask (h, w) and logits float32 (h, w)."""
    height, width = mask.shape
    size = max(1, height * min(PAGE_WIDTH, width) // width), min(PAGE_WIDTH, width)
    image, mask = reduced(image, mask, size)
    logits = pooled(torch.from_numpy(logits)[None, None], size)[0, 0]
    truth, void, prediction = mask == 1, mask == VOID, (logits > 0).numpy()
    layer, probability = errors(truth, prediction, void), (logits.sigmoid() * 255).byte().numpy()
    return page_pictures(image, truth | hatched(void), prediction, layer, probability)


def look_at_all(s: SimpleNamespace, folder: Path, folds: Folds) -> list[HeldOut]:
    """Return what each photo's network says of it, in the order of the photos."""
    data, found = folds.shown, []
    on_page = set(np.linspace(0, len(data) - 1, min(PAGE_PHOTOS, len(data))).round().astype(int).tolist())
    with progress(total=len(data), desc="held out", unit="photo") as bar:
        for fold in folds:
            model = predict.load_model(best_of(folder, fold), s.device, s.precision)
            indices = folds.held_out(fold).tolist()
            finish = partial(look, data, on_page)
            for photo in predict.predict_all(indices, model, lambda i: data.sample(i)[0], finish, s.batch_size):
                found.append(photo)
                bar.update()
    return sorted(found, key=lambda photo: photo.index)


def mean_of(dice: np.ndarray, groups: np.ndarray) -> str:
    """Say the mean of the photos' Dice, and between which values that of many others lies."""
    if np.ptp(dice) == 0:
        return f"{dice.mean():.4f} (95 %: unknown, all are equal)"
    degrees = groups.max()
    low, high = interval(dice, groups, STUDENT[degrees - 1] if degrees <= len(STUDENT) else 1.96)
    return f"{dice.mean():.4f} (95 %: {low:.4f} to {high:.4f})"


def conclude(s: SimpleNamespace, folder: Path, folds: Folds) -> None:
    """Predict each photo by the network that has not learned from it; print scores, write the page and suspects.csv."""
    found = look_at_all(s, folder, folds)
    rows = []
    print("\nfold  photos    dice  at original size")
    for fold in folds:
        mine = [found[index] for index in folds.held_out(fold)]
        small, full = (float(np.mean([getattr(photo, name) for photo in mine])) for name in ("small_dice", "dice"))
        rows.append({"fold": fold, "photos": len(mine), "dice": small, "original_size": full})
        print(f"{fold:4}  {len(mine):6}  {small:.4f}  {full:16.4f}")
    small, full = (np.array([getattr(photo, name) for photo in found]) for name in ("small_dice", "dice"))
    means, count = [mean_of(dice, folds.groups) for dice in (small, full)], counted(len(found), "photo")
    said = f"{means[0]} at training size, {means[1]} at the photos' original size"
    print(f"Mean Dice of all {count}, held out: {said}.")

    write_suspects(found, folds, folder / "suspects.csv")
    photos = list(shown_on_page(found, folds.shown))
    shown = f"{len(photos)} of {count}" if len(photos) < len(found) else count
    summary = f"Mean Dice: {said}. {shown}, each as the network predicts it that has not learned from it."
    title = f"Dice {full.mean():.4f} of {count} in {len(folds)} folds"
    write_page(folder, title, summary, photos, rows, vars(s), "\n".join(folds.lines()))
    print(f"Masks that the networks contradict, the most suspicious first: {folder / 'suspects.csv'}")
    networks = folder.as_posix() + f"/fold_*/{best_of(folder, 1).name}"
    print(f"The networks together: python predict.py --checkpoint {networks} photo.jpg")
    print(f"Look at {(folder / 'index.html').resolve().as_uri()}")


def write_suspects(found: list[HeldOut], folds: Folds, file: Path) -> None:
    """Write suspects.csv: how much each photo's network contradicts its mask, and where, the most suspicious first."""
    rows = []
    for photo in found:
        image, fold = str(folds.shown.pairs[photo.index][0]), int(folds.fold_of[photo.index])
        rows.append({"photo": image, "fold": fold, "dice": photo.dice} | photo.suspect)
    save_metrics(sorted(rows, key=lambda row: -row["suspicion"]), file)


def shown_on_page(found: list[HeldOut], data: Samples) -> Iterator[SimpleNamespace]:
    """Yield what the page shows of those photos that have pictures."""
    for photo in found:
        if photo.pictures:
            infos = {name: data.infos[name][photo.index].item() for name in ("height", "width", "foreground")}
            name = str(data.pairs[photo.index][0])
            yield SimpleNamespace(name=name, dice=[photo.dice], pictures=photo.pictures, **infos)


# ---------------------------------------------------------------------------------------------------------------------
# The command


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.cross_validate", __doc__)
    parser.epilog = "All flags of train.py are taken, too: python train.py --help lists them."
    parser.add_argument("--folds", type=int, default=5, help="how many networks are trained [5]")
    group = "photos in whose names this, or its first (group), finds the same show one object [Carvana's cars]"
    parser.add_argument("--group", type=regex, metavar="REGEX", help=group)
    parser.add_argument("--output-dir", type=Path, default=Path("runs"), help="where the folds' runs are kept [runs]")
    args, flags = parser.parse_known_args(argv)
    given = {flag.partition("=")[0] for flag in flags}
    if args.folds < 2:
        raise UserError(f"--folds is {args.folds}: set it to at least 2, such as 5")
    if ours := given.intersection(OURS):
        raise UserError(f"{min(ours)} is each fold's own: leave it out, and choose an --output-dir")
    if processes.WORLD_SIZE > 1:
        raise UserError("tools.cross_validate runs in one process: start it without torchrun")

    folder = args.output_dir
    own = ["--checkpoint", str(folder / CHECKPOINT), "--saved-images-dir", str(folder), "--no-load-model"]
    with read_settings(vars(train), [*flags, *own], size_multiple, 1) as s:
        settle(s, utils.load_checkpoint)
        with locked(folder / ".folds.lock", f"--output-dir {folder}", LOCK_SECONDS):
            remove_leftovers(folder)
            folders = folders_of(s, given)
            folds = Folds.of(s, folders, args.folds, args.group)
            objects, where = len(np.unique(folds.groups)), " and ".join(str(images) for images, _ in folders)
            print(f"{counted(len(folds.shown), 'photo')} of {counted(objects, 'object')} in {where}.")
            print("\n".join(folds.lines()))
            train_all(s, args, folds, flags)
            with memory_errors(f"at BATCH_SIZE {s.batch_size}: halve it"):
                conclude(s, folder, folds)


if __name__ == "__main__":
    run(main)
