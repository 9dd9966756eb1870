import re
from pathlib import Path

import train
import utils

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


def test_the_settings_table_names_every_constant_with_its_default():
    table = README[README.index("| Constant |") : README.index("## Troubleshooting")]
    for name, value in vars(utils.parse_settings(vars(train), [])).items():
        row = next(line for line in table.splitlines() if f"`{name.upper()}`" in line)
        if isinstance(value, int) and value > 0:
            assert str(value) in row


def test_every_file_that_it_names_is_there():
    for name in re.findall(r"`(\w+\.py)`|\((\w+[\w/]*\.(?:png|jpg))\)", README):
        assert (ROOT / max(name)).exists(), name
