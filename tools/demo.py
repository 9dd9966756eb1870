"""Serve a page that cuts the objects out of photos which are dropped, pasted or taken with a camera.

    python -m tools.demo               # on http://127.0.0.1:7860; nothing leaves the machine
    python -m tools.demo --share       # and at a public address, through gradio's servers

It needs gradio 6.20 or newer (pip install --upgrade gradio), whose variables GRADIO_SERVER_NAME and GRADIO_SERVER_PORT
choose the address.
"""

import os
import re
import signal
import sys
import tempfile
from contextlib import closing, contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from PIL import Image, ImageColor

import utils
from machinery.decoding import read_image
from machinery.errors import UserError, run
from machinery.outputs import Prediction, write_png
from machinery.photos import find_photos
from machinery.report import pooled
from machinery.settings import Parser
from predict import Predictor, enlarge, load_model

GRADIO = 6, 20  # older ones lack parts of the page, or load scripts from elsewhere
SHOWN = 1280  # pixels of the longer side of what is shown; what is downloaded has the photo's own size
SECONDS = 3600  # that photos and results are kept; the end of the program removes them, too
CHECKERS = Image.fromarray(np.kron(np.indices((80, 80)).sum(0) % 2 * 39 + 216, np.ones((16, 16))).astype(np.uint8))


def reduced(path: Path, model: Predictor, side: int) -> Image.Image:
    """Read a photo at `side` pixels at most."""
    picture = Image.fromarray(read_image(path, None, model.rule))
    picture.thumbnail((side, side))
    return picture


def cut(kept: SimpleNamespace, photo: np.ndarray, logits: np.ndarray, choices: tuple) -> Prediction:
    """Return what a photo at any size becomes by the page's choices."""
    threshold, is_coloured, colour = choices
    rgb = ImageColor.getcolor(re.sub(r"\.\d+", "", colour), "RGB")  # "#1d9a8a" or "rgba(29.3, 154, 138, 1)"
    flags = SimpleNamespace(threshold=threshold, background=rgb if is_coloured else CHECKERS.convert("RGB"))
    return Prediction(kept.path, photo, enlarge(logits, kept.image, photo), flags)


def make_page(gr: ModuleType, model: Predictor, examples: list[Path]) -> object:
    """Build the page, a gr.Blocks. It keeps each photo's logits, so that the threshold needs no network."""

    @contextmanager
    def one_sentence(path):
        try:
            yield
        except UserError as error:
            raise gr.Error(str(error).replace(str(path), path.name), print_exception=False) from error

    def take(path, *choices):
        with one_sentence(path):
            image, shown = read_image(path, model.size, model.rule), np.asarray(reduced(path, model, SHOWN))
            logits = small = model(image[None])[0]
            if isinstance(model.size, float) and logits.size > shown.size / 3:  # of crops: thin things are to stay
                small = pooled(torch.from_numpy(logits[None, None]), shown.shape[:2])[0, 0].numpy()
            kept = SimpleNamespace(path=path, image=image, logits=logits, shown=shown, small=small)
        return kept, shown, draw(kept, *choices)

    def take_example(event: gr.SelectData, threshold, is_coloured, colour):
        return take(examples[event.index], threshold, is_coloured, colour)

    def draw(kept, *choices):
        if kept:
            with one_sentence(kept.path):
                return kept.shown, cut(kept, kept.shown, kept.small, choices).on_background()

    def save(kept, threshold, is_coloured, colour):
        if not kept:
            raise gr.Error("there is no photo yet: drop one first", print_exception=False)
        with one_sentence(kept.path):
            full = cut(kept, read_image(kept.path, None, model.rule), kept.logits, (threshold, is_coloured, colour))
            path = Path(tempfile.mkdtemp(dir=os.environ["GRADIO_TEMP_DIR"]), f"{kept.path.stem}_cutout.png")
            write_png(path, full.on_background() if is_coloured else full.cutout())
        return path

    with gr.Blocks(title="Cut out", analytics_enabled=False, delete_cache=(SECONDS // 10, SECONDS)) as page:
        kept = gr.State(time_to_live=SECONDS)
        with gr.Row():
            photo = gr.Image(label="Photo", type="filepath", height=420, elem_id="photo")
            photo.preprocess = lambda file: file and Path(file.path)  # gradio's own fails on broken files
            pair = gr.ImageSlider(label="Photo | cut-out", max_height=420, buttons=["fullscreen"], elem_id="pair")
        with gr.Row():
            small = [reduced(path, model, 240) for path in examples]
            look = {"columns": 4, "height": 170, "allow_preview": False, "buttons": [], "visible": bool(small)}
            look["object_fit"] = "contain"  # or portraits lose their heads
            gallery = gr.Gallery(small, label="Examples", **look)
            with gr.Column():
                threshold = gr.Slider(0.01, 0.99, 0.5, step=0.01, label="Threshold")
                is_coloured, colour = gr.Checkbox(label="On this colour:"), gr.ColorPicker("#1d9a8a", label="Colour")
                button, file = gr.Button("Download PNG"), gr.DownloadButton(visible="hidden", elem_id="file")
        choices, results = [threshold, is_coloured, colour], [kept, photo, pair]
        photo.upload(take, [photo, *choices], results).failure(lambda: (None, None, None), None, results)
        photo.clear(lambda: (None, None), None, [kept, pair], queue=False)
        gallery.select(take_example, choices, results)
        for choice in choices:
            choice.change(draw, [kept, *choices], pair, trigger_mode="always_last", show_progress="hidden")
        button.click(save, [kept, *choices], file).success(None, js="() => document.querySelector('#file').click()")
    return page


def import_gradio() -> ModuleType:
    """Return the package gradio. Raises UserError where it is missing or too old, before it is imported and fails."""
    try:
        found = version("gradio")
        if tuple(map(int, re.findall(r"\d+", found)[:2])) < GRADIO:
            raise ImportError(f"this is {found}")
        import gradio
    except ImportError as error:  # version's, too
        wanted = ".".join(map(str, GRADIO))
        raise UserError(f"tools.demo needs gradio {wanted} or newer ({error}): pip install --upgrade gradio") from error
    except ValueError as error:
        raise UserError(f"GRADIO_SERVER_PORT is no number ({error}): set it to one, such as 7860") from error
    return gradio


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m tools.demo", __doc__)
    parser.add_argument("--checkpoint", default="my_checkpoint_best.pth.tar", help="[my_checkpoint_best.pth.tar]")
    parser.add_argument("--device", default="auto", help="cuda, cuda:1, mps or cpu [the first that is there]")
    parser.add_argument("--share", action="store_true", help="gives the page a public address, too")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # where gradio keeps files; no statistics
        os.environ |= {"GRADIO_TEMP_DIR": folder, "GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_RUN_HISTORY": "False"}
        gr = import_gradio()
        model, examples = load_model(args.checkpoint, args.device), []
        with suppress(KeyError, TypeError, UserError):  # four photos of the validation set, or none where they are gone
            folder_of_photos = Path(utils.load_checkpoint(Path(args.checkpoint))["settings"]["val_img_dir"])
            if not folder_of_photos.resolve().is_relative_to(Path.cwd()):  # a checkpoint may be anybody's
                raise UserError("its photos are none of this folder's")
            found = find_photos([str(folder_of_photos)])
            examples = [found[len(found) * number // 4].path for number in range(4)]
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the folder is removed
        theme = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"])  # the computer's own
        with closing(make_page(gr, model, examples)) as page:
            page.queue(max_size=32)
            try:
                page.launch(share=args.share, theme=theme, ssr_mode=False, footer_links=[])
            except OSError as error:
                reason = str(error).partition(".")[0]
                raise UserError(f"no page there ({reason}): correct GRADIO_SERVER_NAME, GRADIO_SERVER_PORT") from error


if __name__ == "__main__":
    run(main)
