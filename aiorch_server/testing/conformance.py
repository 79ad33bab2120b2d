"""The contract of ``aiorch_server.backend`` as one pytest class.

::

    class TestMyBackend(BackendConformance):
        def make_backend(self) -> Backend:
            return MyBackend()

        def write_artefact(self, folder: Path) -> Path:
            ...                      # a small real model, saved as the framework saves it
            return folder / "model.my"

        def expect(self, inputs):
            ...                      # the framework's own answer for these inputs

Needs pytest; nothing in the server imports it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from aiorch_server.backend import Backend, DeclaredSignature, LoadContext, ModelInstance
from aiorch_server.errors import ModelLoadError
from aiorch_server.testing.samples import contradict, make_inputs
from aiorch_server.types import DataType, ModelSignature, NumpyArray

_THREAD_DEADLINE_S = 60.0


class BackendConformance:
    """Subclass it with a name that pytest collects and fill in the three methods above; change attributes by need."""

    #: How far an answer may be from ``expect``, and a row of a batch from the row alone.
    rtol: ClassVar[float] = 1e-5
    atol: ClassVar[float] = 1e-6
    #: False for a backend that serves without an artefact: nothing on disk can then be missing or broken.
    needs_artefact: ClassVar[bool] = True
    #: What the tests' model configuration would say; formats that hold no signature need it.
    declared: ClassVar[DeclaredSignature] = DeclaredSignature()
    parameters: ClassVar[Mapping[str, str]] = {}
    allow_code: ClassVar[bool] = False
    #: False for a model without a batch dimension; the tests of batches then run one request at a time.
    is_batching: ClassVar[bool] = True
    _context: ClassVar[LoadContext]

    def make_backend(self) -> Backend:
        """A new object of the backend under test."""
        raise NotImplementedError

    def write_artefact(self, folder: Path) -> Path:
        """Writes a good artefact under ``folder`` (a version folder), gives its path; keeps things on the class."""
        raise NotImplementedError

    def expect(self, inputs: Mapping[str, NumpyArray]) -> Mapping[str, NumpyArray]:
        """The framework's own answer, computed without the backend; called after ``write_artefact``."""
        raise NotImplementedError

    def make_inputs(self, signature: ModelSignature, rows: int, seed: int = 0) -> dict[str, NumpyArray]:
        """Good inputs; made up from the signature unless a model needs others."""
        return make_inputs(signature, rows, seed)

    def make_bad_inputs(self, signature: ModelSignature) -> dict[str, NumpyArray]:
        """Inputs on which ``execute`` must raise; the first one is left out unless a model needs others."""
        inputs = self.make_inputs(signature, 1)
        inputs.pop(signature.inputs[0].name)
        return inputs

    # -- fixtures -----------------------------------------------------------------------------------------------

    @pytest.fixture
    def backend(self) -> Backend:
        """The backend under test, new for each test."""
        return self.make_backend()

    @pytest.fixture
    def context(self, tmp_path_factory: pytest.TempPathFactory) -> LoadContext:
        """A load context for an artefact that is written once per class."""
        own = type(self)
        if "_context" not in vars(own):
            model_directory = tmp_path_factory.mktemp("models") / "conformance"
            folder = model_directory / "3"
            folder.mkdir(parents=True)
            own._context = LoadContext(
                model_name="conformance",
                model_version=3,
                model_directory=model_directory,
                artefact=self.write_artefact(folder),
                declared=self.declared,
                parameters=self.parameters,
                allow_code=self.allow_code,
            )
        return own._context

    @pytest.fixture
    def signature(self, backend: Backend, context: LoadContext) -> ModelSignature:
        """What the backend reads from the artefact."""
        return backend.inspect(context)

    @pytest.fixture
    def instance(self, backend: Backend, context: LoadContext, signature: ModelSignature) -> Iterator[ModelInstance]:
        """A loaded instance, closed after the test; a test may close it itself."""
        instance = backend.load(context, signature)
        yield instance
        instance.close()

    # -- signature ----------------------------------------------------------------------------------------------

    def test_signature_is_complete(self, signature: ModelSignature) -> None:
        """There are inputs and outputs, their names are unique, and batching is as announced."""
        assert signature.inputs and signature.outputs
        for specs in (signature.inputs, signature.outputs):
            assert len({spec.name for spec in specs}) == len(specs)
        assert (signature.max_batch_size > 0) == self.is_batching

    def test_declared_signature_is_accepted(self, backend: Backend, context: LoadContext) -> None:
        """Declaring exactly what the artefact holds changes nothing; a smaller max_batch_size is taken over."""
        own = backend.inspect(context)
        size = min(own.max_batch_size, 2)
        declared = DeclaredSignature(own.inputs, own.outputs, size)
        assert backend.inspect(replace(context, declared=declared)) == replace(own, max_batch_size=size)

    def test_one_output_may_be_declared_alone(self, backend: Backend, context: LoadContext) -> None:
        """Outputs that the configuration leaves out are not served."""
        own = backend.inspect(context)
        if len(own.outputs) == 1:
            assert self.declared.outputs in ((), own.outputs)
            return
        declared = DeclaredSignature(own.inputs, own.outputs[1:], own.max_batch_size)
        narrowed_context = replace(context, declared=declared)
        narrowed = backend.inspect(narrowed_context)
        assert narrowed.outputs == own.outputs[1:]
        inputs = self.make_inputs(narrowed, 2)
        outputs = backend.load(narrowed_context, narrowed).execute(inputs)
        assert set(outputs) == {spec.name for spec in own.outputs[1:]}
        self.check_equal({name: self.expect(inputs)[name] for name in outputs}, outputs)

    def test_wrong_declaration_is_refused(self, backend: Backend, context: LoadContext) -> None:
        """Another name, type or number of dimensions raises ModelLoadError that names the tensor."""
        for word, declared in contradict(backend.inspect(context)):
            with pytest.raises(ModelLoadError) as raised:
                self.load_and_run(backend, replace(context, declared=declared))
            assert word in str(raised.value), declared

    def load_and_run(self, backend: Backend, context: LoadContext) -> None:
        """Loads as the server does; formats without a signature of their own may refuse later than ``inspect``."""
        backend.load(context, backend.inspect(context))

    # -- artefacts ----------------------------------------------------------------------------------------------

    def test_missing_artefact_is_named(self, backend: Backend, context: LoadContext, tmp_path: Path) -> None:
        """No file or folder: ModelLoadError with the file's name and the model's, without the server's paths."""
        if not self.needs_artefact:
            assert backend.inspect(replace(context, artefact=tmp_path / "nothing"))
            return
        missing = context.artefact.with_name("absent" + context.artefact.suffix)
        self.check_refused(backend, replace(context, artefact=missing))

    @pytest.mark.parametrize("content", [b"", b"\x00garbage\xff" * 100], ids=["empty", "garbage"])
    def test_broken_artefact_is_named(
        self, backend: Backend, context: LoadContext, tmp_path: Path, content: bytes
    ) -> None:
        """A file that is no model: ModelLoadError with the file's name."""
        if not self.needs_artefact:
            assert backend.inspect(replace(context, artefact=tmp_path / "nothing"))
            return
        folder = tmp_path / "broken" / "1"
        folder.mkdir(parents=True)
        broken = folder / context.artefact.name
        broken.write_bytes(content)
        self.check_refused(backend, replace(context, artefact=broken, model_directory=tmp_path / "broken"))

    def check_refused(self, backend: Backend, context: LoadContext) -> None:
        """Inspecting must raise ModelLoadError whose text holds the file name and model, but no folder above it."""
        with pytest.raises(ModelLoadError) as raised:
            backend.inspect(context)
        text = str(raised.value)
        assert context.artefact.name in text
        assert context.model_name in text
        assert str(context.model_directory.parent) not in text

    # -- answers ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("rows", [1, 2, 7])
    def test_answers_are_the_frameworks(self, instance: ModelInstance, signature: ModelSignature, rows: int) -> None:
        """Batches of several sizes give what the framework itself gives."""
        inputs = self.make_inputs(signature, rows)
        expected = {name: array.copy() for name, array in self.expect(inputs).items()}
        self.check_equal(expected, instance.execute(inputs))

    @pytest.mark.parametrize("rows", [1, 5])
    def test_outputs_match_signature(self, instance: ModelInstance, signature: ModelSignature, rows: int) -> None:
        """Names, dtypes, shapes and rows are those of the signature; BYTES are objects of bytes."""
        outputs = instance.execute(self.make_inputs(signature, rows))
        assert set(outputs) == {spec.name for spec in signature.outputs}
        for spec in signature.outputs:
            array = outputs[spec.name]
            assert isinstance(array, np.ndarray)
            assert array.dtype == spec.datatype.numpy
            shape = array.shape
            if signature.max_batch_size:
                assert shape[0] == rows
                shape = shape[1:]
            assert len(shape) == len(spec.shape)
            assert all(want in (-1, have) for want, have in zip(spec.shape, shape, strict=True))
            if spec.datatype is DataType.BYTES:
                assert all(isinstance(element, bytes) for element in array.ravel())

    def test_batch_equals_single_rows(self, instance: ModelInstance, signature: ModelSignature) -> None:
        """A batch of N gives row by row what N batches of one give: no row sees its neighbours."""
        rows = 6 if signature.max_batch_size else 1
        inputs = self.make_inputs(signature, rows, seed=5)
        together = {name: array.copy() for name, array in instance.execute(inputs).items()}
        for row in range(rows if signature.max_batch_size else 0):
            alone = {name: np.ascontiguousarray(array[row : row + 1]) for name, array in inputs.items()}
            self.check_equal({name: array[row : row + 1] for name, array in together.items()}, instance.execute(alone))
        self.check_equal(self.expect(inputs), together)

    def test_outputs_outlive_the_next_call(self, instance: ModelInstance, signature: ModelSignature) -> None:
        """What one call gave is not overwritten by the next, as long as the first call's inputs stay."""
        first_inputs = self.make_inputs(signature, 3, seed=1)
        first = instance.execute(first_inputs)
        kept = {name: array.copy() for name, array in first.items()}
        instance.execute(self.make_inputs(signature, 3, seed=2))
        for name, array in first.items():
            np.testing.assert_array_equal(array, kept[name])

    def test_inputs_are_left_alone(self, instance: ModelInstance, signature: ModelSignature) -> None:
        """The server's staging memory is read, not written."""
        inputs = self.make_inputs(signature, 3)
        before = {name: array.copy() for name, array in inputs.items()}
        instance.execute(inputs)
        for name, array in inputs.items():
            np.testing.assert_array_equal(array, before[name])

    def test_read_only_inputs_are_taken(self, instance: ModelInstance, signature: ModelSignature) -> None:
        """Arrays over received bytes cannot be written to; that is neither an error nor a warning."""
        inputs = self.make_inputs(signature, 2)
        for array in inputs.values():
            array.setflags(write=False)
        self.check_equal(self.expect(inputs), instance.execute(inputs))

    # -- life ---------------------------------------------------------------------------------------------------

    def test_serves_after_an_error(self, instance: ModelInstance, signature: ModelSignature) -> None:
        """A batch that fails leaves the instance usable."""
        with pytest.raises(Exception):  # noqa: B017 - the contract leaves the class to the framework
            instance.execute(self.make_bad_inputs(signature))
        inputs = self.make_inputs(signature, 2, seed=9)
        self.check_equal(self.expect(inputs), instance.execute(inputs))

    def test_close_twice(self, instance: ModelInstance) -> None:
        """A second close does nothing, also before anything ran."""
        instance.close()
        instance.close()

    def test_close_leaves_others(self, backend: Backend, context: LoadContext, signature: ModelSignature) -> None:
        """Instances are on their own: closing one does not stop another, and a new one can be loaded."""
        first = backend.load(context, signature)
        second = backend.load(context, signature)
        first.close()
        inputs = self.make_inputs(signature, 2)
        self.check_equal(self.expect(inputs), second.execute(inputs))
        second.close()
        self.check_equal(self.expect(inputs), backend.load(context, signature).execute(inputs))

    def test_two_instances_in_two_threads(
        self, backend: Backend, context: LoadContext, signature: ModelSignature
    ) -> None:
        """Two instances, each loaded and run by a thread of its own, give right answers at the same time."""
        rounds = 20
        batches = [[self.make_inputs(signature, 2, seed=100 * who + turn) for turn in range(rounds)] for who in (0, 1)]
        expected = [[dict(self.expect(inputs)) for inputs in own] for own in batches]
        together = threading.Barrier(2, timeout=_THREAD_DEADLINE_S)
        failures: list[BaseException] = []

        def drive(who: int) -> None:
            try:
                instance = backend.load(replace(context, instance_index=who), signature)
                together.wait()
                for inputs, answer in zip(batches[who], expected[who], strict=True):
                    self.check_equal(answer, instance.execute(inputs))
                instance.close()
            except BaseException as error:
                together.abort()
                failures.append(error)

        threads = [threading.Thread(target=drive, args=(who,), daemon=True) for who in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(_THREAD_DEADLINE_S)
            assert not thread.is_alive()
        if failures:
            raise failures[0]

    # -- comparing ----------------------------------------------------------------------------------------------

    def check_equal(self, expected: Mapping[str, NumpyArray], given: Mapping[str, NumpyArray]) -> None:
        """Same names, shapes and values; floats within ``rtol`` and ``atol``."""
        assert set(given) == set(expected)
        for name, array in expected.items():
            assert given[name].shape == array.shape, name
            if array.dtype.kind == "f":
                answer, wanted = given[name].astype(np.float64), array.astype(np.float64)
                np.testing.assert_allclose(answer, wanted, rtol=self.rtol, atol=self.atol, err_msg=name)
            else:
                np.testing.assert_array_equal(given[name], array, err_msg=name)
