from __future__ import annotations

import pickle
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import joblib
import numpy as np
import pytest
import skops.io
from aiorch_backends.sklearn import SklearnBackend
from sklearn.cluster import KMeans
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LinearRegression, LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext
from aiorch_server.errors import ModelLoadError, RequestError
from aiorch_server.testing import BackendConformance
from aiorch_server.types import DataType, NumpyArray, TensorSpec

FEATURES = 5
_GENERATOR = np.random.default_rng(3)
ROWS = _GENERATOR.standard_normal((80, FEATURES))
CLASSES = (ROWS[:, 0] + ROWS[:, 1] > 0).astype(np.int64)


class SklearnConformance(BackendConformance):
    estimator: ClassVar[Any]

    def make_backend(self) -> Backend:
        return SklearnBackend()

    def write_artefact(self, folder: Path) -> Path:
        skops.io.dump(self.estimator, folder / "model.skops")
        return folder / "model.skops"


class TestClassifier(SklearnConformance):
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, CLASSES)

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        rows = inputs["input"]
        return {"label": self.estimator.predict(rows), "probabilities": self.estimator.predict_proba(rows)}


class TestNamedClasses(SklearnConformance):
    """Labels are strings, there are no probabilities, rows are declared FP32."""

    estimator = LinearSVC().fit(ROWS, np.array(["nein", "ja, äußerst"])[CLASSES])
    declared = DeclaredSignature((TensorSpec("input", DataType.FP32, (FEATURES,)),), (), 16)

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        labels = self.estimator.predict(inputs["input"])
        return {"label": np.array([label.encode() for label in labels], object)}

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        super().test_wrong_declaration_is_refused(backend, context)
        assert backend.inspect(context).inputs[0].datatype is DataType.FP32


class TestRegressor(SklearnConformance):
    """Two targets at once, pickled by joblib."""

    estimator = LinearRegression().fit(ROWS, ROWS[:, :2] * 3)
    allow_code = True

    def write_artefact(self, folder: Path) -> Path:
        joblib.dump(self.estimator, folder / "model.joblib")
        return folder / "model.joblib"

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        return {"prediction": self.estimator.predict(inputs["input"])}


class TestTexts(SklearnConformance):
    estimator = make_pipeline(TfidfVectorizer(), LogisticRegression()).fit(
        ["plain words", "two words", "plain zürich", "東京"], [0, 1, 0, 1]
    )
    declared = DeclaredSignature((TensorSpec("input", DataType.BYTES, (1,)),))

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        texts = [text.decode() for text in np.asarray(inputs["input"], object)[:, 0]]
        return {"label": self.estimator.predict(texts), "probabilities": self.estimator.predict_proba(texts)}

    def test_broken_utf8_is_the_callers_fault(self, backend: Backend, context: LoadContext) -> None:
        instance = backend.load(context, backend.inspect(context))
        with pytest.raises(RequestError, match="input 'input', element 0: not UTF-8"):
            instance.execute({"input": np.array([[b"\xff"]], object)})


def save(folder: Path, estimator: Any) -> LoadContext:
    skops.io.dump(estimator, folder / "model.skops")
    return make_context(folder / "model.skops")


def make_context(artefact: Path, **changes: Any) -> LoadContext:
    changes.setdefault("declared", DeclaredSignature())
    return LoadContext("model", 1, artefact.parent.parent, artefact, **changes)


def test_clusters_are_whole_numbers(tmp_path: Path) -> None:
    estimator = KMeans(n_clusters=2, n_init=1, random_state=0).fit(ROWS)
    backend, context = SklearnBackend(), save(tmp_path, estimator)
    signature = backend.inspect(context)
    assert signature.outputs == (TensorSpec("prediction", DataType.INT64, ()),)
    answer = backend.load(context, signature).execute({"input": ROWS[:4]})["prediction"]
    np.testing.assert_array_equal(answer, estimator.predict(ROWS[:4]))


def test_several_targets_have_labels_but_no_probabilities(tmp_path: Path) -> None:
    estimator = RandomForestClassifier(3, random_state=0).fit(ROWS, np.stack([CLASSES, 1 - CLASSES], axis=1))
    skops.io.dump(estimator, tmp_path / "model.skops")
    context = make_context(tmp_path / "model.skops", parameters={"trusted_types": "sklearn.tree._tree.Tree"})
    assert SklearnBackend().inspect(context).outputs == (TensorSpec("label", DataType.INT64, (2,)),)


def test_untrusted_types_are_named_and_can_be_allowed(tmp_path: Path) -> None:
    context = save(tmp_path, RandomForestClassifier(2, random_state=0).fit(ROWS, CLASSES))
    with pytest.raises(ModelLoadError, match=r"not trusted: sklearn\.tree\._tree\.Tree.*trusted_types"):
        SklearnBackend().inspect(context)
    allowed = make_context(context.artefact, parameters={"trusted_types": "some.Other, sklearn.tree._tree.Tree"})
    assert SklearnBackend().inspect(allowed).inputs[0].shape == (FEATURES,)


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, ("import sys; sys.modules['pickle_went_off'] = sys",)


@pytest.mark.parametrize("name", ["model.pkl", "model.joblib"])
def test_pickles_are_not_opened_unless_allowed(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(ModelLoadError, match="allow_code is off"):
        SklearnBackend().inspect(make_context(tmp_path / name))
    assert "pickle_went_off" not in sys.modules
    with pytest.raises(ModelLoadError, match="no predict method"):
        SklearnBackend().inspect(make_context(tmp_path / name, allow_code=True))
    assert sys.modules.pop("pickle_went_off") is sys


def test_text_pipeline_without_declaration_says_what_to_write(tmp_path: Path) -> None:
    context = save(tmp_path, TestTexts.estimator)
    with pytest.raises(ModelLoadError, match=r'name: "input" data_type: TYPE_STRING dims: \[ 1 \]'):
        SklearnBackend().inspect(context)


def test_texts_for_numbers_are_refused(tmp_path: Path) -> None:
    context = save(tmp_path, TestClassifier.estimator)
    declared = DeclaredSignature((TensorSpec("input", DataType.BYTES, (1,)),))
    with pytest.raises(ModelLoadError, match="TYPE_STRING, but the estimator takes 5 numbers"):
        SklearnBackend().inspect(make_context(context.artefact, declared=declared))


def test_unfitted_estimator_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="does not say how many features"):
        SklearnBackend().inspect(save(tmp_path, LogisticRegression()))


def test_estimator_fitted_on_a_data_frame_does_not_warn(tmp_path: Path) -> None:
    estimator = make_pipeline(StandardScaler(), LogisticRegression()).fit(ROWS, CLASSES)
    estimator[0].feature_names_in_ = np.array([f"f{place}" for place in range(FEATURES)], object)
    backend, context = SklearnBackend(), save(tmp_path, estimator)
    answer = backend.load(context, backend.inspect(context)).execute({"input": ROWS})
    np.testing.assert_array_equal(answer["label"], TestClassifier.estimator.predict(ROWS))


def test_parallel_estimators_use_the_instances_share(tmp_path: Path) -> None:
    estimator = RandomForestClassifier(2, random_state=0, n_jobs=-1).fit(ROWS, CLASSES)
    joblib.dump(estimator, tmp_path / "model.joblib")
    backend, context = SklearnBackend(), make_context(tmp_path / "model.joblib", allow_code=True, threads=1)
    backend.inspect(context)
    opened = backend._estimators.take(context)
    assert opened is not None and opened.n_jobs == 1
