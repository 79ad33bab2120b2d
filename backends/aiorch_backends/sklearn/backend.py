"""The scikit-learn backend: asks an estimator for one row to learn what it gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from aiorch_backends.common import (
    FoundTensor,
    OpenedArtefacts,
    complete_signature,
    decode_text,
    encode_text,
    import_framework,
    refuse,
)
from aiorch_backends.sklearn.estimators import open_estimator
from aiorch_server.backend import Backend, LoadContext, ModelInstance
from aiorch_server.errors import ModelExecutionError
from aiorch_server.types import DataType, ModelSignature, NumpyArray

_INPUT = "input"
_INPUT_TYPES = (DataType.FP64, DataType.FP32, DataType.BYTES)


class SklearnBackend(Backend):
    """Serves fitted estimators and pipelines; each instance has its own copy."""

    name = "sklearn"
    platforms = ("sklearn", "scikit-learn")
    artefacts = ("model.skops", "model.joblib", "model.pkl")
    #: skops files hold trusted types only, and pickles ask for allow_code wherever they come from.
    runs_code = False
    parameters = ("trusted_types",)

    def __init__(self) -> None:
        self._estimators: OpenedArtefacts[Any] = OpenedArtefacts()

    def inspect(self, context: LoadContext) -> ModelSignature:
        """Inputs from ``n_features_in_``, outputs from what the estimator gives for one row."""
        estimator = open_estimator(context)
        given = _describe_input(context, estimator)
        sample = np.array([[b"text"]], dtype=np.object_) if given.datatype is DataType.BYTES else _zeros(given)
        outputs = []
        for name, method in _list_methods(estimator).items():
            try:
                row = method(_prepare(given.datatype, sample))
            except Exception as error:
                raise refuse(context, f"the estimator fails on a sample row: {error}") from error
            if not isinstance(row, np.ndarray):
                # Several targets at once give a list of probabilities, one for each; only their labels are served.
                continue
            outputs.append(FoundTensor(name, _choose_datatype(name, row), (-1, *row.shape[1:])))
        signature = complete_signature(context, [given], outputs)
        self._estimators.put(context, estimator)
        return signature

    def load(self, context: LoadContext, signature: ModelSignature) -> ModelInstance:
        """Opens the estimator, or takes the one that ``inspect`` opened; limits the thread pools it computes with."""
        estimator = self._estimators.take(context) or open_estimator(context)
        # OpenMP counts per calling thread, so this belongs in the instance's own; BLAS pools are the process's.
        import_framework("threadpoolctl", extra="sklearn").threadpool_limits(limits=context.threads)
        return SklearnInstance(estimator, signature)


class SklearnInstance(ModelInstance):
    """Runs only the methods whose outputs are served."""

    def __init__(self, estimator: Any, signature: ModelSignature) -> None:
        methods = _list_methods(estimator)
        self._input = signature.inputs[0]
        self._outputs = [(spec.name, spec.datatype, methods[spec.name]) for spec in signature.outputs]

    def execute(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """Outputs are fresh arrays, cast to the signature's types."""
        if self._input.name not in inputs:
            raise ModelExecutionError(f"input '{self._input.name}' is missing")
        rows = _prepare(self._input.datatype, inputs[self._input.name])
        return {name: _cast(datatype, method(rows)) for name, datatype, method in self._outputs}

    def close(self) -> None:
        """Lets go of the estimator."""
        self._outputs = []


def _list_methods(estimator: Any) -> dict[str, Callable[[Any], Any]]:
    """What a client can get, by output name."""
    if not hasattr(estimator, "classes_"):
        return {"prediction": estimator.predict}
    methods: dict[str, Callable[[Any], Any]] = {"label": estimator.predict}
    if hasattr(estimator, "predict_proba"):
        methods["probabilities"] = estimator.predict_proba
    return methods


def _describe_input(context: LoadContext, estimator: Any) -> FoundTensor:
    features = getattr(estimator, "n_features_in_", None)
    declared = {spec.name: spec.datatype for spec in context.declared.inputs}.get(_INPUT, DataType.FP64)
    if features is not None and declared is not DataType.BYTES:
        return FoundTensor(_INPUT, declared if declared in _INPUT_TYPES else DataType.FP64, (-1, int(features)))
    if features is None and any(spec.datatype is DataType.BYTES for spec in context.declared.inputs):
        return FoundTensor(_INPUT, DataType.BYTES, (-1, 1))
    if features is None:
        raise refuse(
            context,
            "the estimator does not say how many features it takes; one that takes texts is declared as "
            f'input [ {{ name: "{_INPUT}" data_type: TYPE_STRING dims: [ 1 ] }} ]',
        )
    raise refuse(context, f"input '{_INPUT}' is declared as TYPE_STRING, but the estimator takes {features} numbers")


def _zeros(given: FoundTensor) -> NumpyArray:
    assert given.shape is not None
    return np.zeros((1, *given.shape[1:]), dtype=given.datatype.numpy)


def _prepare(datatype: DataType, rows: NumpyArray) -> Any:
    return decode_text(rows, _INPUT).ravel() if datatype is DataType.BYTES else rows


def _choose_datatype(name: str, row: NumpyArray) -> DataType:
    if row.dtype.kind in "OSU":
        return DataType.BYTES
    if row.dtype.kind == "b":
        return DataType.BOOL
    return DataType.INT64 if row.dtype.kind in "iu" and name != "probabilities" else DataType.FP64


def _cast(datatype: DataType, rows: Any) -> NumpyArray:
    if datatype is DataType.BYTES:
        return encode_text(np.asarray(rows))
    return np.ascontiguousarray(rows, dtype=datatype.numpy)
