"""digits_pipeline: a native scikit-learn pipeline in the skops format, served by sklearn without a configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import skops.io
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def main(models: Path, references: Path) -> None:
    """Trains, saves, and keeps the pipeline's own answers for FP64 rows."""
    data = np.load(references / "digits.npz")
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=0.1, max_iter=500))
    pipeline.fit(data["train_images"].astype(np.float64), data["train_labels"])

    artefact = models / "digits_pipeline" / "1" / "model.skops"
    artefact.parent.mkdir(parents=True)
    skops.io.dump(pipeline, artefact)

    rows = data["images"].astype(np.float64)
    label = pipeline.predict(rows)
    accuracy = float((label == data["labels"]).mean())
    assert accuracy > 0.9, f"accuracy {accuracy:.3f} on held-out images"
    np.savez(
        references / "digits_pipeline.npz",
        **{"input.input": rows, "output.label": label, "output.probabilities": pipeline.predict_proba(rows)},
    )
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
