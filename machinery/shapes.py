"""Polygons and run lengths <-> masks.

A polygon is a ring: an array of corners (x, y), float64 (n, 2). They count from the photo's upper left corner: the
centre of its first pixel is (0.5, 0.5).
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

import contourpy
import cv2
import numpy as np

FAR = 1e7  # pixels: a coordinate beyond is a mistake


def ring_of(points: Iterable) -> np.ndarray:
    """Return the ring of pairs, or of x, y, x, y, ... Raises ValueError for nan and for what is far away."""
    try:
        ring = np.array(list(points), np.float64).reshape(-1, 2)
    except (TypeError, ValueError) as error:
        raise ValueError("its corners are not pairs of numbers") from error
    if not (np.abs(ring) < FAR).all():
        raise ValueError("a coordinate is no number, or far away from the photo")
    return ring


def box_ring(points: Iterable) -> np.ndarray:
    """Return the four corners of a box that is given by two opposite ones."""
    (left, top), (right, bottom) = ring_of(points)
    return np.array([(left, top), (right, top), (right, bottom), (left, bottom)])


def ellipse_ring(x: float, y: float, radius_x: float, radius_y: float) -> np.ndarray:
    """Return an ellipse as 720 corners: at a radius of 1000 pixels the ring is 0.01 off."""
    angles = np.linspace(0, 2 * np.pi, 720, endpoint=False)
    return ring_of(np.stack((x + radius_x * np.cos(angles), y + radius_y * np.sin(angles)), 1))


def line_rings(corners: np.ndarray, width: float) -> list[np.ndarray]:
    """Return rings whose union is a line through the corners, so many pixels wide, with round joints and ends."""
    starts, ends = corners[:-1], corners[1:]
    along = ends - starts
    across = np.stack((-along[:, 1], along[:, 0]), 1)
    across *= width / 2 / np.maximum(np.hypot(*across.T), 1e-9)[:, None]
    sides = np.stack((starts + across, ends + across, ends - across, starts - across), 1)
    return [*sides, *(ellipse_ring(x, y, width / 2, width / 2) for x, y in corners)]


def turned(ring: np.ndarray, degrees: float) -> np.ndarray:
    """Turn a ring clockwise around its centre. Raises ValueError for what is no angle."""
    if not abs(degrees) < FAR:
        raise ValueError("its rotation is no angle")
    angle, centre = np.radians(degrees), ring.mean(0)
    return (ring - centre) @ [(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))] + centre


def polygon_mask(rings: list[np.ndarray], size: tuple[int, int]) -> np.ndarray:
    """Return the union of rings, bool (H, W): pixels whose centres lie inside of one of them, by the even-odd rule.

    Each edge changes inside to outside for all pixels to the right of where it crosses their row's centres. What is
    traversed forth and back, as the slit to a hole, changes nothing.
    """
    mask = np.zeros(size, bool)
    for ring in rings:
        first, last = (first_centre(corner, size[::-1]) for corner in (ring.min(0), ring.max(0)))  # x, y of its box
        width, height = np.maximum(last - first, 0)
        start, end = ring - first, np.roll(ring, -1, 0) - first  # of each edge
        goes_down = start[:, 1:] < end[:, 1:]
        upper, lower = np.where(goes_down, start, end), np.where(goes_down, end, start)
        top, bottom = first_centre(upper[:, 1], height), first_centre(lower[:, 1], height)
        rows = bottom - top  # whose centres each edge crosses
        edge = np.repeat(np.arange(len(ring)), rows)  # of each crossing
        row = top[edge] + np.arange(len(edge)) - np.repeat(rows.cumsum() - rows, rows)
        across = (lower - upper)[edge]
        x = upper[edge, 0] + (row + 0.5 - upper[edge, 1]) * across[:, 0] / across[:, 1]
        changes = np.zeros((height, width + 1), bool)
        np.logical_xor.at(changes, (row, first_centre(x, width)), True)
        np.logical_xor.accumulate(changes, 1, out=changes)
        mask[first[1] : last[1], first[0] : last[0]] |= changes[:, :width]
    return mask


def first_centre(coordinates: np.ndarray, limit: int | tuple[int, int]) -> np.ndarray:
    """Return the number of the first pixel whose centre lies at a coordinate or beyond it, from 0 to `limit`."""
    return np.clip(np.ceil(coordinates - 0.5), 0, limit).astype(int)


def coco_polygon_mask(ring: np.ndarray, box: list[int]) -> np.ndarray:
    """Return pycocotools' mask of a ring within the box (left, top, width, height), bool (height, width).

    It draws edges as points a fifth of a pixel apart. Where two points in turn lie on both sides of the centres of a
    column, inside changes to outside for all pixels below.
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c, rleFrPoly
    """
    left, top, width, height = box
    corners = (5 * ring + 0.5).astype(int)
    along = np.roll(corners, -1, 0) - corners
    steps = np.abs(along).max(1)  # of each edge, between its points
    is_back = along[np.arange(len(ring)), np.abs(along).argmax(1)] < 0  # an edge is drawn in the rising direction
    origin = np.where(is_back[:, None], corners + along, corners)
    slope = np.where(is_back[:, None], -along, along) / np.maximum(steps, 1)[:, None]
    edge = np.repeat(np.arange(len(ring)), steps + 1)  # of each point
    step = np.arange(len(edge)) - ((steps + 1).cumsum() - steps - 1)[edge]
    step = np.where(is_back[edge], steps[edge] - step, step)
    points = (origin[edge] + step[:, None] * slope[edge] + 0.5).astype(int)

    least = np.minimum(points[1:], points[:-1])
    x, y = least[(points[1:, 0] != points[:-1, 0]) & (least[:, 0] % 5 == 2)].T
    changes = np.zeros((height + 1, width), bool)
    np.logical_xor.at(changes, (-((2 - y) // 5) - top, x // 5 - left), True)
    return np.logical_xor.accumulate(changes, 0)[:height]


def outlines(mask: np.ndarray, min_area: int) -> Iterator[np.ndarray]:
    """Yield a ring for each object of a mask, uint8 (H, W), in which 0 is background: polygon_mask's way back.

    It has few corners, and an IoU of 0.99 or more with the object. Objects and holes of less than `min_area` pixels are
    left out.
    """
    return map(with_slits, object_rings(mask, min_area))


def object_rings(mask: np.ndarray, min_area: int = 0) -> Iterator[list[np.ndarray]]:
    """Yield each object's outer ring and those of its holes, from which `outlines` makes one."""
    left, top, width, height = cv2.boundingRect(mask.view(np.uint8))
    inner = np.pad(mask[top : top + height, left : left + width] > 0, 1)
    # Rings run half-way between the centres of pixels inside and outside; just below 0.5, corners that touch are joined
    objects = contourpy.contour_generator(z=inner, fill_type="OuterOffset").filled(0.5 - 1e-9, 2)
    for corners, starts in zip(*objects, strict=True):
        outer, *all_holes = (ring[:-1].round(2) for ring in np.split(corners, starts[1:-1]))
        holes = [hole for hole in all_holes if count_pixels(hole) >= min_area]
        filled = sum(map(count_pixels, all_holes)) - sum(map(count_pixels, holes))
        if count_pixels(outer) - sum(map(count_pixels, holes)) >= min_area:
            corner = np.array((left - 0.5, top - 0.5))
            yield [ring + corner for ring in simplified([outer, *holes], filled)]


def count_pixels(ring: np.ndarray) -> float:
    """Return how many pixels a ring of `outlines` holds: each corner cuts off or adds an eighth, half one in all."""
    return cv2.contourArea(ring.astype(np.float32)) + 0.5


TOLERANCES = 0.35 * 2 ** (np.arange(31) / 4)  # pixels between the edge and the corners that are left out, up to 63


def simplified(rings: list[np.ndarray], filled: float) -> list[np.ndarray]:
    """Return an object's outer ring and those of its holes, with as few corners as keep its IoU at 0.99 or above.

    `filled` are the pixels of holes without a ring, which lower the IoU. Where it is below 0.995 by them alone, the
    corners may cost another 0.5 %.
    """
    shift = rings[0].min(0).round() - 1.5  # into a box of its own, in which the centres are polygon_mask's
    size = tuple(np.ceil(rings[0].max(0) - shift).astype(int)[::-1] + 1)
    exact = polygon_mask([with_slits(rings) - shift], size)
    least = min(0.99, 0.995 * (1 - filled / np.count_nonzero(exact)))

    def with_fewer_corners(tolerance: float) -> list[np.ndarray]:
        outer, *holes = (cv2.approxPolyDP(ring.astype(np.float32), tolerance, True)[:, 0] for ring in rings)
        holes = [few if len(few) > 2 else hole for few, hole in zip(holes, rings[1:], strict=True)]  # none closes
        return [ring.astype(np.float64) for ring in (outer, *holes)]

    def loses_too_much(tolerance: float) -> bool:
        mask = polygon_mask([with_slits(with_fewer_corners(tolerance)) - shift], size)
        return np.count_nonzero(mask & exact) - filled < least * np.count_nonzero(mask | exact)

    possible = np.searchsorted(TOLERANCES, max(size) / 8)  # fewer are tried for small objects, of which there are many
    largest = bisect_left(TOLERANCES, True, hi=possible, key=loses_too_much)
    return with_fewer_corners(TOLERANCES[largest - 1]) if largest else rings


def with_slits(rings: list[np.ndarray]) -> np.ndarray:
    """Join an outer ring and those of its holes to one, with a slit to the leftmost corner of each hole."""
    whole, *holes = rings
    for hole in sorted(holes, key=lambda hole: hole[:, 0].min()):
        around = np.roll(hole, -hole[:, 0].argmin(), 0)
        here = ((whole - around[0]) ** 2).sum(1).argmin()
        whole = np.concatenate((whole[: here + 1], around, around[:1], whole[here:]))
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Run lengths <-> masks. Runs go along the rows (order "C", as numpy calls it) or down the columns ("F").


def rle_encode(mask: np.ndarray) -> str:
    """Return the runs of a mask (H, W), which is foreground where it is not 0: "start length start length ...".

    Pixels count from 1, row by row from the top left; an empty mask gives "".
    https://www.kaggle.com/c/carvana-image-masking-challenge/overview/evaluation
    """
    pixels = np.zeros(mask.size + 2, bool)  # with background before the first and after the last
    pixels[1:-1] = mask.ravel() != 0
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    starts, ends = changes[::2], changes[1::2]
    return " ".join(f"{start} {end - start}" for start, end in zip(starts.tolist(), ends.tolist(), strict=True))


def rle_decode(runs: str, size: tuple[int, int], order: str = "C") -> np.ndarray:
    """Return the mask of Kaggle's runs, as rle_encode writes them: bool (H, W).

    Raises ValueError for what is no pairs of start and length, for runs that do not fit `size`, (height, width), and
    for runs that overlap or go back, as those do whose starts count from the end of the run before.
    """
    try:
        starts, lengths = np.array(runs.split(), np.int64).reshape(-1, 2).T
    except (ValueError, OverflowError) as error:
        raise ValueError("its runs are not pairs of start and length") from error
    starts = starts - 1
    mask = np.zeros(size[0] * size[1], bool)
    if (starts < 0).any() or (lengths < 1).any() or (lengths > len(mask) - starts).any():
        raise ValueError(f"its runs do not fit {size[1]} x {size[0]} pixels")
    if (starts[1:] < (starts + lengths)[:-1]).any():
        raise ValueError("its runs overlap or go back; starts must count from the photo's first pixel, in rising order")
    for start, length in zip(starts, lengths, strict=True):
        mask[start : start + length] = True
    return mask.reshape(size, order=order)


def counts_mask(counts: list[int], size: tuple[int, int], order: str = "C") -> np.ndarray:
    """Return the mask, bool (H, W), of run lengths that are background and object by turns.

    Raises ValueError where they do not fill `size`, (height, width), which is not checked itself.
    """
    pixels = size[0] * size[1]
    if not all(0 <= count <= pixels for count in counts) or sum(counts) != pixels:  # as int64, a sum may wrap around
        raise ValueError(f"its run lengths do not fill {size[1]} x {size[0]} pixels")
    return np.repeat(np.arange(len(counts)) % 2 == 1, np.array(counts, np.int64)).reshape(size, order=order)


def counts_of(pixels: np.ndarray, box: list[int], size: tuple[int, int]) -> list[int]:
    """Return COCO's run lengths, as counts_mask reads them down the columns, of a mask in a box of a photo.

    The mask is bool (height, width), the box (left, top, width, height), and the photo's size (height, width).
    """
    left, top, width, height = box
    columns = np.zeros((width, height + 2), bool)  # with background above and below
    columns[:, 1:-1] = pixels.T
    column, row = np.nonzero(columns[:, 1:] != columns[:, :-1])
    changes, count = np.unique((left + column) * size[0] + top + row, return_counts=True)
    changes = changes[count == 1]  # a run from the photo's lower border goes on in the next column
    return np.diff(changes, prepend=0, append=size[0] * size[1]).tolist()


def coco_mask(counts: list[int] | str, own_size: list[int], size: tuple[int, int]) -> np.ndarray:
    """Return the mask, bool (H, W), of COCO's run lengths, a list or its text. Raises ValueError for another size."""
    if tuple(own_size) != size:
        raise ValueError(f"its mask is {own_size[1]} x {own_size[0]}, but its photo {size[1]} x {size[0]}")
    return counts_mask(coco_counts(counts) if isinstance(counts, str) else counts, size, "F")


def coco_counts(text: str) -> list[int]:
    """Decode run lengths from COCO's text: 5 bits a character, the lowest first, and bit 5 where another one follows.

    From the fourth number on they are differences to the last but one. Raises ValueError for another text.
    https://github.com/cocodataset/cocoapi/blob/master/common/maskApi.c, rleFrString
    """
    counts, number, shift = [], 0, 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError("its run lengths are no text of COCO's")
        number |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            if bits & 16:  # the sign
                number -= 1 << shift
            counts.append(number + (counts[-2] if len(counts) > 2 else 0))
            number, shift = 0, 0
    return counts
