"""Graphs, schedules and plans as versioned JSON text, and back.

The text is one object: `{"format": "packlight", "version": 2, "type": "plan", "value": {...}}`.
Fields that have their default value are left out: files stay small, and a later release can add
fields with defaults and still read them. Reading is strict: an unknown field, a value of the wrong
type, an id that points nowhere or a truncated file is a `FormatError` that says where, never a
graph that fails later.
"""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from functools import cache
from typing import Any, NamedTuple, Union, get_args, get_origin, get_type_hints

from packlight.errors import FormatError
from packlight.step.schedule import Plan, Schedule
from packlight.step.types import StepGraph

FORMAT = "packlight"
VERSION = 2

_TYPE_NAMES: dict[str, type[StepGraph] | type[Schedule] | type[Plan]] = {
    "step_graph": StepGraph,
    "schedule": Schedule,
    "plan": Plan,
}

_Decoder = Callable[[Any, str], Any]


def to_json(obj: StepGraph | Schedule | Plan) -> str:
    """Return a graph, schedule or plan as JSON text that `from_json` reads back as an equal object.

    Floats are written so that they return to the last bit.

    Raises:
        FormatError: the object is of another type, or holds a number that JSON has no word for.

    >>> from packlight.step import Action, Instruction
    >>> text = to_json(Schedule((Instruction(Action.RUN, 0),), num_forward=1))
    >>> from_json(text).num_forward
    1
    """
    name = next((name for name, cls in _TYPE_NAMES.items() if type(obj) is cls), None)
    if name is None:
        known = ", ".join(cls.__name__ for cls in _TYPE_NAMES.values())
        raise FormatError(f"cannot write a {type(obj).__name__}; what can be written: {known}")
    return write_document(name, encode(obj))


def write_document(name: str, value: Any) -> str:
    """Return a value that JSON has words for as one of Packlight's documents.

    Raises:
        FormatError: it holds a number that JSON has no word for.
    """
    document = {"format": FORMAT, "version": VERSION, "type": name, "value": value}
    try:
        return json.dumps(document, allow_nan=False, separators=(",", ":"))
    except ValueError as error:
        raise FormatError(f"a {name} with a number that is not finite cannot be written") from error


def from_json(text: str | bytes) -> StepGraph | Schedule | Plan:
    """Return the graph, schedule or plan that `to_json` wrote.

    Raises:
        FormatError: the text is not JSON, is not Packlight's, is of another version, or does not
            describe a whole and consistent object.

    Cost: linear in the length of the text.
    """
    name, value = read_document(text, _TYPE_NAMES)
    obj: StepGraph | Schedule | Plan = decode(_TYPE_NAMES[name], value, name)
    return obj


def read_document(text: str | bytes, known_names: Collection[str]) -> tuple[str, Any]:
    """Return the type and the value of one of Packlight's documents.

    Raises:
        FormatError: the text is not JSON, is not Packlight's, is of another version or type.
    """
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise FormatError(f"not JSON, or cut short: {error}") from error
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise FormatError(f"not a Packlight file: it does not say \"format\": \"{FORMAT}\"")
    version = document.get("version")
    if version != VERSION or isinstance(version, bool):
        raise FormatError(
            f"written in format version {version!r}; this release of Packlight reads version "
            f"{VERSION}\nhint: capture the model again, or read it with the release that wrote it"
        )
    name = str(document.get("type"))
    if name not in known_names:
        raise FormatError(f"unknown type {document.get('type')!r}; known: {', '.join(known_names)}")
    unknown = sorted(set(document) - {"format", "version", "type", "value"})
    if unknown:
        raise FormatError(f"unknown fields beside the value: {', '.join(unknown)}")
    return name, document.get("value")


def decode(cls: Any, value: Any, where: str) -> Any:
    """Return the object of a type that `encode` made a value of, checked.

    Args:
        cls: a dataclass, or another annotation of what fields of dataclasses hold.
        value: from JSON.
        where: what it is, for errors.

    Raises:
        FormatError: the value does not describe a whole and consistent object.
    """
    obj = _decoder(cls)(value, where)
    _check_ranges(obj)
    return obj


def _refuse_constant(name: str) -> Any:
    raise FormatError(f"{name} is not a number that a graph or plan can hold")


def encode(value: Any) -> Any:
    """Return a dataclass, or what its fields hold, in the words that JSON has."""
    if is_dataclass(value) and not isinstance(value, type):
        encoded = {}
        for item in _dataclass_fields(type(value)):
            content = getattr(value, item.name)
            if item.default is MISSING or content != item.default:
                encoded[item.name] = encode(content)
        return encoded
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, StrEnum):
        return value.value
    # Profilers hand in numpy's numbers; JSON knows only Python's.
    return value.item() if hasattr(value, "item") else value


@cache
def _dataclass_fields(cls: type) -> tuple[Field[Any], ...]:
    return fields(cls)


@cache
def _decoder(hint: Any) -> _Decoder:
    """Return a function (value, where) -> object for one type annotation."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (types.UnionType, Union):
        (inner,) = (_decoder(argument) for argument in arguments if argument is not type(None))
        return lambda value, where: None if value is None else inner(value, where)
    if origin is Mapping:
        return _mapping_decoder(_decoder(arguments[1]))
    if origin is tuple and len(arguments) == 2 and arguments[1] is Ellipsis:
        return _sequence_decoder(_decoder(arguments[0]))
    if origin is tuple:
        return _tuple_decoder([_decoder(argument) for argument in arguments])
    if is_dataclass(hint):
        return _dataclass_decoder(hint)
    if isinstance(hint, type) and issubclass(hint, StrEnum):
        return _enum_decoder(hint)
    assert hint in (int, float, str, bool), hint
    return _scalar_decoder(hint)


def _mapping_decoder(decode: _Decoder) -> _Decoder:
    def decode_mapping(value: Any, where: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is not an object but {_shown(value)}")
        return {key: decode(item, f"{where}[{key!r}]") for key, item in value.items()}

    return decode_mapping


def _sequence_decoder(decode: _Decoder) -> _Decoder:
    def decode_sequence(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise FormatError(f"{where} is not a list but {_shown(value)}")
        return tuple([decode(item, f"{where}[{i}]") for i, item in enumerate(value)])

    return decode_sequence


def _tuple_decoder(decoders: list[_Decoder]) -> _Decoder:
    def decode_tuple(value: Any, where: str) -> tuple[Any, ...]:
        if not isinstance(value, list) or len(value) != len(decoders):
            raise FormatError(f"{where} is not a list of {len(decoders)} but {_shown(value)}")
        return tuple([d(item, where) for d, item in zip(decoders, value, strict=True)])

    return decode_tuple


class _FieldDecoder(NamedTuple):
    decode: _Decoder
    is_required: bool


def _dataclass_decoder(cls: Any) -> _Decoder:
    hints = get_type_hints(cls)
    known = {
        item.name: _FieldDecoder(_decoder(hints[item.name]), item.default is MISSING)
        for item in _dataclass_fields(cls)
    }
    required = [name for name, item in known.items() if item.is_required]

    def decode_dataclass(value: Any, where: str) -> Any:
        if not isinstance(value, dict):
            raise FormatError(f"{where} is not an object but {_shown(value)}")
        unknown = sorted(set(value) - set(known))
        if unknown:
            raise FormatError(f"{where} has unknown fields: {', '.join(unknown)}")
        missing = [name for name in required if name not in value]
        if missing:
            raise FormatError(f"{where} lacks {', '.join(missing)}")
        content = {name: known[name].decode(v, f"{where}.{name}") for name, v in value.items()}
        try:
            return cls(**content)
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{where} is inconsistent: {error}") from error

    return decode_dataclass


def _enum_decoder(cls: type[StrEnum]) -> _Decoder:
    members = {member.value: member for member in cls}

    def decode_enum(value: Any, where: str) -> StrEnum:
        if not isinstance(value, str) or value not in members:
            raise FormatError(f"{where} is {_shown(value)}, not one of {', '.join(members)}")
        return members[value]

    return decode_enum


def _scalar_decoder(cls: type) -> _Decoder:
    accepted = (int, float) if cls is float else (cls,)

    def decode_scalar(value: Any, where: str) -> Any:
        if not isinstance(value, accepted) or (isinstance(value, bool) and cls is not bool):
            raise FormatError(f"{where} is {_shown(value)}, not {cls.__name__}")
        return cls(value)

    return decode_scalar


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def _check_ranges(obj: Any) -> None:
    """Check what the types themselves take on trust from the code that builds them."""
    if isinstance(obj, Plan):
        _check_ranges(obj.schedule)
    elif isinstance(obj, Schedule):
        if not 0 <= obj.num_forward <= len(obj.instructions):
            raise FormatError(
                f"num_forward is {obj.num_forward} in a schedule of {len(obj.instructions)} "
                "instructions"
            )
    elif isinstance(obj, StepGraph):
        if not 0 <= obj.num_forward <= obj.num_computations:
            raise FormatError(
                f"num_forward is {obj.num_forward} in a graph of {obj.num_computations} operations"
            )
        for buffer in obj.buffers:
            if buffer.bytes < 0:
                raise FormatError(f"buffer {buffer.id} has {buffer.bytes} bytes")
        for operation in obj.computations:
            lost = [b for b in operation.creates if not 0 <= b < len(obj.buffers)]
            if lost:
                raise FormatError(
                    f"operation {operation.id} ({operation.name}) creates buffers {lost} of "
                    f"{len(obj.buffers)}"
                )
            if any(obj.buffers[b].memory for b in operation.creates):
                raise FormatError(
                    f"operation {operation.id} ({operation.name}) creates buffers in another memory"
                )
