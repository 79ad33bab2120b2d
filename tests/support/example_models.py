"""The models that the Python examples of Triton's client project ask for, as models in Python."""

from __future__ import annotations

from pathlib import Path

HEAD = """
import numpy as np
import triton_python_backend_utils as pb_utils


class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(request) for request in requests]

    def read(self, request, *names):
        return [pb_utils.get_input_tensor_by_name(request, name).as_numpy() for name in names]

    def tell(self, **outputs):
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, value) for name, value in outputs.items()])
"""
#: Sum and difference; loaded with a configuration of one number, it has to tell its tensors itself.
PAIR = (
    HEAD
    + """
    @staticmethod
    def auto_complete_config(config):
        for number in (0, 1):
            config.add_input({"name": f"INPUT{number}", "data_type": "TYPE_DATATYPE", "dims": [16]})
            config.add_output({"name": f"OUTPUT{number}", "data_type": "TYPE_DATATYPE", "dims": [16]})
        return config

    def answer(self, request):
        left, right = self.read(request, "INPUT0", "INPUT1")
        if left.dtype.kind != "O":
            return self.tell(OUTPUT0=left + right, OUTPUT1=left - right)
        left, right = left.astype(np.int64), right.astype(np.int64)
        results = [np.array(list(map(str, each.ravel())), object).reshape(each.shape)
                   for each in (left + right, left - right)]
        return self.tell(OUTPUT0=results[0], OUTPUT1=results[1])
"""
)
IDENTITY = (
    HEAD
    + """
    def answer(self, request):
        return self.tell(OUTPUT0=self.read(request, "INPUT0")[0])
"""
)
#: The value, and one more at the start.
SEQUENCE = (
    HEAD
    + """
    def answer(self, request):
        value, start = self.read(request, "INPUT", "START")
        return self.tell(OUTPUT=value + start.reshape(value.shape))
"""
)
#: The same, and the sequence's id at the end.
SEQUENCE_WITH_ID = (
    HEAD
    + """
    def answer(self, request):
        value, *signals = self.read(request, "INPUT", "START", "END", "CORRID")
        start, end, id = (signal.item() for signal in signals)
        return self.tell(OUTPUT=(value + start + end * id).astype(np.int32))
"""
)
#: The sum so far, and the sequence's id, a text, at the end.
SEQUENCE_OF_TEXT_ID = (
    HEAD
    + """
    def initialize(self, args):
        self.sums = {}

    def answer(self, request):
        value, *signals = self.read(request, "INPUT", "START", "END", "CORRID")
        start, end, id = (signal.item() for signal in signals)
        self.sums[id] = value + (0 if start else self.sums[id])
        total = self.sums.pop(id) + int(id) if end else self.sums[id]
        return self.tell(OUTPUT=total.astype(np.int32))
"""
)
REPEAT = (
    HEAD
    + """
    def execute(self, requests):
        for request in requests:
            sender = request.get_response_sender()
            for value in self.read(request, "IN")[0]:
                sender.send(self.tell(OUT=value.reshape(1)))
            sender.send(flags=pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL)
"""
)
#: Scores that differ from class to class and from image to image.
IMAGE = (
    HEAD
    + """
    def answer(self, request):
        (pixels,) = self.read(request, "data_0")
        rows = pixels.reshape(-1, 1024, 147).mean(axis=2)[:, :1000].astype(np.float32)
        return self.tell(fc6_1=rows if pixels.ndim == 4 else rows[0])
"""
)
DECODE = (
    HEAD
    + """
    def answer(self, request):
        images = self.read(request, "RAW")[0].ravel()
        rows = [np.resize(np.frombuffer(each, np.uint8), (3, 224, 224)) for each in images]
        return self.tell(PIXELS=np.array(rows, np.float32))
"""
)


def tensor(kind: str, name: str, datatype: str, dims: str, more: str = "") -> str:
    return f'{kind} {{ name: "{name}" data_type: TYPE_{datatype} dims: [{dims}] {more} }}\n'


def pair(datatype: str) -> tuple[str, str]:
    tensors = [tensor(kind.lower(), f"{kind}{each}", datatype, "16") for kind in ("INPUT", "OUTPUT") for each in (0, 1)]
    return "max_batch_size: 8\n" + "".join(tensors), PAIR.replace("DATATYPE", datatype)


def identity(datatype: str) -> tuple[str, str]:
    tensors = tensor("input", "INPUT0", datatype, "-1") + tensor("output", "OUTPUT0", datatype, "-1")
    return f"max_batch_size: 8\n{tensors}", IDENTITY


def sequence(signals: str, strategy: str, code: str) -> tuple[str, str]:
    tensors = tensor("input", "INPUT", "INT32", "1") + tensor("output", "OUTPUT", "INT32", "1")
    return f"max_batch_size: 8\n{tensors} sequence_batching {{ {signals} {strategy} }}", code


def signal(name: str, form: str = "int32_false_true: [0, 1]") -> str:
    return f'control_input {{ name: "{name}" control {{ kind: CONTROL_SEQUENCE_{name} {form} }} }}\n'


def signals_with_id(datatype: str) -> str:
    return signal("START") + signal("END") + signal("CORRID", f"data_type: TYPE_{datatype}")


def image(batch: int) -> tuple[str, str]:
    pixels = tensor("input", "data_0", "FP32", "3, 224, 224", "format: FORMAT_NCHW")
    scores = tensor("output", "fc6_1", "FP32", "1000", 'label_filename: "labels.txt"')
    return f"max_batch_size: {batch}\n{pixels}{scores}", IMAGE


OLDEST = "oldest { max_candidate_sequences: 16 }"
SIMPLE: dict[str, tuple[str, str]] = {
    "simple": pair("INT32"),
    "simple_int8": pair("INT8"),
    "simple_string": pair("STRING"),
    "simple_identity": identity("STRING"),
    "simple_sequence": sequence(signal("START") + signal("READY"), "direct { }", SEQUENCE),
    "simple_dyna_sequence": sequence(signals_with_id("UINT64"), OLDEST, SEQUENCE_WITH_ID),
    "simple_string_dyna_sequence": sequence(signals_with_id("STRING"), OLDEST, SEQUENCE_OF_TEXT_ID),
}
REPEATING = {
    "repeat_int32": (
        "model_transaction_policy { decoupled: true }\n"
        + tensor("input", "IN", "INT32", "-1")
        + tensor("input", "DELAY", "UINT32", "-1")
        + tensor("input", "WAIT", "UINT32", "1")
        + tensor("output", "OUT", "INT32", "1"),
        REPEAT,
    )
}
OTHERS = {
    "custom_identity_int32": identity("INT32"),
    "densenet_onnx": image(0),
    "inception": image(8),
    "decode": (
        "max_batch_size: 8\n"
        + tensor("input", "RAW", "STRING", "1")
        + tensor("output", "PIXELS", "FP32", "3, 224, 224"),
        DECODE,
    ),
    "preprocess_inception_ensemble": (
        "max_batch_size: 8\n"
        + tensor("input", "INPUT", "STRING", "1")
        + tensor("output", "OUTPUT", "FP32", "1000", 'label_filename: "labels.txt"')
        + """ensemble_scheduling {
            step { model_name: "decode" input_map { key: "RAW" value: "INPUT" }
                output_map { key: "PIXELS" value: "pixels" } }
            step { model_name: "inception" input_map { key: "data_0" value: "pixels" }
                output_map { key: "fc6_1" value: "OUTPUT" } } }""",
        "",
    ),
}


def write_models(root: Path, models: dict[str, tuple[str, str]]) -> Path:
    for name, (config, code) in models.items():
        folder = root / name / "1"
        folder.mkdir(parents=True)
        kind = 'backend: "python"' if code else 'platform: "ensemble"'
        (root / name / "config.pbtxt").write_text(f"{kind}\n{config}")
        if code:
            (folder / "model.py").write_text(code)
        if "label_filename" in config:
            (root / name / "labels.txt").write_text("".join(f"class {index}\n" for index in range(1000)))
    return root
