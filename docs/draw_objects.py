"""Draw docs/objects.jpg, and print the numbers in docs/predict.md: python docs/draw_objects.py"""

import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from machinery.objects import COLUMNS, Objects  # noqa: E402
from machinery.outputs import Prediction  # noqa: E402

SIZE = 320, 640
CELLS = ((90, 90, 42, 30), (230, 70, 26, 26), (350, 120, 55, 40), (500, 80, 34, 46), (120, 225, 30, 44))
CELLS += ((300, 250, 24, 20), (345, 256, 26, 22), (480, 230, 60, 36), (630, 190, 30, 38))  # x, y and radii
SHOWN = 5, 8  # of the table's objects
SPECKS = ((190, 160), (420, 40), (240, 290), (570, 150))


def draw_photo() -> tuple[np.ndarray, np.ndarray]:
    """Draw cells, and specks of dirt, uint8 (H, W, 3), and probabilities as a network might find them, (H, W)."""
    random, share = np.random.default_rng(0), np.zeros(SIZE, np.float32)
    for x, y, radius_x, radius_y in CELLS:
        cv2.ellipse(share, (x, y), (radius_x, radius_y), random.uniform(-20, 20), 0, 360, 1, -1, cv2.LINE_AA)
    for place in SPECKS:
        cv2.circle(share, place, 3, 1, -1, cv2.LINE_AA)
    inside = cv2.GaussianBlur(share, (0, 0), 9)
    colours = np.array((214, 200, 222)) + share[..., None] * ((120, 60, 150) - np.array((214, 200, 222)))
    colours += 40 * (1 - inside[..., None]) * share[..., None] + random.normal(0, 5, (*SIZE, 1))
    return colours.clip(0, 255).astype(np.uint8), cv2.GaussianBlur(share, (0, 0), 1.5)


photo, probabilities = draw_photo()
prediction = Prediction(Path("cells.jpg"), photo, probabilities, SimpleNamespace(threshold=0.5), min_area=100)
prediction.numbered = Objects(prediction.mask, prediction.probabilities)
Image.fromarray(np.hstack((photo, np.asarray(prediction.overlay())))).save(ROOT / "docs" / "objects.jpg", quality=85)

for name in COLUMNS:
    shown = (row[name] for row in prediction.numbered.rows() if row["object"] in SHOWN)
    print(f"| `{name}` |", *(f"{value:.4g} |" if isinstance(value, float) else f"{value} |" for value in shown))
