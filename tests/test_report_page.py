"""The page of a real run in a real browser."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import SMALL
from PIL import Image

import train

sync_api = pytest.importorskip("playwright.sync_api", reason="needs the package playwright: pip install playwright")
BROWSER = next(filter(None, map(shutil.which, ("chromium", "google-chrome", "chromium-browser"))), None)
pytestmark = pytest.mark.skipif(not BROWSER, reason="needs a browser: apt-get install chromium")

EVIL = """ä "b" & 'c' <img src=x onerror=alert(1)>.jpg"""


@pytest.fixture(scope="module")
def page_file(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    shutil.copytree(drawn, folder / "data")
    photo = sorted((folder / "data/val_images").iterdir())[5]
    photo.rename(photo.with_name(EVIL))
    mask = folder / f"data/val_masks/{photo.stem}_mask.gif"
    mask.rename(mask.with_name(Path(EVIL).stem + "_mask.gif"))
    portrait = sorted((folder / "data/val_images").iterdir())[7]
    for path in (portrait, folder / f"data/val_masks/{portrait.stem}_mask.gif"):
        with Image.open(path) as picture:
            upright = picture.transpose(Image.Transpose.ROTATE_90)
        upright.save(path)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train.main([*SMALL, "--num-epochs", "2"])
    return folder / "saved_images" / "index.html"


@pytest.fixture(scope="module")
def browser() -> Iterator["sync_api.Browser"]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def page(browser: "sync_api.Browser", page_file: Path) -> Iterator["sync_api.Page"]:
    """The opened page; afterwards there must have been no error, no dialog and no request beside the page's own."""
    page = browser.new_page()
    wrong = []
    page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda request: None if request.url.startswith("data:") else wrong.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    assert wrong == [page_file.as_uri()]
    page.close()


def visible(page: "sync_api.Page") -> str:
    """What lies over the first photo."""
    images = page.locator("main figure").first.locator("img").all()
    return " ".join(image.get_attribute("class") or "photo" for image in images if image.is_visible())


def names(page: "sync_api.Page") -> list[str]:
    return page.locator("main figcaption b").all_text_contents()  # inner_text is empty below the screen


def values(page: "sync_api.Page", name: str) -> list[float]:
    return page.locator("main figure").evaluate_all(f"figures => figures.map(figure => +figure.dataset.{name})")


def test_photos_load(page):
    for image in page.locator("main img").all()[:10]:
        if image.is_visible():
            image.scroll_into_view_if_needed()
            assert image.evaluate("async image => { await image.decode(); return image.naturalWidth }") == 48
    assert page.locator(".curves").evaluate("image => image.naturalWidth") == 800
    assert len(names(page)) == 32
    assert all(image.get_attribute("alt") for image in page.locator("img").all())


def test_file_names_are_text(page):
    assert EVIL in names(page)
    page.get_by_role("button", name=f"Enlarge {EVIL}").click()
    assert page.locator("dialog b").inner_text() == EVIL


def test_views_switch_by_mouse_and_by_key(page):
    assert visible(page) == "photo errors"
    page.get_by_label("truth").check()
    assert visible(page) == "photo truth"
    page.keyboard.press("1")
    assert visible(page) == "photo"
    page.keyboard.press("5")
    assert visible(page) == "photo probability"
    page.get_by_label("probability").focus()
    page.keyboard.press("ArrowLeft")
    assert visible(page) == "photo errors"


def test_photos_are_sorted_by_mouse_and_by_key(page):
    worst_first = values(page, "dice")
    assert worst_first == sorted(worst_first)
    page.locator("#order").select_option("foreground")
    assert values(page, "foreground") == sorted(values(page, "foreground")) != values(page, "dice")
    page.locator("#order").focus()
    page.keyboard.press("n")  # of a list the option that begins so
    others = [name for name in names(page) if name != EVIL]
    assert others == sorted(others, key=lambda name: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", name)])
    assert page.locator("#order").input_value() == "name"
    assert values(page, "dice") != worst_first


def test_a_photo_is_enlarged_and_the_arrows_go_on(page):
    page.get_by_role("button").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("dialog b").inner_text() == names(page)[0]
    box = page.locator("dialog img").first.bounding_box()
    assert max(box["width"], box["height"]) > 600
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.locator("dialog b").inner_text() == names(page)[1]
    page.keyboard.press("2")
    assert page.locator("dialog img.truth").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("dialog").is_visible()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_two_columns_and_does_not_scroll_sideways(page, scheme):
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 360, "height": 740})
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    tops = page.locator("main figure").evaluate_all("figures => figures.map(f => f.getBoundingClientRect().top)")
    assert tops[0] == tops[1] < tops[2]
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(20, 23, 27)"}[scheme]


@pytest.mark.parametrize("width", [1200, 360])
def test_photos_come_first_and_have_their_own_proportions(page, width):
    page.set_viewport_size({"width": width, "height": 900})
    first, run = page.locator("main figure").first.bounding_box(), page.locator("#run")
    assert first["y"] < 450 and run.bounding_box()["y"] > first["y"] + first["height"]
    shapes = page.locator("main figure").evaluate_all(
        """figures => figures.map(figure => [...figure.querySelectorAll("img")]
           .map(image => image.getBoundingClientRect()).filter(box => box.width)
           .map(box => (box.width / box.height).toFixed(2)).join(" "))"""
    )
    assert sorted(shapes) == ["0.67 0.67"] + ["1.50 1.50"] * 31  # photo and errors lie upon each other
    page.get_by_role("link", name="curves, scores").click()
    assert run.evaluate("section => section.getBoundingClientRect().top") < 900  # on the screen


def test_an_enlarged_portrait_is_seen_as_a_whole(page):
    portrait = (
        page.locator("main figure")
        .filter(has=page.locator("img"))
        .evaluate_all("figures => figures.findIndex(figure => figure.style.getPropertyValue('--shape') < 1)")
    )
    page.get_by_role("button").nth(portrait).click()
    box = page.locator("dialog img").first.bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"] and box["height"] > 400
