"""Draw a small synthetic Carvana: cars on a turntable in a studio, each photographed from 16 sides, with their masks.

    python -m machinery.sample_data                                   # into data/sample, as train.py does by itself
    python -m machinery.sample_data --output-dir /tmp/cars --train-cars 40 --val-cars 10 --seed 1

A car is some 200 flat polygons, drawn from back to front through a pinhole camera. Lengths are metres; the turntable's
centre is the origin; in a car's frame x points to its front, y to its left, z up. The same seed draws the same photos.
"""

import functools
import itertools
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from machinery.errors import UserError, reason_of, remedy_of, run
from machinery.files import MASK_SUFFIX, files_in, in_turn
from machinery.settings import Parser

VIEWS = 16  # photos of a car, 22.5 degrees apart
HEIGHT, WIDTH = 1280, 1918  # of a photo in pixels, as in Carvana

# Length, width, height in metres; then the top of the lower body ("deck") and the roof line from the rear (0) to the
# front (1) as (x, height), both as fractions; then where pillars divide the side windows.
BODIES = {
    "sedan": (4.7, 1.82, 1.45, [(0, 0.56), (0.2, 0.63), (0.7, 0.62), (0.95, 0.50), (1, 0.42)],
              [(0.10, 0.63), (0.27, 0.97), (0.42, 1), (0.53, 0.97), (0.74, 0.62)], (0.30, 0.48)),
    "coupe": (4.4, 1.85, 1.34, [(0, 0.58), (0.2, 0.66), (0.62, 0.63), (0.95, 0.50), (1, 0.42)],
              [(0.06, 0.65), (0.32, 0.96), (0.42, 1), (0.49, 0.97), (0.68, 0.63)], (0.36,)),
    "hatch": (4.0, 1.75, 1.50, [(0, 0.56), (0.1, 0.61), (0.72, 0.60), (0.95, 0.51), (1, 0.43)],
              [(0.02, 0.60), (0.10, 0.93), (0.35, 1), (0.54, 0.97), (0.78, 0.59)], (0.24, 0.46)),
    "wagon": (4.7, 1.82, 1.48, [(0, 0.56), (0.1, 0.61), (0.7, 0.61), (0.95, 0.50), (1, 0.42)],
              [(0.02, 0.60), (0.10, 0.93), (0.3, 1), (0.55, 0.98), (0.75, 0.61)], (0.22, 0.36, 0.50)),
    "suv": (4.6, 1.92, 1.75, [(0, 0.56), (0.1, 0.60), (0.72, 0.60), (0.96, 0.54), (1, 0.46)],
            [(0.02, 0.59), (0.08, 0.95), (0.3, 1), (0.55, 0.98), (0.74, 0.60)], (0.22, 0.46)),
    "van": (5.0, 1.95, 2.00, [(0, 0.48), (0.1, 0.52), (0.82, 0.52), (0.97, 0.44), (1, 0.36)],
            [(0.01, 0.52), (0.03, 0.97), (0.3, 1), (0.66, 0.98), (0.90, 0.48)], (0.60,)),
    "pickup": (5.3, 1.95, 1.80, [(0, 0.55), (0.1, 0.56), (0.72, 0.58), (0.96, 0.53), (1, 0.45)],
               [(0.40, 0.56), (0.43, 0.95), (0.5, 1), (0.6, 0.98), (0.73, 0.58)], (0.54,)),
}  # fmt: skip

# RGB. White, black and greys are as frequent among the paints as on the road.
PAINTS = [(236, 236, 232), (22, 23, 26), (120, 124, 128), (178, 182, 186), (150, 22, 28), (28, 52, 112), (40, 78, 52),
          (222, 220, 212), (44, 46, 50), (120, 94, 66), (92, 132, 168), (208, 168, 40), (78, 82, 88),
          (204, 92, 34)]  # fmt: skip
GLASS, RUBBER, PLASTIC = (52, 60, 68), (26, 26, 28), (38, 39, 41)
HEADLIGHT, TAILLIGHT, NUMBER_PLATE = (240, 240, 226), (168, 18, 22), (214, 214, 208)
SIGNS = ("OPEN ROAD", "STUDIO 7", "MOTORS", "FRESH CARS", "TURNTABLE", "DRIVE ON")
LAMPS = np.array(((-0.53, -0.63, 0.57), (0.70, -0.50, 0.51)))  # unit vectors towards the studio's two lamps

Colour = tuple[int, int, int]


class Polygon:
    """A flat face of a car: its (n, 3) corners in the car's frame, colour, centre and outward unit normal."""

    def __init__(self, corners, colour: Colour) -> None:
        self.corners, self.colour = np.array(corners, float), colour
        self.centre = self.corners.mean(axis=0)
        n = len(self.corners)
        across = self.corners[n // 2] - self.corners[0], self.corners[3 * n // 4] - self.corners[n // 4]
        normal = np.cross(*across)
        normal /= np.linalg.norm(normal) + 1e-12
        outward = normal @ (self.centre - (0, 0, 0.7)) > 0  # away from a point inside every car
        self.normal = normal if outward else -normal


class Camera:
    """A pinhole `distance` metres before the turntable, `height` metres above the floor; focal and centre in pixels."""

    def __init__(self, distance: float, height: float, focal: float, centre: tuple[float, float]) -> None:
        self.position, self.focal, self.centre = np.array((0, -distance, height)), focal, np.array(centre)
        pitch = np.arctan2(height - 0.6, distance)  # it looks at a point 0.6 m above the turntable
        cos, sin = np.cos(pitch), np.sin(pitch)
        self.axes = np.array(((1, 0, 0), (0, sin, cos), (0, cos, -sin)))  # right, up, ahead

    def project(self, points: np.ndarray) -> np.ndarray:
        """Return the (n, 2) pixels of (n, 3) metres in the studio."""
        right, up, ahead = self.axes @ (points - self.position).T
        return np.stack((right, -up), axis=1) * (self.focal / ahead)[:, None] + self.centre

    def scaled(self, factor: float) -> "Camera":
        return Camera(-self.position[1], self.position[2], self.focal * factor, self.centre * factor)


class Car:
    """The polygons of one car, in the groups in which they are drawn."""

    def __init__(self, body: str, paint: Colour, rng: np.random.Generator) -> None:
        length, width, height, deck, roof, pillars = BODIES[body]
        self.length, self.width = length * rng.uniform(0.95, 1.05), width * rng.uniform(0.97, 1.03)
        self.height, self.paint, self.deck = height * rng.uniform(0.96, 1.04), paint, np.array(deck)
        self.sill = rng.uniform(0.17, 0.22) + 0.06 * (body in ("suv", "van", "pickup"))  # metres above the floor
        self.body = self.make_body()
        self.cabin, self.windows = self.make_cabin(np.array(roof), pillars, is_van=body == "van")
        self.ends = self.make_ends(is_pickup=body == "pickup")
        self.radius = min(0.21 * self.height + 0.01, 0.37) * rng.uniform(0.95, 1.05)  # of a wheel
        self.axles = (-0.32 * self.length, 0.31 * self.length)
        self.spokes = int(rng.integers(5, 11))
        self.rim: Colour = (int(rng.choice((70, 150, 200))),) * 3
        self.sides = {side: self.make_side(side, pillars) for side in (-1, 1)}  # 1 is left
        self.wheels = {side: [self.make_wheel(axle, side) for axle in self.axles] for side in (-1, 1)}
        self.mirrors = {side: self.make_mirror(side) for side in (-1, 1)}

    def deck_height(self, x: np.ndarray | float) -> np.ndarray:
        return np.interp(x / self.length + 0.5, *self.deck.T) * self.height

    def half_width(self, x: np.ndarray | float) -> np.ndarray:
        return self.width / 2 * (1 - 0.2 * np.abs(2 * x / self.length) ** 7)  # rounded towards both ends

    def make_body(self) -> list[Polygon]:
        """Make the lower body: cross-sections from sill to deck, joined from rear to front."""
        x = -self.length / 2 * np.cos(np.linspace(0, np.pi, 19))  # close together at the ends, where it is round
        half_width, top = self.half_width(x), self.deck_height(x)
        sill = self.sill + 0.10 * np.abs(2 * x / self.length) ** 6
        levels = ((0.93, 0), (0.965, 0.14), (1.0, 0.5), (0.985, 0.8), (0.94, 0.95), (0.80, 1.0))  # (width, height)
        left = np.stack([np.stack((x, half_width * w, sill + (top - sill) * h), axis=-1) for w, h in levels])
        right = left * (1, -1, 1)  # (level, station, xyz), like left
        colours = (PLASTIC, *[self.paint] * 4)
        polygons = []
        for i in range(len(x) - 1):
            for side in (left, right):
                for low, high, colour in zip(side[:-1], side[1:], colours, strict=True):
                    polygons.append(Polygon((low[i], low[i + 1], high[i + 1], high[i]), colour))
            polygons.append(Polygon((left[-1, i], left[-1, i + 1], right[-1, i + 1], right[-1, i]), self.paint))
        for end in (0, -1):
            for level, colour in enumerate(colours):
                corners = left[level, end], left[level + 1, end], right[level + 1, end], right[level, end]
                polygons.append(Polygon(corners, colour))
        return polygons

    def make_cabin(self, roof: np.ndarray, pillars: tuple, is_van: bool) -> tuple[list[Polygon], list[Polygon]]:
        """Make what stands on the deck, joined along the roof line, and the windows that lie on it."""
        line = np.linspace(0, len(roof) - 1, 33)
        line = np.stack([np.interp(line, np.arange(len(roof)), column) for column in roof.T], axis=-1)
        line[1:-1] = (line[:-2] + 2 * line[1:-1] + line[2:]) / 4  # rounds the corners
        x = (line[:, 0] - 0.5) * self.length
        base, foot = self.deck_height(x), 0.94 * self.half_width(x)
        z = np.maximum(line[:, 1] * self.height, base + 0.005)
        z[[0, -1]] = base[[0, -1]] - 0.07  # it reaches into the body, so that no slit is left between them
        rise = (z - base) / (self.height - base)  # 0 at the deck, 1 at the roof
        y = foot * (1 - 0.2 * rise)  # narrower towards the roof

        cabin = []
        for i in range(len(x) - 1):
            j = i + 1
            cabin.append(
                Polygon(((x[i], y[i], z[i]), (x[i], -y[i], z[i]), (x[j], -y[j], z[j]), (x[j], y[j], z[j])), self.paint)
            )
            for s in (-1, 1):
                lower = (x[j], s * foot[j], base[j] - 0.07), (x[i], s * foot[i], base[i] - 0.07)
                cabin.append(Polygon(((x[i], s * y[i], z[i]), (x[j], s * y[j], z[j]), *lower), self.paint))

        def pane(x: np.ndarray, y: np.ndarray, top: np.ndarray, y_low: np.ndarray, bottom: np.ndarray) -> Polygon:
            return Polygon((*np.stack((x, y, top), -1), *np.stack((x, y_low, bottom), -1)[::-1]), GLASS)

        glazed = (rise > 0.14) & (rise < 0.93)
        front = np.arange(len(x)) > z.argmax()
        windows = [
            pane(x[end], 0.9 * y[end], z[end], -0.9 * y[end], z[end]) for end in (glazed & front, glazed & ~front)
        ]
        tall = x[rise > 0.4] / self.length + 0.5
        bounds = [tall[0] + 0.03, *pillars, tall[-1] + 0.04]
        if is_van:  # no rear window, and none at the sides of the cargo
            windows, bounds = windows[:1], bounds[1:]
        for start, stop in itertools.pairwise(bounds):
            xs = (np.linspace(start + 0.008, stop - 0.008, 9) - 0.5) * self.length
            deck, ceiling = self.deck_height(xs), self.height - self.deck_height(xs)
            bottom = 0.08
            top = np.maximum((np.interp(xs, x, z) - deck) / ceiling * 0.86, bottom + 0.02)
            for s in (-1, 1):
                foot = s * (0.94 * self.half_width(xs) + 0.003)
                y_top, y_bottom = foot * (1 - 0.2 * top), foot * (1 - 0.2 * bottom)
                windows.append(pane(xs, y_top, deck + ceiling * top, y_bottom, deck + ceiling * bottom))
        return cabin, windows

    def make_ends(self, is_pickup: bool) -> list[Polygon]:
        """Make lights, grille, bumper, number plates, and a pickup's bed."""
        polygons = []
        for end, light in ((1, HEADLIGHT), (-1, TAILLIGHT)):
            x = end * (self.length / 2 + 0.01)
            half, sill, top = (
                self.half_width(end * self.length / 2),
                self.sill + 0.1,
                self.deck_height(end * self.length / 2),
            )

            def panel(y0, y1, low, high, colour, x=x, sill=sill, top=top) -> None:
                low, high = sill + (top - sill) * low, sill + (top - sill) * high
                polygons.append(Polygon(((x, y0, low), (x, y1, low), (x, y1, high), (x, y0, high)), colour))

            inner = end * 0.455 * self.length  # the lights go round the corners
            low, high = sill + (top - sill) * 0.62, sill + (top - sill) * 0.88
            for s in (-1, 1):
                panel(s * 0.52 * half, s * 0.95 * half, 0.62, 0.88, light)
                y0, y1 = s * (half + 0.004), s * (self.half_width(inner) + 0.004)
                polygons.append(
                    Polygon(((x, y0, low), (inner, y1, low + 0.04), (inner, y1, high), (x, y0, high)), light)
                )
            panel(
                *((-0.45 * half, 0.45 * half, 0.45, 0.85) if end == 1 else (-0.9 * half, 0.9 * half, 0.1, 0.2)), PLASTIC
            )
            panel(-0.26, 0.26, 0.22, 0.42, NUMBER_PLATE)
        if is_pickup:
            x0, x1 = -0.48 * self.length, -0.13 * self.length
            y0, y1 = 0.76 * self.half_width(x0), 0.76 * self.half_width(x1)
            z0, z1 = self.deck_height(x0) + 0.01, self.deck_height(x1) + 0.01
            polygons.append(Polygon(((x0, y0, z0), (x1, y1, z1), (x1, -y1, z1), (x0, -y0, z0)), PLASTIC))
        return polygons

    def make_side(self, side: int, pillars: tuple) -> list[Polygon]:
        """Make door gaps, handles, sill and wheel arches of one side."""
        polygons, y, belt = [], side * self.width / 2 * 0.995, self.deck_height(0)

        def strip(x0, x1, z0, z1, colour) -> None:
            polygons.append(Polygon(((x0, y, z0), (x1, y, z0), (x1, y, z1), (x0, y, z1)), colour))

        dark = tuple(int(0.45 * c) for c in self.paint)
        for pillar in (*pillars, 0.70):
            x = (pillar - 0.5) * self.length
            if self.axles[0] + 1.2 * self.radius < x < self.axles[1] - 0.9 * self.radius:
                strip(x, x + 0.018, self.sill + 0.1, belt - 0.03, dark)
                strip(x + 0.06, x + 0.22, belt - 0.17, belt - 0.14, dark)
        strip(*self.axles, self.sill, self.sill + 0.13, PLASTIC)
        for axle in self.axles:
            arch = self.circle(axle, 0.99 * y, 1.16)
            arch[:, 2] = np.maximum(arch[:, 2], self.sill)  # it ends where the body ends
            polygons.append(Polygon(arch, (14, 14, 15)))
        return polygons

    def circle(self, axle: float, y: float, size: float, start: float = 0, stop: float = 2 * np.pi) -> np.ndarray:
        """Return points around an axle, `size` wheel radii away from it."""
        angle = np.linspace(start, stop, 40)
        return self.radius * np.stack((size * np.cos(angle), 0 * angle, 1 + size * np.sin(angle)), -1) + (axle, y, 0)

    def make_wheel(self, axle: float, side: int) -> tuple[np.ndarray, list[Polygon]]:
        """Make the points whose convex hull is the tyre, and the polygons of its outer face."""
        y = side * (self.width / 2 - 0.005)
        tyre = np.concatenate((self.circle(axle, y, 1), self.circle(axle, y - side * 0.22, 1)))
        face = [Polygon(self.circle(axle, y, 1), (34, 34, 36)), Polygon(self.circle(axle, y, 0.7), self.rim)]
        for angle in 2 * np.pi * np.arange(self.spokes) / self.spokes:  # the gaps between the spokes
            outer, inner = 1.9 / self.spokes, 1.2 / self.spokes
            far, near = (
                self.circle(axle, y, 0.62, angle - outer, angle + outer),
                self.circle(axle, y, 0.2, angle - inner, angle + inner),
            )
            face.append(Polygon((*far, *near[::-1]), (40, 41, 43)))
        return tyre, face

    def make_mirror(self, side: int) -> np.ndarray:
        """Make the eight corners of a wing mirror."""
        x = (0.16 if self.height < 1.9 else 0.3) * self.length
        corners = np.stack(np.meshgrid((-0.06, 0.05), (-0.11, 0.11), (-0.05, 0.16), indexing="ij"), -1).reshape(-1, 3)
        return corners + np.array((x, side * (self.width / 2 + 0.06), self.deck_height(x)))


class Painter:
    """Draws a car that is turned by `angle` radians into an image and a mask, or its mirror image below the floor."""

    def __init__(self, image: np.ndarray, mask: np.ndarray, camera: Camera, angle: float, below_floor: bool = False):
        self.image, self.mask, self.camera = image, mask, camera
        cos, sin = np.cos(angle), np.sin(angle)
        self.flip = np.array((1, 1, -1 if below_floor else 1))
        self.rotation = np.array(((cos, sin, 0), (-sin, cos, 0), (0, 0, 1)))  # points @ rotation: car's frame -> studio
        self.eye = (camera.position * self.flip) @ self.rotation.T
        self.lamps = LAMPS @ self.rotation.T

    def pixels(self, points: np.ndarray) -> np.ndarray:
        """Return the (n, 2) pixels of (n, 3) metres in the car's frame, in OpenCV's fixed point, 1/16 of a pixel."""
        return np.round(self.camera.project((points @ self.rotation) * self.flip) * 16).astype(np.int32)

    def fill(self, points: np.ndarray, colour) -> None:
        pixels = self.pixels(points)
        cv2.fillPoly(self.image, [pixels], [float(c) for c in colour], shift=4)
        cv2.fillPoly(self.mask, [pixels], 255, shift=4)

    def fill_hull(self, points: np.ndarray, colour: Colour) -> None:
        pixels = cv2.convexHull(self.pixels(points))
        cv2.fillPoly(self.image, [pixels], colour, shift=4)
        cv2.fillPoly(self.mask, [pixels], 255, shift=4)

    def fill_visible(self, polygons: list[Polygon]) -> None:
        """Draw those that face the camera, the farthest first, with Lambert's diffuse light and Blinn's highlights."""
        visible = [p for p in polygons if p.normal @ (self.eye - p.centre) > 0]
        for p in sorted(visible, key=lambda p: -np.linalg.norm(self.eye - p.centre)):
            view = self.eye - p.centre
            half = self.lamps + view / np.linalg.norm(view)
            half /= np.linalg.norm(half, axis=1, keepdims=True)
            diffuse = 0.42 + 0.3 * np.maximum(self.lamps @ p.normal, 0).sum() + 0.16 * p.normal[2]
            shine = 110 * (np.maximum(half @ p.normal, 0) ** 40).sum() + 16 * max(p.normal[2], 0) ** 2
            self.fill(p.corners, np.clip(np.array(p.colour) * diffuse + shine, 0, 255))

    def draw(self, car: Car) -> None:
        near = [side for side in (-1, 1) if side * self.eye[1] > car.width / 2]  # the sides that the camera sees
        far = [side for side in (-1, 1) if side not in near]
        for side in (*far, *near):
            for tyre, _ in car.wheels[side]:
                self.fill_hull(tyre, RUBBER)
        self.fill_visible(car.body)
        for side in far:
            self.fill_hull(car.mirrors[side], car.paint)
        for group in (car.ends, car.cabin, car.windows):
            self.fill_visible(group)
        for side in near:
            for polygon in car.sides[side]:
                self.fill(polygon.corners, polygon.colour)
            for _, face in car.wheels[side]:
                for polygon in face:
                    self.fill(polygon.corners, polygon.colour)
            self.fill_hull(car.mirrors[side], tuple(int(0.85 * c) for c in car.paint))


def draw_studio(camera: Camera, height: int, width: int, rng: np.random.Generator) -> np.ndarray:
    """Draw the empty studio, uint8 RGB (height, width, 3): a wall with lettering, floor, turntable, uneven light."""
    scale = width / WIDTH
    wall_y = rng.uniform(3.2, 4.5)  # metres behind the turntable's centre
    horizon = camera.project(np.array(((0, wall_y, 0),)))[0, 1] / height
    v, u = np.mgrid[0:1:160j, 0:1:240j]
    wall, floor = rng.uniform(150, 215), rng.uniform(105, 175)
    light = floor + (wall - floor) / (
        1 + np.exp(np.clip((v - horizon) / 0.012, -50, 50))
    )  # the wall curves into the floor
    for _ in range(4):  # lamps, and the dark between them
        x, y, r = rng.uniform(0, 1), rng.uniform(0, 1), rng.uniform(0.15, 0.4)
        light += rng.uniform(-45, 45) * np.exp(-((u - x) ** 2 + (v - y) ** 2) / (2 * r * r))
    tint = 1 + rng.uniform(-0.04, 0.04, 3)
    light = np.clip(light[..., None] * tint, 0, 255).astype(np.uint8)
    image = cv2.resize(light, (width, height), interpolation=cv2.INTER_CUBIC)

    bottom, joint = int(horizon * height), max(1, round(3 * scale))
    for x in np.arange(rng.uniform(0, 0.2), 1, 1 / rng.integers(4, 9)) * width:  # joints of the wall's panels
        panel = image[:bottom, int(x) : int(x) + joint]
        panel[:] = 0.86 * panel
    canvas = Image.fromarray(image)
    pen = ImageDraw.Draw(canvas)
    for sign in rng.choice(SIGNS, 2, replace=False):
        font = ImageFont.load_default(max(4, rng.uniform(70, 190) * scale))
        place = (rng.uniform(-0.05, 0.75) * width, rng.uniform(0.02, 0.75) * bottom)
        colour = rng.choice(((40, 44, 52), (34, 74, 120), (150, 44, 40), (236, 236, 232)))
        pen.text(place, str(sign), tuple(int(c) for c in colour), font)
    image = cv2.GaussianBlur(np.asarray(canvas), (0, 0), 1.6 * scale + 0.1)  # the wall is a little out of focus

    angle = np.linspace(0, 2 * np.pi, 120)
    for radius, gain in ((3.05, 0.8), (3.0, 1.06)):  # the turntable's rim, and its top
        ring = camera.project(radius * np.stack((np.cos(angle), np.sin(angle), 0 * angle), axis=-1))
        inside = cv2.fillPoly(np.zeros((height, width), np.uint8), [ring.round().astype(np.int32)], 1)
        cv2.copyTo(cv2.convertScaleAbs(image, alpha=gain), inside, image)
    return image


@functools.lru_cache(maxsize=3)  # a car's views are drawn one after the other
def make_scene(seed: int, index: int, height: int, width: int) -> tuple[str, Car, Camera, np.ndarray, np.ndarray]:
    """Make the index-th car of a seed: name (12 hexadecimal digits), car, camera, studio, sensor noise."""
    shuffled = np.random.default_rng(seed)  # the first few cars already show many bodies and paints
    bodies, paints = shuffled.permutation(list(BODIES)), shuffled.permutation(PAINTS)
    rng = np.random.default_rng((seed, index))
    name = rng.bytes(6).hex()
    paint = tuple(int(c) for c in paints[index % len(paints)])
    car = Car(str(bodies[index % len(bodies)]), paint, rng)
    centre = (width * rng.uniform(0.46, 0.54), height * rng.uniform(0.52, 0.60))
    camera = Camera(rng.uniform(6.5, 8.0), rng.uniform(1.3, 1.9), rng.uniform(1750, 2150) * width / WIDTH, centre)
    noise = rng.normal(0, rng.uniform(1.5, 3), (height, width)).astype(np.int16)
    return name, car, camera, draw_studio(camera, height, width, rng), cv2.merge((noise, noise, noise))


def draw_photo(seed: int, index: int, view: int, height: int, width: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Draw one view of a car: its stem, uint8 RGB photo (height, width, 3), uint8 mask (height, width) of 0 and 255."""
    name, car, camera, studio, noise = make_scene(seed, index, height, width)
    rng = np.random.default_rng((seed, index, view))
    angle = 2 * np.pi * (view + rng.uniform(-0.1, 0.1)) / VIEWS - np.pi / 2

    # Shadow and reflection are soft: they are drawn at a quarter of the size, as a change of the studio's pixels.
    soft = 0.25 * width / WIDTH
    floor = cv2.resize(studio, (max(1, width // 4), max(1, height // 4)), interpolation=cv2.INTER_AREA)
    mirrored, footprint = floor.copy(), np.zeros(floor.shape[:2], np.uint8)
    painter = Painter(mirrored, np.zeros_like(footprint), camera.scaled(0.25), angle, below_floor=True)
    corners = np.array(((-1, -1, 0), (1, -1, 0), (1, 1, 0), (-1, 1, 0))) * (0.47 * car.length, car.width / 2, 0)
    cv2.fillPoly(footprint, [painter.pixels(corners)], 255, shift=4)
    painter.draw(car)
    shadow = 0.55 * cv2.GaussianBlur(footprint, (0, 0), 45 * soft) + 0.35 * cv2.GaussianBlur(
        footprint, (0, 0), 9 * soft
    )
    gloss = rng.uniform(0.15, 0.3) * cv2.GaussianBlur(painter.mask, (0, 0), 14 * soft)[..., None] / 255
    lit = floor * (1 - gloss) + cv2.GaussianBlur(mirrored, (0, 0), 5 * soft) * gloss
    change = (lit * (1 - shadow[..., None] / 255) - floor).astype(np.int16)
    photo = cv2.add(studio, cv2.resize(change, (width, height)), dtype=cv2.CV_8U)

    mask = np.zeros((height, width), np.uint8)
    Painter(photo, mask, camera, angle).draw(car)
    photo = cv2.GaussianBlur(photo, (0, 0), 0.9 * width / WIDTH + 0.2)  # the lens
    noise = np.roll(noise, rng.integers(height), axis=0)
    photo = cv2.addWeighted(photo, rng.uniform(0.92, 1.08), noise, 1, 0, dtype=cv2.CV_8U)
    return f"{name}_{view + 1:02}", photo, mask


def draw_dataset(
    output_dir: Path, train_cars: int = 8, val_cars: int = 2, height: int = HEIGHT, width: int = WIDTH, seed: int = 0
) -> None:
    """Draw cars into output_dir/{train,val}_{images,masks}, the training cars into train_, the others into val_.

    The folder appears once everything in it is drawn. Raises UserError if it is there already and not empty.
    """
    output_dir = output_dir.absolute()
    if output_dir.exists() and any(output_dir.iterdir()):
        raise UserError(f"{output_dir} is not empty: remove it, or choose another --output-dir")
    temporary = output_dir.with_name(f"{output_dir.name}.{os.getpid()}.tmp")

    def save(job: tuple[int, int]) -> None:
        index, view = job
        stem, photo, mask = draw_photo(seed, index, view, height, width)
        split = "train" if index < train_cars else "val"
        Image.fromarray(photo).save(temporary / f"{split}_images" / f"{stem}.jpg", quality=75)
        mask = Image.fromarray(mask // 255, "P")
        mask.putpalette((0, 0, 0, 255, 255, 255))
        mask.save(temporary / f"{split}_masks" / f"{stem}_mask.gif")

    jobs = [(index, view) for index in range(train_cars + val_cars) for view in range(VIEWS)]
    try:
        for folder in ("train_images", "train_masks", "val_images", "val_masks"):
            (temporary / folder).mkdir(parents=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # OpenCV and Pillow release the GIL
            for _ in tqdm(pool.map(save, jobs), desc="drawing", total=len(jobs), unit="photo", disable=None):
                pass
        if output_dir.exists():
            output_dir.rmdir()
        temporary.rename(output_dir)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def use_sample_if_empty(s: SimpleNamespace) -> None:
    """Draw cars and make them the data of train.py's settings, while the four folders of data/ are all empty."""
    folders = (s.train_img_dir, s.train_mask_dir, s.val_img_dir, s.val_mask_dir)
    if folders != ("data/train_images", "data/train_masks", "data/val_images", "data/val_masks"):
        return
    for folder in map(Path, folders):
        if not folder.is_dir() or files_in(folder):
            return
    sample = Path("data/sample")
    print(f"data/ has no photos of yours yet: training on drawn cars in {sample}/")
    try:
        with in_turn(sample.with_suffix(".lock")):  # of several processes one draws and the others wait
            if not sample.exists():
                draw_dataset(sample)
    except OSError as error:
        raise UserError(f"{sample} cannot be drawn ({reason_of(error)}): make room for 20 MB there") from error
    s.train_img_dir, s.train_mask_dir = str(sample / "train_images"), str(sample / "train_masks")
    s.val_img_dir, s.val_mask_dir = str(sample / "val_images"), str(sample / "val_masks")
    s.mask_suffix = MASK_SUFFIX


def main(argv: list[str] | None = None) -> None:
    parser = Parser("python -m machinery.sample_data", __doc__)
    add = parser.add_argument
    add("--output-dir", type=Path, default=Path("data/sample"), help="a new or empty folder [data/sample]")
    add("--train-cars", type=int, default=8, help=f"cars to train on, {VIEWS} photos each [8]")
    add("--val-cars", type=int, default=2, help="cars to validate on [2]")
    add("--height", type=int, default=HEIGHT, help=f"of a photo, in pixels [{HEIGHT}]")
    add("--width", type=int, default=WIDTH, help=f"of a photo, in pixels [{WIDTH}]")
    add("--seed", type=int, default=0, help="other seeds draw other cars [0]")
    args = parser.parse_args(argv)
    if min(args.train_cars, args.val_cars) < 1 or min(args.height, args.width) < 16 or args.seed < 0:
        parser.error("--train-cars and --val-cars must be at least 1, --height and --width 16, --seed 0")
    try:
        draw_dataset(**vars(args))
    except OSError as error:
        raise UserError(f"{args.output_dir} cannot be drawn ({reason_of(error)}): {remedy_of(error)}") from error


if __name__ == "__main__":
    run(main)
