"""The connected objects of a mask: how many, how large, where; and each as an annotation of COCO.

Definitions are those of scikit-image's regionprops: pixels that touch at a side or a corner are of one object, and the
centre of a photo's first pixel is (0, 0). https://scikit-image.org/docs/stable/api/skimage.measure.html
"""

from collections.abc import Iterator
from functools import cached_property

import cv2
import numpy as np

from machinery.decoding import bands
from machinery.shapes import coco_polygon_mask, counts_of, object_rings

# Of pixels on an edge: which of their neighbours are on it, too -> how long it is there. Benkrid and Crookes, "Design
# and FPGA implementation of a perimeter estimator", as regionprops has it.
NEIGHBOURS = np.array([(10, 2, 10), (2, 1, 2), (10, 2, 10)], np.float32)
LENGTHS = np.array((0, 1, np.sqrt(2), (1 + np.sqrt(2)) / 2))
KINDS = np.zeros(256, np.uint8)  # of the sums of NEIGHBOURS, as indices of LENGTHS
KINDS[[5, 7, 15, 17, 25, 27]], KINDS[[21, 33]], KINDS[[13, 23]] = 1, 2, 3

COLUMNS = ("object", "area_px", "area_share", "left", "top", "width", "height", "centroid_x", "centroid_y")
COLUMNS += ("equivalent_diameter", "perimeter", "mean_probability", "touches_border")


def objects(mask_or_probabilities: np.ndarray, threshold: float = 0.5) -> list[dict]:
    """Measure the connected objects of a mask (H, W), in which 0 is background, or of probabilities, float (H, W).

    Return a row for each, {name: value} of COLUMNS, in pixels, in the order of their first pixels. Without
    probabilities, their mean is None.
    """
    array = np.asarray(mask_or_probabilities)
    if array.ndim != 2:
        raise ValueError(f"a mask of {array.ndim} dimensions: give one of height and width")
    if np.issubdtype(array.dtype, np.floating):
        return Objects(array > threshold, array).rows()
    return Objects(array != 0).rows()


def remove_specks(mask: np.ndarray, probabilities: np.ndarray, min_area: int, largest: bool = False) -> np.ndarray:
    """Set objects of fewer than `min_area` pixels to 0 in a mask and its probabilities, both (H, W), in place.

    With `largest`, all but the largest object, the first one of several. Return where they were, bool (H, W).
    """
    found, specks = Objects(mask), np.empty(mask.shape, bool)
    is_speck = np.concatenate(([False], found.areas < min_area))
    if largest and len(found):
        is_speck[1:] |= np.arange(len(found)) != found.areas.argmax()
    for rows, _, _ in bands(len(mask), 0):
        specks[rows] = is_speck[found.labels[rows]]
    mask[specks] = probabilities[specks] = 0
    return specks


class Objects:
    """The connected objects of a mask (H, W), in which 0 is background.

    `labels` are their numbers, int32 (H, W): from 1, in the order of their first pixels, and 0 on the background;
    `boxes` are left, top, width and height, (n, 4), `areas` (n,) and `centroids`, x and y, (n, 2).
    """

    def __init__(self, mask: np.ndarray, probabilities: np.ndarray | None = None) -> None:
        self.mask, self.probabilities = (mask != 0).view(np.uint8), probabilities
        how = 8, cv2.CV_32S, cv2.CCL_SAUF  # other algorithms number them in another order
        _, self.labels, stats, centroids = cv2.connectedComponentsWithStatsWithAlgorithm(self.mask, *how)
        self.boxes, self.areas, self.centroids = stats[1:, :4], stats[1:, cv2.CC_STAT_AREA], centroids[1:]

    def __len__(self) -> int:
        return len(self.areas)

    def rows(self) -> list[dict]:
        """Return the rows of `objects`."""
        left, top, width, height = self.boxes.T
        is_inside = (left > 0) & (top > 0) & (left + width < self.mask.shape[1]) & (top + height < self.mask.shape[0])
        columns = [np.arange(1, len(self) + 1), self.areas, self.areas / self.mask.size, left, top, width, height]
        columns += [*self.centroids.T, np.sqrt(4 * self.areas / np.pi), self.perimeters(), self.means(), ~is_inside]
        return [dict(zip(COLUMNS, row, strict=True)) for row in zip(*(c.tolist() for c in columns), strict=True)]

    def perimeters(self) -> np.ndarray:
        """Return the lengths of the objects' edges, those of holes included, float64 (n,)."""
        counts, cross = np.zeros(len(LENGTHS) * (len(self) + 1)), cv2.getStructuringElement(cv2.MORPH_CROSS, (3, 3))
        for rows, inner, kept in bands(len(self.mask), 2):
            edge = self.mask[rows] - cv2.erode(self.mask[rows], cross, borderType=cv2.BORDER_CONSTANT, borderValue=0)
            kinds = cv2.LUT(cv2.filter2D(edge, -1, NEIGHBOURS, borderType=cv2.BORDER_CONSTANT), KINDS)[inner]
            is_counted = kinds > 0
            index = len(LENGTHS) * self.labels[kept][is_counted].astype(np.int64) + kinds[is_counted]
            counts += np.bincount(index, minlength=len(counts))
        return (counts.reshape(-1, len(LENGTHS)) @ LENGTHS)[1:]

    def means(self) -> np.ndarray:
        """Return the objects' mean probabilities, float64 (n,), or None for each."""
        if self.probabilities is None:
            return np.full(len(self), None)
        sums = np.zeros(len(self) + 1)
        for rows, _, _ in bands(len(self.mask), 0):
            sums += np.bincount(self.labels[rows].ravel(), self.probabilities[rows].ravel(), len(sums))
        return sums[1:] / self.areas

    @cached_property
    def places(self) -> np.ndarray:
        """Return a pixel of each object, x and y, (n, 2): the one at its centroid, or else its first."""
        places = self.centroids.round().astype(int)
        for number in np.flatnonzero(self.labels[places[:, 1], places[:, 0]] != np.arange(1, len(self) + 1)):
            left, top, width, _ = self.boxes[number]
            places[number] = left + (self.labels[top, left : left + width] == number + 1).argmax(), top
        return places

    def annotations(self) -> Iterator[dict]:
        """Yield COCO's entries of the objects: https://cocodataset.org/#format-data

        They are polygons, or run lengths where an object has holes, or where pycocotools' mask of the polygon has an
        IoU of less than 0.98 with it. Areas are those of pycocotools' masks.
        """
        for number, box in enumerate(self.boxes.tolist(), 1):
            left, top, width, height = box
            pixels = self.labels[top : top + height, left : left + width] == number
            outer, *holes = next(object_rings(pixels))
            ring, area = outer + np.array((left, top)), self.areas[number - 1]
            drawn = coco_polygon_mask(ring, box)
            if holes or np.count_nonzero(drawn & pixels) < 0.98 * np.count_nonzero(drawn | pixels):
                segmentation = {"counts": counts_of(pixels, box, self.mask.shape), "size": list(self.mask.shape)}
            else:
                segmentation, area = [ring.ravel().tolist()], np.count_nonzero(drawn)
            yield {"segmentation": segmentation, "area": int(area), "bbox": box, "iscrowd": 0}
