"""What a run leaves in saved_images/, apart from what a browser makes of the page."""

import base64
import builtins
import importlib.util
import io
import re
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import draw_few_pictures, leave_photos, rows
from matplotlib.figure import Figure
from PIL import Image

import utils
from machinery import report, runs
from machinery.decoding import VOID
from machinery.errors import UserError


def picture(path: str) -> np.ndarray:
    return np.asarray(Image.open(f"saved_images/{path}").convert("RGB"))


def page() -> str:
    return Path("saved_images/index.html").read_text(encoding="utf-8")


def drawn_figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Return a list to which every figure of curves is added."""
    figures = []

    def figure(**options):
        figures.append(Figure(**options))
        return figures[-1]

    monkeypatch.setattr(report, "Figure", figure)
    return figures


def curves(figure: Figure) -> dict[str, dict[str, list[float]]]:
    """Return what a figure draws: title -> name of a line -> its values."""
    return {
        axes.get_title(): {line.get_label(): line.get_ydata().tolist() for line in axes.get_lines()}
        for axes in figure.axes
    }


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def events(folder: str) -> object:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(folder)
    found.Reload()
    return found


def test_errors_have_colours_and_the_truth_an_outline():
    mask = np.zeros((6, 8), bool)
    mask[2:4, 2:5] = True
    prediction = np.roll(mask, 2, axis=1)
    layer = report.errors(mask, prediction, np.zeros_like(mask))
    assert tuple(layer[2, 4, :3]) == report.TRUE_POSITIVE
    assert tuple(layer[2, 2, :3]) == report.FALSE_NEGATIVE
    assert tuple(layer[2, 6, :3]) == report.FALSE_POSITIVE
    assert tuple(layer[1, 2]) == tuple(layer[2, 5]) == (255, 255, 255, 255)
    assert not layer[0].any() and not layer[:, 0].any()


def test_a_layer_covers_a_photo_as_far_as_it_is_opaque():
    image = np.full((1, 3, 3), 100, np.uint8)
    layer = np.array([[[200, 0, 0, 0], [200, 0, 0, 255], [200, 0, 100, 51]]], np.uint8)
    assert report.laid_over(image, layer).tolist() == [[[100, 100, 100], [200, 0, 0], [120, 80, 100]]]


def test_there_is_an_overlay_of_every_batch(project, run_train):
    run_train("--num-epochs", "1", "--batch-size", "14")  # 32 photos: 14, 14 and 4
    assert sorted(path.name for path in Path("saved_images").glob("overlay_*")) == [
        f"overlay_{n}.png" for n in range(3)
    ]
    for number in range(3):
        assert picture(f"overlay_{number}.png").shape == picture(f"{number}.png").shape
    tile, truth = picture("overlay_0.png")[2:34, 2:50], picture("0.png")[2:34, 2:50, 0] > 0
    assert (tile[report.outline(truth)][:10] == 255).all()
    run_train("--num-epochs", "1", "--batch-size", "32")
    assert [path.name for path in Path("saved_images").glob("overlay_*")] == ["overlay_0.png"]


def test_grids_have_four_columns_and_grey_lines(tmp_path):
    pictures = np.random.default_rng(0).integers(0, 256, (5, 6, 8, 3), np.uint8)
    report.save_grid(pictures, tmp_path / "grid.png")
    grid = np.asarray(Image.open(tmp_path / "grid.png"))
    wanted = np.full((2 + 2 * 8, 2 + 4 * 10, 3), 128, np.uint8)  # two rows, of which the second has one picture
    for number, picture in enumerate(pictures):
        row, column = divmod(number, 4)
        wanted[2 + 8 * row : 8 + 8 * row, 2 + 10 * column : 10 + 10 * column] = picture
    np.testing.assert_array_equal(grid, wanted)


def test_a_grid_is_whole_or_not_there(tmp_path, monkeypatch):
    def die(tensor, path, **_):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchvision.utils.save_image", die)
    (tmp_path / "grid.png").write_bytes(b"the one before")
    with pytest.raises(UserError, match=r"grid.png could not be written \(No space left on device\)"):
        report.save_grid(np.zeros((1, 6, 8, 1), np.uint8), tmp_path / "grid.png")
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"the one before"]


def test_saved_masks_are_black_and_white_and_grey_where_void(tmp_path):
    predictions = np.zeros((2, 6, 8), bool)
    predictions[0, :3] = True
    masks = np.zeros((2, 6, 8), np.uint8)
    masks[1, :, :4], masks[1, 5] = 1, VOID
    utils.save_predictions_as_imgs(predictions, masks, 7, tmp_path)
    prediction, truth = (np.asarray(Image.open(tmp_path / name).convert("L")) for name in ("pred_7.png", "7.png"))
    np.testing.assert_array_equal(prediction[2:8, 2:10], predictions[0] * 255)
    assert not prediction[2:8, 12:20].any() and not truth[2:8, 2:10].any()
    assert (truth[2:7, 12:16] == 255).all() and (truth[2:7, 16:20] == 0).all() and (truth[7, 12:20] == 128).all()


def test_a_new_metric_is_one_line(project, run_train, monkeypatch, capsys):
    """Of utils.image_scores: it is in the console's table, metrics.csv, the curves, the page and TensorBoard."""
    image_scores = utils.image_scores

    def more_scores(tp, fp, fn, tn):
        return image_scores(tp, fp, fn, tn) | {"sensitivity": tp / (tp + fn)}

    monkeypatch.setattr(utils, "image_scores", more_scores)
    figures = drawn_figures(monkeypatch)
    flags = ["--tensorboard-dir", "runs"] if has_tensorboard() else []
    run_train("--num-epochs", "2", *flags)

    names = "epoch train_loss val_loss pixel_accuracy dice iou sensitivity learning_rate seconds images_per_second"
    assert list(rows()[0]) == names.split()
    values = [float(row["sensitivity"]) for row in rows()]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    console = names.replace(" learning_rate", "").replace(" images_per_second", "").split()
    heading = lines.index(console)
    shown = [line[6] for line in lines[heading:] if line and line[0] in ("1", "2")]
    assert shown == [f"{value:.4f}" for value in values]
    assert curves(figures[-1])["Sensitivity"] == {"sensitivity": pytest.approx(values)}
    assert '<th scope="col">sensitivity</th>' in page()
    assert all(f"<td>{value:.4g}</td>" in page() for value in values)
    if flags:
        logged = events("runs").Scalars("sensitivity")
        assert [event.value for event in logged] == pytest.approx(values)


def test_a_new_metric_leaves_a_gap_where_a_run_had_none(project, run_train, monkeypatch):
    run_train("--num-epochs", "2")
    image_scores = utils.image_scores
    monkeypatch.setattr(utils, "image_scores", lambda *counts: image_scores(*counts) | {"half": counts[0] * 0 + 0.5})
    figures = drawn_figures(monkeypatch)
    run_train("--num-epochs", "3", "--load-model")
    assert [row["half"] for row in rows()] == ["", "", "0.5"]
    assert curves(figures[-1])["Half"] == {"half": pytest.approx([np.nan, np.nan, 0.5], nan_ok=True)}
    assert len({axes.get_xlim() for axes in figures[-1].axes}) == 1
    assert '<th scope="col">half</th>' in page() and page().count("<td></td>") == 2


def test_curves_share_axes_where_their_ranges_are_alike(project, run_train, monkeypatch):
    figures = drawn_figures(monkeypatch)
    run_train("--num-epochs", "1")
    assert {title: list(lines) for title, lines in curves(figures[-1]).items()} == {
        "Loss": ["train_loss", "val_loss"],
        "Dice and IoU": ["dice", "iou"],
        "Pixel accuracy": ["pixel_accuracy"],
        "Learning rate": ["learning_rate"],
    }


def test_curves_and_page_go_on_with_the_run(project, run_train):
    run_train("--num-epochs", "1")
    assert picture("curves.png").shape == (600, 800, 3)
    first = picture("curves.png")
    assert "<polyline" not in page()
    run_train("--num-epochs", "2", "--load-model")
    assert (picture("curves.png") != first).any()
    text = page()
    assert text.count("<figure") == text.count("<polyline") == 32
    assert f"Dice {float(rows()[1]['dice']):.4f} after epoch 2 of 2" in text


def test_the_page_shows_each_photos_dice_worst_first(project, run_train):
    run_train("--num-epochs", "3")
    shown = [float(dice) for dice in re.findall('data-dice="(.*?)"', page())]
    assert shown == sorted(shown) and shown[0] < shown[-1]
    assert np.mean(shown) == pytest.approx(float(rows()[2]["dice"]), abs=1e-9)


def test_of_many_epochs_the_last_ten_are_open(project, run_train, monkeypatch):
    draw_few_pictures(monkeypatch.setattr)
    leave_photos(4, 2)
    flags = ["--num-epochs"]
    run_train(*flags, "10")
    assert page().count("<details open>") == 1 and "Scores of epochs" not in page()
    run_train(*flags, "13", "--load-model")
    earlier, last = re.findall(r"<table>.*?</table>", page(), re.DOTALL)[:2]
    assert re.findall(r"<tr><td>(\d+)</td>", earlier) == ["1", "2", "3"]
    assert re.findall(r"<tr><td>(\d+)</td>", last) == [str(epoch) for epoch in range(4, 14)]
    closed, opened = (
        re.search(rf"<details( open)?><summary>Scores of {of}", page())[1] for of in ("epochs", "the last")
    )
    assert closed is None and opened


def test_a_table_that_cannot_be_written_costs_no_epoch(project, run_train):
    """As where a spreadsheet holds it open."""
    leave_photos(8, 4)
    Path("saved_images/metrics.csv").mkdir(parents=True)
    with pytest.raises(UserError, match=r"metrics.csv could not be written"):
        run_train("--num-epochs", "2")
    Path("saved_images/metrics.csv").rmdir()
    run_train("--num-epochs", "2", "--load-model")
    assert [row["epoch"] for row in rows()] == ["1", "2"]


def test_of_many_photos_the_page_shows_some(project, run_train, monkeypatch):
    monkeypatch.setattr(report, "PAGE_PHOTOS", 5)
    run_train("--num-epochs", "1")
    names = sorted(re.findall('data-name="(.*?)"', page()))
    all_names = sorted(path.name for path in Path("data/val_images").iterdir())
    assert names == [all_names[index] for index in (0, 8, 16, 23, 31)]
    assert "5 of 32 validation photos" in page()


def test_large_photos_are_made_smaller_for_the_page():
    image, mask = np.full((700, 960, 3), 90, np.uint8), np.zeros((700, 960), bool)
    uris = report.page_pictures(image, mask, mask, report.errors(mask, mask, mask & False), mask.astype(np.uint8))
    for uri in uris.values():
        assert Image.open(io.BytesIO(base64.b64decode(uri.split(",")[1]))).size == (480, 350)


def test_a_page_that_cannot_be_written_ends_the_run_with_a_sentence(project, run_train):
    Path("saved_images/index.html").mkdir(parents=True)
    with pytest.raises(UserError, match=r"index.html could not be written"):
        run_train("--num-epochs", "2")


def test_a_log_has_a_line_a_minute_instead_of_a_bar(project, run_train, monkeypatch, capsys):
    now = iter(range(0, 100_000, 25))
    monkeypatch.setattr(runs.time, "monotonic", lambda: next(now))
    run_train("--num-epochs", "1")
    out, err = capsys.readouterr()
    assert re.search(r"^epoch 1/1: \d+ of 64 images, loss 0\.\d{4}$", out, re.MULTILINE)
    assert "\r" not in out + err


def test_tensorboard_gets_scores_overlays_and_settings(project, run_train):
    pytest.importorskip("tensorboard")
    run_train("--num-epochs", "2", "--tensorboard-dir", "runs")
    logged = events("runs")
    assert [event.step for event in logged.Scalars("dice")] == [1, 2]
    assert logged.Scalars("dice")[1].value == pytest.approx(float(rows()[1]["dice"]))
    assert [event.step for event in logged.Images("overlay_0")] == [1, 2]
    assert "learning_rate = 0.05" in str(logged.Tensors("settings/text_summary")[0])


def test_an_epochs_pictures_are_skipped_where_those_before_are_not_done(project, run_train, monkeypatch, capsys):
    second, begin, draw = threading.Event(), report.Report.begin, report.Report._draw_run

    def note_second(self, epoch, is_last):
        try:
            return begin(self, epoch, is_last)
        finally:
            if epoch == 2:
                second.set()

    def wait_for_second(self, *args):
        assert second.wait(60)
        draw(self, *args)

    monkeypatch.setattr(report.Report, "begin", note_second)
    monkeypatch.setattr(report.Report, "_draw_run", wait_for_second)
    run_train("--num-epochs", "3")
    assert capsys.readouterr().out.count("Epoch 2 gets no pictures") == 1
    assert len(rows()) == 3 and f"Dice {float(rows()[2]['dice']):.4f} after epoch 3 of 3" in page()
    assert len(list(Path("saved_images").glob("overlay_*.png"))) == 8


def test_a_missing_tensorboard_is_named_with_its_install_line(project, run_train, monkeypatch):
    imported = builtins.__import__

    def refuse(name, *args):
        if name == "torch.utils.tensorboard":
            raise ImportError(name)
        return imported(name, *args)

    monkeypatch.setattr(builtins, "__import__", refuse)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    with pytest.raises(UserError, match="pip install tensorboard"):
        run_train("--num-epochs", "1", "--tensorboard-dir", "runs")


def test_drawing_changes_no_weight(project, run_train, monkeypatch):
    run_train("--num-epochs", "2")
    drawn = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["state_dict"]
    monkeypatch.setattr(report.Report, "add", lambda *_: None)
    monkeypatch.setattr(report.Report, "finish", lambda *_: None)
    run_train("--num-epochs", "2")
    again = utils.load_checkpoint(Path("my_checkpoint.pth.tar"))["state_dict"]
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)


def test_a_tensorboard_folder_that_cannot_be_written_is_named(project, run_train):
    Path("runs").touch()
    with pytest.raises(UserError, match="TENSORBOARD_DIR: runs cannot be written"):
        run_train("--num-epochs", "1", "--tensorboard-dir", "runs")
