"""A script's constants are its settings: a flag for each, and the range of each."""

import argparse
import ast
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tokenize import COMMENT, generate_tokens
from types import SimpleNamespace

from machinery.errors import UserError
from machinery.files import SUFFIXES, check_writable


def expanded(value: object) -> object:
    """Return a setting with the home folder for a ~ at a path's beginning, as a shell would, also within a list."""
    if isinstance(value, list | tuple):
        return type(value)(map(expanded, value))
    if isinstance(value, Path):
        return Path(os.path.expanduser(value))  # noqa: PTH111
    is_path = isinstance(value, str) and re.match(r"~[^/\\]*[/\\]", value)  # a mask's suffix may be ~
    return os.path.expanduser(value) if is_path else value  # noqa: PTH111


class Parser(argparse.ArgumentParser):
    """An ArgumentParser whose errors are UserErrors, and which expands ~ in paths, the constants' and the flags'.

    Args:
        command: how the script is called, such as "python train.py" or "python -m tools.split_data".
        description: the beginning of its help, such as the script's docstring, which python -OO takes away.
    """

    def __init__(self, command: str, description: str | None) -> None:
        formatter = argparse.RawDescriptionHelpFormatter  # keeps the docstring's lines
        super().__init__(command, description=description, formatter_class=formatter, allow_abbrev=False)

    def parse_known_args(self, *args: object, **options: object) -> tuple[argparse.Namespace, list[str]]:
        found, others = super().parse_known_args(*args, **options)
        return argparse.Namespace(**{name: expanded(value) for name, value in vars(found).items()}), others

    def error(self, message: str) -> None:
        raise UserError(f"{message} ({self.prog} --help shows all flags)")


def whole_number_or_word(text: str) -> int | str:
    """Return the number that a flag's text is, or the text where it is a word, such as "none"."""
    if text.isalpha() or re.fullmatch(r"-?\d+", text):
        return text if text.isalpha() else int(text)
    raise argparse.ArgumentTypeError(f"{text} is no whole number")


def number_or_none(text: str) -> float | str:
    """Return the number that a flag's text is, or the text where it is "none"."""
    try:
        return text if text.lower() == "none" else float(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text} is no number") from error


def regex(text: str) -> re.Pattern:
    """Return the regular expression that a flag's text is."""
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is no regular expression ({error})") from error


@dataclass(frozen=True)
class Constant:
    """The way in which a script writes one of its constants."""

    may_be_none: bool  # X: str | None = "a"
    is_tuple: bool  # X: tuple[int, ...] | None = None
    comment: str  # beside it
    is_number: bool = False  # X: float | None = None


def constants_of(source: str) -> dict[str, Constant]:
    """Return the upper-case constants that a script sets, by their names."""
    lines = StringIO(source).readline
    comments = {token.start[0]: token.string for token in generate_tokens(lines) if token.type == COMMENT}
    found = {}
    for statement in ast.parse(source).body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        annotation = ast.unparse(statement.annotation) if isinstance(statement, ast.AnnAssign) else ""
        comment = comments.get(statement.end_lineno, "").lstrip("# ")
        for target in targets:
            if isinstance(target, ast.Name) and target.id.isupper():
                is_number = annotation.startswith("float")
                found[target.id] = Constant("None" in annotation, "tuple" in annotation, comment, is_number)
    return found


def parse_settings(constants: dict, argv: list[str] | None = None) -> SimpleNamespace:
    """Make every upper-case constant of a script a flag of the same name: IMAGE_HEIGHT = 160 is --image-height 160.

    Args:
        constants: the script's globals(). A constant's type is its flag's, and the comment beside it is the help. A
            constant that is annotated with None (X: str | None = "a") takes "none" as a value.
        argv: the command line, sys.argv[1:] by default.

    Returns the settings by lower-case name. Raises UserError for an unknown flag and a value of the wrong type.
    """
    source = Path(constants["__file__"])
    written = constants_of(source.read_text(encoding="utf-8"))
    parser = Parser(f"python {source.name}", constants["__doc__"])
    for name, default in constants.items():
        if name not in written:  # such as SGD, which is imported
            continue
        constant = written[name]
        is_tuple = isinstance(default, tuple | list) or constant.is_tuple
        if is_tuple and default is not None:
            default = tuple(default) if isinstance(default, tuple | list) else (default,)
        elif isinstance(default, Path):
            default = str(default)
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        options = {"default": default, "help": f"{constant.comment} [{shown}]".replace("%", "%%")}
        if isinstance(default, bool):
            options["action"] = argparse.BooleanOptionalAction
        elif is_tuple:
            kind = type(default[0]) if default else int
            options |= {"type": whole_number_or_word if constant.may_be_none else kind, "nargs": "+", "metavar": "N"}
        elif constant.is_number:
            options |= {"type": number_or_none, "metavar": name.split("_")[-1]}
        else:
            options |= {"type": str if default is None else type(default), "metavar": name.split("_")[-1]}
        parser.add_argument("--" + name.lower().replace("_", "-"), **options)

    settings = vars(parser.parse_args(argv))
    for name, value in settings.items():
        if isinstance(value, list):
            value = settings[name] = tuple(value)
        if written[name.upper()].may_be_none and str(value).lower() in ("none", "('none',)"):
            settings[name] = None
    return SimpleNamespace(**settings)


@contextmanager
def read_settings(
    constants: dict, argv: list[str] | None, size_multiple: Callable[[tuple], int], processes: int
) -> Iterator[SimpleNamespace]:
    """Parse and check train.py's settings, and give its constants the values of their flags while the block runs.

    So a constant that a function reads as a global follows its flag. Afterwards they are the defaults again. Raises
    UserError; the arguments are those of parse_settings and check_settings.
    """
    s = parse_settings(constants, argv)
    flags = {flag.partition("=")[0] for flag in (sys.argv[1:] if argv is None else argv)}
    if s.minutes is not None and "--num-epochs" in flags:
        if "--minutes" in flags:
            raise UserError("--minutes chooses NUM_EPOCHS for the time: give --minutes or --num-epochs, not both")
        s.minutes = None  # the constant's, for which this run's flag stands in
    check_settings(s, size_multiple, processes)
    before = {name: constants[name] for name in map(str.upper, vars(s))}
    constants.update({name: getattr(s, name.lower()) for name in before})
    try:
        yield s
    finally:
        constants.update(before)


LARGEST = 1e6  # of rates and weights: float32, in which they are multiplied, ends at 3e38


def is_number(value: object, low: float, high: float) -> bool:
    """Return whether it is a number from `low` to `high`."""
    return type(value) in (int, float) and low <= value <= high  # nan is not


Range = tuple[str, type | tuple[type, ...], Callable[[object], bool], str]  # name, type, is it valid, what is wanted


def check_ranges(settings: object, ranges: Iterable[Range], spell: Callable[[str], str] = str.upper) -> None:
    """Raise UserError for the first setting of another type or out of its range; `spell` writes its name for users."""
    for name, kind, is_valid, wanted in ranges:
        value = getattr(settings, name)
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool) or not is_valid(value):
            raise UserError(f"{spell(name)} is {value!r}: set it to {wanted}")


def check_settings(s: SimpleNamespace, size_multiple: Callable[[tuple], int], processes: int) -> None:
    """Check train.py's settings and that its folders can be written to. Raises UserError.

    Args:
        size_multiple: the U-Net's features -> the multiple to which it pads height and width.
        processes: among which the batch is divided.
    """
    number, parts = (int, float), processes * (s.accumulation if type(s.accumulation) is int else 1)
    multiple = size_multiple(s.features) if isinstance(s.features, tuple) and not s.encoder else 1
    smallest, smallest_crop = max(64 if s.encoder else 16, multiple), max(64, 4 * multiple)
    side = lambda v: smallest <= v <= 65535  # noqa: E731
    weight = (number, lambda v: is_number(v, 0, LARGEST), f"a number, at least 0 and at most {LARGEST:g}")
    parts_of_batch = f"a multiple of {parts}, the processes times ACCUMULATION" if parts > 1 else "at least 1"
    parts_of_batch += ", at most 100000"
    check_ranges(s, (
        ("features", tuple, lambda v: v and all(type(f) is int and 0 < f <= 10_000 for f in v),
         "channels of each stage, 10000 at most"),
        ("image_height", int, side, f"a whole number, at least {smallest} and at most 65535"),
        ("image_width", int, side, f"a whole number, at least {smallest} and at most 65535"),
        ("crop", tuple | None,
         lambda v: v is None or (len(v) == 2 and all(type(c) is int and smallest_crop <= c <= 65535 for c in v)),
         f"height and width, at least {smallest_crop} and at most 65535, such as (256, 256), or to None"),
        ("scale", number, lambda v: 0 < v <= 1, "a share of the photos' own size, above 0 and at most 1"),
        ("encoder", str | None, lambda v: v != "", 'the name of a network of timm, such as "resnet34", or to None'),
        ("encoder_weights", str | None, lambda v: v != "", "a file with the weights of ENCODER, or to None"),
        ("foreground_values", tuple | None,
         lambda v: v in (None, ("labels",), ("brightness",))
         or (v and all(type(f) in number and 0 < abs(f) < 2**32 for f in v)),
         'labels other than 0, such as (15,) or (1, 2), with a flag --foreground-values 1 2, or to "labels", '
         '"brightness" or None'),
        ("mask_suffix", str, lambda v: not v.lower().endswith(SUFFIXES),
         "what follows a photo's name in its mask's, without .png, such as _mask"),
        ("num_epochs", int, lambda v: 1 <= v <= 10**9, "a whole number, at least 1 and at most 10**9"),
        ("minutes", float | int | None, lambda v: v is None or 0 < v <= LARGEST,
         f"a number above 0, at most {LARGEST:g}, or to None"),
        ("accumulation", int, lambda v: v >= 1, "a whole number, at least 1"),
        ("batch_size", int, lambda v: 1 <= v <= 10**5 and v % parts == 0, f"a whole number, {parts_of_batch}"),
        ("learning_rate", number, lambda v: 0 < v <= LARGEST, f"a number above 0, such as 0.05, at most {LARGEST:g}"),
        ("weight_decay", *weight),
        ("mean", tuple, lambda v: len(v) == 3 and all(is_number(c, -LARGEST, LARGEST) for c in v), "three numbers"),
        ("std", tuple, lambda v: len(v) == 3 and all(is_number(c, 1e-6, LARGEST) for c in v), "three numbers above 0"),
        ("dice_weight", *weight),
        ("clip_norm", *weight),
        ("seed", int, lambda v: 0 <= v < 2**63, "a whole number, at least 0 and below 2**63"),
        ("num_workers", int, lambda v: -1 <= v <= 256, "a whole number, at least 0 and at most 256, or to -1"),
        ("device", str, bool, '"auto", "cuda", "mps" or "cpu"'),
        ("precision", str, lambda v: v in ("auto", "bf16", "fp16", "fp32"), '"auto", "bf16", "fp16" or "fp32"'),
        ("compile", str, lambda v: v in ("auto", "yes", "no"), '"auto", "yes" or "no"'),
        ("checkpoint", str, lambda v: v and len(os.fsencode(Path(v).name)) <= 200 and not Path(v).is_dir(),
         "a file's name, of 200 bytes at most"),  # which names of others begin with; disks allow 255
        ("checkpoint_minutes", number, lambda v: v >= 0, "a number, at least 0"),
        ("saved_images_dir", str, bool, "a folder's name"),
    ))  # fmt: skip
    is_one_value = not s.crop and s.batch_size == parts and max(s.image_height, s.image_width) <= multiple
    if is_one_value:
        raise UserError(f"BATCH_SIZE is {s.batch_size}: set it to {2 * parts}, because BatchNorm needs several values")
    check_combinations(s)


def check_combinations(s: SimpleNamespace) -> None:
    """Check settings that depend on one another, and that the folders can be written to. Raises UserError."""
    if s.scale != 1 and not s.crop:
        raise UserError(f"SCALE is {s.scale}, but CROP is None: set CROP, such as (256, 256), or SCALE to 1")
    if s.encoder_weights and not s.encoder:
        raise UserError("ENCODER_WEIGHTS is set, but ENCODER is None: set both or none of them")
    if s.encoder_weights and not (s.load_model or s.start_from or Path(s.encoder_weights).is_file()):
        raise UserError(f"ENCODER_WEIGHTS: {s.encoder_weights} is no file: correct the path")
    for setting in ("train_img_dir", "train_mask_dir", "val_img_dir", "val_mask_dir"):
        if Path(s.saved_images_dir).resolve() == Path(getattr(s, setting)).resolve():
            raise UserError(f"SAVED_IMAGES_DIR is {setting.upper()}, where it could overwrite files: choose another")
    check_writable(Path(s.checkpoint).parent, "CHECKPOINT")
    check_writable(Path(s.saved_images_dir), "SAVED_IMAGES_DIR")
