"""``aiorch access``: who may do what, API keys and quotas."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from aiorch_client.admin import AdminClient, ApiKey, Quota, Role, RoleBinding

from aiorch_server.cli.admin import add_row, admin_command, describe, make_table, show_time
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.output import UsageError

group = typer.Typer(no_args_is_help=True, help="Says who may do what: roles, API keys, quotas.")
_keys = typer.Typer(no_args_is_help=True, help="Makes, lists and revokes API keys.")
_quotas = typer.Typer(no_args_is_help=True, help="Sets and lists what tenants may take.")
group.add_typer(_keys, name="key")
group.add_typer(_quotas, name="quota")

Principal = Annotated[str, typer.Argument(help="A caller's name as whoami shows it, or group:NAME.")]
OfPrincipal = Annotated[str, typer.Option("--principal", help="Only of this caller.")]
Bound = Annotated[float | None, typer.Option(min=0, help="0 takes the bound away.")]
_ROLES = ("viewer", "client", "deployer", "admin")
_LONGEST_DAYS = 36_500


@group.command("whoami")
@admin_command
def whoami(client: AdminClient, output: ClientOutput) -> None:
    """Shows who the server takes you for, and what you may do."""
    identity = client.who_am_i()
    lines = [f"{identity.principal} (by {identity.method}, tenant {identity.tenant or 'none'})"]
    if identity.groups:
        lines.append(f"groups: {', '.join(identity.groups)}")
    if identity.expires_at is not None:
        lines.append(f"until {show_time(identity.expires_at)}")
    lines += [f"{binding.role.value} on {binding.models}" for binding in identity.bindings]
    output.show({"identity": describe(identity)}, *lines)


@group.command("grant")
@admin_command
def grant(
    client: AdminClient,
    output: ClientOutput,
    principal: Principal,
    role: Annotated[str, typer.Argument(metavar="|".join(_ROLES), help="Each may do what those before it may.")],
    models: Annotated[str, typer.Option(help="Model names, * for any characters: team-a-*.")] = "*",
) -> None:
    """Gives a caller a role on the models whose names fit."""
    if role not in _ROLES:
        raise UsageError(f"'{role}' is no role: expected one of {', '.join(_ROLES)}")
    binding = client.grant(principal, Role(role), models)
    output.show({"binding": describe(binding)}, f"{principal} is {role} on {models} ({binding.id})")


@group.command("revoke")
@admin_command
def revoke(
    client: AdminClient,
    output: ClientOutput,
    id: Annotated[str, typer.Argument(metavar="ID", help="As aiorch access bindings shows it.")],
) -> None:
    """Takes a role away."""
    client.revoke(id)
    output.show({"revoked": id}, f"{id} is revoked")


@group.command("bindings")
@admin_command
def bindings(client: AdminClient, output: ClientOutput, principal: OfPrincipal = "") -> None:
    """Lists who has which role."""
    found: list[RoleBinding] = list(client.list_bindings(principal))
    table = make_table("id", "principal", "role", "models", "since", "by")
    for each in found:
        since = show_time(each.created_at)
        add_row(table, each.id, each.principal, each.role.value, each.models, since, each.created_by)
    output.show({"bindings": [describe(each) for each in found]}, table if found else "no roles were given")


@_keys.command("create")
@admin_command
def create_key(
    client: AdminClient,
    output: ClientOutput,
    principal: Principal,
    tenant: Annotated[str, typer.Option(help="Whose quota counts; by default the principal's.")] = "",
    description: Annotated[str, typer.Option(help="What it is for.")] = "",
    expires_days: Annotated[
        float | None, typer.Option(min=0, max=_LONGEST_DAYS, help="Days that it opens; for ever without.")
    ] = None,
) -> None:
    """Makes an API key and shows it: nobody can read it again."""
    until = None if expires_days is None else datetime.now(UTC) + timedelta(days=expires_days)
    made = client.create_key(principal, tenant=tenant, description=description, expires_at=until)
    if not made.secret:
        raise UsageError(
            f"key {made.key.id} was made, but the answer with it was lost: revoke it "
            f"({output.write_command('access', 'key', 'revoke', made.key.id)}) and make another"
        )
    told = f"key {made.key.id} of {principal}; keep it, it is not shown again:"
    output.show({"key": describe(made.key), "secret": made.secret}, told, made.secret)


@_keys.command("list")
@admin_command
def list_keys(client: AdminClient, output: ClientOutput, principal: OfPrincipal = "") -> None:
    """Lists API keys, without their secrets."""
    found: list[ApiKey] = list(client.list_keys(principal))
    table = make_table("id", "principal", "tenant", "made", "by", "expires", "revoked", "description")
    for each in found:
        times = (show_time(each.expires_at), show_time(each.revoked_at), each.description)
        add_row(table, each.id, each.principal, each.tenant, show_time(each.created_at), each.created_by, *times)
    output.show({"keys": [describe(each) for each in found]}, table if found else "no keys")


@_keys.command("revoke")
@admin_command
def revoke_key(
    client: AdminClient, output: ClientOutput, id: Annotated[str, typer.Argument(metavar="ID", help="The key's id.")]
) -> None:
    """From then on the key opens nothing."""
    client.revoke_key(id)
    output.show({"revoked": id}, f"key {id} is revoked")


@_quotas.command("set")
@admin_command
def set_quota(
    client: AdminClient,
    output: ClientOutput,
    tenant: Annotated[str, typer.Argument(help="Whose.")],
    requests_per_s: Bound = None,
    rows_per_s: Bound = None,
    max_in_flight: Annotated[int | None, typer.Option(min=0, help="0 takes the bound away.")] = None,
) -> None:
    """Bounds what a tenant may take of each server; what is not given stays."""
    if requests_per_s is None and rows_per_s is None and max_in_flight is None:
        raise UsageError("nothing to set: give --requests-per-s, --rows-per-s or --max-in-flight")
    quota = client.set_quota(
        tenant, requests_per_s=requests_per_s, rows_per_s=rows_per_s, max_in_flight=max_in_flight
    )  # fmt: skip
    _show_quotas(output, [quota])


@_quotas.command("list")
@admin_command
def list_quotas(client: AdminClient, output: ClientOutput) -> None:
    """Lists the tenants that have bounds."""
    _show_quotas(output, list(client.list_quotas()))


def _show_quotas(output: ClientOutput, quotas: list[Quota]) -> None:
    numbers = ("requests/s", "rows/s", "in flight")
    table = make_table("tenant", *numbers, numbers=numbers)
    for each in quotas:
        bounds = (each.requests_per_s, each.rows_per_s, each.max_in_flight)
        add_row(table, each.tenant, *(f"{bound:g}" if bound else "" for bound in bounds))
    output.show({"quotas": [asdict(each) for each in quotas]}, table if quotas else "no quotas")
