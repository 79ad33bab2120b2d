"""digits_cnn (torch.export, no configuration needed) and digits_cnn_ts (TorchScript, which needs one)."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

EPOCHS = 12
BATCH = 50

TORCHSCRIPT_CONFIG = """\
# TorchScript holds neither datatypes nor shapes, so they are written here.
name: "digits_cnn_ts"
backend: "pytorch"
max_batch_size: 64
input [ { name: "INPUT__0" data_type: TYPE_FP32 dims: [ 64 ] } ]
output [ { name: "OUTPUT__0" data_type: TYPE_FP32 dims: [ 10 ] } ]
dynamic_batching { }
"""


class DigitsNet(nn.Module):
    """FP32 pixels [rows, 64] to probabilities [rows, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(128, 10),
        )

    def score(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, which training wants."""
        scores: torch.Tensor = self.layers((image / 16.0).reshape(-1, 1, 8, 8))
        return scores

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.score(image), dim=1)


class NamedDigitsNet(nn.Module):
    """The same with named outputs, as torch.export keeps them."""

    def __init__(self, net: DigitsNet) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: torch.Tensor) -> dict[str, torch.Tensor]:
        probabilities = self.net(image)
        return {"probabilities": probabilities, "label": probabilities.argmax(dim=1)}


def train(images: torch.Tensor, labels: torch.Tensor) -> DigitsNet:
    """A network trained from a fixed seed."""
    torch.manual_seed(0)
    net = DigitsNet()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.005)
    for _ in range(EPOCHS):
        order = torch.randperm(len(images))
        for rows in (order[first : first + BATCH] for first in range(0, len(order), BATCH)):
            optimizer.zero_grad()
            loss: Any = nn.functional.cross_entropy(net.score(images[rows]), labels[rows])
            loss.backward()
            optimizer.step()
    return net.eval()


def main(models: Path, references: Path) -> None:
    """Trains once, saves both formats, and keeps the network's own answers."""
    torch.set_num_threads(1)
    data = np.load(references / "digits.npz")
    net = train(torch.from_numpy(data["train_images"]), torch.from_numpy(data["train_labels"]))

    exported = models / "digits_cnn" / "1" / "model.pt2"
    exported.parent.mkdir(parents=True)
    batch = torch.export.Dim("batch", min=1, max=256)
    sample = torch.zeros(2, 64)
    program = torch.export.export(NamedDigitsNet(net), (sample,), dynamic_shapes={"image": {0: batch}})
    torch.export.save(program, exported)

    scripted = models / "digits_cnn_ts" / "1" / "model.pt"
    scripted.parent.mkdir(parents=True)
    torch.jit.save(torch.jit.script(net), scripted)
    (models / "digits_cnn_ts" / "config.pbtxt").write_text(TORCHSCRIPT_CONFIG)

    with torch.inference_mode():
        probabilities = net(torch.from_numpy(data["images"])).numpy()
    label = probabilities.argmax(axis=1)
    accuracy = float((label == data["labels"]).mean())
    assert accuracy > 0.9, f"accuracy {accuracy:.3f} on held-out images"
    np.savez(
        references / "digits_cnn.npz",
        **{"input.image": data["images"], "output.probabilities": probabilities, "output.label": label},
    )
    np.savez(references / "digits_cnn_ts.npz", **{"input.INPUT__0": data["images"], "output.OUTPUT__0": probabilities})
    print(f"accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
