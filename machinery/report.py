"""The pictures of a run: predictions, overlays, curves, and a page to browse them."""

import base64
import copy
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import cv2
import jinja2
import numpy as np
import torch
import torch.nn.functional as F
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

from machinery.decoding import NUM_THREADS, VOID
from machinery.errors import UserError, reason_of
from machinery.files import save_metrics, saving
from machinery.samples import Samples, describe

# Colours that colour-blind people can tell apart: Okabe and Ito, https://jfly.uni-koeln.de/color/
TRUE_POSITIVE, FALSE_NEGATIVE, FALSE_POSITIVE = (86, 180, 233), (240, 228, 66), (213, 94, 0)
BLUE, VERMILION = "#0072b2", "#d55e00"
PAGE_WIDTH = 480  # pixels of a photo on the page, at most
PAGE_PHOTOS = 1000  # on the page, at most: more make it slow


class Report:
    """Draw a run's pictures in threads beside training. A context manager, whose end waits for the last of them.

    Its methods raise UserError where something could not be written.

    Args:
        folder: for pictures, metrics.csv and the page.
        train_set, val_set: the prepared data; prints what they hold.
        part: of val_set, on which epochs are validated.
        settings: the page shows them.
        save_masks: saves a batch's masks, which utils.save_predictions_as_imgs does: predictions bool (N, H, W), true
            masks uint8 (N, H, W), the number of the batch, the folder.
    """

    def __init__(
        self,
        folder: Path,
        train_set: Samples,
        val_set: Samples,
        part: Samples,
        settings: dict[str, object],
        save_masks: Callable[[np.ndarray, np.ndarray, int, Path], None],
    ) -> None:
        self.folder, self.data, self.settings, self.save_masks = Path(folder), part, settings, save_masks
        self.data_report = describe(train_set, val_set)
        print(self.data_report)
        shown = np.linspace(0, len(part) - 1, min(PAGE_PHOTOS, len(part))).round().astype(int)  # evenly spaced
        self.pictures = {index: {} for index in shown.tolist()}  # of the photos on the page, by their index
        self.batches = self.photos = 0  # of the validation under way
        self.board = None

    def trial(self, folder: Path, photos: int) -> "Report":
        """Return a report that draws into another folder, of the first photos alone."""
        trial = copy.copy(self)
        trial.folder, trial.pictures = folder, {index: {} for index in range(min(PAGE_PHOTOS, photos))}
        trial.settings = self.settings | {"tensorboard_dir": None}
        return trial

    def __enter__(self) -> "Report":
        self.threads, self.pending = ThreadPoolExecutor(min(8, NUM_THREADS)), list[Future]()
        if self.settings["tensorboard_dir"]:
            self.board = tensorboard_writer(self.settings["tensorboard_dir"], self.settings)
        return self

    def __exit__(self, error: type | None, *_: object) -> None:
        self.threads.shutdown(cancel_futures=error is not None)
        try:
            if not error:
                self._end()
        finally:
            if self.board:
                self.board.close()

    def begin(self, epoch: int, is_last: bool) -> Callable[[Tensor, Tensor], None] | None:
        """Begin an epoch's pictures: return what is to be called with logits and Dice of each validation batch.

        Where the pictures before are not done, this epoch gets none, and a line says so. The last epoch waits for them.
        """
        self.is_drawing = is_last or all(future.done() for future in self.pending)
        if not self.is_drawing:
            tqdm.write(f"Epoch {epoch} gets no pictures: those before it are still being drawn.")
            return None
        self._end()
        self.batches = self.photos = 0
        return self.add

    def _end(self) -> None:
        """Wait until everything is drawn. Raises the first error."""
        for future in self.pending:
            future.result()
        self.pending.clear()

    def add(self, logits: Tensor, dice: Tensor) -> None:
        """Queue the next batch for drawing: logits float32 (N, 1, H, W), and each image's Dice, (N,), on any device."""
        probabilities = (logits[:, 0].sigmoid() * 255).byte().cpu().numpy()
        predictions = (logits[:, 0] > 0).cpu().numpy()
        most = max(8, 2**30 // probabilities.nbytes)  # that wait in memory
        if len(self.pending) > most:
            self.pending[-most].result()
        batch = self.batches, self.photos, probabilities, predictions, dice.tolist()
        self.pending.append(self.threads.submit(self._draw_batch, *batch))
        self.batches, self.photos = self.batches + 1, self.photos + len(logits)

    def finish(self, history: list[dict], photo_dice: list[list[float]]) -> None:
        """Write metrics.csv, and queue curves and page for drawing, after an epoch's last batch.

        Args:
            history: the rows of metrics.csv.
            photo_dice: each validation photo's Dice in each epoch.
        """
        save_metrics(history, self.folder / "metrics.csv")
        if self.board:
            for name, value in history[-1].items():
                self.board.add_scalar(name, value, history[-1]["epoch"])
        if not self.is_drawing:
            return
        args = self.batches, copy.deepcopy(history), photo_dice.copy(), self.pending.copy()
        self.pending.append(self.threads.submit(self._draw_run, *args))

    def _draw_batch(
        self, batch: int, first: int, probabilities: np.ndarray, predictions: np.ndarray, dice: list[float]
    ) -> None:
        """Draw a batch whose first photo is number `first`, from uint8 probabilities and predictions, (N, H, W)."""
        size = predictions.shape[1:]
        samples = [reduced(*self.data.sample(first + offset), size) for offset in range(len(predictions))]
        self.save_masks(predictions, np.stack([mask for _, mask in samples]), batch, self.folder)
        tiles = []
        for offset, (image, mask) in enumerate(samples):
            truth, void = mask == 1, mask == VOID
            layer = errors(truth, predictions[offset], void)
            tiles.append(label(laid_over(image, layer), f"{dice[offset]:.4f}"))
            if first + offset in self.pictures:
                shown = image, truth | hatched(void), predictions[offset], layer, probabilities[offset]
                self.pictures[first + offset] = page_pictures(*shown)
        save_grid(np.stack(tiles), self.folder / f"overlay_{batch}.png")

    def _draw_run(self, batches: int, history: list[dict], photo_dice: list[list[float]], before: list[Future]) -> None:
        """Draw curves and page when the pictures before are done."""
        for future in before:  # which were queued first: none of them waits for this thread
            future.result()
        remove_older_pictures(batches, self.folder)
        draw_curves(history, self.folder / "curves.png")
        photos = [
            SimpleNamespace(
                name=self.data.pairs[index][0].name,
                **{name: self.data.infos[name][index].item() for name in ("height", "width", "foreground")},
                dice=[epoch[index] for epoch in photo_dice],
                pictures=pictures,
            )
            for index, pictures in self.pictures.items()
        ]
        row, best = history[-1], max(history[-len(photo_dice) :], key=lambda row: row["dice"])  # on these photos
        title = f"Dice {row['dice']:.4f} after epoch {row['epoch']} of {self.settings['num_epochs']}"
        shown = f"{len(photos)} of {len(self.data)}" if len(photos) < len(self.data) else len(photos)
        summary = f"Best: {best['dice']:.4f} after epoch {best['epoch']}. {shown} validation photos."
        write_page(self.folder, title, summary, photos, history, self.settings, self.data_report)
        if self.board:
            log_overlays(self.board, history[-1]["epoch"], self.folder, batches)


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def reduced(image: np.ndarray, mask: np.ndarray, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return an image, uint8 (H, W, 3), and its mask, uint8 (H, W) in {0, 1, VOID}, at `size` (height, width).

    A pixel is foreground where any was, so that thin things stay, and void where all was.
    """
    if mask.shape == size:
        return image, mask
    ranks = np.where(mask == VOID, 0, mask + np.float32(1))  # void, background, foreground: the highest one stays
    ranks = pooled(torch.from_numpy(ranks)[None, None], size)[0, 0].int().numpy()
    image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
    return image, np.array((VOID, 0, 1), np.uint8)[ranks]


def pooled(pictures: Tensor, size: tuple[int, int]) -> Tensor:
    """Return pictures (N, C, H, W) at `size` (height, width): each pixel is the largest of those that it stands for."""
    if pictures.is_mps:  # which has it for whole factors alone
        pictures = pictures.cpu()
    return F.adaptive_max_pool2d(pictures, size)


def hatched(area: np.ndarray) -> np.ndarray:
    """Return diagonal lines in an area, bool (H, W)."""
    height, width = area.shape
    diagonals = np.arange(height)[:, None] + np.arange(width)
    return area & (diagonals % 6 < 2)


def errors(mask: np.ndarray, prediction: np.ndarray, void: np.ndarray) -> np.ndarray:
    """Return a layer that colours true positives, false negatives and false positives, RGBA uint8 (H, W, 4).

    All three arguments are bool (H, W). The true mask has a white outline, and void (ignored) pixels are hatched.
    """
    prediction = prediction & ~void
    layer = np.zeros((*mask.shape, 4), np.uint8)
    for where, colour, alpha in (
        (mask & prediction, TRUE_POSITIVE, 100),
        (mask & ~prediction, FALSE_NEGATIVE, 200),
        (~mask & prediction, FALSE_POSITIVE, 200),
    ):
        layer[where] = *colour, alpha
    layer[outline(mask) | hatched(void)] = 255
    return layer


def outline(mask: np.ndarray) -> np.ndarray:
    """Return the background next to a mask's foreground; both are bool (H, W)."""
    return (cv2.dilate(mask.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0) & ~mask


def laid_over(image: np.ndarray, layer: np.ndarray) -> np.ndarray:
    """Lay a layer, RGBA uint8 (H, W, 4), over a photo, RGB uint8 (H, W, 3)."""
    alpha = layer[..., 3:].astype(np.uint16)
    return ((image * (255 - alpha) + layer[..., :3] * alpha) // 255).astype(np.uint8)


def label(tile: np.ndarray, text: str) -> np.ndarray:
    """Write a text into the lower left corner of a tile, RGB uint8 (H, W, 3), white with a black rim."""
    picture, height = Image.fromarray(tile), tile.shape[0]
    place, font = (height // 40 + 1, height - height // 40 - 2), ImageFont.load_default(max(10, height // 11))
    ImageDraw.Draw(picture).text(place, text, "white", font, "lb", stroke_width=1, stroke_fill="black")
    return np.array(picture)


def save_train_batch(images: Tensor, masks: Tensor, path: Path) -> None:
    """Save a batch as augmentation leaves it, uint8 (N, H, W, 3) and (N, H, W), with the masks outlined.

    Void (ignored) pixels are hatched.
    """
    tiles = images.numpy().copy()
    for tile, mask in zip(tiles, masks.numpy(), strict=True):
        tile[outline(mask == 1)] = 255, 230, 0  # yellow
        tile[hatched(mask == VOID)] = 255
    save_grid(tiles, path)


def save_grid(pictures: np.ndarray, path: Path) -> None:
    """Save pictures, uint8 (N, H, W, 1 or 3), as one PNG, in 4 columns with grey lines between them.

    Raises UserError if torchvision does not match torch.
    """
    try:
        from torchvision.utils import save_image  # here, for it takes seconds, and predict.py does without
    except Exception as error:  # each pair of versions that do not match fails in its own way
        found = f"torchvision {version('torchvision')} does not match torch {version('torch')}"
        raise UserError(f"{found}: pip install --upgrade torch torchvision") from error
    channels_first = torch.from_numpy(pictures).movedim(-1, 1) / 255  # float32 (N, C, H, W), range 0 to 1
    with saving(path) as temporary:
        save_image(channels_first, temporary, format="PNG", nrow=4, pad_value=0.5)


def remove_older_pictures(batch: int, folder: Path) -> None:
    """Remove the pictures of batches from `batch` on, which an earlier run with more batches has left."""
    while (prediction := folder / f"pred_{batch}.png").exists() and (truth := folder / f"{batch}.png").exists():
        prediction.unlink()
        truth.unlink()
        (folder / f"overlay_{batch}.png").unlink(missing_ok=True)
        batch += 1


# ---------------------------------------------------------------------------------------------------------------------
# Curves


def columns(history: list[dict]) -> list[str]:
    """Return the names of all columns of metrics.csv; a run's first rows may lack a metric that was added later."""
    return list(dict.fromkeys(name for row in history for name in row))


def draw_curves(history: list[dict], path: Path) -> None:
    """Draw the losses, scores and learning rate over the epochs, in two columns, 800 pixels wide.

    Losses share axes, and so do Dice and IoU. Every other metric has its own, because its range may be any.
    """
    panels: dict[str, list[str]] = {"Loss": [], "Dice and IoU": []}
    shared = {"train_loss": "Loss", "val_loss": "Loss", "dice": "Dice and IoU", "iou": "Dice and IoU"}
    for name in columns(history):
        if name not in ("epoch", "seconds", "images_per_second"):
            title = shared.get(name, name.replace("_", " ").capitalize())
            panels.setdefault(title, []).append(name)

    rows = math.ceil(len(panels) / 2)
    figure = Figure(figsize=(8, 3 * rows), dpi=100, layout="constrained")
    epochs = [row["epoch"] for row in history]
    for number, (title, names) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(rows, 2, number, sharex=next(iter(figure.axes), None))  # the same epochs in all
        for name, colour, marker in zip(names, (BLUE, VERMILION), ("o", "s"), strict=False):
            values = [row.get(name, np.nan) for row in history]  # nan leaves a gap
            axes.plot(epochs, values, marker, ls="-", color=colour, ms=4 if len(epochs) < 50 else 0, label=name)
        if len(names) > 1:
            axes.legend()
        axes.set(title=title, xlabel="epoch")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    with saving(path) as temporary:
        figure.savefig(temporary, format="png")


# ---------------------------------------------------------------------------------------------------------------------
# The page


def page_pictures(
    image: np.ndarray, mask: np.ndarray, prediction: np.ndarray, layer: np.ndarray, probability: np.ndarray
) -> dict[str, str]:
    """Return what page.html shows of a photo, as data URIs: the photo, and what can be laid over it.

    Args:
        image: RGB uint8 (H, W, 3).
        mask, prediction: bool (H, W).
        layer: what `errors` returns, RGBA uint8 (H, W, 4).
        probability: uint8 (H, W), 255 is 1.
    """
    height, width = mask.shape
    page_width = min(PAGE_WIDTH, width)
    size = page_width, max(1, height * page_width // width)
    smooth = {"dsize": size, "interpolation": cv2.INTER_AREA}
    sharp = {"dsize": size, "interpolation": cv2.INTER_NEAREST}
    bilevel = cv2.IMWRITE_PNG_BILEVEL, 1
    return {
        "photo": data_uri("jpeg", cv2.cvtColor(cv2.resize(image, **smooth), cv2.COLOR_RGB2BGR)),
        "truth": data_uri("png", cv2.resize(mask * np.uint8(255), **sharp), *bilevel),
        "prediction": data_uri("png", cv2.resize(prediction * np.uint8(255), **sharp), *bilevel),
        "errors": data_uri("png", cv2.cvtColor(cv2.resize(layer, **sharp), cv2.COLOR_RGBA2BGRA)),
        "probability": data_uri("jpeg", cv2.resize(probability, **smooth)),
    }


def data_uri(kind: str, picture: np.ndarray, *options: int) -> str:
    """Encode a picture in OpenCV's order of colours as a URI that holds it."""
    return data_uri_of(kind, cv2.imencode(f".{kind}", picture, options)[1])


def data_uri_of(kind: str, encoded: bytes) -> str:
    """Return a URI that holds an encoded picture."""
    return Markup(f"data:image/{kind};base64,{base64.b64encode(encoded).decode()}")


def write_page(
    folder: Path,
    title: str,
    summary: str,
    photos: list[SimpleNamespace],
    rows: list[dict],
    settings: dict[str, object],
    data_report: str,
) -> None:
    """Write index.html, which needs no other file, from page.html, with the folder's curves.png if it is there.

    Args:
        photos: each with name, height, width, foreground, Dice in each validation, and page_pictures.
        rows: of the table of scores, which the first column counts.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )  # fmt: skip
    curves = folder / "curves.png"
    page = environment.get_template("page.html").render(
        title=title,
        summary=summary,
        history=rows,
        columns=columns(rows),
        photos=sorted(photos, key=lambda photo: photo.dice[-1]),
        settings=settings,
        data_report=data_report,
        curves=data_uri_of("png", curves.read_bytes()) if curves.exists() else None,
        span=max(1 - min((min(photo.dice) for photo in photos), default=0), 1e-3),  # of the curves of Dice
        colours={"true positive": TRUE_POSITIVE, "false negative": FALSE_NEGATIVE, "false positive": FALSE_POSITIVE},
    )
    with saving(folder / "index.html") as temporary:
        temporary.write_text(page, encoding="utf-8", errors="replace")  # a name may be no text


# ---------------------------------------------------------------------------------------------------------------------
# TensorBoard


def tensorboard_writer(folder: str, settings: dict[str, object]) -> object:
    """Return a SummaryWriter that has logged the settings. Raises UserError if the package is missing."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError(f"TENSORBOARD_DIR is {folder}, which needs a package: pip install tensorboard") from error
    try:
        board = SummaryWriter(folder)
    except OSError as error:
        raise UserError(f"TENSORBOARD_DIR: {folder} cannot be written ({reason_of(error)}): choose another") from error
    board.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in settings.items()))
    return board


def log_overlays(board: object, epoch: int, folder: Path, batches: int) -> None:
    """Log an epoch's first overlays."""
    for batch in range(min(4, batches)):
        overlay = np.asarray(Image.open(folder / f"overlay_{batch}.png").convert("RGB"))
        board.add_image(f"overlay_{batch}", overlay, epoch, dataformats="HWC")
    board.flush()
