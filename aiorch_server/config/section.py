"""The base of all configuration sections, and the number types they share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, StrictBool

from aiorch_server.config.names import check_file_name
from aiorch_server.types import DataType


class Section(BaseModel):
    """A frozen part of a configuration; unknown keys are problems, never ignored."""

    # What is wrong may be a secret, and pydantic's own text has it all; ours are made in `problems`.
    model_config = ConfigDict(
        extra="forbid", frozen=True, protected_namespaces=(), allow_inf_nan=False, hide_input_in_errors=True
    )


def _refuse_bool(value: object) -> object:
    # Pydantic reads true as 1, which hides a slip such as `count: yes`.
    if isinstance(value, bool):
        raise ValueError("should be a number, not true or false")
    return value


def _read_data_type(value: object) -> object:
    if isinstance(value, DataType):
        return value
    try:
        return DataType.from_config_name(str(value))
    except KeyError:
        raise ValueError(f"should be one of {', '.join(each.config_name for each in DataType)}") from None


# Numbers may come as strings: protobuf's JSON form writes 64-bit integers so.
_NUMBER = BeforeValidator(_refuse_bool)
Flag = StrictBool
Whole = Annotated[int, _NUMBER]
Int32 = Annotated[int, _NUMBER, Field(ge=-(2**31), lt=2**31)]
Int64 = Annotated[int, _NUMBER, Field(ge=-(2**63), lt=2**63)]
UInt32 = Annotated[int, _NUMBER, Field(ge=0, lt=2**32)]
UInt64 = Annotated[int, _NUMBER, Field(ge=0, lt=2**64)]
Number = Annotated[float, _NUMBER]
#: Microseconds that still fit into signed 64-bit nanoseconds, the core's unit.
Microseconds = Annotated[int, _NUMBER, Field(ge=0, le=(2**63 - 1) // 1000)]
Version = Annotated[int, _NUMBER, Field(ge=1, lt=2**63)]
FileName = Annotated[str, AfterValidator(check_file_name)]
ConfigDataType = Annotated[
    DataType, BeforeValidator(_read_data_type), PlainSerializer(lambda value: value.config_name, return_type=str)
]


def _check_dim(value: int) -> int:
    if value != -1 and value <= 0:
        raise ValueError("should be greater than 0, or -1 for any size")
    return value


Dim = Annotated[Int64, AfterValidator(_check_dim)]
