"""What says who a caller is: the interface of all authenticators, and what they look at and give."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field

from aiorch_server.security.identity import AuthMethod, RoleBinding

__all__ = ["AuthMethod", "Authenticator", "Credentials", "Identity"]


@dataclass(frozen=True, slots=True)
class Credentials:
    """What a call shows, the same at every door; never written anywhere, so it shows nothing of itself.

    ``authorizations`` are the values of its ``authorization`` headers, verbatim; ``certificate`` is the one in DER that
    the connection's handshake has proved and checked against the door's authorities, empty without one.
    """

    authorizations: tuple[bytes, ...] = field(default=(), repr=False)
    certificate: bytes = field(default=b"", repr=False)

    @property
    def bearer(self) -> str | None:
        """The token of ``authorization: Bearer TOKEN`` (RFC 6750), None where there is something else or nothing."""
        if len(self.authorizations) != 1:
            return None
        scheme, _, token = self.authorizations[0].partition(b" ")
        token = token.strip(b" ")
        if scheme.lower() != b"bearer" or not token or not token.isascii():
            return None
        return token.decode("ascii")

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to look at."""
        return not self.authorizations and not self.certificate


@dataclass(frozen=True, slots=True)
class Identity:
    """Who somebody is, as one authenticator found out.

    ``name`` is what role bindings and the audit log speak of; ``roles`` are what the credentials themselves grant.
    ``expires_ns`` is absolute on the wall clock, 0 for never. ``is_bound``: it holds with this connection's certificate
    alone.
    """

    name: str
    method: AuthMethod
    tenant: str = ""
    groups: tuple[str, ...] = ()
    roles: tuple[RoleBinding, ...] = ()
    expires_ns: int = 0
    is_bound: bool = False


class Authenticator(abc.ABC):
    """Finds out who a caller is; all methods are called on the server's event loop and may not block it.

    Those of others are named ``module:attribute`` in the settings, or by an entry point of the group
    ``aiorch.authenticators``, and are called without arguments to make one. They are asked in the order of the
    settings, and before those that come with the server.
    """

    #: What it wants to see, for the text of a refusal: "a bearer token of https://...".
    expects: str = "credentials"

    @abc.abstractmethod
    async def authenticate(self, credentials: Credentials) -> Identity | None:
        """Who shows these; None where they are not of its kind, so that another one is asked.

        NotAuthenticated where they are of its kind and do not hold: nobody else is asked then. CapacityError where that
        cannot be found out now. No text may repeat anything of the credentials. What is given is remembered until it
        expires, or ``refresh`` says otherwise.
        """

    async def refresh(self) -> bool:
        """Called about once a second; True: whatever was found out before must be found out again (a key was revoked).

        Nobody waits for it but the next call of it; what it raises is logged.
        """
        return False

    async def close(self) -> None:  # noqa: B027 - most hold nothing
        """Gives back what it holds; called once, after the last call."""
