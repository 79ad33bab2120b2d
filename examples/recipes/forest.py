"""digits_forest: a random forest by scikit-learn, converted to ONNX; served by onnxruntime without a configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import onnxruntime
from skl2onnx import to_onnx
from skl2onnx.common.data_types import FloatTensorType
from sklearn.ensemble import RandomForestClassifier


def main(models: Path, references: Path) -> None:
    """Trains, converts (zipmap off: probabilities stay a tensor), and asks ONNX Runtime for the held-out answers."""
    data = np.load(references / "digits.npz")
    forest = RandomForestClassifier(n_estimators=100, max_depth=12, random_state=0, n_jobs=1)
    forest.fit(data["train_images"], data["train_labels"])
    graph = to_onnx(
        forest,
        initial_types=[("input", FloatTensorType([None, 64]))],
        options={id(forest): {"zipmap": False}},
        target_opset=17,
    )
    artefact = models / "digits_forest" / "1" / "model.onnx"
    artefact.parent.mkdir(parents=True)
    artefact.write_bytes(graph.SerializeToString())

    session = onnxruntime.InferenceSession(str(artefact), providers=["CPUExecutionProvider"])
    label, probabilities = session.run(["label", "probabilities"], {"input": data["images"]})
    agreement = float((label == forest.predict(data["images"])).mean())
    accuracy = float((label == data["labels"]).mean())
    assert agreement > 0.99, f"the converted forest agrees with the original on {agreement:.1%} only"
    assert accuracy > 0.9, f"accuracy {accuracy:.3f} on held-out images"
    np.savez(
        references / "digits_forest.npz",
        **{"input.input": data["images"], "output.label": label, "output.probabilities": probabilities},
    )
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
