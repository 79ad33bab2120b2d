"""Every error the server raises on purpose, sorted by whose move it is next.

::

    AiorchError
    |- RequestError            the caller must change the request
    |  |- UnsupportedRequest      the model or the server cannot do this at all
    |  |- PayloadTooLarge         a message or an expansion passed its limit
    |  |- RequestCancelled        the caller took the request back
    |  |- LoadNotAllowed          the server's control mode leaves loading to the repository
    |  |- OverrideRefused         a load request's own configuration or files make no model
    |  |- DeviceMissing           it needs a device that this machine does not have
    |  |- AlreadyExists           the name is taken
    |  |- NotAuthenticated        the caller must say who it is
    |  |- PermissionDenied        the caller may not do this
    |  |- PreconditionFailed      the caller must change something else first
    |  |- IdempotencyKeyReused    the key stands for another request already
    |  |- Conflict                somebody else was faster: look again, then decide
    |  |- ChecksumMismatch        what came is not what was announced
    |  `- InvalidSettings         the server was started with settings that are wrong
    |- NotFoundError           the caller must name something that exists
    |  |- UnknownModel            no model of that name
    |  `- UnknownVersion          the model is known, that version is not
    |- CapacityError           the caller may try again later
    |  |- QueueFull               the model's queue is at its bound
    |  |- AnswerTooLate           no answer could be in time, by what the server knows of the model
    |  |- QueueTimeout            the queue policy's time ran out
    |  |- DeadlineExpired         the caller's own deadline ran out
    |  |- StreamStalled           nobody took a stream's answers for too long
    |  |- QuotaExceeded           the tenant's quota is used up
    |  |- RegistryUnavailable     the registry's database or store does not answer
    |  |  |- StoreUnavailable        its artefact store does not
    |  |  `- OutcomeUnknown          ... and nobody knows whether the change was made
    |  |- IdentityUnavailable     what tells who a caller is does not answer
    |  |- ModelNotReady           the version exists, but does not serve (yet)
    |  |- MemoryBudgetExceeded    there is no room for the model in a device's memory budget now
    |  `- ServerStopping          the server takes no new requests
    |- BackendError            the model's owner must act
    |  |- ModelLoadError          the artefact or its configuration does not load
    |  `- ModelExecutionError     the model's code failed on a batch
    `- InternalError           we must act: a fault of this server

``code`` carries gRPC's number (https://grpc.io/docs/guides/status-codes/); doors translate it with one table each.
No error here knows a web framework, and none is ever told apart by its text. Callers see ``told`` where there is one,
else the text.
"""

from __future__ import annotations

import enum
from typing import ClassVar, Final, Self

#: When to come back where there was no room and nobody knows how long that lasts.
USUAL_PAUSE_NS: Final = 1_000_000_000


class Code(enum.IntEnum):
    """gRPC status codes, by number."""

    OK = 0
    CANCELLED = 1
    UNKNOWN = 2
    INVALID_ARGUMENT = 3
    DEADLINE_EXCEEDED = 4
    NOT_FOUND = 5
    ALREADY_EXISTS = 6
    PERMISSION_DENIED = 7
    RESOURCE_EXHAUSTED = 8
    FAILED_PRECONDITION = 9
    ABORTED = 10
    OUT_OF_RANGE = 11
    UNIMPLEMENTED = 12
    INTERNAL = 13
    UNAVAILABLE = 14
    DATA_LOSS = 15
    UNAUTHENTICATED = 16


class AiorchError(Exception):
    """Root of all errors of this package; ``str(error)`` is the text a client sees."""

    code: ClassVar[Code] = Code.UNKNOWN
    retryable: ClassVar[bool] = False
    #: What callers are told where the text is for operators alone, because it names places they need not know of.
    told: str = ""

    @property
    def public_text(self) -> str:
        """What callers may read of it, also where it became the reason of something else."""
        return self.told or str(self)

    def restate(self, text: str) -> Self:
        """The same error in other words: class, cause and whatever else it knows stay."""
        restated = type(self).__new__(type(self))
        restated.__dict__.update(self.__dict__)
        restated.args = (text,)
        restated.__cause__ = self.__cause__
        return restated


class RequestError(AiorchError):
    """The request is wrong; sending it again unchanged cannot help."""

    code = Code.INVALID_ARGUMENT


class UnsupportedRequest(RequestError):
    """The request is well formed, but this model or server does not do what it asks for."""

    code = Code.UNIMPLEMENTED


class PayloadTooLarge(RequestError):
    """A message, or what it unpacks to, is larger than the configured limit."""

    code = Code.RESOURCE_EXHAUSTED


class RequestCancelled(RequestError):
    """The caller cancelled the request or went away."""

    code = Code.CANCELLED


class LoadNotAllowed(RequestError):
    """Models are not loaded or unloaded by request in this control mode; Triton answers UNAVAILABLE."""

    code = Code.UNAVAILABLE


class OverrideRefused(RequestError):
    """The configuration or files in a load request make no model; INTERNAL, because Triton's programs check that."""

    code = Code.INTERNAL


class DeviceMissing(RequestError):
    """The request needs a device, such as a GPU, that this server does not have."""

    code = Code.UNAVAILABLE


class AlreadyExists(RequestError):
    """Something of that name is registered already."""

    code = Code.ALREADY_EXISTS


class NotAuthenticated(RequestError):
    """The call has no credentials, or none that hold."""

    code = Code.UNAUTHENTICATED


class PermissionDenied(RequestError):
    """The caller is known and may see what it asks for, but not do this with it."""

    code = Code.PERMISSION_DENIED


class PreconditionFailed(RequestError):
    """The state of what the request names does not allow it; the text says what does."""

    code = Code.FAILED_PRECONDITION


class IdempotencyKeyReused(RequestError):
    """The idempotency key was used for another request; a new request needs a new key."""


class Conflict(RequestError):
    """What the request builds upon was changed by somebody else; the text says by whom, where that is known."""

    code = Code.ABORTED


class ChecksumMismatch(RequestError):
    """The bytes that came are not those that were announced; nothing of them was kept."""

    code = Code.DATA_LOSS


class InvalidSettings(RequestError):
    """Settings the server was started with are wrong; the text names each one and where it came from."""


class NotFoundError(AiorchError):
    """What the request names does not exist here."""

    code = Code.NOT_FOUND


class UnknownModel(NotFoundError):
    """No model of that name; Triton answers INVALID_ARGUMENT here, and its clients rely on it."""

    code = Code.INVALID_ARGUMENT


class UnknownVersion(NotFoundError):
    """The model is known, the version is not."""


class CapacityError(AiorchError):
    """The server cannot take the request now; a later attempt may succeed.

    ``retry_after_ns`` from now it makes sense to try again; 0 where no time is known.
    """

    code = Code.UNAVAILABLE
    retryable = True

    def __init__(self, text: str = "", retry_after_ns: int = 0) -> None:
        super().__init__(text)
        self.retry_after_ns = retry_after_ns


class QueueFull(CapacityError):
    """The model's queue holds as many requests as its configuration allows."""

    def __init__(self, text: str = "", retry_after_ns: int = USUAL_PAUSE_NS) -> None:
        super().__init__(text, retry_after_ns)


class AnswerTooLate(CapacityError):
    """The request was not queued: its answer would come after the model's objective, or after its caller's deadline."""


class QueueTimeout(CapacityError):
    """The request waited longer than the model's queue policy allows."""

    def __init__(self, text: str = "", retry_after_ns: int = USUAL_PAUSE_NS) -> None:
        super().__init__(text, retry_after_ns)


class DeadlineExpired(CapacityError):
    """The caller's deadline passed before an answer was ready."""

    code = Code.DEADLINE_EXCEEDED
    retryable = False


class StreamStalled(CapacityError):
    """The answers of a stream were not taken for so long that the model had to wait too long to send more."""

    retryable = False


class QuotaExceeded(CapacityError):
    """The tenant has used up what it may; the text says which bound, and when to come back."""

    code = Code.RESOURCE_EXHAUSTED


class RegistryUnavailable(CapacityError):
    """The registry's database or artefact store cannot be reached; what is served goes on being served."""

    told = "the registry is away; nothing was changed, try again"


class StoreUnavailable(RegistryUnavailable):
    """The artefact store cannot be reached, or does not give what it holds."""

    told = "the artefact store does not answer; nothing was changed, try again"


class OutcomeUnknown(RegistryUnavailable):
    """The database went away while a change was written; repeating is safe with the same idempotency key alone."""

    retryable = False
    told = (
        "the registry went away while a change was being written; it is not known whether it was made: look, or repeat "
        "the call with the same idempotency key"
    )


class IdentityUnavailable(CapacityError):
    """Whether credentials hold cannot be found out now: the issuer of tokens, or whoever else tells it, is away."""


class ModelNotReady(CapacityError):
    """The model version exists but is loading, unloading or failed."""


class MemoryBudgetExceeded(CapacityError):
    """A model does not fit into what is left of a device's memory budget, and nothing can be evicted now."""


class ServerStopping(CapacityError):
    """The server is draining and takes no new requests."""


class BackendError(AiorchError):
    """The model or its artefact is at fault."""

    code = Code.INTERNAL


class ModelLoadError(BackendError):
    """An artefact or its configuration cannot be loaded; the text says what is wrong and where."""

    code = Code.INVALID_ARGUMENT


class ModelExecutionError(BackendError):
    """The model's own code failed while it ran a batch."""


class InternalError(AiorchError):
    """A fault of this server, not of the request or the model."""

    code = Code.INTERNAL


_BY_CODE: dict[int, type[AiorchError]] = {
    Code.INVALID_ARGUMENT: RequestError,
    Code.UNIMPLEMENTED: UnsupportedRequest,
    Code.CANCELLED: RequestCancelled,
    Code.ALREADY_EXISTS: AlreadyExists,
    Code.NOT_FOUND: NotFoundError,
    Code.RESOURCE_EXHAUSTED: PayloadTooLarge,
    Code.UNAVAILABLE: CapacityError,
    Code.DEADLINE_EXCEEDED: DeadlineExpired,
    Code.INTERNAL: ModelExecutionError,
}


def error_from_code(code: int, text: str) -> AiorchError:
    """The error that stands for a numeric gRPC code which came back from the compiled path; never raises itself."""
    return _BY_CODE.get(code, AiorchError)(text)
