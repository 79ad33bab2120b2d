"""Who gets in: the one decision of both doors, with a memory of what was found out before."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Final, NamedTuple, Protocol

from aiorch_server._core import Quota
from aiorch_server.errors import (
    AiorchError,
    CapacityError,
    IdentityUnavailable,
    InternalError,
    NotAuthenticated,
    PermissionDenied,
)
from aiorch_server.security.access import Access
from aiorch_server.security.authenticator import Authenticator, Credentials, Identity
from aiorch_server.security.identity import Principal, RoleBinding
from aiorch_server.security.permissions import TABLE, Scope
from aiorch_server.security.policy import GROUP, Policy
from aiorch_server.security.quotas import MAX_TENANT_BYTES, QuotaBook, QuotaBounds
from aiorch_server.security.roles import Role

logger = logging.getLogger(__name__)

#: Callers that are remembered, by a digest of what they showed.
MAX_REMEMBERED: Final = 10_000
#: How often changes are looked for, and how long a look may take.
INTERVAL_S: Final = 1.0
_LOOK_LIMIT_S: Final = 4.0
#: How long an authenticator may take over one caller; those that come with the server have shorter bounds of their own.
_FIND_LIMIT_S: Final = 20.0
#: A pass of the compiled door ends by itself after that time, so that whoever uses it is seen here now and then.
PASS_NS: Final = 30_000_000_000
_LONGEST_NAME: Final = 256
#: Whoever asks what needs no credentials.
NOBODY: Final = Principal("nobody")


class Passes(Protocol):
    """What lets ModelInfer through the compiled door without asking here again; see _core.Passes."""

    @property
    def generation(self) -> int:
        """How often it was cleared."""
        ...

    def add(
        self,
        credential: bytes,
        model: str,
        *,
        expires_ns: int,
        generation: int,
        quota: Quota | None = None,
        tenant: int = 0,
        weight: float = 1.0,
        is_certificate: bool = False,
    ) -> bool:
        """Keeps a pass until ``expires_ns`` on the monotonic clock, unless it was cleared since ``generation``."""
        ...

    def clear(self) -> None:
        """From now on everything is asked again."""
        ...


class RoleSource(Protocol):
    """Where roles are granted, quotas set and keys revoked while the server runs: the registry."""

    async def read_generation(self) -> int:
        """Another number after each change of bindings, quotas or API keys; CapacityError while nobody can say."""
        ...

    async def read_rules(self) -> tuple[Sequence[RoleBinding], Sequence[QuotaBounds]]:
        """All bindings and quotas."""
        ...


class _Remembered(NamedTuple):
    principal: Principal
    until_ns: int  # on the wall clock; 0: as long as nothing changes
    is_bound: bool


class Gate:
    """Authenticates callers and says what they may do; on one event loop. ``follow`` must run for revocations to hold.

    ``clock`` gives nanoseconds since 1970.
    """

    def __init__(
        self,
        authenticators: Sequence[Authenticator],
        policy: Policy,
        quotas: QuotaBook | None = None,
        *,
        passes: Passes | None = None,
        source: RoleSource | None = None,
        clock: Callable[[], int] = time.time_ns,
    ) -> None:
        self._authenticators = tuple(authenticators)
        self._policy = policy
        self._quotas = quotas or QuotaBook()
        self._passes = passes
        self._source = source
        self._source_generation: int | None = None
        self._looking_at_source = asyncio.Lock()
        self._clock = clock
        self._remembered: OrderedDict[bytes, _Remembered] = OrderedDict()
        self._generation = 0
        self._quiet: set[str] = set()
        self._expects = " or ".join(dict.fromkeys(each.expects for each in self._authenticators)) or "credentials"

    async def enter(self, call: str, credentials: Credentials) -> Access:
        """What the caller with these credentials may do in ``call``, a key of permissions.TABLE.

        NotAuthenticated without credentials that hold, PermissionDenied where no model makes a difference, and for a
        call that the table does not have; CapacityError where it cannot be found out now. What the caller may do with a
        model is asked of the result.
        """
        permission = TABLE.get(call)
        if permission is not None and permission.scope is Scope.OPEN:
            return Access(NOBODY, permission)
        generation = self._generation
        principal = await self._find_principal(credentials)
        if permission is None:
            raise PermissionDenied(f"{call} is not in the table of permissions, so nobody may call it")
        tenant = principal.tenant
        access = Access(
            principal, permission, credentials, generation, self._quotas.find(tenant), self._quotas.find_share(tenant)
        )
        role = permission.role or Role.ADMIN
        if permission.scope is Scope.SERVER:
            access.require_everywhere(role)
        elif permission.scope is Scope.ANYWHERE and not principal.may_anywhere(role):
            raise PermissionDenied(f"'{principal.name}' needs the role {role.name.lower()} on some model for {call}")
        return access

    async def identify(self, credentials: Credentials) -> Principal:
        """Who shows these, whatever is called; raises as ``enter``."""
        return await self._find_principal(credentials)

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
        access.quota, access.share = renewed.quota, renewed.share

    def admit(self, access: Access, model: str) -> None:
        """Lets further ModelInfer of this caller to ``model`` through the compiled door; for a call that went well."""
        if self._passes is None or access.generation != self._generation:
            return
        credentials = access.credentials
        remembered = self._remembered.get(_digest(credentials))
        if remembered is None or remembered.is_bound:
            return
        left_ns = remembered.until_ns - self._clock() if remembered.until_ns else PASS_NS
        self._passes.add(
            credentials.authorizations[0] if credentials.authorizations else credentials.certificate,
            model,
            expires_ns=time.monotonic_ns() + min(left_ns, PASS_NS),
            generation=self._passes.generation,
            quota=access.quota,
            tenant=access.share.number,
            weight=access.share.weight,
            is_certificate=not credentials.authorizations,
        )

    def list_quotas(self) -> list[Quota]:
        """The quotas of the tenants that are counted now."""
        return self._quotas.list_quotas()

    def forget(self) -> None:
        """Whatever was decided before is decided again from now on."""
        self._generation += 1
        self._remembered.clear()
        if self._passes is not None:
            self._passes.clear()

    async def follow(self) -> None:
        """Looks for revocations, changed roles and changed keys every INTERVAL_S; until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(INTERVAL_S)

    async def look(self) -> None:
        """Looks once, at the source and at all authenticators; forgets what was decided where anything has changed."""
        looks = [self._look(each.expects, each.refresh()) for each in self._authenticators]
        _, *have_changed = await asyncio.gather(self.note_change(), *looks)
        if any(have_changed):
            self.forget()

    async def note_change(self) -> bool:
        """Looks at the source alone, at once: what was changed there before this was called holds when it returns.

        Where the source cannot be read, what was decided before is forgotten with the next look that succeeds.
        """
        return await self._look("the roles of the registry", self._look_at_source())

    async def close(self) -> None:
        """Closes the authenticators; what they raise is logged."""
        found = await asyncio.gather(*(each.close() for each in self._authenticators), return_exceptions=True)
        for each in found:
            if isinstance(each, Exception):
                logger.error("an authenticator did not close in order: %s", type(each).__name__)

    async def _look(self, what: str, look: object) -> bool:
        """The outcome; a failure is told once, until a look succeeds again."""
        try:
            has_changed = bool(await asyncio.wait_for(look, _LOOK_LIMIT_S))  # type: ignore[arg-type]
        except Exception as error:
            if what not in self._quiet:
                self._quiet.add(what)
                logger.warning("no look at %s, what was known stays in force: %s", what, type(error).__name__)
            return False
        self._quiet.discard(what)
        return has_changed

    async def _look_at_source(self) -> bool:
        if self._source is None:
            return False
        async with self._looking_at_source:  # an earlier look must not bring older rules than a later one
            return await self._read_source(self._source)

    async def _read_source(self, source: RoleSource) -> bool:
        generation = await source.read_generation()
        if generation == self._source_generation:
            return False
        try:
            bindings, quotas = await source.read_rules()
            self._policy.replace(bindings)
            self._quotas.replace(quotas)
            self.forget()
        except CapacityError:
            raise
        except Exception:
            self.forget()  # rules that cannot be honoured must not keep a revoked key in force
            raise
        self._source_generation = generation
        return True

    async def _find_principal(self, credentials: Credentials) -> Principal:
        digest = _digest(credentials)
        remembered = self._remembered.get(digest)
        if remembered is not None:
            if not remembered.until_ns or self._clock() < remembered.until_ns:
                self._remembered.move_to_end(digest)
                return remembered.principal
            del self._remembered[digest]
        generation = self._generation
        identity = await self._authenticate(credentials)
        if 0 < identity.expires_ns <= self._clock():
            raise NotAuthenticated("the credentials have expired")
        principal = self._policy.bind(identity)
        if generation == self._generation:
            self._remembered[digest] = _Remembered(principal, identity.expires_ns, identity.is_bound)
            if len(self._remembered) > MAX_REMEMBERED:
                self._remembered.popitem(last=False)
        return principal

    async def _authenticate(self, credentials: Credentials) -> Identity:
        if credentials.is_empty:
            raise NotAuthenticated(f"this call needs credentials: {self._expects}")
        if len(credentials.authorizations) > 1:
            raise NotAuthenticated("the call has several authorization headers; expected one")
        for authenticator in self._authenticators:
            identity = await self._ask(authenticator, credentials)
            if identity is not None:
                _check_names(identity)
                return identity
        raise NotAuthenticated(f"the credentials are not of a kind that is accepted here; expected {self._expects}")

    async def _ask(self, authenticator: Authenticator, credentials: Credentials) -> Identity | None:
        try:
            async with asyncio.timeout(_FIND_LIMIT_S):
                return await authenticator.authenticate(credentials)
        except AiorchError:
            raise
        except TimeoutError:
            raise IdentityUnavailable("who calls could not be found out in time") from None
        except Exception as error:
            # Its text and its traceback may hold what the caller has shown.
            logger.error("%s failed with %s", type(authenticator).__qualname__, type(error).__name__)
            raise InternalError("internal error while the credentials were checked") from None


def _digest(credentials: Credentials) -> bytes:
    digest = hashlib.sha256(credentials.certificate)
    for value in credentials.authorizations:
        digest.update(b"\0%d\0" % len(value))
        digest.update(value)
    return digest.digest()


def _check_names(identity: Identity) -> None:
    name = identity.name
    if not identity.tenant.isprintable():
        raise NotAuthenticated("the credentials name a tenant with characters that are not printable")
    if len((identity.tenant or name).encode("utf-8", "replace")) > MAX_TENANT_BYTES:
        raise NotAuthenticated(
            f"the credentials name a tenant, or a caller without one, of over {MAX_TENANT_BYTES} bytes"
        )
    if not name or len(name) > _LONGEST_NAME or not name.isprintable() or name.startswith(GROUP):
        raise NotAuthenticated(
            f"the credentials name a caller with no name of 1 to {_LONGEST_NAME} printable characters, or with one "
            f"that begins with '{GROUP}'"
        )
