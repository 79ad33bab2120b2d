"""Sections of a model configuration about tensors: inputs, outputs, batch tensors, warm-up data."""

from __future__ import annotations

import enum
from collections.abc import Mapping

from pydantic import Field, model_validator

from aiorch_server.config.problems import Problem, raise_problems
from aiorch_server.config.section import ConfigDataType, Dim, FileName, Flag, Section, UInt32


class Format(enum.StrEnum):
    """The layout of an image tensor, for readers of the configuration."""

    FORMAT_NONE = "FORMAT_NONE"
    FORMAT_NHWC = "FORMAT_NHWC"
    FORMAT_NCHW = "FORMAT_NCHW"


class Reshape(Section):
    """The shape the backend sees where it differs from ``dims``."""

    shape: tuple[Dim, ...] = ()


class ModelInput(Section):
    """An input tensor; ``dims`` leaves out the batch dimension of a batching model."""

    name: str = Field(min_length=1)
    data_type: ConfigDataType
    format: Format = Format.FORMAT_NONE
    dims: tuple[Dim, ...] = ()
    reshape: Reshape | None = None
    is_shape_tensor: Flag = False
    allow_ragged_batch: Flag = False
    optional: Flag = False
    is_non_linear_format_io: Flag = False


class ModelOutput(Section):
    """An output tensor; ``label_filename`` names a file beside the configuration with one label per line."""

    name: str = Field(min_length=1)
    data_type: ConfigDataType
    dims: tuple[Dim, ...] = ()
    reshape: Reshape | None = None
    label_filename: FileName = ""
    is_shape_tensor: Flag = False
    is_non_linear_format_io: Flag = False


class BatchInputKind(enum.StrEnum):
    """What a generated batch input holds."""

    BATCH_ELEMENT_COUNT = "BATCH_ELEMENT_COUNT"
    BATCH_ACCUMULATED_ELEMENT_COUNT = "BATCH_ACCUMULATED_ELEMENT_COUNT"
    BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO = "BATCH_ACCUMULATED_ELEMENT_COUNT_WITH_ZERO"
    BATCH_MAX_ELEMENT_COUNT_AS_SHAPE = "BATCH_MAX_ELEMENT_COUNT_AS_SHAPE"
    BATCH_ITEM_SHAPE = "BATCH_ITEM_SHAPE"
    BATCH_ITEM_SHAPE_FLATTEN = "BATCH_ITEM_SHAPE_FLATTEN"


class BatchInput(Section):
    """An input that the server makes from the composition of a batch."""

    kind: BatchInputKind = BatchInputKind.BATCH_ELEMENT_COUNT
    target_name: tuple[str, ...] = ()
    data_type: ConfigDataType
    source_input: tuple[str, ...] = ()


class BatchOutputKind(enum.StrEnum):
    """How an output is given back to the members of a batch."""

    BATCH_SCATTER_WITH_INPUT_SHAPE = "BATCH_SCATTER_WITH_INPUT_SHAPE"


class BatchOutput(Section):
    """An output whose split over the members follows the shape of an input."""

    target_name: tuple[str, ...] = ()
    kind: BatchOutputKind = BatchOutputKind.BATCH_SCATTER_WITH_INPUT_SHAPE
    source_input: tuple[str, ...] = ()


class WarmupInput(Section):
    """Data of one input for a warm-up run; exactly one source of data is written.

    ``input_data_file`` names a file in the model's ``warmup`` folder that holds the tensor's raw bytes.
    """

    data_type: ConfigDataType
    dims: tuple[Dim, ...] = ()
    zero_data: Flag | None = None
    random_data: Flag | None = None
    input_data_file: FileName | None = None

    @model_validator(mode="after")
    def _check(self) -> WarmupInput:
        written = [name for name in ("zero_data", "random_data", "input_data_file") if getattr(self, name)]
        if len(written) != 1:
            found = " and ".join(written) or "none"
            text = f"found {found}; exactly one of zero_data, random_data, input_data_file must be written"
            raise_problems([Problem((), text)])
        if any(size < 0 for size in self.dims):
            raise_problems([Problem(("dims",), f"found {list(self.dims)}; a warm-up needs definite sizes above 0")])
        return self


class ModelWarmup(Section):
    """One request that is run before a version becomes ready; ``count`` 0 stands for once."""

    name: str = ""
    batch_size: UInt32 = 0
    inputs: Mapping[str, WarmupInput] = {}
    count: UInt32 = 0
