"""digits_keras: a Keras model in the ``.keras`` format, served by tensorflow without a configuration."""

from __future__ import annotations

import sys
from pathlib import Path

import keras
import numpy as np

EPOCHS = 25


def main(models: Path, references: Path) -> None:
    """Trains from a fixed seed, saves, and keeps the model's own answers."""
    keras.utils.set_random_seed(0)
    data = np.load(references / "digits.npz")
    image = keras.Input((64,), name="image")
    hidden = keras.layers.Rescaling(1 / 16)(image)
    hidden = keras.layers.Dense(64, activation="relu")(hidden)
    output = keras.layers.Dense(10, activation="softmax", name="probabilities")(hidden)
    model = keras.Model(image, output, name="digits")
    model.compile(
        optimizer=keras.optimizers.Adam(0.005),
        loss="sparse_categorical_crossentropy",
        jit_compile=False,
        steps_per_execution=24,
    )
    model.fit(data["train_images"], data["train_labels"], batch_size=50, epochs=EPOCHS, verbose=0)

    artefact = models / "digits_keras" / "1" / "model.keras"
    artefact.parent.mkdir(parents=True)
    model.save(artefact)

    probabilities = model.predict(data["images"], batch_size=len(data["images"]), verbose=0)
    accuracy = float((probabilities.argmax(axis=1) == data["labels"]).mean())
    assert accuracy > 0.9, f"accuracy {accuracy:.3f} on held-out images"
    np.savez(
        references / "digits_keras.npz",
        **{"input.image": data["images"], "output.probabilities": probabilities},
    )
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
