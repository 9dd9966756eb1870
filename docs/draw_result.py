"""Draw docs/result.jpg from the best checkpoint and the drawn cars: python docs/draw_result.py, after train.py."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dataset import CarvanaDataset  # noqa: E402
from machinery.decoding import read_image  # noqa: E402
from predict import load_model  # noqa: E402

SHOWN = (2, 9, 19, 28)  # of the validation photos

model = load_model("my_checkpoint_best.pth.tar", "cpu", "fp32")
photos = CarvanaDataset(Path("data/sample/val_images"), Path("data/sample/val_masks"), model.size)

columns = []
for index in SHOWN:
    image, mask = photos[index]
    predicted = model(image[None])[0] > 0
    photo = read_image(photos.pairs[index][0], (2 * mask.shape[0], 2 * mask.shape[1]))
    masks = [np.dstack([np.kron(m, np.ones((2, 2))) * 255] * 3).astype(np.uint8) for m in (mask, predicted)]
    column = np.concatenate((photo, *masks))
    columns.append(np.pad(column, ((4, 4), (4, 4), (0, 0)), constant_values=128))
Image.fromarray(np.concatenate(columns, axis=1)).save(ROOT / "docs" / "result.jpg", quality=85)
