"""Makes the gate from the settings; authenticators of others by ``module:attribute`` or entry point."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from importlib.metadata import entry_points
from typing import Any, Final

from aiorch_server.config.security import SecurityConfig
from aiorch_server.errors import InvalidSettings
from aiorch_server.security.api_keys import ApiKeyAuthenticator, ApiKeys, KnownKey
from aiorch_server.security.authenticator import Authenticator
from aiorch_server.security.gate import Gate, Passes, RoleSource
from aiorch_server.security.identity import RoleBinding
from aiorch_server.security.policy import Policy
from aiorch_server.security.quotas import QuotaBook, QuotaBounds
from aiorch_server.security.roles import Role

GROUP: Final = "aiorch.authenticators"


def open_gate(
    config: SecurityConfig,
    *,
    has_certificates: bool = False,
    passes: Passes | None = None,
    keys: ApiKeys | None = None,
    source: RoleSource | None = None,
) -> Gate | None:
    """The gate that the settings describe, None where nobody is asked; InvalidSettings where it cannot be made.

    ``has_certificates``: some door checks clients' certificates. ``keys`` and ``source`` are those of the registry.
    """
    if not config.enabled:
        return None
    authenticators = list(_list_authenticators(config, has_certificates, keys))
    if not authenticators:
        raise InvalidSettings(
            "security.enabled: found true, and no way to say who one is; give security.tokens or security.api_keys, or "
            "let a door check clients' certificates (tls.root with tls.require_client_auth)"
        )
    bindings = [RoleBinding(each.principal, Role[each.role.name], each.models) for each in config.bindings]
    quotas = QuotaBook(
        QuotaBounds(each.tenant, each.requests_per_s, each.rows_per_s, each.max_in_flight, each.weight)
        for each in config.quotas
    )
    return Gate(authenticators, Policy(bindings), quotas, passes=passes, source=source)


def _list_authenticators(
    config: SecurityConfig, has_certificates: bool, keys: ApiKeys | None
) -> Iterator[Authenticator]:
    for name in config.authenticators:
        yield _make(name)
    if config.api_keys or keys is not None:
        fixed = [
            KnownKey(
                each.id,
                bytes.fromhex(each.sha256),
                each.principal,
                each.tenant,
                int(each.expires_at.timestamp() * 1e9) if each.expires_at is not None else 0,
            )
            for each in config.api_keys
        ]
        yield ApiKeyAuthenticator(fixed, keys)
    try:
        if config.tokens:
            from aiorch_server.security.tokens import TokenAuthenticator

            yield from map(TokenAuthenticator, config.tokens)
        if has_certificates and config.certificates.enabled:
            from aiorch_server.security.certificates import CertificateAuthenticator

            yield CertificateAuthenticator(config.certificates)
    except ImportError as error:
        text = (
            f"security: tokens and certificates need the extra 'admin': pip install 'aiorchestrator[admin]' ({error})"
        )
        raise InvalidSettings(text) from error


def _make(name: str) -> Authenticator:
    try:
        made = _find(name)()
    except InvalidSettings:
        raise
    except (Exception, SystemExit) as error:  # foreign code
        text = f"security.authenticators: {name!r} cannot be had: {type(error).__name__}: {error}"
        raise InvalidSettings(text) from error
    if not isinstance(made, Authenticator):
        raise InvalidSettings(f"security.authenticators: {name!r} gives a {type(made).__name__}, no Authenticator")
    return made


def _find(name: str) -> Any:
    if ":" in name:
        module, _, attribute = name.partition(":")
        found: Any = importlib.import_module(module)
        for step in attribute.split("."):
            found = getattr(found, step)
        return found
    installed = {point.name: point for point in entry_points(group=GROUP)}
    if name not in installed:
        known = ", ".join(sorted(installed)) or "none"
        raise InvalidSettings(f"there is no authenticator '{name}'; installed: {known}, or write module:attribute")
    return installed[name].load()
