"""The pickles of the CIFAR archives, read without Python's unpickler: data comes out, no object is ever built.

A pickle is a program. This reads the few instructions that dicts, lists, numbers, strings and uint8 or integer arrays
are written with, in protocols 2 to 5 of Python 2 and 3, and refuses all others. An array is made from its bytes, its
shape and the name of its dtype, each checked here; nothing of numpy is handed a state that the file made up.
"""

import math
import pickletools
import struct
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

DTYPES = ("u1", "i1", "u2", "i2", "u4", "i4", "u8", "i8")
MODULES = ("numpy.core.multiarray", "numpy._core.multiarray")
FRAMED = ("numpy.core.numeric", "numpy._core.numeric")
NAMES = {ord(code.code): code.name for code in pickletools.opcodes}
FIXED = {"BININT1": 1, "BININT2": 2, "BININT": 4, "BINFLOAT": 8, "PROTO": 1, "FRAME": 8}
FIXED |= {"BINPUT": 1, "LONG_BINPUT": 4, "BINGET": 1, "LONG_BINGET": 4}  # bytes of an argument
SIZED = {"SHORT_BINSTRING": 1, "BINSTRING": 4, "SHORT_BINBYTES": 1, "BINBYTES": 4, "BINBYTES8": 8, "BYTEARRAY8": 8}
SIZED |= {"SHORT_BINUNICODE": 1, "BINUNICODE": 4, "BINUNICODE8": 8, "LONG1": 1}  # bytes of an argument's length
NUMBERS = ("BININT1", "BININT2", "BININT", "BINFLOAT")
TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8")
PUT, GET = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class _Name(NamedTuple):
    """A function or class that the pickle asks for, never looked up."""

    module: str
    name: str


class _DType:
    """The dtype of an array to come, by its code such as `u1`; the byte order follows."""

    def __init__(self, code: str) -> None:
        if code not in DTYPES:
            raise ValueError(f"it holds an array of {code!r}, which is no integer type")
        self.code, self.order = code, "<"


class _Array:
    """An array whose bytes may still have to come."""

    def __init__(self) -> None:
        self.array: NDArray[Any] | None = None


def read_pickle(data: bytes) -> Any:
    """The dict, list, number, string (bytes as Python 2 wrote them) or integer array in a pickle.

    ValueError, LookupError, TypeError, AttributeError or ArithmeticError for anything else.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}
    for name, argument in _instructions(data):
        if name in PUT:
            memo[_number(argument)] = stack[-1]
        elif name in GET:
            stack.append(memo[_number(argument)])
        elif name in NUMBERS or name in SIZED:
            stack.append(_value(name, argument))
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name == "MARK":
            marks.append(len(stack))
        elif name in CONSTANTS:
            stack.append(CONSTANTS[name])
        elif name not in ("PROTO", "FRAME"):
            _change(name, argument, stack, marks)
    (out,) = stack
    return out.array if isinstance(out, _Array) else out


def _instructions(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Each instruction up to the last, STOP, with the bytes of its argument."""
    at = 0
    while (name := NAMES.get(data[at], "?")) != "STOP":
        at += 1
        if name in SIZED:
            start = at + SIZED[name]
            end = start + _number(data[at:start])
        elif name == "GLOBAL":
            start, end = at, data.index(b"\n", data.index(b"\n", at) + 1) + 1
        else:
            start, end = at, at + FIXED.get(name, 0)
        if end >= len(data):
            raise ValueError(f"{name} claims {end - start} bytes of {len(data) - start}")
        yield name, data[start:end]
        at = end


def _number(argument: bytes) -> int:
    return int.from_bytes(argument, "little")


def _value(name: str, argument: bytes) -> Any:
    """The number or string that an argument stands for."""
    if name in ("BININT", "LONG1"):
        return int.from_bytes(argument, "little", signed=True)
    if name in NUMBERS:
        return struct.unpack(">d", argument)[0] if name == "BINFLOAT" else _number(argument)
    return argument.decode() if name in TEXTS else argument


def _change(name: str, argument: bytes, stack: list[Any], marks: list[int]) -> None:
    """The instructions that put together what lies on the stack."""
    if name in ("EMPTY_DICT", "EMPTY_LIST"):
        stack.append({} if name == "EMPTY_DICT" else [])
    elif name in TUPLES or name == "TUPLE":
        start = marks.pop() if name == "TUPLE" else len(stack) - TUPLES[name]
        stack[start:] = [tuple(stack[start:])]
    elif name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS"):
        start = marks.pop() if name.endswith("S") else len(stack) - (1 if name == "APPEND" else 2)
        values, into = stack[start:], stack[start - 1]
        del stack[start:]
        if name.startswith("APPEND") and type(into) is list:
            into.extend(values)
        elif name.startswith("SETITEM") and type(into) is dict:
            into.update(zip(values[::2], values[1::2], strict=True))
        else:
            raise ValueError(f"{name} meets a {type(into).__name__}")
    elif name == "GLOBAL":
        stack.append(_Name(*argument.decode().splitlines()))
    elif name == "STACK_GLOBAL":
        stack[-2:] = [_Name(*stack[-2:])]
    elif name == "REDUCE":
        stack[-2:] = [_called(*stack[-2:])]
    elif name == "BUILD":
        _fill(stack[-2], stack.pop())
    else:
        raise ValueError(f"it holds the instruction {name}, which no plain data needs")


def _called(what: _Name, arguments: tuple[Any, ...]) -> Any:
    """Return the value of a call, of the few with which arrays and Python 3's bytes are written."""
    module, name = what
    if module in MODULES and name == "_reconstruct":
        return _Array()
    if module in FRAMED and name == "_frombuffer":
        data, dtype, shape, order = arguments
        out = _Array()
        out.array = _array(data, dtype, shape, order == "F")
        return out
    if module in MODULES and name == "scalar":
        dtype, data = arguments
        return int(_array(data, dtype, (), False))
    if what == ("numpy", "dtype"):
        return _DType(_text(arguments[0]))
    if what == ("_codecs", "encode") and arguments[1] == "latin1":
        return arguments[0].encode("latin-1")
    if what in (("__builtin__", "bytes"), ("builtins", "bytes")) and arguments == ():
        return b""
    raise ValueError(f"it asks for {module}.{name}, which is no data")


def _fill(what: Any, state: tuple[Any, ...]) -> None:
    """Give an array its content, or a dtype its byte order."""
    if isinstance(what, _DType):
        what.order = _text(state[1])
    elif isinstance(what, _Array):
        _, shape, dtype, fortran, data = state
        what.array = _array(data, dtype, shape, fortran)
    else:
        raise ValueError(f"it gives a {type(what).__name__} a state, which is no data")


def _array(data: bytes, dtype: Any, shape: tuple[int, ...], fortran: bool) -> NDArray[Any]:
    if not isinstance(dtype, _DType) or dtype.order not in ("<", "|", ">"):
        raise ValueError("it holds an array without a plain dtype")
    kind = np.dtype((">" if dtype.order == ">" else "<") + dtype.code)
    if any(type(side) is not int or side < 0 for side in shape) or len(data) != math.prod(shape) * kind.itemsize:
        raise ValueError(f"it holds an array of shape {shape} in {len(data)} bytes")
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C")


def _text(value: Any) -> str:
    return value.decode("latin-1") if isinstance(value, bytes) else str(value)
