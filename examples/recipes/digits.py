"""The data: scikit-learn's digits, 1,797 real images of 8 x 8 pixels, split once and for all.

Arguments: the folder for the models (unused), the folder for references (gets ``digits.npz``).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

TRAIN_ROWS = 1200
SPLIT_SEED = 2024


def main(models: Path, references: Path) -> None:
    """Writes train_images, train_labels, images and labels; FP32 pixels from 0 to 16, 64 a row, INT64 labels."""
    images, labels = load_digits(return_X_y=True)
    # The set is ordered by writer; a shuffled split has all writers on both sides.
    order = np.random.default_rng(SPLIT_SEED).permutation(len(images))
    images, labels = images[order].astype(np.float32), labels[order].astype(np.int64)
    np.savez(
        references / "digits.npz",
        train_images=images[:TRAIN_ROWS],
        train_labels=labels[:TRAIN_ROWS],
        images=images[TRAIN_ROWS:],
        labels=labels[TRAIN_ROWS:],
    )
    print(f"{TRAIN_ROWS} images to train with, {len(images) - TRAIN_ROWS} held out")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
