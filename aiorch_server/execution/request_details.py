"""What travels with a request beside its tensors, for models that take requests."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from aiorch_server.execution.callers import Callers, current_callers
from aiorch_server.execution.response_channel import ResponseChannel
from aiorch_server.tracing import Run
from aiorch_server.types import InferenceRequest, Parameter, SequencePlace

#: Parameters that mean something to the server; models see the others. Triton: docs/protocol/extension_parameters.md.
_RESERVED: Final = frozenset(
    {"sequence_id", "sequence_start", "sequence_end", "priority", "timeout", "headers", "binary_data_output"}
)
_RESERVED_PREFIX: Final = "triton_"


@dataclass(slots=True)
class RequestDetails:
    """Goes with a request as its attachment.

    ``channel`` is set for decoupled models. ``answer_parameters`` is the way back of an ordinary answer's parameters.
    ``callers`` are the models whose code asked for it. ``run`` is set where the request is watched.
    """

    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    sequence: SequencePlace = field(default_factory=SequencePlace)
    timeout_us: int = 0
    channel: ResponseChannel | None = None
    answer_parameters: Mapping[str, Parameter] = field(default_factory=dict)
    callers: Callers = ()
    run: Run | None = None

    @classmethod
    def of(
        cls,
        request: InferenceRequest,
        sequence: SequencePlace,
        *,
        timeout_us: int = 0,
        channel: ResponseChannel | None = None,
        run: Run | None = None,
    ) -> RequestDetails:
        """The details of a checked request."""
        parameters = request.parameters
        if parameters:
            parameters = {
                name: value
                for name, value in parameters.items()
                if name not in _RESERVED and not name.startswith(_RESERVED_PREFIX)
            }
        return cls(
            parameters,
            sequence,
            timeout_us,
            channel,
            callers=current_callers.get(),
            run=run,
        )
