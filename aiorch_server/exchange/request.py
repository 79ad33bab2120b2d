"""What one request has outside of its message, and wants done with its outputs, until it is answered."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Final, Self, TypeVar

from aiorch_server.errors import RequestError
from aiorch_server.exchange.classes import CLASSIFICATION, classify, read_count
from aiorch_server.exchange.regions import Booking, Place, SharedRegions
from aiorch_server.types import InferenceRequest, InferenceResponse, ModelSignature, Parameter, Tensor, TensorSpec

_T = TypeVar("_T")
_REGION: Final = "shared_memory_region"
_OFFSET: Final = "shared_memory_offset"
_SIZE: Final = "shared_memory_byte_size"
#: Copied on the event loop up to here (about 0.1 ms), beyond on a thread.
_LARGEST_INLINE_BYTES: Final = 1 << 20
#: Sorted on the event loop up to here, beyond on a thread.
_LARGEST_INLINE_CLASSES_BYTES: Final = 1 << 15


class Exchange:
    """Brings a request's inputs out of shared memory, and its outputs into it or into classes; used on the event loop.

    Regions are found when it is made, so that unregistering one during the request changes nothing for it. Used as a
    context manager; leaving it drops its hold on the copies, whose memory is given back when nobody has them any more.
    """

    def __init__(self, regions: SharedRegions, request: InferenceRequest, signature: ModelSignature) -> None:
        """Raises RequestError, UnsupportedRequest, NotFoundError, PayloadTooLarge or CapacityError."""
        self._regions = regions
        self._request = request
        self._inputs: dict[int, Place] = {}
        self._outputs: dict[str, Place] = {}
        self._classes: dict[str, int] = {}
        self._signature = signature
        for index, tensor in enumerate(request.inputs):
            if tensor.parameters and (place := _find_place(regions, tensor.name, tensor.parameters)):
                self._inputs[index] = place
        for output in request.outputs:
            if not output.parameters:
                continue
            if count := read_count(output.parameters, self._find_output(output.name)):
                if _REGION in output.parameters:
                    raise RequestError(f"output can't set both '{_REGION}' and '{CLASSIFICATION}'")
                self._classes[output.name] = count
            if place := _find_place(regions, output.name, output.parameters):
                self._outputs[output.name] = place
        self._booking: Booking | None = None

    def __enter__(self) -> Self:
        size = sum(place.byte_size for place in self._inputs.values())
        if size:
            self._booking = self._regions.take_copied(size)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._booking = None

    async def bring(self) -> InferenceRequest:
        """The request with the bytes of all its inputs; RequestError if an object has become too small."""
        booking = self._booking
        if booking is None:
            return self._request
        inputs = list(self._request.inputs)
        for index, place in self._inputs.items():
            data = await _run(functools.partial(place.read, booking), place.byte_size)
            inputs[index] = dataclasses.replace(inputs[index], data=data)
        return dataclasses.replace(self._request, inputs=inputs)

    async def deliver(self, response: InferenceResponse) -> InferenceResponse:
        """The response with outputs as the request wanted them; those in shared memory have ``data`` None.

        RequestError for an output that does not fit.
        """
        if not self._outputs and not self._classes:
            return response
        outputs = [await self._classify(await self._put(tensor)) for tensor in response.outputs]
        return dataclasses.replace(response, outputs=outputs)

    async def _classify(self, tensor: Tensor) -> Tensor:
        count = self._classes.get(tensor.name)
        if count is None:
            return tensor
        spec = self._find_output(tensor.name)
        labels = spec.labels if spec is not None else ()
        has_batch = self._signature.max_batch_size > 0
        size = memoryview(tensor.data or b"").nbytes
        limit = _LARGEST_INLINE_CLASSES_BYTES
        return await _run(lambda: classify(tensor, count, labels, has_batch=has_batch), size, limit)

    def _find_output(self, name: str) -> TensorSpec | None:
        return next((spec for spec in self._signature.outputs if spec.name == name), None)

    async def _put(self, tensor: Tensor) -> Tensor:
        place = self._outputs.get(tensor.name)
        if place is None:
            return tensor
        data = b"" if tensor.data is None else tensor.data
        size = memoryview(data).nbytes
        if size > place.byte_size:
            raise RequestError(
                f"shared memory size specified with the request for output '{tensor.name}' ({place.byte_size} bytes) "
                f"should be at least {size} bytes to hold the results"
            )
        await _run(lambda: place.write(data), size)
        parameters: dict[str, Parameter] = {
            **tensor.parameters,
            _REGION: place.region.facts.name,
            _SIZE: size,
        }
        if place.offset:
            parameters[_OFFSET] = place.offset
        return dataclasses.replace(tensor, data=None, parameters=parameters)


async def _run(job: Callable[[], _T], size: int, largest_inline: int = _LARGEST_INLINE_BYTES) -> _T:
    return job() if size <= largest_inline else await asyncio.to_thread(job)


def _find_place(regions: SharedRegions, tensor: str, parameters: Mapping[str, Parameter]) -> Place | None:
    if _REGION not in parameters:
        for name in (_OFFSET, _SIZE):
            if name in parameters:
                raise RequestError(f"'{name}' can not be specified without '{_REGION}' parameter for tensor '{tensor}'")
        return None
    region = parameters[_REGION]
    if type(region) is not str:
        raise _wrong_type(_REGION, tensor, "string_param")
    numbers = []
    for name in (_OFFSET, _SIZE):
        value = parameters.get(name, 0)
        if type(value) is not int:
            raise _wrong_type(name, tensor, "int64_param")
        numbers.append(value)
    return regions.find(region, *numbers)


def _wrong_type(name: str, tensor: str, expected: str) -> RequestError:
    return RequestError(f"invalid value type for '{name}' parameter for tensor '{tensor}', expected {expected}.")
