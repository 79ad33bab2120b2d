"""What ``aiorch status`` shows of a registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from aiorch_client import ClientError, TlsConfig
from aiorch_client.admin import AdminClient, Deployment

from aiorch_server.cli.admin import admin_command, describe
from aiorch_server.cli.connection import ClientOutput
from aiorch_server.cli.following import render_deployment
from aiorch_server.cli.reference import check_model_name

#: Servers without a registry, and callers who may not look into it, see the rest all the same.
_WITHOUT = (grpc.StatusCode.UNIMPLEMENTED, grpc.StatusCode.PERMISSION_DENIED)


@admin_command
def show_deployment(client: AdminClient, output: ClientOutput, model: str) -> None:
    """The deployment of one model, with its rollout."""
    deployment = client.get_deployment(check_model_name(model))
    output.show({"deployment": describe(deployment)}, *render_deployment(deployment))


def find_deployments(
    url: str, *, tls: TlsConfig | None, token: str | None, metadata: Sequence[tuple[str, str]] = (), timeout_s: float
) -> tuple[list[Deployment] | None, str]:
    """All deployments, None where there is no registry; and why they cannot be told, where that is so."""
    with AdminClient(url, tls=tls, token=token, metadata=metadata, timeout_s=timeout_s) as client:
        try:
            return list(client.list_deployments()), ""
        except ClientError as error:
            return None, "" if error.code in _WITHOUT else f"deployments are not known: {error.details}"


def describe_all(deployments: list[Deployment] | None) -> list[dict[str, Any]] | None:
    """Deployments for JSON."""
    return None if deployments is None else [describe(each) for each in deployments]
