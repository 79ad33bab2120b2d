"""Opening estimators without running what a stranger put into the file."""

from __future__ import annotations

from typing import Any

from aiorch_backends.common import import_framework, refuse, require_artefact
from aiorch_server.backend import LoadContext


def open_estimator(context: LoadContext) -> Any:
    """A fitted estimator; ModelLoadError naming the file, the untrusted types, or the switch that would be needed."""
    path = require_artefact(context)
    import_framework("sklearn", extra="sklearn")
    estimator = _open_skops(context) if path.suffix == ".skops" else _open_pickle(context)
    if not hasattr(estimator, "predict"):
        raise refuse(context, f"{type(estimator).__name__} has no predict method, so there is nothing to serve")
    if not hasattr(estimator, "get_params"):
        return estimator
    # Fitted on a data frame, it would warn at each call that rows of a tensor have no column names.
    for part in (estimator, *estimator.get_params().values()):
        if isinstance(getattr(part, "__dict__", None), dict):
            part.__dict__.pop("feature_names_in_", None)
    # Parallel calls belong to the server's instances; nested pools would only fight over the same cores.
    parallel = [key for key in estimator.get_params() if key == "n_jobs" or key.endswith("__n_jobs")]
    estimator.set_params(**dict.fromkeys(parallel, context.threads))
    return estimator


def _open_skops(context: LoadContext) -> Any:
    skops = import_framework("skops.io", extra="sklearn")
    allowed = {name.strip() for name in context.parameters.get("trusted_types", "").split(",")} - {""}
    try:
        untrusted = set(skops.get_untrusted_types(file=context.artefact))
    except Exception as error:
        raise refuse(context, f"not a skops file: {error}") from error
    if untrusted and context.is_requested and not context.allow_code:
        names = ", ".join(sorted(untrusted))
        raise refuse(
            context,
            f"the file holds types that are not trusted: {names}; a load request cannot declare them trusted_types, "
            "because they may run code (allow_code is off). Put the model and its configuration into the repository, "
            "or start the server with --allow-code to trust whoever can send load requests",
        )
    if untrusted - allowed:
        names = ", ".join(sorted(untrusted - allowed))
        raise refuse(
            context,
            f"the file holds types that are not trusted: {names}. If you know where it comes from, list them in the "
            'configuration: parameters { key: "trusted_types" value { string_value: "..." } }',
        )
    try:
        return skops.load(context.artefact, trusted=sorted(untrusted))
    except Exception as error:
        raise refuse(context, error) from error


def _open_pickle(context: LoadContext) -> Any:
    if not context.allow_code:
        raise refuse(
            context,
            "pickled models run code when they are opened and are not allowed here (allow_code is off, --allow-code "
            "turns it on); save the model with skops.io.dump(model, 'model.skops')",
        )
    joblib = import_framework("joblib", extra="sklearn")
    try:
        return joblib.load(context.artefact)
    except Exception as error:
        raise refuse(context, f"not a pickled model: {type(error).__name__}: {error}") from error
