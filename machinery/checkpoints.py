"""A run's state, the files that keep it, and which run may continue with them."""

import math
import os
import pickle
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from torch import Tensor, nn

from machinery import processes
from machinery.decoding import Rule, rule_from
from machinery.encoders import Encoder, encoder_normalisation
from machinery.errors import UserError, counted, reason_of, remedy_of
from machinery.files import is_locked, link_or_copy, lock_of, locked, remove_leftovers, saving, sync
from machinery.sample_data import use_sample_if_empty
from machinery.samples import Samples
from machinery.settings import LARGEST, is_number

LOCK_SECONDS = 15  # that a run waits for another: one that was killed leaves workers, which end 5 seconds later
TAGS = ("", ".prev", "_best")  # in the names of a run's files: the newest state, the one before, the best weights
FORMAT = 7  # of checkpoints; raise it when their entries change, and tell _upgraded what older ones lack

# ---------------------------------------------------------------------------------------------------------------------
# Files


def save(state: dict, path: Path, previous: Path | None = None) -> None:
    """Write a checkpoint, which appears when it is complete; the one before is kept as `previous` if that is given.

    Raises UserError where it cannot be written.
    """
    with saving(path, previous) as temporary:
        torch.save(state, temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
    sync(path.parent)


def load(path: Path, build_network: Callable[[dict], nn.Module]) -> dict:
    """Read a checkpoint of any format onto the CPU. Raises UserError if it is missing, damaged or something else.

    `build_network` makes the network of which checkpoint["state_dict"] has the weights from checkpoint["model"].
    """
    if damage := _damage(path):
        raise UserError(f"{path} {damage}: choose another, or train first")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} could run code, which no checkpoint of train.py does: use another") from error
    except Exception as error:  # torch.load raises many kinds on files of other kinds
        raise UserError(f"{path} is not from this train.py: choose another, or train again") from error
    is_newer = False
    try:
        checkpoint = _upgraded(checkpoint)
        is_newer = checkpoint["format"] > FORMAT
        fits = _is_sound(checkpoint)
        if fits:
            network = _without_memory(build_network, checkpoint["model"])
            shapes = {name: weight.shape for name, weight in network.state_dict().items()}
            fits = shapes == {name: weight.shape for name, weight in checkpoint["state_dict"].items()}
            # A tensor can repeat one stored number: 20 kB would ask for 100 GB. Weights may be saved in half precision
            fits = fits and sum(weight.nbytes for weight in network.parameters()) <= 4 * path.stat().st_size
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError, OverflowError):
        fits = False
    if is_newer:
        raise UserError(f"{path} has format {checkpoint['format']}, newer than this train.py's: update the repository")
    if not fits:
        raise UserError(
            f"{path} is not from this train.py, or its network is not the one that build_network makes: choose "
            "another, or train again"
        )
    return checkpoint


def _is_sound(checkpoint: dict) -> bool:
    """Return whether what prediction and training compute with has the types and ranges that train.py writes.

    Raises KeyError, TypeError or AttributeError for some others.
    """
    config, before, rule = checkpoint["model"], checkpoint["preprocessing"], rule_from(checkpoint["rule"])
    features, tile, scale = config.get("features"), config.get("tile"), before.get("scale")
    photo_size = checkpoint["photo_size"]
    counts = [checkpoint.get(name, 0) for name in ("epoch", "images", "computed", "seconds", "spent")]
    return all((
        features is None or (len(features) <= 16 and _are_sizes(features, 1)),
        tile is None or (len(tile) == 2 and _are_sizes(tile, 16)),
        _are_sizes((before["height"], before["width"]), 1),
        scale is None or (type(scale) is float and is_number(scale, 1e-6, 1)),
        photo_size is None or (len(photo_size) == 2 and _are_sizes(photo_size, 1)),
        len(before["mean"]) == 3 and all(is_number(value, -LARGEST, LARGEST) for value in before["mean"]),
        len(before["std"]) == 3 and all(is_number(value, 1e-6, LARGEST) for value in before["std"]),
        (rule.low is None) == (rule.high is None),
        all(is_number(value, -1e38, 1e38) for value in (rule.low or 0, rule.high or 0, *(rule.chosen or ()))),
        all(type(kind) is str and is_number(value, -1e38, 1e38) for kind, value in rule.brightest.items()),
        all(is_number(count, 0, math.inf) for count in counts),
        (plan := checkpoint["plan"]) is None or (plan["photos"] >= 1 and plan["image"] > 0),
        all(type(checksum) is int for checksum in checkpoint["learned"]),
        all(type(row) is dict for row in checkpoint.get("history", [])),
        all(type(checkpoint.get(name, {})) is dict for name in ("settings", "data", "losses")),
        all(weight.layout is torch.strided and weight.is_cpu for weight in checkpoint["state_dict"].values()),
    ))  # fmt: skip


def _are_sizes(values: Iterable, smallest: int) -> bool:
    """Return whether all are whole numbers of pixels or channels."""
    return all(type(value) is int and smallest <= value <= 65535 for value in values)


def _without_memory(build_network: Callable[[dict], nn.Module], config: dict) -> nn.Module:
    """Return the network, on the meta device if it can be built there: some read their weights while they are built."""
    with torch.device("meta"), warnings.catch_warnings(), suppress(Exception):  # of many kinds
        warnings.simplefilter("ignore")  # that weights which it loads have no effect
        return build_network(config)
    return build_network(config)


def _upgraded(checkpoint: dict) -> dict:
    """Turn a checkpoint of any format into one of today's."""
    lacking = {"format": 1, "photo_dice": [], "computed": checkpoint.get("images", 0), "optimizer_name": "Muon"}
    lacking |= {"rule": asdict(Rule(low=0.0, high=65535.0)), "photo_size": None, "plan": None, "learned": []}
    lacking["spent"] = sum(row.get("seconds", 0.0) for row in checkpoint.get("history", []))
    upgraded = lacking | checkpoint
    if upgraded["format"] < 7 and upgraded["model"].get("encoder"):
        upgraded["model"] = {"full_size_decoder": True} | upgraded["model"]
    return upgraded


def _damage(path: Path) -> str | None:
    """Return what is wrong with a file of torch.save, a zip file: torch.load does not look at its checksums."""
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(entry.file_size for entry in archive.infolist()) > path.stat().st_size:  # torch.save compresses none
                return "is damaged or no checkpoint"
            if archive.testzip():
                return "is damaged"
        torch.load(path, "cpu", weights_only=True, mmap=True)  # looks at the rest of the zip file, and reads no weights
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        raise UserError(f"{path} cannot be read ({reason_of(error)}): {remedy_of(error)}, or choose another") from error
    except pickle.UnpicklingError:  # of which load_checkpoint says more
        pass
    except Exception:  # zipfile raises many kinds on damaged files
        return "is damaged or no checkpoint"
    return None


def sibling(path: Path, tag: str) -> Path:
    """Return a file that belongs to a checkpoint: my_checkpoint.pth.tar, "_best" -> my_checkpoint_best.pth.tar"""
    stem, dot, suffixes = path.name.partition(".")
    return path.with_name(f"{stem}{tag}{dot}{suffixes}")


def set_aside(path: Path) -> None:
    """Rename the checkpoints of an earlier run, so that a new one does not overwrite them, and print a line."""
    if not any(sibling(path, tag).exists() for tag in TAGS):
        return
    number = 1
    while not is_free(sibling(path, f"_{number}")):
        number += 1
    kept = sibling(path, f"_{number}")
    files = {sibling(path, tag): sibling(kept, tag) for tag in TAGS if sibling(path, tag).exists()}
    for file, target in files.items():  # all have their new names before one loses its old one, so that a kill leaves
        link_or_copy(file, target)  # a whole set
    for file in reversed(files):  # the newest last: until then LOAD_MODEL continues it
        file.unlink()
    print(f"{path} of an earlier run is now {kept} (LOAD_MODEL = True would have continued it).")


def is_free(path: Path) -> bool:
    """Return whether there is no file of a run whose newest checkpoint is `path`, and no run that may write one."""
    files = [sibling(path, tag) for tag in TAGS]
    return not any(file.exists() or is_locked(lock_of(file)) for file in files)


def restore_previous(path: Path) -> None:
    """Put the checkpoint before in the place of one that is damaged, or missing since a kill between two renames."""
    damage, previous = _damage(path), sibling(path, ".prev")
    if damage and not _damage(previous):
        print(f"{path} {damage}: {previous.name}, the checkpoint before it, takes its place.")
        if path.exists():
            path.replace(sibling(path, ".damaged"))
        previous.replace(path)


# ---------------------------------------------------------------------------------------------------------------------
# The state


@dataclass
class Epoch:
    """The part of the state that begins anew after each validation; of few photos, that are several epochs."""

    images: int = 0  # photos that were trained on
    computed: int = 0  # the same, and those that came twice to fill the last batch
    losses: dict[int, Tensor] = field(default_factory=dict)  # of each batch, summed; by the `images` before it
    seconds: float = 0.0  # of training


@dataclass
class State:
    """All that training changes: a checkpoint keeps it, and continuing restores it."""

    model: nn.Module
    config: dict  # what build_network made the model of
    forward: nn.Module  # the model, compiled or not, which under torchrun shares its gradients
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    history: list[dict] = field(default_factory=list)  # the rows of metrics.csv, one for each validation
    photo_dice: list[list[float]] = field(default_factory=list)  # of each validation photo in each of these rows
    best: float = -1.0  # Dice of the best epoch
    epoch: Epoch = field(default_factory=Epoch)  # the one under way
    plan: dict[str, float] | None = None  # for MINUTES: a rehearsal's costs, and the "photos" chosen
    spent: float = 0.0  # seconds that processes before this one have spent on the run
    started: float = field(default_factory=time.monotonic)  # when this process began with it

    @property
    def epochs(self) -> int:
        """Return how many epochs were over at the last validation."""
        return self.history[-1]["epoch"] if self.history else 0

    @property
    def seconds(self) -> float:
        """Return the seconds that the run has taken, without the time between its processes."""
        return self.spent + time.monotonic() - self.started

    def state_dict(self) -> dict:
        losses = torch.stack(list(self.epoch.losses.values())).tolist() if self.epoch.losses else []  # waits once
        return vars(self.epoch) | {
            "losses": dict(zip(self.epoch.losses, losses, strict=True)),
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "optimizer_name": type(self.optimizer).__name__,
            "scaler": self.scaler.state_dict(),  # empty unless it trains in fp16
            "epoch": self.epochs,
            "history": self.history,
            "photo_dice": self.photo_dice,
            "best": self.best,
            "plan": self.plan,
            "spent": self.seconds,
        }

    def load_state_dict(self, checkpoint: dict) -> None:
        self.model.load_state_dict(checkpoint["state_dict"])
        restore(self.optimizer, checkpoint["optimizer_name"], checkpoint["optimizer"])
        if checkpoint["scaler"]:
            self.scaler.load_state_dict(checkpoint["scaler"])
        for name in ("history", "photo_dice", "best", "plan", "spent"):
            setattr(self, name, checkpoint[name])
        self.epoch = Epoch(**{name: checkpoint[name] for name in vars(self.epoch)})
        device = next(self.model.parameters()).device
        self.epoch.losses = {images: torch.tensor(loss, device=device) for images, loss in self.epoch.losses.items()}


def restore(optimizer: torch.optim.Optimizer, name: str, state: dict) -> None:
    """Continue with the state dict of an optimizer of that name, at this run's rates. Raises UserError for others."""
    own = [{name: group[name] for name in group if name not in ("params", "lr")} for group in optimizer.param_groups]
    try:
        if name != (now := type(optimizer).__name__):
            raise ValueError(f"{name}, not {now}")
        optimizer.load_state_dict(state)
        _try_a_step(deepcopy(optimizer))  # loading compares no sizes
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        if processes.is_out_of_memory(error):
            raise
        raise UserError(f"the checkpoint is of another optimizer ({error}): use that one, or train anew") from error
    for group, options in zip(optimizer.param_groups, own, strict=True):
        group |= options  # this run's LEARNING_RATE and so on; the schedule sets "lr"


def _try_a_step(optimizer: torch.optim.Optimizer) -> None:
    """Take a step with gradients of 0. Raises errors of many kinds where the state does not fit the weights."""
    for group in optimizer.param_groups:
        for weight in group["params"]:
            weight.grad = torch.zeros_like(weight)
    optimizer.step()


def is_plain(value: object) -> bool:
    """Return whether a checkpoint may hold a setting as it is: none that is read can run code."""
    if isinstance(value, tuple):
        return all(map(is_plain, value))
    return type(value) in (bool, int, float, str, type(None))


class CheckpointWriter:
    """Writes a run's checkpoints in a thread: training waits only until tensors are copied to the host's memory.

    `header` begins each of them; the newest state goes to `path`, the best weights to its sibling "_best". Where a run
    `is_new`, those of an earlier one are set aside.
    """

    def __init__(self, path: Path, header: dict, is_new: bool) -> None:
        self.path, self.header, self.is_new = path, header, is_new
        self._best = sibling(path, "_best")

    @property
    def best_path(self) -> Path:
        """Return the file with the best weights: the newest state's, where somebody has removed the other."""
        return self._best if self._best.exists() else self.path

    def __enter__(self) -> "CheckpointWriter":
        if self.is_new and processes.RANK == 0:
            set_aside(self.path)
        self.thread, self.pending, self.saved_at = ThreadPoolExecutor(1), None, time.monotonic()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def save(self, state: object, is_best: bool = False) -> None:
        """Queue what state.state_dict() returns, which is copied now, and the best weights if these are."""
        if processes.RANK > 0:
            return
        newest = self.header | state.state_dict()
        files = [(newest, self.path, sibling(self.path, ".prev"))]
        if is_best:
            weights = self.header | {name: newest[name] for name in ("state_dict", "epoch", "history")}
            files.insert(0, (weights, self._best, None))
        self.wait()
        self.pending = self.thread.submit(lambda copies: [save(*copy) for copy in copies], copied(files, {}))
        self.saved_at = time.monotonic()

    def seconds_since_save(self) -> float:
        return time.monotonic() - self.saved_at

    def wait(self) -> None:
        """Wait until everything is written. Raises UserError where that failed."""
        if self.pending:
            self.pending.result()


def copied(value: object, copies: dict[int, Tensor]) -> object:
    """Copy a value, with its tensors in the host's memory; one that occurs twice is copied once."""
    if isinstance(value, Tensor):
        if id(value) not in copies:
            copies[id(value)] = value.detach().to("cpu", copy=True)
        return copies[id(value)]
    if isinstance(value, dict):
        return {key: copied(item, copies) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(copied(item, copies) for item in value)
    return value


# ---------------------------------------------------------------------------------------------------------------------
# Continuing


@dataclass
class Beginning:
    """The checkpoint that a run continues, or with whose weights (START_FROM) it begins; both None: from scratch."""

    run: str = ""  # processes.run_id()
    continued: dict | None = None
    started_from: dict | None = None

    @classmethod
    def of(cls, s: SimpleNamespace, load_checkpoint: Callable[[Path], dict]) -> "Beginning":
        """Read what a run with the settings s begins with. Raises UserError if they do not allow it.

        When torchrun starts the processes again because one has died, they continue what this run has saved.
        """
        # Of several machines' torchruns only the one whose process has died counts the restart
        run, is_restart = processes.run_id(), processes.all_reduce_max(processes.RESTARTS) > 0
        continued = processes.broadcast_object(_to_continue, s, load_checkpoint, run if is_restart else None)
        if continued or not s.start_from:
            return cls(run, continued, None)
        return cls(run, None, processes.broadcast_object(_to_start_from, s, load_checkpoint))

    @property
    def rule(self) -> Rule | None:
        """Return the rule by which a continued run decodes its files."""
        return rule_from(self.continued and self.continued["rule"])

    @property
    def is_pretrained(self) -> bool:
        """Return whether the run began with the weights of START_FROM."""
        return bool(self.started_from or (self.continued and self.continued["settings"].get("start_from")))

    @property
    def network(self) -> dict:
        """Return what build_network made the checkpoint's network of; {} where the run begins anew."""
        return (self.continued or self.started_from or {"model": {}})["model"]

    @property
    def has_weights(self) -> bool:
        return bool(self.continued or self.started_from)

    def header(self, s: SimpleNamespace, config: dict, train_set: Samples, val_set: Samples) -> dict:
        """Return what each checkpoint of the run holds besides its state: enough to predict and to continue.

        `config` is what build_network made the network of. Raises UserError where processes have different photos.
        """
        data = {"train": train_set.fingerprint(), "val": val_set.fingerprint()}
        if len(set(map(str, processes.all_gather_object(data)))) > 1:
            raise UserError("the machines have different photos or masks: give all of them the same, or a shared disk")
        settings = {name: value if is_plain(value) else repr(value) for name, value in vars(s).items()}
        if self.continued:  # it continues as it began
            settings |= {"start_from": self.continued["settings"].get("start_from")}
        before = self.continued or self.started_from or {"learned": []}
        warn_of_learned(set(before["learned"]), val_set)
        return {
            "format": FORMAT,
            "model": config,
            "preprocessing": {"height": s.image_height, "width": s.image_width, "mean": s.mean, "std": s.std}
            | ({"scale": float(s.scale)} if s.crop else {}),
            "rule": asdict(train_set.rule),
            "photo_size": [int(np.median(train_set.infos[name])) for name in ("height", "width")],
            "settings": settings,
            "run": self.run,
            "data": data,
            "learned": sorted({*before["learned"], *train_set.infos["file"].tolist()}),  # photos' checksums
        }

    def load_into(self, state: State, header: dict) -> None:
        """Give a new state what the checkpoint holds."""
        if self.continued:
            state.load_state_dict(adapted(self.continued, header))
        else:
            state.model.load_state_dict(self.started_from["state_dict"])


def warn_of_learned(learned: set[int], val_set: Samples) -> None:
    """Print a warning if validation photos are among those that weights have learned from, by their checksums."""
    files = zip(val_set.pairs, val_set.infos["file"].tolist(), strict=True)
    known = [image for (image, _), file in files if file in learned]
    if known:
        share = f"{len(known)} of {len(val_set.pairs)}, such as {known[0]}"
        print(f"WARNING: validation photos that the weights have learned from: {share}: scores will flatter")


def _to_continue(s: SimpleNamespace, load_checkpoint: Callable[[Path], dict], restarted: str | None) -> dict | None:
    """Return the checkpoint to continue: LOAD_MODEL's, or that of the run which was `restarted`, by its run_id."""
    path, checkpoint = Path(s.checkpoint), None
    if restarted or s.load_model:
        restore_previous(path)
    if restarted and path.exists():
        checkpoint = load_checkpoint(path)
        if checkpoint.get("run") != restarted:  # it is an older run's: this one has died before its first checkpoint
            checkpoint = None
    if s.load_model and not checkpoint:
        checkpoint = load_checkpoint(path)
    if not checkpoint:
        return None
    if not {"optimizer", "scaler", "settings", "data", "images", "losses"} <= checkpoint.keys():
        raise UserError(f"{path} has weights only: set CHECKPOINT to the one without _best in its name")
    newer = {"encoder": None, "crop": None, "scale": 1.0, "dice_weight": 0.0, "minutes": None}  # older ones lack these
    before = vars(s) | newer | checkpoint["settings"]
    network = "encoder" if s.encoder or before["encoder"] else "features"  # another encoder has its own MEAN, too
    size = ("crop", "scale") if s.crop or before["crop"] else ("image_height", "image_width")
    fixed = (network, *size, "mean", "std", "foreground_values") if before["encoder"] == s.encoder else (network,)
    if differing := [f"{name.upper()} = {before[name]}" for name in fixed if before[name] != getattr(s, name)]:
        raise UserError(f"{path} was trained with {', '.join(differing)}: set that again, or LOAD_MODEL = False")
    length = "minutes" if s.minutes else "num_epochs"
    has_ended = checkpoint["epoch"] >= s.num_epochs
    if s.minutes:  # which chose the checkpoint's number of epochs
        has_ended = before["minutes"] == s.minutes and checkpoint["epoch"] >= before["num_epochs"]
    if has_ended:
        had = f"had its {counted(s.minutes, 'minute')}" if s.minutes else counted(checkpoint["epoch"], "epoch")
        print(f"{path} has {had} already: a larger {length.upper()} continues it.")
    free = ("batch_size", "accumulation", length, "learning_rate", "weight_decay", "dice_weight", "clip_norm")
    for name in (*free, "seed", "device", "precision", "num_workers"):
        if before[name] != getattr(s, name):
            print(f"{name.upper()} was {before[name]} and is {getattr(s, name)} from here on.")
    return checkpoint


def adapted(checkpoint: dict, header: dict) -> dict:
    """Reset what does not fit today's photos, masks and seed in a checkpoint, print what that is, and return it."""
    now, before = header["settings"], checkpoint["settings"]
    has_other_photos = header["data"]["train"] != checkpoint["data"]["train"]
    if header["data"]["val"] != checkpoint["data"]["val"]:
        print("The validation photos have changed: scores before and after do not compare, and a new best is sought.")
        checkpoint |= {"best": -1.0, "photo_dice": []}
    if not (best := sibling(Path(now["checkpoint"]), "_best")).exists():
        print(f"{best} is missing: a new best is sought.")
        checkpoint["best"] = -1.0
    if has_other_photos:
        print("The training photos have changed.")
    if has_other_photos or now["seed"] != before["seed"]:
        if checkpoint["images"]:
            print("The epoch that was cut off begins anew.")
        checkpoint |= {"images": 0, "computed": 0, "losses": {}, "seconds": 0.0}
    if has_other_photos or now["minutes"] != before.get("minutes"):
        checkpoint["plan"] = None
    epochs, images = counted(checkpoint["epoch"], "epoch"), counted(checkpoint["images"], "image")
    print(f"Continuing after {epochs} and {images} of the next.")
    return checkpoint


def _to_start_from(s: SimpleNamespace, load_checkpoint: Callable[[Path], dict]) -> dict:
    """Read START_FROM and print what it is. Raises UserError where its network is not that of the settings."""
    checkpoint = load_checkpoint(Path(s.start_from))
    config, before = checkpoint["model"], checkpoint["preprocessing"]
    for name, own, wanted in (
        ("ENCODER", config.get("encoder"), s.encoder),
        ("FEATURES", None if s.encoder else tuple(config.get("features") or ()), None if s.encoder else s.features),
    ):
        if own != wanted:
            raise UserError(f"{s.start_from} has {name} = {own}, but it is {wanted} here: set {name} to {own}")
    rows = checkpoint.get("history")
    dice = f", Dice {rows[-1]['dice']:.4f}" if rows else ""
    print(f"Starting from {s.start_from} (epoch {checkpoint.get('epoch')}{dice}), with 0.3 of LEARNING_RATE.")
    for name in ("mean", "std"):
        if tuple(before[name]) != tuple(getattr(s, name)):
            print(f"{name.upper()} was {before[name]} there and is {getattr(s, name)} here.")
    return checkpoint


def _own_encoder(s: SimpleNamespace, load_checkpoint: Callable[[Path], dict]) -> str | None:
    """Return the encoder of START_FROM, or of CHECKPOINT where a run continues that has begun so."""
    if s.load_model:
        restore_previous(Path(s.checkpoint))
    return load_checkpoint(Path(s.checkpoint if s.load_model else s.start_from))["model"].get("encoder")


def settle(s: SimpleNamespace, load_checkpoint: Callable[[Path], dict]) -> None:
    """Set what depends on other settings: a crop's size, drawn cars where data/ is empty, an encoder and its mean."""
    if s.crop:
        s.image_height, s.image_width = s.crop  # a crop is all that the network sees
    use_sample_if_empty(s)
    if s.start_from and not s.encoder:
        s.encoder = processes.broadcast_object(_own_encoder, s, load_checkpoint)
    if s.encoder:
        Encoder(s.encoder).check_size(s.image_height, s.image_width)  # now: decoding photos may take an hour
        s.mean, s.std = encoder_normalisation(s.encoder, s.mean, s.std)


@contextmanager
def reserved(s: SimpleNamespace) -> Iterator[None]:
    """Reserve CHECKPOINT and SAVED_IMAGES_DIR for this run. Raises UserError where another one uses them."""
    path = Path(s.checkpoint)
    files = [(lock_of(sibling(path, tag)), "CHECKPOINT") for tag in TAGS]
    files.append((Path(s.saved_images_dir, ".lock"), "SAVED_IMAGES_DIR"))
    with ExitStack() as locks:
        for file, setting in files if processes.RANK == 0 else ():
            locks.enter_context(locked(file, f"{setting} {getattr(s, setting.lower())}", LOCK_SECONDS))
        if processes.RANK == 0:
            for tag in TAGS:
                remove_leftovers(path.parent, sibling(path, tag).name)
            remove_leftovers(Path(s.saved_images_dir))
        yield
