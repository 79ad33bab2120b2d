"""Who gets in: the one decision of both doors, with a memory of what was found out before."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from aiorch_server.errors import NotAuthenticated, PermissionDenied
from aiorch_server.security.access import Access
from aiorch_server.security.authenticator import Authenticator, Credentials, Identity
from aiorch_server.security.identity import Principal
from aiorch_server.security.permissions import TABLE, Scope
from aiorch_server.security.policy import Policy
from aiorch_server.security.roles import Role

logger = logging.getLogger(__name__)

#: Callers that are remembered; what one needs is bounded by the doors' bounds on headers.
MAX_REMEMBERED: Final = 10_000
#: How often changes are looked for, and how long a look may take.
INTERVAL_S: Final = 1.0
_LOOK_LIMIT_S: Final = 4.0
#: A pass of the compiled door ends by itself after that time, so that whoever uses it is seen here now and then.
PASS_S: Final = 30.0
#: Whoever asks what needs no credentials.
NOBODY: Final = Principal("nobody")


class Passes(Protocol):
    """What lets calls through the compiled door without asking here again."""

    @property
    def generation(self) -> int:
        """How often it was cleared."""
        ...

    def admit(
        self, credential: bytes, model: str, *, expires_ns: int, generation: int, tenant: str, is_certificate: bool
    ) -> None:
        """ModelInfer of ``model`` with this credential needs no question until ``expires_ns`` (monotonic).

        Does nothing if it was cleared since ``generation`` was read. The credential is the value of the one
        authorization header; without such a header, the connection's certificate in DER.
        """
        ...

    def clear(self) -> None:
        """From now on everything is asked again."""
        ...


class _Remembered(NamedTuple):
    identity: Identity
    until_ns: int  # wall clock, 0: for ever


class Gate:
    """Authenticates callers and says what they may do; on one event loop. ``follow`` must run for revocations to hold.

    ``clock`` gives nanoseconds since 1970.
    """

    def __init__(
        self,
        authenticators: Sequence[Authenticator],
        policy: Policy,
        *,
        passes: Passes | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._authenticators = tuple(authenticators)
        self._policy = policy
        self._passes = passes
        self._clock = clock
        self._remembered: OrderedDict[Credentials, _Remembered] = OrderedDict()
        self._generation = 0
        self.expects = " or ".join(dict.fromkeys(each.expects for each in self._authenticators)) or "credentials"

    async def enter(self, call: str, credentials: Credentials) -> Access:
        """What the caller with these credentials may do in ``call``, a key of permissions.TABLE.

        NotAuthenticated without credentials that hold, PermissionDenied where no model makes a difference, and for a
        call that the table does not have. What it may do with a model is asked of the result.
        """
        permission = TABLE.get(call)
        if permission is not None and permission.scope is Scope.OPEN:
            return Access(NOBODY, permission)
        generation = self._generation
        principal = await self._find_principal(credentials)
        access = Access(principal, permission, credentials, generation)
        if permission is None:
            raise PermissionDenied(f"nobody may call {call}: it is not in the table of permissions")
        role = permission.role
        if permission.scope is Scope.SERVER:
            access.require_everywhere(role or Role.ADMIN)
        elif permission.scope is Scope.ANYWHERE and not principal.may_anywhere(role or Role.ADMIN):
            raise PermissionDenied(f"'{principal.name}' needs the role {(role or Role.ADMIN).name.lower()} for {call}")
        return access

    async def renew(self, access: Access) -> None:
        """Asks again for a call that goes on, before it gets or gives anything more; raises as ``enter``.

        Cheap while nothing has changed and nothing has expired.
        """
        if access.permission is None or access.permission.scope is Scope.OPEN:
            return
        expires_ns = access.principal.expires_ns
        if access.generation == self._generation and not 0 < expires_ns <= self._clock():
            return
        renewed = await self.enter(access.permission.call, access.credentials)
        access.principal, access.generation = renewed.principal, renewed.generation

    def admit(self, access: Access, model: str) -> None:
        """Lets the next ModelInfer of this caller to ``model`` through the compiled door; for calls that went well."""
        raise NotImplementedError

    def forget(self) -> None:
        """Whatever was decided before is decided again from now on."""
        self._generation += 1
        self._remembered.clear()
        if self._passes is not None:
            self._passes.clear()

    async def follow(self) -> None:
        """Looks for revocations and changed keys every INTERVAL_S; until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_S)
            looks = [asyncio.wait_for(each.refresh(), _LOOK_LIMIT_S) for each in self._authenticators]
            found = await asyncio.gather(*looks, return_exceptions=True)
            if any(each is True for each in found):
                self.forget()

    async def _find_principal(self, credentials: Credentials) -> Principal:
        remembered = self._remembered.get(credentials)
        if remembered is not None and (not remembered.until_ns or self._clock() < remembered.until_ns):
            return self._policy.bind(remembered.identity)
        raise NotAuthenticated(f"this call needs credentials: {self.expects}")
