"""The de-annotation of USF-MAE's public notebook, reimplemented from its description as a baseline for comparison.

The mask is the union of three parts. Colour: CLAHE (clip 2, 8 x 8) on L of LAB, HSV saturation above 40, k-means
(k = 3) on those pixels, centres with S > 40 and V > 20, components of 20 pixels or more. Grey: CLAHE, Canny 50/150,
dilation by 3 x 3, outer contours with areas of 30 to 2,000, filled. Text: whole boxes of an OCR engine. The mask is
closed and opened with 5 x 5 and inpainted by Navier-Stokes with radius 3.
"""

import shutil
import subprocess
from collections.abc import Callable

import cv2
import numpy as np
from sklearn.cluster import KMeans

Boxes = Callable[[np.ndarray], list[tuple[int, int, int, int]]]  # left, top, right, bottom


def deannotate(image: np.ndarray, find_text: Boxes | None) -> tuple[np.ndarray, np.ndarray]:
    """Runs the recipe on RGB uint8 `[H, W, 3]`; returns the image and the mask that was filled, uint8 `[H, W]`."""
    mask = cv2.bitwise_or(_colour_mask(image), _grey_mask(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)))
    if find_text:
        mask = cv2.bitwise_or(mask, text_mask(image, find_text))
    square = np.ones((5, 5), np.uint8)
    mask = cv2.morphologyEx(cv2.morphologyEx(mask, cv2.MORPH_CLOSE, square), cv2.MORPH_OPEN, square)
    return np.asarray(cv2.inpaint(image, mask, 3, cv2.INPAINT_NS)), mask


def text_mask(image: np.ndarray, find_text: Boxes) -> np.ndarray:
    """Mask of the boxes that an engine finds: uint8 `[H, W]`, 0 or 255."""
    mask = np.zeros(image.shape[:2], np.uint8)
    for left, top, right, bottom in find_text(image):
        cv2.rectangle(mask, (left, top), (right, bottom), (255,), -1)
    return mask


def _colour_mask(image):
    lab = cv2.cvtColor(image, cv2.COLOR_RGB2LAB)
    light = cv2.createCLAHE(2.0, (8, 8)).apply(np.ascontiguousarray(lab[:, :, 0]))
    enhanced = cv2.cvtColor(np.dstack([light, lab[:, :, 1:]]), cv2.COLOR_LAB2RGB)
    hsv = cv2.cvtColor(enhanced, cv2.COLOR_RGB2HSV)
    saturated = hsv[:, :, 1] > 40
    mask = np.zeros(image.shape[:2], np.uint8)
    if np.count_nonzero(saturated) < 3:
        return mask
    clusters = KMeans(n_clusters=3, random_state=42).fit(hsv[saturated].astype(np.float64))
    wanted = (clusters.cluster_centers_[:, 1] > 40) & (clusters.cluster_centers_[:, 2] > 20)
    mask[saturated] = wanted[clusters.labels_] * np.uint8(255)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
    large = stats[:, cv2.CC_STAT_AREA] >= 20
    large[0] = False
    return large[labels].astype(np.uint8) * 255


def _grey_mask(grey):
    edges = cv2.Canny(cv2.createCLAHE(2.0, (8, 8)).apply(grey), 50, 150)
    edges = cv2.dilate(edges, np.ones((3, 3), np.uint8))
    contours, _ = cv2.findContours(edges, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_SIMPLE)
    mask = np.zeros_like(grey)
    chosen = [contour for contour in contours if 30 < cv2.contourArea(contour) < 2000]
    cv2.drawContours(mask, chosen, -1, (255,), cv2.FILLED)
    return mask


def tesseract() -> Boxes | None:
    """Boxes of words from Tesseract, the engine of the notebook, or None if its command is not installed."""
    command = shutil.which("tesseract")
    if not command:
        return None

    def find(image):
        png = cv2.imencode(".png", cv2.cvtColor(image, cv2.COLOR_RGB2GRAY))[1].tobytes()
        table = subprocess.run([command, "stdin", "stdout", "tsv"], input=png, capture_output=True, check=True).stdout
        boxes = []
        for line in table.decode().splitlines()[1:]:
            cells = line.split("\t")
            if len(cells) > 11 and cells[11].strip():
                left, top, width, height = map(int, cells[6:10])
                boxes.append((left, top, left + width, top + height))
        return boxes

    return find


def rapidocr() -> Boxes | None:
    """Boxes of lines from the DB detector of `pip install rapidocr-onnxruntime`, or None if it is not installed."""
    try:
        from rapidocr_onnxruntime import RapidOCR
    except ImportError:
        return None
    engine = RapidOCR(intra_op_num_threads=1, inter_op_num_threads=1)

    def find(image):
        lines, _ = engine(image[:, :, ::-1], use_det=True, use_cls=False, use_rec=False)
        boxes = (cv2.boundingRect(np.array(line, np.int32)) for line in lines or [])
        return [(left, top, left + width, top + height) for left, top, width, height in boxes]

    return find
