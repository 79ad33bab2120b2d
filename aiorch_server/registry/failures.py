"""What an error of a database's driver means for the caller."""

from __future__ import annotations

from typing import Any, Final, TypeVar

from sqlalchemy.exc import DBAPIError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from aiorch_server.errors import AiorchError, InternalError, OutcomeUnknown, RegistryUnavailable
from aiorch_server.registry.urls import DatabaseUrl

#: Serialization failure, deadlock; MySQL's deadlock, record changed; SQLite's busy, locked.
_TRANSIENT_STATES: Final = ("40001", "40P01")
_TRANSIENT_NUMBERS: Final = (1213, 1020)
_SQLITE_BUSY: Final = (5, 6)
#: Lock not available, statement cancelled; MySQL's lock wait timeout.
_BUSY_STATES: Final = ("55P03", "57014")
_BUSY_NUMBER: Final = 1205
_NO_TABLE_STATE: Final = "42P01"
_NO_TABLE_NUMBER: Final = 1146
#: By class of SQLSTATE: insufficient resources, operator intervention, system error, a connection's end, wrong login.
_AWAY_CLASSES: Final = ("53", "57", "58", "08", "28", "3D")
_LONGEST_REASON = 300
_Error = TypeVar("_Error", bound=AiorchError)


def is_transient(error: BaseException) -> bool:
    """Whether the transaction was undone for the sake of another, so that it may well pass now."""
    cause = _find_cause(error)
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF in _SQLITE_BUSY:
        return True
    return _read_state(cause) in _TRANSIENT_STATES or _read_number(cause) in _TRANSIENT_NUMBERS


def is_lost(error: BaseException) -> bool:
    """Whether the connection broke."""
    return isinstance(error, DBAPIError) and error.connection_invalidated


def explain(error: BaseException, url: DatabaseUrl, *, is_committing: bool) -> AiorchError:
    """The error to raise in place of one of SQLAlchemy's."""
    if is_committing and (is_lost(error) or not isinstance(error, DBAPIError)):
        return explain_unknown(url)
    cause = _find_cause(error)
    state, number = _read_state(cause), _read_number(cause)
    reason = _shorten(url.hide(str(cause)))
    where = f"the registry's database {url}"
    if isinstance(error, PoolTimeout) or is_transient(error) or state in _BUSY_STATES or number == _BUSY_NUMBER:
        return _tell(
            RegistryUnavailable(f"{where} is busy; nothing was changed, try again: {reason}"),
            "the registry is busy; nothing was changed, try again",
        )
    if state == _NO_TABLE_STATE or number == _NO_TABLE_NUMBER or "no such table" in reason:
        return _tell(
            RegistryUnavailable(f"{where} has no tables: run `aiorch registry upgrade`"),
            "the registry is away: its tables are not set up; nothing was changed",
        )
    is_away = is_lost(error) or isinstance(error, OperationalError | InterfaceError) or state[:2] in _AWAY_CLASSES
    if is_away or "file is not a database" in reason:
        return _tell(
            RegistryUnavailable(f"{where} cannot be used, and nothing was changed: {reason}"),
            "the registry is away: its database cannot be used; nothing was changed, try again",
        )
    return _tell(
        InternalError(f"{where} refused a statement ({type(cause).__name__}): {reason}"),
        "internal error in the registry; the server's log says more",
    )


def explain_silence(url: DatabaseUrl, limit_s: float) -> RegistryUnavailable:
    """The error for a database that does not answer."""
    said = f"did not answer within {limit_s:g} s; nothing was changed"
    error = RegistryUnavailable(f"the registry's database {url} {said}")
    return _tell(error, f"the registry is away: its database {said}, try again")


def explain_unknown(url: DatabaseUrl) -> OutcomeUnknown:
    """The error for a change of which nobody knows whether it was made."""
    return OutcomeUnknown(
        f"the registry's database {url} broke off while a change was being written; it is not known whether it was "
        "made: look, or repeat the call with the same idempotency key"
    )


def _tell(error: _Error, told: str) -> _Error:
    """``error`` with what callers are told of it: they need not know where the database is, and who uses it."""
    error.told = told
    return error


def _find_cause(error: BaseException) -> BaseException:
    found = getattr(error, "orig", None)
    return found if isinstance(found, BaseException) else error


def _read_state(cause: Any) -> str:
    state = getattr(cause, "sqlstate", None)
    return state if isinstance(state, str) else ""


def _read_number(cause: BaseException) -> int:
    """MySQL's number for an error; drivers give it as the first argument."""
    first = cause.args[0] if cause.args else None
    return first if isinstance(first, int) else 0


def _shorten(reason: str) -> str:
    return reason if len(reason) <= _LONGEST_REASON else reason[:_LONGEST_REASON] + "..."
