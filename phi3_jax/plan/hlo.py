"""Reads compiled HLO text: computations, which of them call which, and how often each runs.

No library reads it in Python: jaxlib's module has instructions without their attributes, and the definition
of the protocol buffer comes with TensorFlow. Unknown opcodes and attributes are kept as text.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from phi3_jax.sizes import ceil_div

_HEADER = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) .*->.*\{\s*$")
_INSTRUCTION = re.compile(r"^\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = ")
_OPCODE = re.compile(r"\s*(?P<opcode>[\w\-]+)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<=? ]*)\]")
_CALLED = re.compile(
    r"\b(?P<how>calls|to_apply|body|condition|true_computation|false_computation|branch_computations"
    r"|called_computations)=(?:\{(?P<many>[^}]*)\}|%?(?P<one>[\w.\-]+))"
)
_KNOWN_TRIPS = re.compile(r'"known_trip_count"\s*:\s*\{\s*"n"\s*:\s*"?(\d+)')

# Opcodes that pass a number on unchanged.
_TRANSPARENT = ("copy", "bitcast", "convert", "reshape", "copy-start", "copy-done", "optimization-barrier")


@dataclass(frozen=True)
class Instruction:
    """One line: `name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str
    """The text in the parentheses: a constant's value, a parameter's number."""
    attributes: str

    def attribute(self, name: str) -> str | None:
        """Returns the value of `name=value`, without the braces around it."""
        match = re.search(rf"\b{name}=(\{{[^}}]*\}}|[^,\s]+)", self.attributes)
        return None if match is None else match[1].strip("{}")

    @property
    def called(self) -> list[tuple[str, str]]:
        """A pair such as ("body", "region_1") for each computation that runs within this instruction."""
        pairs = []
        for match in _CALLED.finditer(self.attributes):
            names = _NAME.findall(match["many"]) if match["many"] is not None else [match["one"]]
            pairs += [(match["how"], name) for name in names]
        return pairs

    @property
    def op_name(self) -> str:
        """The operation of the user's program that it comes from."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""


@dataclass
class Computation:
    """A sequence of instructions, by name."""

    name: str
    instructions: dict[str, Instruction] = field(default_factory=dict)
    root: str = ""

    def has_custom_call(self, target: str) -> bool:
        return any(f'custom_call_target="{target}"' in i.attributes for i in self.instructions.values())


class Call(NamedTuple):
    """One call of a computation."""

    computation: Computation
    times: int
    """How often it runs in one execution of the program."""
    certain: bool
    caller: Instruction | None


@dataclass
class Module:
    """A program's computations."""

    computations: dict[str, Computation]
    entry: str

    def calls(self) -> Iterator[Call]:
        """Yields every call of every computation, from the entry downwards.

        A loop's body runs as often as the loop's trip count; where that cannot be read, the body counts once
        and is uncertain. Each branch of a conditional counts as if it were always taken.
        """
        if self.entry in self.computations:
            yield from self._calls(self.computations[self.entry], 1, True, None)

    def _calls(
        self, computation: Computation, times: int, certain: bool, caller: Instruction | None
    ) -> Iterator[Call]:
        yield Call(computation, times, certain, caller)
        for instruction in computation.instructions.values():
            trips: int | None = 1
            if instruction.opcode == "while":
                trips = self.trip_count(computation, instruction)
            for how, name in instruction.called:
                if how != "condition" and name in self.computations:
                    count = times * (1 if trips is None else trips)
                    certain_here = certain and trips is not None
                    yield from self._calls(self.computations[name], count, certain_here, instruction)

    def trip_count(self, computation: Computation, loop: Instruction) -> int | None:
        """Returns how often the body of `loop` runs; None if that cannot be read.

        It is the compiler's note, or follows from a counter that is compared with a constant.
        """
        if match := _KNOWN_TRIPS.search(loop.attributes):
            return int(match[1])
        called = dict(loop.called)
        condition, body = (
            self.computations.get(called.get("condition", "")),
            self.computations.get(called["body"]),
        )
        if condition is None or body is None:
            return None
        compare = condition.instructions[condition.root]
        if compare.opcode == "fusion":
            compare = self._unwrap(compare)
        if compare.opcode != "compare":
            return None
        direction = compare.attribute("direction") or ""
        sides = [_counter_or_number(condition, name) for name in compare.operands[:2]]
        values = [self._initial_value(computation, loop, side) for side in sides]
        steps = [0 if side[0] is None else _step(body, side[0]) for side in sides]
        if None in values or None in steps:
            return None
        return _trips(direction, values, steps)  # type: ignore[arg-type]  # None is excluded above

    def _unwrap(self, fusion: Instruction) -> Instruction:
        """Returns the root of a fusion that contains nothing else, with the fusion's operands."""
        inner = self.computations.get(dict(fusion.called).get("calls", ""))
        if inner is None:
            return fusion
        root = inner.instructions[inner.root]
        parameters = {i.name: int(i.inside) for i in inner.instructions.values() if i.opcode == "parameter"}
        if not all(name in parameters for name in root.operands):
            return fusion
        operands = tuple(fusion.operands[parameters[name]] for name in root.operands)
        return Instruction(root.name, root.shape, root.opcode, operands, root.inside, root.attributes)

    def _initial_value(
        self, computation: Computation, loop: Instruction, side: tuple[int | None, int | None]
    ) -> int | None:
        """Returns one side of the comparison before the first trip."""
        index, number = side
        if index is None:
            return number
        carried = computation.instructions.get(loop.operands[0]) if loop.operands else None
        if carried is None or carried.opcode != "tuple" or index >= len(carried.operands):
            return None
        return _number(computation, carried.operands[index])


def parse(text: str) -> Module:
    """Parses the text that `compiled.as_text()` prints."""
    computations: dict[str, Computation] = {}
    entry, current = "", None
    for line in _whole_lines(text):
        if current is None:
            if header := _HEADER.match(line):
                current = computations[header["name"]] = Computation(header["name"])
                entry = header["name"] if header["entry"] else entry
        elif line.rstrip() == "}":
            current = None
        elif (instruction := _instruction(line)) is not None:
            current.instructions[instruction[0].name] = instruction[0]
            if instruction[1] or not current.root:
                current.root = instruction[0].name
    return Module(computations, entry)


def _whole_lines(text: str) -> Iterator[str]:
    """Yields the lines, with each instruction on one: the metadata of Pallas kernels contains line breaks."""
    whole = ""
    for line in text.splitlines():
        if _INSTRUCTION.match(whole) and line.rstrip() != "}" and not _INSTRUCTION.match(line):
            whole += line
        else:
            yield whole
            whole = line
    yield whole


def _instruction(line: str) -> tuple[Instruction, bool] | None:
    """Returns the instruction on this line and whether it is the root; None if there is no instruction."""
    head = _INSTRUCTION.match(line)
    if head is None:
        return None
    rest = line[head.end() :]
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.find(" ")
    opcode = _OPCODE.match(rest, end)
    if end <= 0 or opcode is None:
        return None
    close = _closing(rest, opcode.end() - 1)
    inside = rest[opcode.end() : close]
    operands = tuple(_NAME.findall(inside))
    parsed = Instruction(head["name"], rest[:end], opcode["opcode"], operands, inside, rest[close + 1 :])
    return parsed, bool(head["root"])


def _closing(text: str, start: int) -> int:
    """Returns the index at which the parenthesis that opens at `start` closes."""
    depth = 0
    for index in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[index], 0)
        if depth == 0:
            return index
    return len(text)


def shape_bytes(shape: str) -> int:
    """Returns the bytes of an array, or of all arrays of a tuple, without the padding of its layout."""
    return sum(_array_bytes(kind, sizes) for kind, sizes in _ARRAY.findall(shape))


def _array_bytes(kind: str, sizes: str) -> int:
    bits = 8 if kind == "pred" else int(width[0]) if (width := re.findall(r"\d+", kind)) else 0
    elements = 1
    for size in filter(None, sizes.split(",")):
        elements *= int(re.sub(r"\D", "", size) or 0)
    return ceil_div(bits * elements, 8)


def element_types(shape: str) -> list[str]:
    """Returns the element types of the arrays in a shape, each once."""
    return list(dict.fromkeys(kind for kind, _ in _ARRAY.findall(shape)))


def _number(computation: Computation, name: str) -> int | None:
    """Returns the integer constant that a value is, perhaps through copies; None if it is something else."""
    for _ in range(len(computation.instructions)):
        instruction = computation.instructions.get(name)
        if instruction is None:
            return None
        if instruction.opcode == "constant":
            return int(instruction.inside) if re.fullmatch(r"-?\d+", instruction.inside) else None
        if instruction.opcode not in _TRANSPARENT or not instruction.operands:
            return None
        name = instruction.operands[0]
    return None


def _counter_or_number(computation: Computation, name: str) -> tuple[int | None, int | None]:
    """Returns (i, None) for the loop's i-th carried value, (None, n) for a constant, else (None, None)."""
    if (number := _number(computation, name)) is not None:
        return None, number
    while (instruction := computation.instructions.get(name)) is not None:
        if instruction.opcode == "get-tuple-element":
            return int(instruction.attribute("index") or 0), None
        if instruction.opcode not in _TRANSPARENT:
            break
        name = instruction.operands[0]
    return None, None


def _step(body: Computation, index: int) -> int | None:
    """Returns what one trip adds to the carried value `index`; None if that cannot be read."""
    root = body.instructions.get(body.root)
    if root is None or root.opcode != "tuple" or index >= len(root.operands):
        return None
    name = root.operands[index]
    if _counter_or_number(body, name) == (index, None):
        return 0
    instruction = body.instructions.get(name)
    while instruction is not None and instruction.opcode in _TRANSPARENT:
        instruction = body.instructions.get(instruction.operands[0])
    if instruction is None or instruction.opcode not in ("add", "subtract"):
        return None
    first, second = (_counter_or_number(body, operand) for operand in instruction.operands[:2])
    if first == (index, None) and second[1] is not None:
        return second[1] if instruction.opcode == "add" else -second[1]
    return first[1] if instruction.opcode == "add" and second == (index, None) else None


def _trips(direction: str, values: list[int], steps: list[int]) -> int | None:
    """Returns the trips until `values[0] <direction> values[1]` is false; each side moves by its step."""
    distance, speed = values[1] - values[0], steps[0] - steps[1]
    if direction in ("GT", "GE"):
        distance, speed = -distance, -speed
    if direction in ("LE", "GE"):
        distance += 1
    if direction == "NE" and speed and distance % speed == 0:
        distance, speed = abs(distance), abs(speed)
    if direction not in ("LT", "LE", "GT", "GE", "NE") or speed <= 0:
        return None
    return max(0, ceil_div(distance, speed))
