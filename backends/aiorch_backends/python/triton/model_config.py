"""``pb_utils.ModelConfig``, the configuration as models read it, and the signature that is in it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Final

from aiorch_backends.common import refuse
from aiorch_server.backend import LoadContext
from aiorch_server.types import DataType, ModelSignature, TensorSpec

#: What Triton's JSON form always has, so that models read it without asking whether it is there.
_DEFAULTS: Final[dict[str, Any]] = {
    "name": "",
    "platform": "",
    "backend": "python",
    "max_batch_size": 0,
    "input": [],
    "output": [],
    "batch_input": [],
    "batch_output": [],
    "optimization": {},
    "instance_group": [],
    "default_model_filename": "",
    "cc_model_filenames": {},
    "metric_tags": {},
    "parameters": {},
    "model_warmup": [],
}
_TENSOR_DEFAULTS: Final[dict[str, dict[str, Any]]] = {
    "input": {"dims": [], "format": "FORMAT_NONE", "is_shape_tensor": False, "allow_ragged_batch": False},
    "output": {"dims": [], "label_filename": "", "is_shape_tensor": False},
}
_TENSOR_KEYS: Final = {"input": ("name", "data_type", "dims", "optional"), "output": ("name", "data_type", "dims")}


def fill_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of ``config`` in which every field has a value that Triton's JSON gives one."""
    filled = json.loads(json.dumps({**_DEFAULTS, **config}))
    for kind, defaults in _TENSOR_DEFAULTS.items():
        filled[kind] = [{**defaults, **tensor} for tensor in filled[kind]]
    decoupled = bool(filled.get("model_transaction_policy", {}).get("decoupled", False))
    filled["model_transaction_policy"] = {"decoupled": decoupled}
    return filled  # type: ignore[no-any-return]


def get_input_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    """The entry of ``input`` with that name, None if there is none."""
    return _find(model_config, "input", name)


def get_output_config_by_name(model_config: Mapping[str, Any], name: str) -> Any:
    """The entry of ``output`` with that name, None if there is none."""
    return _find(model_config, "output", name)


def using_decoupled_model_transaction_policy(model_config: Mapping[str, Any]) -> bool:
    """Whether the model gives any number of answers."""
    return bool(model_config.get("model_transaction_policy", {}).get("decoupled", False))


class ModelConfig:
    """What ``auto_complete_config`` completes: it may add to what the owner wrote and never contradict it."""

    def __init__(self, model_config: str) -> None:
        """``model_config`` is a JSON object."""
        self._model_config: dict[str, Any] = json.loads(model_config)
        self._is_policy_written = "model_transaction_policy" in self._model_config

    def as_dict(self) -> dict[str, Any]:
        """The configuration, for reading."""
        return self._model_config

    def set_max_batch_size(self, max_batch_size: int) -> None:
        """ValueError where the owner wrote a larger one."""
        written = self._model_config.get("max_batch_size") or 0
        if written > max_batch_size:
            raise ValueError(
                f"configuration specified max_batch_size {written}, but in auto-complete-config function for model "
                f"'{self._name}' specified max_batch_size {max_batch_size}"
            )
        self._model_config["max_batch_size"] = max_batch_size

    def set_dynamic_batching(self) -> None:
        """ValueError where the owner wrote another scheduler."""
        for other in ("sequence_batching", "ensemble_scheduling"):
            if other in self._model_config:
                raise ValueError(
                    f"configuration specified scheduling_choice as '{other}', but auto-complete-config function for "
                    f"model '{self._name}' tries to set scheduling_choice as 'dynamic_batching'"
                )
        self._model_config.setdefault("dynamic_batching", {})

    def add_input(self, input: Mapping[str, Any]) -> None:
        """A dict of name, data_type, dims and perhaps optional; ValueError for others and for contradictions."""
        self._add("input", input)

    def add_output(self, output: Mapping[str, Any]) -> None:
        """A dict of name, data_type and dims; ValueError for others and for contradictions."""
        self._add("output", output)

    def set_model_transaction_policy(self, transaction_policy_dict: Mapping[str, Any]) -> None:
        """A dict with decoupled; ValueError for other keys, and where the owner wrote the opposite."""
        for key in transaction_policy_dict:
            if key != "decoupled":
                raise ValueError(
                    f"model transaction property in auto-complete-config function for model '{self._name}' contains "
                    "property other than 'decoupled'."
                )
        if "decoupled" not in transaction_policy_dict:
            return
        wanted = bool(transaction_policy_dict["decoupled"])
        policy = self._model_config.setdefault("model_transaction_policy", {})
        if self._is_policy_written and bool(policy.get("decoupled", False)) != wanted:
            raise ValueError(
                f"trying to change decoupled property in auto-complete-config for model '{self._name}', which is "
                f"already set to '{policy.get('decoupled', False)}'."
            )
        policy["decoupled"] = wanted

    @property
    def _name(self) -> str:
        return str(self._model_config.get("name", ""))

    def _add(self, kind: str, given: Mapping[str, Any]) -> None:
        label = f"{kind} '{given['name']}'" if "name" in given else kind
        where = f"{label} in auto-complete-config function for model '{self._name}'"
        allowed = _TENSOR_KEYS[kind]
        for key in given:
            if key not in allowed:
                raise ValueError(f"{where} contains property other than {', '.join(map(repr, allowed))}.")
        for key in ("name", "data_type", "dims"):
            if key not in given:
                raise ValueError(f"{where} is missing '{key}' property.")
        tensors = self._model_config.setdefault(kind, [])
        for tensor in tensors:
            if tensor["name"] == given["name"]:
                self._check_same(kind, tensor, given)
                tensor.update(given)
                return
        tensors.append(dict(given))

    def _check_same(self, kind: str, written: Mapping[str, Any], given: Mapping[str, Any]) -> None:
        for key in ("data_type", "dims", "optional"):
            if key not in given or written.get(key) in (None, [], "TYPE_INVALID"):
                continue
            old, new = written[key], given[key]
            if (list(old) != list(new)) if key == "dims" else old != new:
                raise ValueError(
                    f"unable to load model '{self._name}', configuration specifies {key} {old} for {kind} "
                    f"'{given['name']}', model provides {new}"
                )


def read_signature(context: LoadContext, model_class: type) -> ModelSignature:
    """What the configuration and ``auto_complete_config`` say together; ModelLoadError where that is too little."""
    config = ModelConfig(json.dumps({"max_batch_size": 0, "input": [], "output": [], **context.config}))
    config.as_dict().setdefault("name", context.model_name)
    complete = getattr(model_class, "auto_complete_config", None)
    if complete is not None:
        given = complete(config)
        if not isinstance(given, ModelConfig):
            raise refuse(context, "auto_complete_config must return the ModelConfig that it was given")
        config = given
    completed = config.as_dict()
    for kind in ("input", "output"):
        if not completed.get(kind):
            raise refuse(context, f"neither the configuration nor auto_complete_config declares an {kind}")
    # The declaration has more than these lists where the server adds tensors, such as a sequence's controls.
    written = {tensor["name"] for kind in ("input", "output") for tensor in completed[kind]}
    return ModelSignature(
        (
            *(_read_spec(context, "input", tensor) for tensor in completed["input"]),
            *(spec for spec in context.declared.inputs if spec.name not in written),
        ),
        (
            *(_read_spec(context, "output", tensor) for tensor in completed["output"]),
            *(spec for spec in context.declared.outputs if spec.name not in written),
        ),
        _read_batch_size(context, completed.get("max_batch_size")),
        using_decoupled_model_transaction_policy(completed),
    )


def _read_spec(context: LoadContext, kind: str, tensor: Mapping[str, Any]) -> TensorSpec:
    labels = {spec.name: spec.labels for spec in context.declared.outputs}
    name = str(tensor["name"])
    try:
        datatype = DataType.from_config_name(tensor["data_type"])
        dims = tuple(int(dim) for dim in tensor["dims"])
        if any(dim < -1 for dim in dims):
            raise ValueError
    except (KeyError, TypeError, ValueError):
        raise refuse(
            context,
            f"{kind} '{name}': data_type {tensor.get('data_type')!r} and dims {tensor.get('dims')!r} should look like "
            "TYPE_FP32 and [ 3, -1 ]",
        ) from None
    return TensorSpec(name, datatype, dims, bool(tensor.get("optional", False)), labels.get(name, ()))


def _read_batch_size(context: LoadContext, size: Any) -> int:
    if isinstance(size, bool) or not isinstance(size, int) or size < 0:
        raise refuse(context, f"max_batch_size must be 0 or more, not {size!r}")
    return size


def _find(model_config: Mapping[str, Any], kind: str, name: str) -> Any:
    return next((tensor for tensor in model_config.get(kind, ()) if tensor["name"] == name), None)
