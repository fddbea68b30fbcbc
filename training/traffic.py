"""What a compiled program sends between devices, and what a TPU's compiler thinks it takes: read in its HLO text."""

import math
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

_COLLECTIVE = re.compile(
    r"= (?P<type>.+?) (?P<op>all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute)(?P<start>-start)?\("
)
# What TPU slices send to each other leaves through the hosts, by their runtime. It goes among slices, counted from 1,
# by all devices of each, "{1,2}x{0:3}"; or devices are listed in groups, each as 100,000 times its slice and a number.
_HOSTS = re.compile(
    r'= \((?P<type>\S+), .* send\(.*_megascale_target="?(?P<among>\{.*\})"?,_xla_megascale_transfer_type="(?P<op>\w+)"'
)
_SENT = re.compile(f"{_COLLECTIVE.pattern}| send\\(")
_CHAIN = re.compile(r'chain_id="(\d+)"')  # a TPU's gather in pieces, each beside other work: all show its whole result
_ARRAY = re.compile(r"\b([a-z]+)(\d*)\w*\[([\d,]*)\]")
_CALLED = re.compile(r"(?:body|condition|to_apply|calls|(?:true|false)_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_CONDITION = re.compile(r" while\(.*condition=%?([\w.\-]+)")
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_FUSED = re.compile(r"( fusion\(.*), calls=%?[\w.\-]+")
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{\{([\d,]+)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
# Named axes of a mesh, of which the quoted ones in braces differ within a group; devices are numbered in order, or as
# listed. 'a':(2)3 is a part of an axis: of size 3, inside of the first 2.
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\((.*?)\))? \{([^}]*)\}")
_AXIS = re.compile(r"'([^']*)'(?::\((\d+)\)(\d+)|=(\d+))?")


@dataclass(frozen=True)
class Collective:
    """All operations of one kind among the same groups of devices, in one run of a program."""

    op: str
    group: tuple[int, ...]  # the devices of the first group, as the mesh numbers them
    count: int
    sent: float  # bytes that each device sends
    in_open_loop: bool  # in a loop whose length the program does not state; counted once
    in_branch: bool  # of a conditional: of a step's micro-steps only the last one runs it, with the optimizer
    between_slices: bool  # the group is of slices, by the first device of each; every device sends as much


def sent_bytes(op: str, result: float, n: int) -> float:
    """Bytes that each of n devices sends for a result of `result` bytes, by the algorithms that send least."""
    shares = {"all-reduce": 2 * (n - 1) / n, "reduce-scatter": n - 1, "collective-permute": 1}
    return shares.get(op, (n - 1) / n) * result


def collectives(text: str, num_devices: int) -> list[Collective]:
    """All collectives among more than one device, the largest first; `text` is the compiled program's HLO."""
    found: dict[tuple, list[float]] = defaultdict(lambda: [0, 0.0])
    bodies, chains = _computations(text), set()
    for (name, in_branch), (times, known) in _times(bodies, _SENT).items():
        for line in bodies[name]:
            if hosts := _HOSTS.search(line):
                op = hosts["op"].lower().replace("_", "-").replace("one-to-one", "collective-permute")
                group = _slices(hosts["among"])
                n = len(group)
                result = _bytes(hosts["type"]) * {"all-gather": n, "reduce-scatter": 1 / n}.get(op, 1)
            elif match := _COLLECTIVE.search(line):
                op, group = match["op"], tuple(sorted(_group(line, num_devices)))
                chain = {(op, number) for number in _CHAIN.findall(line)}
                if len(group) < 2 or chain & chains:
                    continue
                chains |= chain
                result = _bytes(_result(match["type"]) if match["start"] and op != "all-reduce" else match["type"])
            else:
                continue
            entry = found[op, group, not known, in_branch, bool(hosts)]
            entry[0] += times
            entry[1] += times * sent_bytes(op, result, len(group))
    rows = [Collective(op, group, int(n), sent, *where) for (op, group, *where), (n, sent) in found.items()]
    return sorted(rows, key=lambda row: -row.sent)


def cycles(text: str) -> dict[str, float] | None:
    """The cycles that a TPU's compiler estimates, without kernels and what is sent; None of others' programs.

    each: of a micro-step; in_branch: of what only the last one of a real step runs, with the optimizer.
    """
    bodies = {name: [_FUSED.sub(r"\1", line) for line in lines] for name, lines in _computations(text).items()}
    found = {"each": 0.0, "in_branch": 0.0}
    for (name, in_branch), (times, _) in _times(bodies, _CYCLES).items():
        estimates = (int(match[1]) for match in map(_CYCLES.search, bodies[name]) if match)
        found["in_branch" if in_branch else "each"] += times * sum(estimates)
    return found if any(found.values()) else None


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


def _times(bodies: dict[str, list[str]], sought: re.Pattern) -> dict[tuple[str, bool], tuple[int, bool]]:
    """How often a program runs each computation in which something is sought, and whether its loops' lengths are known.

    Those in a branch of a conditional stand apart, by name and True; both branches count.
    """
    calls = {name: [call for line in lines for call in _calls(line, bodies)] for name, lines in bodies.items()}
    result: dict[tuple[str, bool], tuple[int, bool]] = {}

    @cache
    def holds(name: str) -> bool:  # a program has thousands of fusions, most with nothing of it
        return any(map(sought.search, bodies[name])) or any(holds(callee) for callee, *_ in calls[name])

    def visit(name: str, in_branch: bool, times: int, known: bool) -> None:
        before = result.get((name, in_branch), (0, True))
        result[name, in_branch] = before[0] + times, before[1] and known
        for callee, branch, trips, said in calls[name]:
            if holds(callee):
                visit(callee, in_branch or branch, times * trips, known and said)

    visit(next(reversed(bodies)), False, 1, True)
    return result


def _calls(line: str, bodies: dict[str, list[str]]) -> Iterator[tuple[str, bool, int, bool]]:
    names = _CALLED.findall(line)
    for branches in _BRANCHES.findall(line):
        names += [name.strip().lstrip("%") for name in branches.split(",")]
    branch, trips = " conditional(" in line, _trips(line, bodies)
    for name in names:
        if name in bodies:
            yield name, branch, trips or 1, trips is not None


def _trips(line: str, bodies: dict[str, list[str]]) -> int | None:
    """How often a line runs what it calls; None of a loop that does not say.

    A TPU's loops show it in their condition alone, counter < constant; the counters of JAX's scan start at 0.
    """
    if not (loop := _CONDITION.search(line)):
        return 1
    if stated := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', line):
        return int(stated[1])
    condition = "\n".join(bodies.get(loop[1], []))
    bound = re.search(r"ROOT .* compare\(.*%([\w.\-]+)\), direction=LT", condition)
    constant = bound and re.search(rf"%{re.escape(bound[1])} = .* constant\((\d+)\)", condition)
    return int(constant[1]) if constant else None


def _result(start: str) -> str:
    """The result's type in that of an asynchronous operation's start, (operands, results, ...)."""
    without_layouts = re.sub(r"\{[^}]*\}", "", start[1:-1])
    return re.findall(r"\([^()]*\)|\w+\[[^\]]*\]", without_layouts)[1]


def _bytes(text: str) -> int:
    total = 0
    for kind, bits, sizes in _ARRAY.findall(text):
        each = 1 if kind == "pred" else int(bits) / 8
        total += int(each * math.prod(map(int, filter(None, sizes.split(",")))))
    return total


def _group(line: str, num_devices: int) -> tuple[int, ...]:
    if listed := _LISTED.search(line):
        return _numbers(listed[1])
    if mesh := _MESH.search(line):
        return _group_of_axes(*mesh.groups(), num_devices)
    if not (iota := _IOTA.search(line)):
        return tuple(range(num_devices))
    return tuple(_ordered(iota[2], iota[3], num_devices).reshape(_numbers(iota[1]))[0].tolist())


def _ordered(shape: str, permutation: str | None, num_devices: int) -> np.ndarray:
    ids = np.arange(num_devices).reshape(_numbers(shape))
    return ids.transpose(_numbers(permutation)) if permutation else ids


def _group_of_axes(mesh: str, order: str | None, differ: str, num_devices: int) -> tuple[int, ...]:
    sizes = {name: int(size) for name, _, _, size in _AXIS.findall(mesh)}
    if order and (iota := re.match(r"\[([\d,]+)\](?:T\(([\d,]+)\))?$", order)):
        ids = _ordered(iota[1], iota[2], num_devices)
    else:
        ids = np.array(_numbers(order)) if order else np.arange(num_devices)
    place = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)  # of each device, on each axis
    for name, before, size, _ in _AXIS.findall(differ):
        axis, whole = list(sizes).index(name), sizes[name]
        inner = whole // (int(before) * int(size)) if size else 1
        place[axis] -= place[axis] // inner % (int(size) if size else whole) * inner
    return tuple(ids.ravel()[(place == place[:, :1]).all(axis=0)].tolist())


def _slices(among: str) -> tuple[int, ...]:
    """The first device of each slice in the first group, as the mesh numbers them."""
    if same := re.match(r"\{([\d,]+)\}x\{\d+:(\d+)\}", among):
        slices, last = _numbers(same[1]), int(same[2])
    else:
        first, every = ([int(n) for n in re.findall(r"\d+", part)] for part in (among.partition("}")[0], among))
        slices, last = tuple(sorted({n // 100_000 for n in first})), max(n % 100_000 for n in every)
    return tuple((slice_ - 1) * (last + 1) for slice_ in slices)


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(",")))


def axes_of_group(group: Sequence[int], shape: dict[str, int]) -> str:
    """The mesh axes in which a group's devices differ, as "data+fsdp"."""
    places = np.array(np.unravel_index(np.array(group), tuple(shape.values())))
    return "+".join(axis for axis, row in zip(shape, places, strict=True) if len(set(row.tolist())) > 1)
