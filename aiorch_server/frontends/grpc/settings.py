"""The RPCs of the trace and logging extensions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from aiorch_proto.v2 import inference_pb2 as pb

if TYPE_CHECKING:
    from aiorch_server.controlplane import ControlPlane


class SettingRpcs:
    """Settings of tracing and logging; a request that names none only reads."""

    _controlplane: ControlPlane

    async def TraceSetting(self, request: pb.TraceSettingRequest, context: Any) -> pb.TraceSettingResponse:
        """What is traced, of all models or of one; a setting without value goes back to what holds for all."""
        changes = {name: list(setting.value) for name, setting in request.settings.items()}
        response = pb.TraceSettingResponse()
        for name, words in self._controlplane.trace_setting(request.model_name, changes).items():
            response.settings[name].value.extend(words)
        return response

    async def LogSettings(self, request: pb.LogSettingsRequest, context: Any) -> pb.LogSettingsResponse:
        """What is logged; a setting without value stays."""
        changes = {}
        for name, setting in request.settings.items():
            choice = setting.WhichOneof("parameter_choice")
            changes[name] = None if choice is None else getattr(setting, choice)
        response = pb.LogSettingsResponse()
        for name, value in self._controlplane.log_settings(changes).items():
            target = response.settings[name]
            if isinstance(value, bool):
                target.bool_param = value
            elif isinstance(value, int):
                target.uint32_param = value
            else:
                target.string_param = value
        return response
