"""Draws docs/result.jpg from the best checkpoint and the drawn cars: python docs/draw_result.py, after train.py."""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from dataset import CarvanaDataset, read_image  # noqa: E402
from model import UNet  # noqa: E402
from utils import load_checkpoint  # noqa: E402

SHOWN = (2, 9, 19, 28)  # of the validation photos

checkpoint = load_checkpoint(Path("my_checkpoint_best.pth.tar"))
model = UNet(**checkpoint["model"]).eval()
model.load_state_dict(checkpoint["state_dict"])
size = checkpoint["preprocessing"]["height"], checkpoint["preprocessing"]["width"]
mean, std = np.float32(checkpoint["preprocessing"]["mean"]), np.float32(checkpoint["preprocessing"]["std"])
photos = CarvanaDataset(Path("data/sample/val_images"), Path("data/sample/val_masks"), size)

columns = []
for index in SHOWN:
    image, mask = photos[index]
    batch = torch.from_numpy((image / np.float32(255) - mean) / std).permute(2, 0, 1)[None]
    with torch.inference_mode():
        predicted = model(batch)[0, 0].numpy() > 0
    tall = 2 * size[0], 2 * size[1]
    photo = read_image(photos.pairs[index][0], tall)
    masks = [np.dstack([np.kron(m, np.ones((2, 2))) * 255] * 3).astype(np.uint8) for m in (mask, predicted)]
    column = np.concatenate((photo, *masks))
    columns.append(np.pad(column, ((4, 4), (4, 4), (0, 0)), constant_values=128))
Image.fromarray(np.concatenate(columns, axis=1)).save(ROOT / "docs" / "result.jpg", quality=85)
