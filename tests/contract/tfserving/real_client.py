"""PyPI's tensorflow-serving-api and TensorFlow on a running server: each check's name and how it ended, as JSON.

A process of its own, because TensorFlow takes seconds to import and does not get along with every other framework.

    python real_client.py HOST:PORT FOLDER_OF_REFERENCES
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

os.environ.update(TF_CPP_MIN_LOG_LEVEL="2", CUDA_VISIBLE_DEVICES="")

# before TensorFlow: both packages in one process, whichever comes first
from aiorch_proto.tfserving import serving_pb2 as ours  # noqa: I001
import grpc
import numpy as np
import tensorflow as tf
from tensorflow_serving.apis import (
    classification_pb2,
    get_model_metadata_pb2,
    get_model_status_pb2,
    inference_pb2,
    model_management_pb2,
    model_service_pb2_grpc,
    predict_pb2,
    prediction_service_pb2_grpc,
    regression_pb2,
)

TIMEOUT_S = 30.0


class Site:
    def __init__(self, target: str, references: Path) -> None:
        channel = grpc.insecure_channel(target)
        self.prediction = prediction_service_pb2_grpc.PredictionServiceStub(channel)
        self.models = model_service_pb2_grpc.ModelServiceStub(channel)
        self.references = references

    def predict(self, model: str, inputs: dict[str, Any], outputs: tuple[str, ...] = ()) -> Any:
        request = predict_pb2.PredictRequest()
        request.model_spec.name = model
        request.output_filter.extend(outputs)
        for name, value in inputs.items():
            request.inputs[name].CopyFrom(value if hasattr(value, "dtype") and not isinstance(value, np.ndarray)
                                          else tf.make_tensor_proto(value))  # fmt: skip
        return self.prediction.Predict(request, timeout=TIMEOUT_S)

    def reference(self, model: str, rows: int = 3) -> tuple[dict[str, Any], dict[str, Any]]:
        with np.load(self.references / f"{model}.npz") as stored:
            tensors = {name: stored[name][:rows] for name in stored}
        inputs = {name.removeprefix("input."): value for name, value in tensors.items() if name.startswith("input.")}
        outputs = {name.removeprefix("output."): value for name, value in tensors.items() if name.startswith("output.")}
        return inputs, outputs


def check_predict(site: Site, model: str) -> None:
    inputs, outputs = site.reference(model)
    response = site.predict(model, inputs)
    assert (response.model_spec.name, response.model_spec.version.value) == (model, 1)
    assert response.model_spec.signature_name == "serving_default"
    assert set(response.outputs) == set(outputs)
    for name, wanted in outputs.items():
        found = tf.make_ndarray(response.outputs[name])
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype), name
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=2e-6)


def check_output_filter(site: Site) -> None:
    inputs, _ = site.reference("digits_forest")
    assert set(site.predict("digits_forest", inputs, ("label",)).outputs) == {"label"}


def check_values_as_lists(site: Site) -> None:
    """What clients without TensorFlow read: the list of the type."""
    rows = np.arange(8, dtype=np.float32).reshape(2, 4)
    response = site.predict("identity_fp32", {"INPUT0": rows})
    assert list(response.outputs["OUTPUT0"].float_val) == rows.reshape(-1).tolist()


def check_filled_tensors(site: Site) -> None:
    """One value stands for all, as tf.make_tensor_proto writes it for constants."""
    proto = tf.make_tensor_proto(2.5, shape=[3, 4], dtype=tf.float32)
    assert len(proto.float_val) == 1
    found = tf.make_ndarray(site.predict("identity_fp32", {"INPUT0": proto}).outputs["OUTPUT0"])
    np.testing.assert_array_equal(found, np.full((3, 4), 2.5, np.float32))


def check_strings(site: Site) -> None:
    response = site.predict("text_length", {"text": np.array([["Zürich"], [""]])})
    assert tf.make_ndarray(response.outputs["length"]).tolist() == [[6], [0]]


def check_metadata(site: Site) -> None:
    request = get_model_metadata_pb2.GetModelMetadataRequest(metadata_field=["signature_def"])
    request.model_spec.name = "digits_keras"
    response = site.prediction.GetModelMetadata(request, timeout=TIMEOUT_S)
    assert response.model_spec.version.value == 1
    signatures = get_model_metadata_pb2.SignatureDefMap()
    assert response.metadata["signature_def"].Unpack(signatures)
    signature = signatures.signature_def["serving_default"]
    assert signature.method_name == "tensorflow/serving/predict"
    image = signature.inputs["image"]
    assert image.dtype == tf.float32.as_datatype_enum
    assert tf.TensorShape(image.tensor_shape).as_list() == [None, 64]
    assert tf.TensorShape(signature.outputs["probabilities"].tensor_shape).as_list() == [None, 10]


def check_status(site: Site) -> None:
    request = get_model_status_pb2.GetModelStatusRequest()
    request.model_spec.name = "digits_forest"
    (status,) = site.models.GetModelStatus(request, timeout=TIMEOUT_S).model_version_status
    assert (status.version, status.state) == (1, get_model_status_pb2.ModelVersionStatus.AVAILABLE)
    assert (status.status.error_code, status.status.error_message) == (0, "")


def make_examples(request: Any, rows: np.ndarray[Any, Any], name: str) -> None:
    for row in rows:
        feature = tf.train.Feature(float_list=tf.train.FloatList(value=row))
        example = request.input.example_list.examples.add()
        example.features.feature[name].CopyFrom(feature)


def check_classify(site: Site) -> None:
    inputs, outputs = site.reference("digits_keras")
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "digits_keras"
    make_examples(request, inputs["image"], "image")
    response = site.prediction.Classify(request, timeout=TIMEOUT_S)
    scores = [[each.score for each in row.classes] for row in response.result.classifications]
    np.testing.assert_allclose(scores, outputs["probabilities"], rtol=1e-4, atol=2e-6)


def check_classify_with_labels(site: Site) -> None:
    inputs, outputs = site.reference("filetype")
    request = classification_pb2.ClassificationRequest()
    request.model_spec.name = "filetype"
    for row in inputs["bytes"]:
        feature = tf.train.Feature(int64_list=tf.train.Int64List(value=row))
        request.input.example_list.examples.add().features.feature["bytes"].CopyFrom(feature)
    response = site.prediction.Classify(request, timeout=TIMEOUT_S)
    first = response.result.classifications[0].classes
    assert len(first) == 214
    assert len({each.label for each in first}) == 214
    np.testing.assert_allclose([each.score for each in first], outputs["target_label"][0], rtol=1e-4, atol=2e-6)


def check_regress(site: Site) -> None:
    request = regression_pb2.RegressionRequest()
    request.model_spec.name = "half_plus_two"
    make_examples(request, np.array([[2.0], [5.0]]), "x")
    response = site.prediction.Regress(request, timeout=TIMEOUT_S)
    assert [each.value for each in response.result.regressions] == [3.0, 4.5]


def check_serialized_examples(site: Site) -> None:
    """A model that takes examples apart itself gets them whole, with the context in front."""
    request = regression_pb2.RegressionRequest()
    request.model_spec.name = "count_features"
    rows = request.input.example_list_with_context
    rows.context.features.feature["shared"].int64_list.value.append(1)
    for names in ("a", "ab"):
        example = rows.examples.add()
        for name in names:
            example.features.feature[name].float_list.value.append(1.0)
    response = site.prediction.Regress(request, timeout=TIMEOUT_S)
    assert [each.value for each in response.result.regressions] == [2.0, 3.0]


def check_multi_inference(site: Site) -> None:
    request = inference_pb2.MultiInferenceRequest()
    make_examples(request, np.array([[2.0], [5.0]]), "x")
    task = request.tasks.add(method_name="tensorflow/serving/regress")
    task.model_spec.name = "half_plus_two"
    (result,) = site.prediction.MultiInference(request, timeout=TIMEOUT_S).results
    assert [each.value for each in result.regression_result.regressions] == [3.0, 4.5]
    assert result.model_spec.version.value == 1


def check_reload_is_refused(site: Site) -> None:
    request = model_management_pb2.ReloadConfigRequest()
    request.config.model_config_list.config.add(name="digits_forest", base_path="/models")
    try:
        site.models.HandleReloadConfigRequest(request, timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        assert error.code() is grpc.StatusCode.UNIMPLEMENTED, error
    else:
        raise AssertionError("not refused")


def check_unknown_model(site: Site) -> None:
    try:
        site.predict("half", {"x": np.zeros((1, 1), np.float32)})
    except grpc.RpcError as error:
        wanted = (grpc.StatusCode.NOT_FOUND, "Servable not found for request: Latest(half)")
        assert (error.code(), error.details()) == wanted, error
    else:
        raise AssertionError("not refused")


def check_both_packages(site: Site) -> None:
    theirs = predict_pb2.PredictRequest(output_filter=["a"])
    theirs.inputs["x"].CopyFrom(tf.make_tensor_proto([[1, 2], [3, 4]]))
    mine = ours.PredictRequest.FromString(theirs.SerializeToString())
    assert mine.SerializeToString(deterministic=True) == theirs.SerializeToString(deterministic=True)
    assert type(mine) is not type(theirs)


PREDICTED = (
    "digits_cnn",
    "digits_cnn_ts",
    "digits_forest",
    "digits_keras",
    "digits_pipeline",
    "filetype",
    "identity_fp32",
    "text_length",
)
CHECKS = {name.removeprefix("check_"): run for name, run in list(globals().items()) if name.startswith("check_")}
CHECKS |= {f"predict[{model}]": lambda site, model=model: check_predict(site, model) for model in PREDICTED}
del CHECKS["predict"]


def main() -> None:
    site = Site(sys.argv[1], Path(sys.argv[2]))
    ended = {}
    for name, run in CHECKS.items():
        try:
            run(site)  # type: ignore[operator]
            ended[name] = "ok"
        except BaseException:
            ended[name] = traceback.format_exc()
    print(json.dumps(ended))


if __name__ == "__main__":
    main()
