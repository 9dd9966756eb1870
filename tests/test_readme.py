import re
from pathlib import Path

import train
from machinery.settings import parse_settings

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def first_block(section: str) -> str:
    return re.search(rf"^## {section}$.*?^```\w*\n(.*?)^```", README, re.MULTILINE | re.DOTALL)[1]


def test_one_line_sets_up_and_trains():
    assert first_block("Quick start").count("\n") == 1
    assert first_block("Quick start").rstrip().endswith("&& python train.py")


def test_one_line_sets_up_and_tests():
    assert first_block("Tests").count("\n") == 1
    assert first_block("Tests").rstrip().endswith("&& pytest")


def test_the_settings_table_has_constants_with_their_defaults():
    table = README[README.index("| Constant |") : README.index("## Troubleshooting")].splitlines()[2:]
    settings = vars(parse_settings(vars(train), []))
    rows = [row for row in table if row.startswith("| `")]
    assert len(rows) >= 10
    for row in rows:
        names, default = row.split("|")[1:3]
        for name in re.findall(r"`(\w+)`", names):
            value = settings[name.lower()]
            shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            assert shown in default or default.strip() in ("", "automatic"), name


def test_what_it_says_to_change_is_there():
    table = README[README.index("| To change |") : README.index("## Settings")].splitlines()[2:]
    for row in [row for row in table if row.startswith("|")]:
        what, files = row.split("|")[2:4]
        code = "".join((ROOT / name).read_text() for name in re.findall(r"`(\w+\.py)`", files))
        for name in re.findall(r"`([\w ]+?)(?:\(\.\.\.\)| = \.\.\.)?`", what):
            assert name in code, name


def test_it_is_short():
    assert len(README.encode()) < 11_000


def test_every_file_that_it_names_is_there():
    for name in re.findall(r"`(\w+\.py)`|\((\w+[\w/]*\.(?:png|jpg|md))\)", README):
        assert (ROOT / max(name)).exists(), name
