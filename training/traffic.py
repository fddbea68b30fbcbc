"""What a compiled program sends between devices: its collectives, counted in its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

_COLLECTIVE = re.compile(
    r"= (?P<type>.+?) (?P<op>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)\("
)
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")


@dataclass(frozen=True)
class Collective:
    """All operations of one kind among the same groups of devices, in a whole step."""

    op: str
    group: tuple[int, ...]  # the devices of the first group, as the mesh numbers them
    count: int  # in a step
    sent: float  # bytes that each device sends in a step
    in_open_loop: bool  # in a loop whose length the program does not state; counted once


def sent_bytes(op: str, result: int, n: int) -> float:
    """Bytes that each of n devices sends for a result of `result` bytes, by the algorithms that send least."""
    shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return shares.get(op, (n - 1) / n) * result


def collectives(text: str, num_devices: int) -> list[Collective]:
    """All collectives among more than one device, the largest first; `text` is the compiled program's HLO."""
    found: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    bodies = _computations(text)
    for name, (times, known) in _times(bodies).items():
        for line in bodies[name]:
            match = _COLLECTIVE.search(line)
            if not match or len(group := _group(line, num_devices)) < 2:
                continue
            entry = found[match["op"], group, not known]
            entry[0] += times
            entry[1] += times * sent_bytes(match["op"], _bytes(match["type"]), len(group))
    rows = [Collective(op, group, int(n), sent, open_) for (op, group, open_), (n, sent) in found.items()]
    return sorted(rows, key=lambda row: -row.sent)


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation by its name, the entry computation last."""
    result: dict[str, list[str]] = {}
    entry, name = "", ""
    for line in text.splitlines():
        if line.endswith("{") and not line.startswith(" ") and (head := re.match(r"(ENTRY )?%?([\w.\-]+) ", line)):
            name = head[2]
            result[name] = []
            entry = name if head[1] else entry
        elif name:
            result[name].append(line)
    result[entry] = result.pop(entry)
    return result


def _times(bodies: dict[str, list[str]]) -> dict[str, tuple[int, bool]]:
    """How often a step runs each computation, and whether all its loops state their length. Both branches count."""
    result: dict[str, tuple[int, bool]] = {}

    def visit(name: str, times: int, known: bool) -> None:
        before = result.get(name, (0, True))
        result[name] = before[0] + times, before[1] and known
        for callee, trips, said in calls[name]:
            visit(callee, times * trips, known and said)

    calls = {name: [call for line in lines for call in _calls(line, bodies)] for name, lines in bodies.items()}
    holds = {name: any(map(_COLLECTIVE.search, lines)) for name, lines in bodies.items()}
    for _ in bodies:  # leave out what calls no collective: a program has thousands of fusions
        grown = {name: holds[name] or any(holds[callee] for callee, *_ in calls[name]) for name in bodies}
        if grown == holds:
            break
        holds = grown
    calls = {name: [call for call in found if holds[call[0]]] for name, found in calls.items()}
    visit(next(reversed(bodies)), 1, True)
    return result


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, int, bool]]:
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    trips, loop = _TRIPS.search(line), " while(" in line
    for name in names:
        if name in bodies:
            yield name, int(trips[1]) if loop and trips else 1, not loop or trips is not None


def _bytes(text: str) -> int:
    total = 0
    for kind, bits, sizes in _ARRAY.findall(text):
        each = 1 if kind == "pred" else int(bits) / 8
        total += int(each * math.prod(map(int, filter(None, sizes.split(",")))))
    return total


def _group(line: str, num_devices: int) -> tuple[int, ...]:
    if listed := _LISTED.search(line):
        return _numbers(listed[1])
    if not (iota := _IOTA.search(line)):
        return tuple(range(num_devices))
    ids = np.arange(num_devices).reshape(_numbers(iota[2]))
    if iota[3]:
        ids = ids.transpose(_numbers(iota[3]))
    return tuple(ids.reshape(_numbers(iota[1]))[0].tolist())


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def axes_of_group(group: Sequence[int], shape: dict[str, int]) -> str:
    """The mesh axes in which a group's devices differ, as "data+fsdp"."""
    places = np.array(np.unravel_index(np.array(group), tuple(shape.values())))
    return "+".join(axis for axis, row in zip(shape, places, strict=True) if len(set(row.tolist())) > 1)
