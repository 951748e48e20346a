"""Pickles as plain data: decoded without running anything, and written.

Torch checkpoints keep their index in pickles, and a pickle is a program. This decoder has no way to import or call: a
global is a pair of names, a call or an object is a record of what would have been called. Names outside the caller's
allow-list end the decoding, opcodes that torch does not write are refused, and every length is compared with the bytes
that are left, so that memory is bounded by the size of the input.

Source: the opcode descriptions of CPython's `pickletools`.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any

__all__ = ["Call", "Global", "Instance", "PersistentId", "PickleError", "decode", "encode"]

MAX_OPCODES = 30_000_000  # a checkpoint of 1,000 ranks with optimizer has a tenth of it; bounds time and memory
_U16, _U32, _U64, _I32, _F64 = (struct.Struct(form) for form in ("<H", "<I", "<Q", "<i", ">d"))


class PickleError(ValueError):
    """Not a pickle, not one that torch writes, or one that names something that is not allowed."""


@dataclass(frozen=True, slots=True)
class Global:
    """A name that an unpickler would import."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False, slots=True)
class Call:
    """What an unpickler would call: `function(*args)`.

    `items` are the keys and values that are set on the result (an OrderedDict is made empty, then filled), `state` is what is
    given to its `__setstate__`.
    """

    function: Global
    args: tuple[Any, ...]
    items: dict[Any, Any] | None = None
    state: Any = None


@dataclass(eq=False, slots=True)
class Instance:
    """An object that an unpickler would make: its class, arguments of __new__, and state."""

    cls: Global
    args: tuple[Any, ...] = ()
    state: Any = None


@dataclass(eq=False, slots=True)
class PersistentId:
    """A reference that the reader of the pickle has to resolve; torch.save uses it for storages."""

    value: Any


class _Machine:
    """Position, stack and memo of one decoding. `below` holds the stacks under the open marks."""

    __slots__ = ("allowed", "below", "data", "globals", "memo", "position", "stack")

    def __init__(self, data: bytes, allowed: Container[Global]) -> None:
        self.data, self.allowed = data, allowed
        self.position = 0
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.globals: dict[tuple[str, str], Global] = {}

    def take(self, count: int) -> bytes:
        end = self.position + count
        if end > len(self.data):
            raise PickleError(f"ends inside an argument at byte {self.position:,}")
        chunk = self.data[self.position : end]
        self.position = end
        return chunk

    def number(self, form: struct.Struct) -> Any:
        return form.unpack(self.take(form.size))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise PickleError("ends inside a name")
        text = self.data[self.position : end]
        self.position = end + 1
        return text.decode()

    def since_mark(self) -> list[Any]:
        values = self.stack
        if not self.below:
            raise PickleError("has no mark")
        self.stack = self.below.pop()
        return values

    def name(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise PickleError("names a global by something that is not text")
        known = self.globals.get((module, name))
        if known is None:
            known = self.globals[module, name] = Global(module, name)
            if known not in self.allowed:
                raise PickleError(f"names {module[:80]}.{name[:80]}, which is not allowed in a checkpoint; refused")
        return known


def _set_items(target: Any, values: list[Any]) -> None:
    if len(values) % 2:
        raise PickleError("has a key without a value")
    if type(target) is Call:
        target.items = items = {} if target.items is None else target.items
    elif type(target) is dict:
        items = target
    else:
        raise PickleError("expects a dict on the stack")
    for at in range(0, len(values), 2):
        key = values[at]
        # nothing else is a key in torch's files, and hashing deeply nested tuples would overflow the C stack
        if not isinstance(key, str | int | Instance | Call):
            raise PickleError(f"uses a {type(key).__name__} as a key")
        items[key] = values[at + 1]


def _append(target: Any, values: list[Any]) -> None:
    if type(target) is not list:
        raise PickleError("expects a list on the stack")
    target.extend(values)


def _build(target: Any, state: Any) -> None:
    if not isinstance(target, Instance | Call):
        raise PickleError("gives a state to something that is no object")
    if target.state is not None:
        raise PickleError("gives one object two states")
    target.state = state


def _two(machine: _Machine) -> tuple[Any, Any]:
    second = machine.stack.pop()
    return machine.stack.pop(), second


def _put(machine: _Machine, index: int) -> None:
    machine.memo[index] = machine.stack[-1]


def _set_one(machine: _Machine) -> None:
    pair = list(_two(machine))
    _set_items(machine.stack[-1], pair)


def _append_one(machine: _Machine) -> None:
    value = machine.stack.pop()
    _append(machine.stack[-1], [value])


def _append_many(machine: _Machine) -> None:
    values = machine.since_mark()
    _append(machine.stack[-1], values)


def _refuse(reason: str) -> None:
    raise PickleError(reason)


def _push(value: Callable[[_Machine], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _push_since_mark(machine: _Machine) -> None:
    values = machine.since_mark()
    machine.stack.append(tuple(values))


_RARE: dict[int, Callable[[_Machine], None]] = {
    0x80: lambda m: None if m.take(1)[0] <= 5 else _refuse("has an unknown protocol"),  # PROTO
    0x95: lambda m: None if m.number(_U64) <= len(m.data) - m.position else _refuse("has a frame beyond its end"),  # FRAME
    ord("N"): _push(lambda m: None),
    0x88: _push(lambda m: True),
    0x89: _push(lambda m: False),
    ord("J"): _push(lambda m: m.number(_I32)),
    0x8A: _push(lambda m: int.from_bytes(m.take(m.take(1)[0]), "little", signed=True)),  # LONG1
    ord("G"): _push(lambda m: m.number(_F64)),
    ord("X"): _push(lambda m: m.take(m.number(_U32)).decode()),
    0x8C: _push(lambda m: m.take(m.take(1)[0]).decode()),  # SHORT_BINUNICODE
    0x8D: _push(lambda m: m.take(m.number(_U64)).decode()),  # BINUNICODE8
    ord("C"): _push(lambda m: m.take(m.take(1)[0])),
    ord("B"): _push(lambda m: m.take(m.number(_U32))),
    ord("t"): _push_since_mark,
    0x86: _push(_two),  # TUPLE2
    ord("]"): _push(lambda m: []),
    ord("a"): _append_one,
    ord("e"): _append_many,
    ord("s"): _set_one,
    ord("c"): _push(lambda m: m.name(m.line(), m.line())),  # GLOBAL
    0x93: _push(lambda m: m.name(*_two(m))),  # STACK_GLOBAL
    ord("q"): lambda m: _put(m, m.take(1)[0]),
    ord("r"): lambda m: _put(m, m.number(_U32)),
    ord("Q"): _push(lambda m: PersistentId(m.stack.pop())),
}


def decode(data: bytes, allowed: Container[Global]) -> Any:
    """The value that a pickle describes, with inert records in place of every global, call and object.

    Args:
        data: the pickle, protocols 2 to 5 as torch writes them.
        allowed: the globals that may be named.

    Raises:
        PickleError: truncated, damaged, an opcode that torch does not write, or a name outside `allowed`.
    """
    collecting = gc.isenabled()
    gc.disable()  # a third of the time would go into looking for cycles among records that are all still needed
    machine = _Machine(data, allowed)
    try:
        return _run(machine)
    except UnicodeDecodeError:
        raise PickleError("has text that is not UTF-8") from None
    except (IndexError, struct.error):
        raise PickleError("is cut off, or takes a value from an empty stack") from None
    except KeyError as error:
        raise PickleError(f"recalls value {error.args[0]}, which was never stored") from None
    finally:
        if collecting:
            gc.enable()


def _run(machine: _Machine) -> Any:
    """The opcodes of which a large checkpoint has millions are handled here, the others by `_RARE`.

    Most values are memorised at once, so every branch that makes one looks for the MEMOIZE that follows.
    """
    data, memo, stack, position = machine.data, machine.memo, machine.stack, 0
    u16, u32 = _U16.unpack_from, _U32.unpack_from
    value: Any
    for _ in range(MAX_OPCODES):
        opcode = data[position]
        position += 1
        if opcode == 0x6A:  # LONG_BINGET
            stack.append(memo[u32(data, position)[0]])
            position += 4
            continue
        if opcode == 0x68:  # BINGET
            stack.append(memo[data[position]])
            position += 1
            continue
        if opcode == 0x4B:  # BININT1
            stack.append(data[position])
            position += 1
            continue
        if opcode == 0x4D:  # BININT2
            stack.append(u16(data, position)[0])
            position += 2
            continue
        if opcode == 0x28:  # MARK
            machine.below.append(stack)
            machine.stack = stack = []
            continue
        if opcode == 0x29:  # EMPTY_TUPLE
            stack.append(())
            continue
        if opcode == 0x62:  # BUILD
            value = stack.pop()
            _build(stack[-1], value)
            continue
        if opcode == 0x75:  # SETITEMS
            values = machine.since_mark()
            stack = machine.stack
            _set_items(stack[-1], values)
            continue
        if opcode in (0x81, 0x52):  # NEWOBJ, REDUCE
            args = stack.pop()
            name = stack[-1]
            if type(name) is not Global or type(args) is not tuple:
                raise PickleError("calls something that is not a name")
            stack[-1] = value = Instance(name, args) if opcode == 0x81 else Call(name, args)
        elif opcode == 0x87:  # TUPLE3
            third, second = stack.pop(), stack.pop()
            stack[-1] = value = (stack[-1], second, third)
        elif opcode == 0x85:  # TUPLE1
            stack[-1] = value = (stack[-1],)
        elif opcode == 0x7D:  # EMPTY_DICT
            value = {}
            stack.append(value)
        elif opcode == 0x94:  # MEMOIZE
            memo[len(memo)] = stack[-1]
            continue
        elif opcode == 0x2E:  # STOP
            value = stack.pop()
            if stack or machine.below or position != len(data):
                raise PickleError("has data after its end")
            return value
        else:
            action = _RARE.get(opcode)
            if action is None:
                raise PickleError(f"has opcode 0x{opcode:02x} at byte {position - 1:,}, which no checkpoint holds")
            machine.position = position
            action(machine)
            position, stack = machine.position, machine.stack
            continue
        if data[position] == 0x94:
            memo[len(memo)] = value
            position += 1
    raise PickleError(f"has more than {MAX_OPCODES:,} opcodes")


def encode(value: Any) -> bytes:
    """The pickle of plain values and of the records of this module, in the opcodes that `torch.load(weights_only=True)` reads.

    Protocol 2. Equal values give equal bytes; equal text and globals are stored once.
    """
    out = bytearray(b"\x80\x02")
    _encode(value, out, {})
    return bytes(out + b".")


def _encode(value: Any, out: bytearray, memo: dict[Any, int]) -> None:
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
