import datetime

from google.protobuf import duration_pb2 as _duration_pb2
from google.protobuf import field_mask_pb2 as _field_mask_pb2
from google.protobuf import timestamp_pb2 as _timestamp_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Objective(_message.Message):
    __slots__ = ("model", "percentile", "latency_us", "error_budget", "min_instances", "max_instances", "max_batch_size", "priority", "instance_cost")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PERCENTILE_FIELD_NUMBER: _ClassVar[int]
    LATENCY_US_FIELD_NUMBER: _ClassVar[int]
    ERROR_BUDGET_FIELD_NUMBER: _ClassVar[int]
    MIN_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    MAX_INSTANCES_FIELD_NUMBER: _ClassVar[int]
    MAX_BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    INSTANCE_COST_FIELD_NUMBER: _ClassVar[int]
    model: str
    percentile: float
    latency_us: int
    error_budget: float
    min_instances: int
    max_instances: int
    max_batch_size: int
    priority: int
    instance_cost: float
    def __init__(self, model: _Optional[str] = ..., percentile: _Optional[float] = ..., latency_us: _Optional[int] = ..., error_budget: _Optional[float] = ..., min_instances: _Optional[int] = ..., max_instances: _Optional[int] = ..., max_batch_size: _Optional[int] = ..., priority: _Optional[int] = ..., instance_cost: _Optional[float] = ...) -> None: ...

class GetObjectiveRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class SetObjectiveRequest(_message.Message):
    __slots__ = ("objective", "update_mask", "idempotency_key")
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    UPDATE_MASK_FIELD_NUMBER: _ClassVar[int]
    IDEMPOTENCY_KEY_FIELD_NUMBER: _ClassVar[int]
    objective: Objective
    update_mask: _field_mask_pb2.FieldMask
    idempotency_key: str
    def __init__(self, objective: _Optional[_Union[Objective, _Mapping]] = ..., update_mask: _Optional[_Union[_field_mask_pb2.FieldMask, _Mapping]] = ..., idempotency_key: _Optional[str] = ...) -> None: ...

class ExplainRequest(_message.Message):
    __slots__ = ("model",)
    MODEL_FIELD_NUMBER: _ClassVar[int]
    model: str
    def __init__(self, model: _Optional[str] = ...) -> None: ...

class RecordTrafficRequest(_message.Message):
    __slots__ = ("model", "version", "duration")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    VERSION_FIELD_NUMBER: _ClassVar[int]
    DURATION_FIELD_NUMBER: _ClassVar[int]
    model: str
    version: int
    duration: _duration_pb2.Duration
    def __init__(self, model: _Optional[str] = ..., version: _Optional[int] = ..., duration: _Optional[_Union[datetime.timedelta, _duration_pb2.Duration, _Mapping]] = ...) -> None: ...

class RecordedTraffic(_message.Message):
    __slots__ = ("version", "times_ns", "rows", "lost")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    TIMES_NS_FIELD_NUMBER: _ClassVar[int]
    ROWS_FIELD_NUMBER: _ClassVar[int]
    LOST_FIELD_NUMBER: _ClassVar[int]
    version: int
    times_ns: _containers.RepeatedScalarFieldContainer[int]
    rows: _containers.RepeatedScalarFieldContainer[int]
    lost: int
    def __init__(self, version: _Optional[int] = ..., times_ns: _Optional[_Iterable[int]] = ..., rows: _Optional[_Iterable[int]] = ..., lost: _Optional[int] = ...) -> None: ...

class Decision(_message.Message):
    __slots__ = ("time", "knob", "before", "after", "reason", "effect")
    TIME_FIELD_NUMBER: _ClassVar[int]
    KNOB_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    EFFECT_FIELD_NUMBER: _ClassVar[int]
    time: _timestamp_pb2.Timestamp
    knob: str
    before: float
    after: float
    reason: str
    effect: str
    def __init__(self, time: _Optional[_Union[datetime.datetime, _timestamp_pb2.Timestamp, _Mapping]] = ..., knob: _Optional[str] = ..., before: _Optional[float] = ..., after: _Optional[float] = ..., reason: _Optional[str] = ..., effect: _Optional[str] = ...) -> None: ...

class Explanation(_message.Message):
    __slots__ = ("model", "objective", "knobs", "decisions")
    class KnobsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    MODEL_FIELD_NUMBER: _ClassVar[int]
    OBJECTIVE_FIELD_NUMBER: _ClassVar[int]
    KNOBS_FIELD_NUMBER: _ClassVar[int]
    DECISIONS_FIELD_NUMBER: _ClassVar[int]
    model: str
    objective: Objective
    knobs: _containers.ScalarMap[str, float]
    decisions: _containers.RepeatedCompositeFieldContainer[Decision]
    def __init__(self, model: _Optional[str] = ..., objective: _Optional[_Union[Objective, _Mapping]] = ..., knobs: _Optional[_Mapping[str, float]] = ..., decisions: _Optional[_Iterable[_Union[Decision, _Mapping]]] = ...) -> None: ...
