"""Writes a contact sheet of simulated frames, one of every kind."""

import argparse

import cv2
import numpy as np

from data_prep.phantom import CLASSES, simulate_patient


def contact_sheet(*, seed: int = 0) -> np.ndarray:
    """The first frame of every geometry (rows) and class (columns), with captions: uint8 [H, W]."""
    rows = []
    for geometry, image_size in (("linear", 288), ("convex", 224)):
        found: dict[int, np.ndarray] = {}
        patient = 0
        while len(found) < len(CLASSES):
            (phantom,) = simulate_patient(patient, seed=seed, image_size=image_size, frames=1)
            if phantom.geometry == geometry:
                found.setdefault(phantom.label, phantom.image)
            patient += 1
        side = max(image.shape[0] for image in found.values())
        for label, image in sorted(found.items()):
            tile = np.full((side + 30, 336), 16, np.uint8)
            top, left = (side - image.shape[0]) // 2 + 4, (336 - image.shape[1]) // 2
            tile[top : top + image.shape[0], left : left + image.shape[1]] = image
            caption = f"{geometry}: {CLASSES[label].replace('_', ' ')}"
            cv2.putText(tile, caption, (8, side + 23), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 210, 1, cv2.LINE_AA)
            found[label] = tile
        rows.append(np.hstack([found[label] for label in range(len(CLASSES))]))
    return np.vstack(rows)


def main(arguments: list[str] | None = None) -> None:
    """Writes the contact sheet."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.phantom",
        description="Simulate labelled B-mode frames and write a contact sheet: every scan geometry and lesion class.",
    )
    parser.add_argument("--output", required=True, metavar="PNG", help="the picture to write, e.g. docs/phantoms.png")
    parser.add_argument("--seed", type=int, default=0, help="of the simulated collection (default %(default)s)")
    options = parser.parse_args(arguments)
    try:
        written = cv2.imwrite(options.output, contact_sheet(seed=options.seed))
    except cv2.error:
        written = False
    if not written:
        parser.error(f"--output: cannot write {options.output!r}; name a .png in a folder that exists")
    print(f"Wrote {options.output}")


if __name__ == "__main__":
    main()
