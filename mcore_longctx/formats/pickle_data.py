"""Pickles as plain data: decoded without running anything, and written.

Torch checkpoints keep their index in pickles, and a pickle is a program. This decoder has no way to import or call: a
global is a pair of names, a call or an object is a record of what would have been called. Names outside the caller's
allow-list end the decoding, opcodes that torch does not write are refused, and every length is compared with the bytes
that are left, so that memory is bounded by the size of the input.

Source: the opcode descriptions of CPython's `pickletools`.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Call", "Global", "Instance", "PersistentId", "PickleError", "decode", "encode"]

MAX_OPCODES = 30_000_000  # a checkpoint of 1,000 ranks with optimizer has a tenth of it; bounds time and memory
_MARK = object()
_U16, _U32, _U64, _I32, _F64 = (struct.Struct(form) for form in ("<H", "<I", "<Q", "<i", ">d"))


class PickleError(ValueError):
    """Not a pickle, not one that torch writes, or one that names something that is not allowed."""


@dataclass(frozen=True)
class Global:
    """A name that an unpickler would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Call:
    """What an unpickler would call: `function(*args)`."""

    function: Global
    args: tuple[Any, ...]


@dataclass(eq=False)
class Instance:
    """An object that an unpickler would make: its class, arguments of __new__, and state."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(eq=False)
class PersistentId:
    """A reference that the reader of the pickle has to resolve; torch.save uses it for storages."""

    value: Any


@dataclass
class _Machine:
    """Stack, memo and position of one decoding."""

    data: bytes
    allowed: Collection[Global]
    position: int = 0
    stack: list[Any] = field(default_factory=list)
    memo: dict[int, Any] = field(default_factory=dict)
    globals: dict[tuple[str, str], Global] = field(default_factory=dict)

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise PickleError(f"ends inside an argument at byte {self.position:,}")
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def byte(self) -> int:
        try:
            value = self.data[self.position]
        except IndexError:
            raise PickleError(f"ends inside an argument at byte {self.position:,}") from None
        self.position += 1
        return value

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise PickleError("ends inside a name")
        text = self.data[self.position : end]
        self.position = end + 1
        return text.decode()

    def pop(self) -> Any:
        if not self.stack or self.stack[-1] is _MARK:
            raise PickleError("takes a value from an empty stack")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        for index in range(len(self.stack) - 1, -1, -1):
            if self.stack[index] is _MARK:
                values = self.stack[index + 1 :]
                del self.stack[index:]
                return values
        raise PickleError("has no mark")

    def top(self, kind: type) -> Any:
        if not self.stack or not isinstance(self.stack[-1], kind):
            raise PickleError(f"expects a {kind.__name__.lower()} on the stack at byte {self.position:,}")
        return self.stack[-1]

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("names a global by something that is not text")
        known = self.globals.get((module, name))
        if known is None:
            known = self.globals[module, name] = Global(module, name)
            if known not in self.allowed:
                raise PickleError(f"names {module[:80]}.{name[:80]}, which is not allowed in a checkpoint; refused")
        return known

    def remember(self, index: int) -> None:
        if not self.stack:
            raise PickleError("remembers nothing")
        self.memo[index] = self.stack[-1]

    def recall(self, index: int) -> None:
        if index not in self.memo:
            raise PickleError(f"recalls value {index}, which was never stored")
        self.stack.append(self.memo[index])

    def set_items(self, target: dict[Any, Any], values: list[Any]) -> None:
        if len(values) % 2:
            raise PickleError("has a key without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            # nothing else is a key in torch's files, and hashing deeply nested tuples would overflow the C stack
            if not isinstance(key, str | int | Instance):
                raise PickleError(f"uses a {type(key).__name__} as a key")
            target[key] = value

    def make(self, function: Any, args: Any, record: Callable[[Global, tuple[Any, ...]], Any]) -> None:
        if not isinstance(function, Global) or not isinstance(args, tuple):
            raise PickleError("calls something that is not a name")
        self.stack.append(record(function, args))


def _build(machine: _Machine) -> None:
    state = machine.pop()
    target = machine.top(Instance)
    if target.state is not None:
        raise PickleError("gives one object two states")
    target.state = state


def _two(machine: _Machine) -> tuple[Any, Any]:
    second = machine.pop()
    return machine.pop(), second


def _last(machine: _Machine, count: int) -> tuple[Any, ...]:
    values = [machine.pop() for _ in range(count)]
    return tuple(reversed(values))


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


_OPCODES: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: None if m.byte() <= 5 else _refuse("has an unknown protocol"),  # PROTO
    0x95: lambda m: None if m.number(_U64) <= len(m.data) - m.position else _refuse("has a frame beyond its end"),  # FRAME
    ord("("): _push(lambda m: _MARK),
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("J"): _push(lambda m: m.number(_I32)),
    ord("K"): _push(lambda m: m.byte()),
    ord("M"): _push(lambda m: m.number(_U16)),
    0x8A: _push(lambda m: int.from_bytes(m.take(m.byte()), "little", signed=True)),  # LONG1
    ord("G"): _push(lambda m: m.number(_F64)),
    ord("X"): _push(lambda m: m.take(m.number(_U32)).decode()),
    0x8C: _push(lambda m: m.take(m.byte()).decode()),  # SHORT_BINUNICODE
    0x8D: _push(lambda m: m.take(m.number(_U64)).decode()),  # BINUNICODE8
    ord("C"): _push(lambda m: m.take(m.byte())),
    ord("B"): _push(lambda m: m.take(m.number(_U32))),
    ord(")"): _push(lambda m: ()),
    ord("t"): _push(lambda m: tuple(m.pop_to_mark())),
    0x85: _push(lambda m: _last(m, 1)),
    0x86: _push(lambda m: _last(m, 2)),
    0x87: _push(lambda m: _last(m, 3)),
    ord("]"): _push(lambda m: []),
    ord("}"): _push(lambda m: {}),
    ord("a"): lambda m: _append(m, [m.pop()]),
    ord("e"): lambda m: _append(m, m.pop_to_mark()),
    ord("s"): lambda m: _set(m, list(_two(m))),
    ord("u"): lambda m: _set(m, m.pop_to_mark()),
    ord("c"): _push(lambda m: m.name(m.line(), m.line())),  # GLOBAL
    0x93: _push(lambda m: m.name(*_two(m))),  # STACK_GLOBAL
    ord("R"): lambda m: m.make(*_two(m), Call),  # REDUCE
    0x81: lambda m: m.make(*_two(m), Instance),  # NEWOBJ
    ord("b"): _build,
    0x94: lambda m: m.remember(len(m.memo)),  # MEMOIZE
    ord("q"): lambda m: m.remember(m.byte()),
    ord("r"): lambda m: m.remember(m.number(_U32)),
    ord("h"): lambda m: m.recall(m.byte()),
    ord("j"): lambda m: m.recall(m.number(_U32)),
    ord("Q"): _push(lambda m: PersistentId(m.pop())),
}


def _refuse(reason: str) -> None:
    raise PickleError(reason)


def _append(machine: _Machine, values: list[Any]) -> None:
    machine.top(list).extend(values)


def _set(machine: _Machine, values: list[Any]) -> None:
    machine.set_items(machine.top(dict), values)


def decode(data: bytes, allowed: Collection[Global]) -> Any:
    """The value that a pickle describes, with inert records in place of every global, call and object.

    Args:
        data: the pickle, protocols 2 to 5 as torch writes them.
        allowed: the globals that may be named.

    Raises:
        PickleError: truncated, damaged, an opcode that torch does not write, or a name outside `allowed`.
    """
    machine = _Machine(data, allowed)
    try:
        for _ in range(MAX_OPCODES):
            opcode = machine.byte()
            if opcode == ord("."):
                value = machine.pop()
                if machine.stack or machine.position != len(data):
                    raise PickleError("has data after its end")
                return value
            action = _OPCODES.get(opcode)
            if action is None:
                raise PickleError(f"has opcode 0x{opcode:02x} at byte {machine.position - 1:,}, which no checkpoint holds")
            action(machine)
    except UnicodeDecodeError:
        raise PickleError("has text that is not UTF-8") from None
    raise PickleError(f"has more than {MAX_OPCODES:,} opcodes")


def encode(value: Any) -> bytes:
    """The pickle of plain values and of the records of this module, in the opcodes that `torch.load(weights_only=True)` reads.

    Protocol 2. Equal values give equal bytes; equal text and globals are stored once.
    """
    out = bytearray(b"\x80\x02")
    _encode(value, out, {})
    return bytes(out + b".")


def _encode(value: Any, out: bytearray, memo: dict[Any, int]) -> None:  # noqa: PLR0912 - one case a type
    match value:
        case None:
            out += b"N"
        case bool():
            out += b"\x88" if value else b"\x89"
        case int():
            _encode_int(value, out)
        case float():
            out += b"G" + struct.pack(">d", value)
        case str():
            if not _recalled(value, out, memo):
                text = value.encode()
                out += b"X" + struct.pack("<I", len(text)) + text
                _remembered(value, out, memo)
        case tuple():
            out += b"("
            _encode_all(value, out, memo)
            out += b"t"
        case list():
            out += b"]("
            _encode_all(value, out, memo)
            out += b"e"
        case dict():
            out += b"}("
            _encode_all((part for pair in value.items() for part in pair), out, memo)
            out += b"u"
        case Global():
            if not _recalled(value, out, memo):
                out += f"c{value.module}\n{value.name}\n".encode()
                _remembered(value, out, memo)
        case Call():
            _encode_all((value.function, value.args), out, memo)
            out += b"R"
        case Instance():
            _encode_all((value.cls, value.args), out, memo)
            out += b"\x81"
            if value.state is not None:
                _encode(value.state, out, memo)
                out += b"b"
        case PersistentId():
            _encode(value.value, out, memo)
            out += b"Q"
        case _:
            raise TypeError(f"cannot pickle a {type(value).__name__}")


def _encode_all(values: Any, out: bytearray, memo: dict[Any, int]) -> None:
    for value in values:
        _encode(value, out, memo)


def _encode_int(value: int, out: bytearray) -> None:
    if 0 <= value < 1 << 8:
        out += b"K" + struct.pack("B", value)
    elif 0 <= value < 1 << 16:
        out += b"M" + struct.pack("<H", value)
    elif -(1 << 31) <= value < 1 << 31:
        out += b"J" + struct.pack("<i", value)
    else:
        raw = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        out += b"\x8a" + struct.pack("B", len(raw)) + raw


def _recalled(value: Any, out: bytearray, memo: dict[Any, int]) -> bool:
    index = memo.get(value)
    if index is None:
        return False
    out += b"h" + struct.pack("B", index) if index < 256 else b"j" + struct.pack("<I", index)
    return True


def _remembered(value: Any, out: bytearray, memo: dict[Any, int]) -> None:
    index = memo[value] = len(memo)
    out += b"q" + struct.pack("B", index) if index < 256 else b"r" + struct.pack("<I", index)
