"""The page of tools.demo in a real browser: photos in, cut-outs out, and nothing that leaves the machine."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
import torch
from PIL import Image
from test_predict import PREPROCESSING

import predict
import utils
from machinery import errors
from machinery.decoding import read_image
from model import UNet
from tools import demo

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
CAMERA = ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]
ROOT = Path(__file__).parents[1]


def error_of(*flags: str) -> str:
    with pytest.raises(SystemExit) as exit_:
        errors.run(lambda: demo.main(list(flags)))
    message = exit_.value.code
    assert isinstance(message, str) and message.startswith("error: ") and "\n" not in message
    return message


def test_without_gradio_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert "tools.demo needs gradio 6.20 or newer" in error_of() and "pip install --upgrade gradio" in error_of()


@pytest.mark.parametrize("found", ["3.50.2", "5.49.1", "6.0.0", "6.19.0"])
def test_an_older_gradio_is_named_before_it_fails(found, monkeypatch):
    monkeypatch.setattr(demo, "version", lambda _: found)
    assert error_of() == (
        f"error: tools.demo needs gradio 6.20 or newer (this is {found}): pip install --upgrade gradio"
    )


def test_the_files_for_a_space_are_those_that_it_imports():
    """Those of the top level; machinery/ imports none of them."""
    needed, left = set(), ["tools/demo"]
    while left:
        name = left.pop()
        if name not in needed and (ROOT / f"{name}.py").exists():
            needed.add(name)
            left += re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / f"{name}.py").read_text(), re.MULTILINE)
    docs = (ROOT / "docs/export.md").read_text()
    named = re.search(r"Hugging Face Space.*?```\n(.*?)```", docs, re.DOTALL)[1].split()
    assert {"app.py", "tools/", "machinery/"} < set(named)
    assert {name for name in named if name.endswith(".py")} - {"app.py"} == {
        f"{name}.py" for name in needed if "/" not in name
    }


# ---------------------------------------------------------------------------------------------------------------------
# In a browser


class Server:
    """tools.demo in a process of its own, in a folder with data and a trained network."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.log, self.temporary = folder, folder / "log", folder / "temporary"
        self.temporary.mkdir()
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        environment = os.environ | {"GRADIO_SERVER_PORT": str(self.port), "TMPDIR": str(self.temporary)}
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, ROOT / "tests/demo_watched.py"], cwd=folder, env=environment, stdout=log, stderr=log
            )
        wait_until(lambda: self.process.poll() is not None or "Running on" in self.log.read_text())
        assert self.process.poll() is None, self.log.read_text()

    def runs(self) -> int:
        return self.log.read_text().count("runs the network")


def save_network(folder: Path) -> None:
    """A random network that takes half of the first validation photo for foreground."""
    path, photo = folder / "my_checkpoint_best.pth.tar", min((folder / "data/val_images").iterdir())
    torch.manual_seed(0)
    model = UNet(3, 1, (8, 16))
    torch.nn.init.normal_(model.head.weight)
    state = {"model": model.config, "preprocessing": PREPROCESSING, "settings": {"val_img_dir": "data/val_images"}}
    utils.save_checkpoint(state | {"state_dict": model.state_dict()}, path)
    logits = predict.load_model(path)(read_image(photo, (32, 48))[None])
    torch.nn.init.constant_(model.head.bias, -np.median(logits))
    utils.save_checkpoint(state | {"state_dict": model.state_dict()}, path)


def wait_until(is_true: Callable[[], bool]) -> None:
    for _ in range(1200):
        if is_true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come to that")


@pytest.fixture(scope="module")
def server(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Afterwards it must have spoken to nobody but itself, and have left no file and no traceback."""
    pytest.importorskip("gradio", reason="needs the package gradio: pip install gradio")
    if not BROWSER:
        pytest.skip("needs a browser: apt-get install chromium")
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(drawn, folder / "data")
    save_network(folder)
    server = Server(folder)
    yield server
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 143
    assert list(server.temporary.iterdir()) == []
    log = server.log.read_text()
    assert "Traceback" not in log
    assert {
        re.sub(r"\W*(127\.0\.0\.1|localhost)\b.*", "", line) for line in re.findall(r"(?:connects|looks).*", log)
    } <= {
        "connects to",
        "looks up",
    }


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", *CAMERA])
        yield browser
        browser.close()


@pytest.fixture
def page(server: Server, browser: "sync_api.Browser") -> Iterator["sync_api.Page"]:
    """The opened page; afterwards it must have asked nobody but the server for anything."""
    context = browser.new_context(permissions=["camera", "clipboard-read", "clipboard-write"])
    page, hosts = context.new_page(), set()
    page.set_default_timeout(60_000)
    page.on("request", lambda request: hosts.add(urlsplit(request.url).hostname))
    page.goto(f"http://127.0.0.1:{server.port}")
    page.get_by_text("Download PNG").wait_for()
    yield page
    assert hosts - {None} == {"127.0.0.1"}  # None: blob: and data:
    context.close()


def shown(page: "sync_api.Page") -> list[str]:
    """The addresses of the photo and its cut-out under the slider, or none."""
    return page.locator("#pair img").evaluate_all("images => images.map(image => image.src)")


def changed(page: "sync_api.Page", before: list[str]) -> list[str]:
    """The addresses of a new photo and its cut-out, as soon as they are loaded."""
    page.wait_for_function(
        """before => {
            const images = [...document.querySelectorAll("#pair img")];
            return images.length == 2 && images[1].src != before[1] && images.every(i => i.complete && i.naturalWidth)
        }""",
        arg=before,
    )
    return shown(page)


def drop(page: "sync_api.Page", path: Path) -> list[str]:
    """Gives the page a photo, and waits for its cut-out."""
    before = shown(page)
    page.locator("#photo input[type=file]").set_input_files(path)
    return changed(page, before)


def says(page: "sync_api.Page", sentence: str, exact: bool = False) -> bool:
    """Whether the page shows a sentence, for which this waits."""
    place = page.get_by_text(sentence, exact=exact)
    place.wait_for()
    return place.is_visible()


def download(page: "sync_api.Page", to: Path) -> Image.Image:
    with page.expect_download() as download:
        page.get_by_role("button", name="Download PNG").click()
    assert download.value.suggested_filename.endswith("_cutout.png")
    download.value.save_as(to)
    return Image.open(to)


def take_away(page: "sync_api.Page") -> None:
    page.get_by_label("Remove Image").click()
    page.wait_for_function("!document.querySelector('#pair img')")


def sizes(page: "sync_api.Page") -> set[tuple[int, int]]:
    pictures = page.locator("#pair img, #photo img")
    return set(map(tuple, pictures.evaluate_all("images => images.map(i => [i.naturalWidth, i.naturalHeight])")))


def test_a_photo_becomes_the_cutout_that_predict_writes(page, server, tmp_path, monkeypatch):
    monkeypatch.chdir(server.folder)
    photo = sorted(Path("data/val_images").iterdir())[0]
    predict.main([str(photo), "--cutout", "--output-dir", str(tmp_path), "--device", "cpu"])
    drop(page, photo)
    cutout = download(page, tmp_path / "downloaded.png")
    assert np.array_equal(np.asarray(cutout), np.asarray(Image.open(tmp_path / f"{photo.stem}_cutout.png")))


def test_threshold_and_background_change_the_cutout_without_the_network(page, server, tmp_path):
    before = drop(page, sorted((server.folder / "data/val_images").iterdir())[1])
    runs, shares = server.runs(), []
    for threshold in ("0.05", "0.95"):
        page.get_by_label("number input for Threshold").fill(threshold)
        page.keyboard.press("Tab")
        before = changed(page, before)
        shares.append((np.asarray(download(page, tmp_path / "cutout.png"))[..., 3] > 127).mean())
    assert shares[0] > shares[1]
    page.get_by_label("On this colour:").check()
    before = changed(page, before)
    page.locator(".dialog-button").click()
    page.get_by_role("textbox").fill("#ff0000")
    page.keyboard.press("Enter")
    changed(page, before)
    coloured = download(page, tmp_path / "coloured.png")
    assert coloured.mode == "RGB" and coloured.getpixel((0, 0)) == (255, 0, 0)
    assert server.runs() == runs


def test_a_broken_file_gives_a_sentence_and_the_next_photo_works(page, server, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8\xff no photo")
    page.locator("#photo input[type=file]").set_input_files(broken)
    sentence = "broken.jpg is no readable image (it is cut off): replace it, or move it away"
    assert says(page, sentence, exact=True) and shown(page) == []
    page.get_by_role("button", name="Download PNG").click()
    assert says(page, "there is no photo yet: drop one first")
    assert len(drop(page, sorted((server.folder / "data/val_images").iterdir())[0])) == 2  # it and its cut-out


def test_large_turned_and_transparent_photos_are_shown_small_and_downloaded_whole(page, server, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # a telephone that was held upright
    Image.linear_gradient("L").resize((4000, 3000)).convert("RGB").save(tmp_path / "turned.jpg", exif=exif)
    drop(page, tmp_path / "turned.jpg")
    assert sizes(page) == {(960, 1280)}
    assert download(page, tmp_path / "downloaded.png").size == (3000, 4000)

    picture = Image.open(sorted((server.folder / "data/val_images").iterdir())[0]).convert("RGBA").resize((1500, 1000))
    picture.paste((255, 0, 0, 0), (0, 0, 750, 1000))
    picture.save(tmp_path / "half.png")
    drop(page, tmp_path / "half.png")
    assert sizes(page) == {(1280, 853)}
    alpha = np.asarray(download(page, tmp_path / "downloaded.png"))[..., 3]
    assert not alpha[:, :749].any() and alpha[:, 751:].any()


def test_examples_the_clipboard_and_the_camera_are_photos_too(page):
    before = shown(page)
    thumbnail = page.get_by_label("Thumbnail 2 of 4")
    fit = thumbnail.locator("img").evaluate("image => getComputedStyle(image).objectFit")
    assert fit == "contain"  # portraits keep their heads
    thumbnail.click()
    example = changed(page, before)
    take_away(page)
    page.evaluate(
        """async () => {
            const canvas = new OffscreenCanvas(60, 40);
            canvas.getContext("2d").fillRect(0, 0, 30, 40);
            await navigator.clipboard.write([new ClipboardItem({"image/png": canvas.convertToBlob()})]);
        }"""
    )
    page.get_by_label("Paste from clipboard").click()
    pasted = changed(page, example)
    assert sizes(page) == {(60, 40)}
    take_away(page)
    page.get_by_label("Capture from camera").click()
    page.get_by_text("Click to Access Webcam").click()
    page.wait_for_function("[...document.querySelectorAll('#photo video')].some(video => video.videoWidth)")
    page.locator("[title='capture photo'], [aria-label='capture photo']").first.click()
    captured = changed(page, pasted)
    assert len({*before, *example, *pasted, *captured}) == 6  # three photos, and their cut-outs


def test_it_does_not_scroll_sideways(page, server):
    drop(page, sorted((server.folder / "data/val_images").iterdir())[0])
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        assert page.evaluate("document.documentElement.scrollWidth") == width
