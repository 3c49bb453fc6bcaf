"""How many bytes a compiled program moves between devices, read from its HLO text."""

import collections
import math
import re
from typing import NamedTuple

_KINDS = (
    "all-gather",
    "reduce-scatter",
    "all-reduce",
    "collective-permute",
    "all-to-all",
    "ragged-all-to-all",
)
_CALLS = ("fusion", "call", "async-start", "custom-call", "conditional")
_ITEM_BYTES = {"pred": 1, "bf16": 2}  # the others end in their number of bits: s32, f32, u8

_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\(")
_COMPUTATION = re.compile(r"(ENTRY )?%?([^\s(]+) \(.*\{$")
_COLLECTIVE = re.compile(f"({'|'.join(_KINDS)})(-start)?")
_CALLED = re.compile(
    r"(?:calls|to_apply|called_computations|\w+_computations?)=\{?((?:%?[\w.-]+(?:, )?)+)"
)
_LAYOUT = re.compile(r"\{[^{}]*\}")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")

# XLA has three ways to write pairs of devices: `replica_groups=[4,2]<=[8]`, `={{0,1},{2,3}}` and
# `=mesh['a'=4,'b'=2] {'b'}`. In the last, `'b':(1)2` would be a part of an axis, of size 2.
_GROUPS_BY_SHAPE = re.compile(r"replica_groups=\[\d+,(\d+)\]")
_GROUPS_BY_LIST = re.compile(r"replica_groups=\{\{([\d,]+)\}")
_GROUPS_BY_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}")
_AXIS_SIZE = re.compile(r"'(\w+)'=(\d+)")
_AXIS_USED = re.compile(r"'(\w+)'(?::\(\d+\)(\d+))?")

_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?(\S+) = s32\[\]\S* constant\((\d+)\)")
_LESS_THAN = re.compile(r"compare\([^,]*%(\S+?), [^,]*%(\S+?)\), direction=LT")


class _Program(NamedTuple):
    """A module of HLO text."""

    computations: dict[str, list[str]]  # the lines of each, by its name
    entry: str  # the name of the one where the program begins


def count_bytes(hlo: str, num_devices: int) -> dict[str, int]:
    """Bytes that a device sends in one run of the program, by the kind of collective.

    Of n devices with S bytes each as the result (all-gather, all-reduce) or the argument
    (reduce-scatter), a ring sends S (n-1)/n for a gather or scatter and twice that for an
    all-reduce. Loops count by their trips. Of a conditional both branches are counted.

    Args:
        hlo: the text of a compiled module.
        num_devices: for which it was compiled.

    Source: Thakur et al. 2005 (Optimization of Collective Communication Operations in MPICH),
    section 4.
    """
    program = _parse(hlo)
    sent: dict[str, int] = collections.Counter()

    def walk(name: str, times: int) -> None:
        """Adds what computation `name` sends, if it runs so often."""
        for line in program.computations[name]:
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            _, shape, operation = instruction.groups()

            if operation == "while":
                condition = program.computations[_called(line, "condition")]
                walk(_called(line, "body"), times * _trips(line, condition))

            elif collective := _COLLECTIVE.fullmatch(operation):
                # A TPU writes a reduce-scatter as a fusion of an all-reduce and a slice.
                is_scatter = name.startswith("all-reduce-scatter")
                kind = "reduce-scatter" if is_scatter else collective[1]
                size = _result_bytes(shape, operation)
                group = _group_size(line, num_devices)
                sent[kind] += times * _sent_bytes(kind, size, group, of_argument=is_scatter)

            elif operation in _CALLS:
                # The names may be of computations, and of much else.
                for names in _CALLED.findall(line):
                    for called in re.findall(r"[\w.-]+", names):
                        if called in program.computations:
                            walk(called, times)

    walk(program.entry, 1)
    return {kind: size for kind, size in sorted(sent.items()) if size}


def _sent_bytes(kind: str, size: int, group: int, of_argument: bool) -> int:
    """Bytes that one of `group` devices sends, in a ring.

    Args:
        kind: of the collective.
        size: bytes of the result, or of the argument if `of_argument`.
    """
    if kind == "collective-permute":
        return size
    if kind == "reduce-scatter" and not of_argument:
        size *= group

    rounds = 2 if kind == "all-reduce" else 1
    return size * (group - 1) // group * rounds


def _group_size(line: str, num_devices: int) -> int:
    """How many devices take part in a collective."""
    if by_shape := _GROUPS_BY_SHAPE.search(line):
        return int(by_shape[1])

    if by_list := _GROUPS_BY_LIST.search(line):
        return by_list[1].count(",") + 1

    if by_mesh := _GROUPS_BY_MESH.search(line):
        sizes = dict(_AXIS_SIZE.findall(by_mesh[1]))
        used = _AXIS_USED.findall(by_mesh[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)

    return num_devices


def _result_bytes(shape: str, operation: str) -> int:
    """Bytes of the result; what starts an asynchronous operation carries its argument too."""
    arrays = _ARRAY.findall(_LAYOUT.sub("", shape))
    sizes = [_array_bytes(dtype, dims) for dtype, dims in arrays]

    if operation == "all-gather-start":
        return max(sizes)
    if operation == "collective-permute-start":
        return sizes[0]
    return sum(sizes)


def _array_bytes(dtype: str, dims: str) -> int:
    """Bytes of an array, such as of `f32` and `8,128`."""
    bits = re.search(r"(\d+)", dtype)
    item_bytes = _ITEM_BYTES.get(dtype) or (int(bits[1]) // 8 if bits else 0)
    return item_bytes * math.prod(int(dim) for dim in dims.split(",") if dim)


def _called(line: str, role: str) -> str:
    """The name of the computation that an instruction calls in this role."""
    match = re.search(rf"{role}=%?([^,\s]+)", line)
    assert match, line
    return match[1]


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs; 1 where that cannot be seen.

    jax's scans count up from 0 to a constant.
    """
    known = _KNOWN_TRIPS.search(line)
    if known:
        return int(known[1])

    text = "\n".join(condition)
    limit = _LESS_THAN.search(text)
    if limit is None:
        return 1
    constants = dict(_CONSTANT.findall(text))
    return int(constants.get(limit[2], 1))


def _parse(hlo: str) -> _Program:
    computations: dict[str, list[str]] = {}
    entry = ""
    name = ""  # of the computation that the line is in
    for line in hlo.splitlines():
        if head := _COMPUTATION.match(line):
            name = head[2]
            computations[name] = []
            if head[1]:
                entry = name
        elif line == "}":
            name = ""
        elif name:
            computations[name].append(line)
    return _Program(computations, entry)
