"""How many bytes a compiled program moves between devices, read from its HLO text."""

import collections
import math
import re

_SIZES = {"pred": 1, "bf16": 2}  # the others end in their number of bits: s32, f32, u8
_KINDS = "all-gather|reduce-scatter|all-reduce|collective-permute|all-to-all|ragged-all-to-all"
_INSTRUCTION = re.compile(r"\s*(?:ROOT )?%?(\S+) = (.*?) ([a-z][a-z0-9-]*)\(")


def count_bytes(hlo: str, num_devices: int) -> dict[str, int]:
    """Bytes that a device sends in one run of the program, by the kind of collective; loops count by their trips.

    Of n devices with S bytes each as the result (all-gather, all-reduce) or the argument (reduce-scatter), a ring sends
    S (n-1)/n for a gather or scatter and twice that for an all-reduce. Of a conditional both branches are counted.
    Source: Thakur et al. 2005 (Optimization of Collective Communication Operations in MPICH), section 4.
    """
    computations, entry = _computations(hlo)
    sent: dict[str, int] = collections.Counter()

    def walk(name: str, times: int) -> None:
        for line in computations[name]:
            if not (match := _INSTRUCTION.match(line)):
                continue
            _, shape, operation = match.groups()
            if operation == "while":
                walk(_called(line, "body"), times * _trips(line, computations[_called(line, "condition")]))
            elif kind := re.fullmatch(f"({_KINDS})(-start)?", operation):
                # A TPU writes a reduce-scatter as a fusion of an all-reduce and a slice.
                is_scatter = name.startswith("all-reduce-scatter")
                what = "reduce-scatter" if is_scatter else kind[1]
                sent[what] += times * _sent(what, _result(shape, operation), _group(line, num_devices), is_scatter)
            elif operation in ("fusion", "call", "async-start", "custom-call", "conditional"):
                named = r"(?:calls|to_apply|called_computations|\w+_computations?)=\{?((?:%?[\w.-]+(?:, )?)+)"
                for called in re.findall(r"[\w.-]+", " ".join(re.findall(named, line))):
                    if called in computations:
                        walk(called, times)

    walk(entry, 1)
    return {kind: size for kind, size in sorted(sent.items()) if size}


def _sent(kind: str, size: int, group: int, of_argument: bool) -> int:
    """Bytes that one of `group` devices sends, in a ring; `size` is the result's, or the argument's."""
    if kind == "collective-permute":
        return size
    whole = size * group if kind == "reduce-scatter" and not of_argument else size
    return whole * (group - 1) // group * (2 if kind == "all-reduce" else 1)


def _group(line: str, num_devices: int) -> int:
    """How many devices take part in a collective. XLA has three ways to write pairs: `replica_groups=[4,2]<=[8]`,
    `={{0,1},{2,3}}` and `=mesh['a'=4,'b'=2] {'b'}`; there `'b':(1)2` would be a part of an axis, of size 2."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return match[1].count(",") + 1
    if match := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
        used = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", match[2])
        return math.prod(int(part or sizes[axis]) for axis, part in used)
    return num_devices


def _result(shape: str, operation: str) -> int:
    """Bytes of the result; what starts an asynchronous operation carries its argument too."""
    parts = [_bytes(*part) for part in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", re.sub(r"\{[^{}]*\}", "", shape))]
    if operation == "all-gather-start":
        return max(parts)
    return parts[0] if operation == "collective-permute-start" else sum(parts)


def _bytes(kind: str, dims: str) -> int:
    bits = re.search(r"(\d+)", kind)
    size = _SIZES.get(kind) or (int(bits[1]) // 8 if bits else 0)
    return size * math.prod(int(dim) for dim in dims.split(",") if dim)


def _called(line: str, role: str) -> str:
    match = re.search(rf"{role}=%?([^,\s]+)", line)
    assert match, line
    return match[1]


def _trips(line: str, condition: list[str]) -> int:
    """How often a loop runs; jax's scans count up from 0 to a constant. 1 where that cannot be seen."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"', line):
        return int(known[1])
    constants = dict(re.findall(r"%?(\S+) = s32\[\]\S* constant\((\d+)\)", "\n".join(condition)))
    limit = re.search(r"compare\([^,]*%(\S+?), [^,]*%(\S+?)\), direction=LT", "\n".join(condition))
    return int(constants.get(limit[2], 1)) if limit else 1


def _computations(hlo: str) -> tuple[dict[str, list[str]], str]:
    """The lines of each computation, by name, and the name of the one where the program begins."""
    found: dict[str, list[str]] = {}
    name, entry = "", ""
    for line in hlo.splitlines():
        if match := re.match(r"(ENTRY )?%?([^\s(]+) \(.*\{$", line):
            name = match[2]
            found[name] = []
            entry = name if match[1] else entry
        elif line == "}":
            name = ""
        elif name:
            found[name].append(line)
    return found, entry
