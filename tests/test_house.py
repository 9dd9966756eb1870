"""The house: what lies at the top level, which room may import which, and which commands start without PyTorch."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TOP_LEVEL = {"train.py", "predict.py", "dataset.py", "model.py", "utils.py", "data", "saved_images", "tests", "docs"}
TOP_LEVEL |= {"tools", "machinery", "README.md", "LICENSE", "requirements.txt", "requirements-dev.txt"}
TOP_LEVEL |= {"pyproject.toml", "UNET_architecture.png"}
DOORS = {  # what each may import of the others
    "train": {"predict", "utils", "dataset", "model"},
    "predict": {"utils", "dataset", "model"},
    "utils": {"dataset", "model"},
    "dataset": set(),
    "model": set(),
}
WITHOUT_TORCH = ("errors", "settings", "files", "decoding", "formats", "samples", "shapes", "outputs", "sample_data")


def imports(path: Path) -> Iterator[str]:
    """Yield the first name of each module that a file imports, in its functions, too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative name"
            yield node.module.partition(".")[0]


@pytest.mark.parametrize("name", DOORS)
def test_the_doors_import_those_behind_them(name):
    assert set(imports(ROOT / f"{name}.py")) & {*DOORS, "tools", "tests"} <= DOORS[name]


@pytest.mark.parametrize("path", sorted((ROOT / "machinery").glob("*.py")), ids=lambda path: path.stem)
def test_machinery_imports_nothing_of_the_top_level(path):
    assert not set(imports(path)) & {*DOORS, "tools", "tests"}


def test_nothing_else_lies_at_the_top_level():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs a git clone")
    found = {line.partition("/")[0].strip('"') for line in listed.splitlines()}
    assert {name for name in found if not name.startswith(".")} == TOP_LEVEL


COMMANDS = ["tools.split_data", "tools.make_masks", "machinery.sample_data"]


@pytest.mark.parametrize("names", [*([name] for name in COMMANDS), [f"machinery.{name}" for name in WITHOUT_TORCH]])
def test_what_needs_no_torch_imports_none(names):
    """Not by what it imports, either: a process of its own tells."""
    code = f"import sys, {', '.join(names)}; module = {names[0]}\n"
    if names[0] in COMMANDS:
        code += "try: module.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'torchvision', 'albumentations', 'timm', 'matplotlib'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    if names[0] in COMMANDS:
        assert done.stdout.startswith(f"usage: python -m {names[0]} ")


@pytest.mark.parametrize("script", ["train.py", "predict.py", "tools/__init__.py"])
def test_threads_that_wait_leave_the_cores_to_other_jobs(script):
    """OpenMP reads that when torch is imported. Without it two runs side by side took five times as long as one."""
    text = (ROOT / script).read_text()
    assert 0 < text.index("GOMP_SPINCOUNT") < (text + "\nimport torch\n").index("\nimport torch\n")
