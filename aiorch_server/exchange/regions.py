"""System shared memory that clients have registered: which objects, how much of them, and copying in and out.

Nothing is ever mapped. A mapping of an object that its owner shrinks ends the process with SIGBUS, and one that its
owner writes to can change between the check of a tensor and its use. So bytes are copied with ``pread`` and ``pwrite``
on the object's descriptor, which tell the end of the object instead of dying there.

Errors are Triton's where its clients know them (server/src/shared_memory_manager.cc, server/src/common.cc).
"""

from __future__ import annotations

import os
import stat
import weakref
from collections import deque
from dataclasses import dataclass

import numpy as np

from aiorch_server.errors import (
    AlreadyExists,
    CapacityError,
    DeviceMissing,
    NotFoundError,
    PayloadTooLarge,
    RequestError,
    UnsupportedRequest,
)

#: Where ``shm_open`` has its objects on Linux.
_FOLDER = "/dev/shm"
_LONGEST_KEY = 255
_LONGEST_NAME = 1024
#: Keys that belong to servers' own processes: Triton's python backend, and ours.
_RESERVED = ("triton_python_backend_shm_region_", "aiorch_internal_")
#: One message holds less than this, and so does one tensor.
_LARGEST_TENSOR_BYTES = 2**31 - 1
DISABLED = "Client shared memory is disabled. Start the server with '--allow-client-shm=true' to enable."


@dataclass(frozen=True, slots=True)
class SystemRegion:
    """A registered region as SystemSharedMemoryStatus shows it."""

    name: str
    key: str
    offset: int
    byte_size: int


class OpenRegion:
    """A region and the descriptor of its object, which is closed with the last reference to this.

    The registration is one reference; each request that uses the region, and each thread that copies, holds another.
    """

    def __init__(self, facts: SystemRegion, descriptor: int) -> None:
        self.facts = facts
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)

    def read(self, offset: int, size: int, booking: Booking) -> memoryview:
        """A copy of ``size`` bytes at ``offset`` of the region; RequestError if the object has become too small.

        The copy keeps ``booking``, whoever holds it and as long as they do.
        """
        copied = np.empty(size, np.uint8)
        weakref.finalize(copied, _drop, booking)
        data = copied.data
        done = 0
        while done < size:
            read = os.preadv(self._descriptor, [data[done:]], self.facts.offset + offset + done)
            if not read:
                raise self._shrunk()
            done += read
        return data.toreadonly()

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Copies ``data`` to ``offset`` of the region; RequestError if the object has become too small."""
        view = memoryview(data).cast("B")
        place = self.facts.offset + offset
        # Writing behind its end would make the object longer again; a client that shrinks it right now gains nothing.
        if os.fstat(self._descriptor).st_size < place + view.nbytes:
            raise self._shrunk()
        try:
            while view.nbytes:
                written = os.pwrite(self._descriptor, view, place)
                view, place = view[written:], place + written
        except OSError as error:
            raise RequestError(
                f"shared memory region '{self.facts.name}' cannot be written: {error.strerror}"
            ) from error

    def _shrunk(self) -> RequestError:
        return RequestError(
            f"the object '{self.facts.key}' behind shared memory region '{self.facts.name}' has become smaller than "
            "the region; unregister it"
        )


@dataclass(frozen=True, slots=True)
class Place:
    """Part of a region that holds a tensor, or shall."""

    region: OpenRegion
    offset: int
    byte_size: int

    def read(self, booking: Booking) -> memoryview:
        """A copy of the bytes; see OpenRegion.read."""
        return self.region.read(self.offset, self.byte_size, booking)

    def write(self, data: bytes | memoryview) -> None:
        """Copies ``data``, at most ``byte_size`` bytes, to the start; raises as OpenRegion.write."""
        self.region.write(self.offset, data)


class Booking:
    """Bytes that copies may take; they are given back with the last reference to it, on any thread.

    Each copy holds one, and so does the thread that makes it: it goes on after its request was cancelled, and a model
    may have its input longer than anybody waits for the answer.
    """

    __slots__ = ("__weakref__",)


def _drop(booking: Booking) -> None:
    """The end of a copy: its reference goes."""


class SharedRegions:
    """The registered regions by name; belongs to the event loop's thread.

    ``keys`` says which objects may be registered: "off" none, "on" all but reserved ones, else a prefix such as
    "/camera_". ``max_bytes`` bounds all registered regions together, and once more all copies of inputs that requests
    hold at a time.
    """

    def __init__(self, keys: str = "off", *, max_regions: int = 256, max_bytes: int = 1 << 30) -> None:
        self.is_enabled = keys != "off"
        self._prefix = "" if keys in ("on", "off") else keys.lstrip("/")
        self._max_regions = max_regions
        self._max_bytes = max_bytes
        self._regions: dict[str, OpenRegion] = {}
        self._copied_bytes = 0
        #: What was given back and is not counted yet; filled by any thread, also by the garbage collector.
        self._given: deque[int] = deque()

    def register(self, name: str, key: str, offset: int, byte_size: int) -> None:
        """Makes ``byte_size`` bytes at ``offset`` of the object ``key`` known as ``name``.

        Raises UnsupportedRequest while switched off, RequestError, AlreadyExists, NotFoundError or PayloadTooLarge.
        """
        self.check_enabled()
        file_name = self._check_key(name, key)
        if name in self._regions:
            raise AlreadyExists(f"shared memory region '{name}' already in manager")
        if not name or len(name) > _LONGEST_NAME or byte_size <= 0 or offset < 0:
            raise _invalid(name)
        if len(self._regions) >= self._max_regions:
            raise PayloadTooLarge(f"{self._max_regions} shared memory regions are registered, which is the most")
        total = byte_size + sum(region.facts.byte_size for region in self._regions.values())
        if total > self._max_bytes:
            raise PayloadTooLarge(
                f"with region '{name}' all shared memory regions would have {total} bytes, expected at most "
                f"{self._max_bytes}"
            )
        descriptor = _open_object(file_name, key)
        region = OpenRegion(SystemRegion(name, key, offset, byte_size), descriptor)
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or offset + byte_size > found.st_size:
            raise _invalid(name)
        self._regions[name] = region

    def unregister(self, name: str = "") -> None:
        """Forgets one region, or all for an empty name; one that is unknown is no error, as in Triton.

        Requests that use it keep it until they are answered.
        """
        if name:
            self._regions.pop(name, None)
        else:
            self._regions.clear()

    def list_regions(self, name: str = "") -> list[SystemRegion]:
        """All regions, or the named one; NotFoundError if there is none of that name."""
        if not name:
            return [region.facts for region in self._regions.values()]
        if name not in self._regions:
            raise NotFoundError(f"Unable to find system shared memory region: '{name}'")
        return [self._regions[name].facts]

    def find(self, name: str, offset: int, byte_size: int) -> Place:
        """The part of a region, which stays usable as long as it is held; NotFoundError, RequestError."""
        self.check_enabled()
        region = self._regions.get(name)
        if region is None:
            raise NotFoundError(f"Unable to find shared memory region: '{name}'")
        if not 0 <= offset < region.facts.byte_size:
            raise RequestError(f"Invalid offset for shared memory region: '{name}'")
        if byte_size < 0 or offset + byte_size > region.facts.byte_size:
            raise RequestError(f"Invalid offset + byte size for shared memory region: '{name}'")
        if byte_size > _LARGEST_TENSOR_BYTES:
            raise PayloadTooLarge(f"a tensor of {byte_size} bytes, expected at most {_LARGEST_TENSOR_BYTES}")
        return Place(region, offset, byte_size)

    def take_copied(self, size: int) -> Booking:
        """Books ``size`` bytes of copies; CapacityError where that is too much."""
        held = self.count_copied()
        if held + size > self._max_bytes:
            raise CapacityError(
                f"requests hold {held} bytes copied from shared memory and {size} more are asked for, expected at most "
                f"{self._max_bytes}; try again later"
            )
        booking = Booking()
        weakref.finalize(booking, self._given.append, size)
        self._copied_bytes = held + size
        return booking

    def count_copied(self) -> int:
        """Bytes that are booked now."""
        while self._given:
            self._copied_bytes -= self._given.popleft()
        return self._copied_bytes

    def check_enabled(self) -> None:
        """UnsupportedRequest while shared memory is switched off."""
        if not self.is_enabled:
            raise UnsupportedRequest(DISABLED)

    def _check_key(self, name: str, key: str) -> str:
        """The object's name without slashes in front; RequestError for keys that are none or are not allowed."""
        file_name = key.lstrip("/")
        is_plain = file_name not in ("", ".", "..") and not set(file_name) & {"/", "\0"}
        try:
            size = len(os.fsencode(file_name))
        except UnicodeEncodeError:
            is_plain, size = False, 0
        if not is_plain or size > _LONGEST_KEY:
            raise RequestError(f"cannot register shared memory region '{name}' - invalid shm key '{key}'")
        for prefix in _RESERVED:
            if file_name.startswith(prefix):
                raise RequestError(
                    f"cannot register shared memory region '{name}' with key '{key}' as the key contains the reserved "
                    f"prefix '{prefix}'"
                )
        if not file_name.startswith(self._prefix):
            raise RequestError(
                f"cannot register shared memory region '{name}' with key '{key}': this server allows keys that start "
                f"with '/{self._prefix}' only"
            )
        return file_name


def _open_object(file_name: str, key: str) -> int:
    """The descriptor of a shared memory object. Absent, forbidden and wrong ones are told apart by nobody."""
    try:
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
        folder = os.open(_FOLDER, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            return os.open(file_name, flags, dir_fd=folder)
        finally:
            os.close(folder)
    except (OSError, ValueError):
        raise NotFoundError(f"Unable to open shared memory region: '{key}'") from None


def _invalid(name: str) -> RequestError:
    return RequestError(f"failed to register shared memory region '{name}': invalid args")


def refuse_cuda_region(name: str) -> DeviceMissing:
    """The error for a CUDA region that is registered: there is no GPU whose memory could be shared."""
    return DeviceMissing(
        f"failed to register CUDA shared memory region '{name}': this server has no GPU, use system shared memory or "
        "send tensors in the request"
    )


def refuse_cuda_status(name: str) -> None:
    """NotFoundError for the status of a named CUDA region; the status of all (empty name) is that there is none."""
    if name:
        raise NotFoundError(f"Unable to find cuda shared memory region: '{name}'")
