from __future__ import annotations

import datetime as dt
import io
import os
import pickle
import pickletools
import struct
from collections import OrderedDict
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mcore_longctx.formats.pickle_data import Call, Global, Instance, PersistentId, PickleError, decode, encode

UNDERSTOOD = {
    *("PROTO", "STOP", "MARK", "NONE", "NEWTRUE", "NEWFALSE", "BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "BINUNICODE"),
    *("TUPLE", "EMPTY_LIST", "APPENDS", "EMPTY_DICT", "SETITEMS", "BINPUT", "LONG_BINPUT", "BINGET", "LONG_BINGET"),
    *("GLOBAL", "REDUCE", "NEWOBJ", "BUILD", "BINPERSID"),
}
# no deadline: the machine may be busy with other things
unhurried = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=300),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=20,
)


@unhurried
@given(PLAIN)
def test_what_is_encoded_is_what_python_unpickles(value: Any) -> None:
    assert pickle.loads(encode(value)) == value
    assert decode(encode(value), ()) == value


@unhurried
@given(PLAIN, st.integers(2, 5))
def test_what_python_pickles_is_what_is_decoded(value: Any, protocol: int) -> None:
    assert decode(pickle.dumps(value, protocol), ()) == value


@unhurried
@given(PLAIN)
def test_encoding_uses_only_what_torch_load_with_weights_only_reads(value: Any) -> None:
    assert {opcode.name for opcode, _, _ in pickletools.genops(encode([value, value]))} <= UNDERSTOOD


class Thing:
    def __init__(self) -> None:
        self.colour = "red"


def test_objects_and_calls_become_records() -> None:
    data = pickle.dumps([OrderedDict(), dt.timedelta(2), Thing()], protocol=4)
    allowed = {Global("collections", "OrderedDict"), Global("datetime", "timedelta"), Global(__name__, "Thing")}
    ordered, delta, thing = decode(data, allowed)
    assert (ordered.function, ordered.args) == (Global("collections", "OrderedDict"), ())
    assert (delta.function, delta.args) == (Global("datetime", "timedelta"), (2, 0, 0))
    assert (thing.cls, thing.state) == (Global(__name__, "Thing"), {"colour": "red"})


def test_records_are_encoded_as_objects_and_calls() -> None:
    record = {"a": Call(Global("collections", "Counter"), ("aab",)), "b": Instance(Global("argparse", "Namespace"), (), {"x": 1})}
    value = pickle.loads(encode(record))
    assert value["a"] == {"a": 2, "b": 1}
    assert value["b"].x == 1


def test_persistent_ids_are_records_too() -> None:
    class Reader(pickle.Unpickler):
        def persistent_load(self, pid: Any) -> Any:
            return ["resolved", pid]

    data = encode([PersistentId(("storage", 3))])
    assert Reader(io.BytesIO(data)).load() == [["resolved", ("storage", 3)]]
    (record,) = decode(data, ())
    assert record.value == ("storage", 3)


class Hostile:
    def __reduce__(self) -> Any:
        return (os.system, ("touch /tmp/never",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_name_outside_the_list_is_refused_and_nothing_runs(protocol: int) -> None:
    with pytest.raises(PickleError, match=r"names \w+\.system, which is not allowed in a checkpoint; refused"):
        decode(pickle.dumps([Hostile()], protocol), {Global("torch", "Size")})


def test_even_an_allowed_call_is_only_recorded() -> None:
    value = decode(pickle.dumps(Hostile(), 4), {Global(os.system.__module__, "system")})
    assert value.args == ("touch /tmp/never",)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "is cut off|ends inside"),
        (b"\x80\x04", "is cut off|ends inside"),
        (b"\x80\x04N", "is cut off|ends inside"),
        (b"\x80\x09N.", "unknown protocol"),
        (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", "frame beyond its end"),
        (b"\x80\x04\x8d" + struct.pack("<Q", 2**62) + b"x.", "is cut off|ends inside"),
        (b"\x80\x04X" + struct.pack("<I", 2**32 - 1) + b"x.", "is cut off|ends inside"),
        (b"\x80\x04X\x01\x00\x00\x00\xff.", "not UTF-8"),
        (b"\x80\x04\x96" + struct.pack("<Q", 2**62) + b".", "opcode 0x96"),
        (b"\x80\x04\x8b" + struct.pack("<i", 2**31 - 1) + b".", "opcode 0x8b"),
        (b"\x80\x04\x82\x01.", "opcode 0x82"),
        (b"\x80\x02P1\n.", "opcode 0x50"),
        (b"\x80\x02(iposix\nsystem\n.", "opcode 0x69"),
        (b"\x80\x04j\xff\xff\xff\xff.", "recalls value"),
        (b"\x80\x04r\xff\xff\xff\xff.", "empty stack"),
        (b"\x80\x04.", "empty stack"),
        (b"\x80\x04(.", "empty stack"),
        (b"\x80\x04NN.", "data after its end"),
        (b"\x80\x04N.N", "data after its end"),
        (b"\x80\x04t.", "no mark"),
        (b"\x80\x04}(Nu.", "key without a value"),
        (b"\x80\x04})Ns.", "uses a tuple as a key"),
        (b"\x80\x04NNa.", "expects a list"),
        (b"\x80\x04NN)R.", "calls something that is not a name"),
        (b"\x80\x04K\x01K\x02\x93.", "not text"),
    ],
)
def test_damaged_and_hostile_pickles_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(PickleError, match=message):
        decode(data, ())


def test_deep_nesting_neither_overflows_nor_takes_long() -> None:
    deep = decode(b"\x80\x04)" + b"\x85" * 200_000 + b".", ())
    assert isinstance(deep, tuple)
    with pytest.raises(PickleError, match="as a key"):
        decode(b"\x80\x04})" + b"\x85" * 200_000 + b"Ns.", ())


def test_the_number_of_opcodes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mcore_longctx.formats.pickle_data.MAX_OPCODES", 1000)
    with pytest.raises(PickleError, match="more than 1,000 opcodes"):
        decode(b"\x80\x04" + b"}" * 2000 + b".", ())
