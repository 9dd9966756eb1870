"""README and docs promise nothing that is not there."""

import re
from pathlib import Path

import pytest

import train
from machinery.settings import parse_settings

ROOT = Path(train.__file__).parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


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
        code = "".join((ROOT / name).read_text() for name in re.findall(r"`([\w/]+\.py)`", files))
        for name in re.findall(r"`([\w ]+?)(?:\(\.\.\.\)| = \.\.\.)?`", what):
            assert name in code, name


def test_what_is_where_is_there():
    for name in re.findall(r"^[\w/]+(?:\.py)?", first_block("What is where"), re.MULTILINE):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_file_and_picture_that_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    for command in re.findall(r"python -m (\w+\.\w+)|`((?:tools|machinery)\.\w+)", text):
        assert (ROOT / f"{max(command).replace('.', '/')}.py").exists(), command
    for name in re.findall(r"python ([\w/]+\.py)|`([\w/]+\.py)`", text):
        assert (ROOT / max(name)).exists(), name
    for name in re.findall(r"\(([\w/]+\.(?:png|jpg|md))\b", text):
        assert (page.parent / name).exists(), name
    for name, anchor in re.findall(r"\(([\w/]*(?:\.md)?)#([\w-]+)\)", text):
        linked = (page.parent / name).read_text(encoding="utf-8") if name else text
        titles = [re.sub(r"[^\w -]", "", title) for title in re.findall(r"^#+ (.*)$", linked, re.MULTILINE)]
        assert anchor in [title.lower().replace(" ", "-") for title in titles], f"{name}#{anchor}"
