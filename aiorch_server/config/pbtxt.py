"""Reads Triton's text format (``config.pbtxt``) into the dict that ``ModelConfig.from_dict`` takes.

The one module outside the doors that imports protobuf: the format's grammar is that of
https://protobuf.dev/reference/protobuf/textformat-spec/.
"""

from __future__ import annotations

import re
from typing import Any

from aiorch_proto.v2 import model_config_pb2
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory, text_format

from aiorch_server.config.problems import suggest
from aiorch_server.errors import ModelLoadError


def read_pbtxt(text: str, source: str) -> dict[str, Any]:
    """The fields written in ``text``, and only those; enums by name, numbers as numbers.

    Raises ModelLoadError ``<source>:<line>:<column>: ...``.
    """
    message = _MESSAGE()
    try:
        text_format.Parse(text, message, descriptor_pool=_POOL)
    except text_format.ParseError as error:
        line, column = error.GetLine(), error.GetColumn()
        place = f"{source}:{line}:{column}" if line is not None else source
        reason = str(error).removeprefix(f"{line}:{column} : ").replace(f'"{_PACKAGE}.', '"')
        raise ModelLoadError(f"{place}: {_explain(reason)}") from None
    except ValueError as error:  # a string that is not UTF-8 passes the grammar and fails at assignment
        raise ModelLoadError(f"{source}: {_shorten(str(error))}") from None
    return _read_message(message)


def _explain(reason: str) -> str:
    unknown = _UNKNOWN_FIELD.fullmatch(reason)
    if unknown is None:
        return _shorten(reason)
    message = _POOL.FindMessageTypeByName(f"{_PACKAGE}.{unknown['message']}")
    return reason.removesuffix(".") + suggest(unknown["field"], message.fields_by_name)


def _build_presence_class() -> tuple[descriptor_pool.DescriptorPool, Any]:
    # Proto3 cannot tell `max_batch_size: 0` from a line that is not there, and the two mean different things: "does
    # not batch" and "ask the artefact". Under proto2 rules every field knows whether it was written, so the same
    # descriptor is built once more, as proto2, in a pool of its own.
    file = descriptor_pb2.FileDescriptorProto()
    model_config_pb2.DESCRIPTOR.CopyToProto(file)
    file.syntax = "proto2"
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return pool, message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{file.package}.ModelConfig"))


def _shorten(reason: str) -> str:
    # The parser quotes whole lines, unprintable characters included.
    printable = "".join(character if character.isprintable() else "?" for character in reason)
    return printable if len(printable) <= _LONGEST_REASON else printable[:_LONGEST_REASON] + "..."


_LONGEST_REASON = 300
_PACKAGE = model_config_pb2.DESCRIPTOR.package
_POOL, _MESSAGE = _build_presence_class()
#: What the parser says of a field that is not there; a longer name is nobody's mistake.
_UNKNOWN_FIELD = re.compile(r'Message type "(?P<message>[\w.]+)" has no field named "(?P<field>\w{1,100})"\.')


def _read_message(message: Any) -> dict[str, Any]:
    return {field.name: _read_field(field, value) for field, value in message.ListFields()}


def _read_field(field: Any, value: Any) -> Any:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        element = field.message_type.fields_by_name["value"]
        return {key: _read_value(element, value[key]) for key in value}
    if field.is_repeated:
        return [_read_value(field, element) for element in value]
    return _read_value(field, value)


def _read_value(field: Any, value: Any) -> Any:
    if field.message_type is not None:
        return _read_message(value)
    if field.enum_type is not None:
        return field.enum_type.values_by_number[value].name
    return value
