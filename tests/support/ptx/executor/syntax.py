"""PTX text as kernels, parameters, declarations and instructions. Nothing is interpreted here.

Of the language's directives only those are read that compilers write into kernels: `.reg`, `.shared`, `.local`, `.param`.
Sections: "Source Format", "State Spaces, Types, and Variables".
"""

from __future__ import annotations

import re
from bisect import bisect_right
from dataclasses import dataclass, field

from .faults import UnsupportedInstructionError

# Bytes of each fundamental type; a predicate has no size in memory.
SIZES = {
    "pred": 0,
    **dict.fromkeys(("b8", "u8", "s8"), 1),
    **dict.fromkeys(("b16", "u16", "s16", "f16", "bf16"), 2),
    **dict.fromkeys(("b32", "u32", "s32", "f32", "f16x2", "bf16x2", "tf32"), 4),
    **dict.fromkeys(("b64", "u64", "s64", "f64"), 8),
}


@dataclass(frozen=True)
class Instruction:
    """One instruction: an optional guard predicate, the opcode's parts between dots, and its operands as text."""

    line: int
    text: str
    guard: str | None
    negated: bool
    parts: tuple[str, ...]
    operands: tuple[str, ...]

    @property
    def type(self) -> str:
        """The last part of the opcode, which is the type of most instructions."""
        return self.parts[-1]


@dataclass(frozen=True)
class Variable:
    """A parameter, or a variable in shared or local memory; `size` is 0 where the launch decides it."""

    name: str
    size: int
    alignment: int


@dataclass
class Kernel:
    """An entry of a module. Labels are indices of instructions; names of inner scopes are made unique."""

    name: str
    parameters: list[Variable]
    registers: dict[str, str] = field(default_factory=dict)  # name → type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: list[Variable] = field(default_factory=list)
    local: list[Variable] = field(default_factory=list)


_ENTRY = re.compile(r"\.entry\s+([$\w]+)\s*(?:\(([^)]*)\))?[^{;]*\{")
_VARIABLE = re.compile(r"(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[^,;]*?\s)?([$\w]+)(?:\[(\d*)\])?\s*$")
_MODULE_SHARED = re.compile(r"(?:\.extern\s+|\.weak\s+|\.visible\s+)*\.shared\s+([^;{=]+);")
_LINE_DIRECTIVE = re.compile(r"\.(loc|file)\s")
_LABEL = re.compile(r"([$\w]+):(?!:)")
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z][\w.:]*)\s*(.*)$", re.DOTALL)
_NAME = re.compile(r"[%$A-Za-z_][\w$]*")


def parse(text: str) -> dict[str, Kernel]:
    """The kernels of a module by their names."""
    # Comments become blanks, so that offsets still lead to lines.
    text = re.sub(r"//[^\n]*|/\*.*?\*/", lambda found: re.sub(r"[^\n]", " ", found[0]), text, flags=re.DOTALL)
    lines = [found.end() for found in re.finditer("\n", text)]
    first = _ENTRY.search(text)
    shared = [_variable(found[1]) for found in _MODULE_SHARED.finditer(text, 0, first.start() if first else len(text))]
    kernels = {}
    for entry in _ENTRY.finditer(text):
        parameters = [_variable(re.sub(r"^\s*\.param\s+", "", p)) for p in (entry[2] or "").split(",") if p.strip()]
        kernel = Kernel(entry[1], parameters, shared=list(shared))
        _Body(text, entry.end(), lines, kernel).read()
        used = {name for i in kernel.instructions for operand in i.operands for name in _NAME.findall(operand)}
        kernel.shared = [variable for variable in kernel.shared if variable.name in used]
        kernels[kernel.name] = kernel
    return kernels


def _variable(text: str) -> Variable:
    found = _VARIABLE.match(text.strip())
    if found is None:
        raise UnsupportedInstructionError(f"declaration not understood: {text.strip()}")
    size = SIZES[found[2]]
    count = 1 if found[4] is None else int(found[4] or 0)
    return Variable(found[3], size * count, int(found[1] or size))


class _Body:
    """What stands between the braces of an entry."""

    def __init__(self, text: str, start: int, lines: list[int], kernel: Kernel) -> None:
        self.text, self.at, self.lines, self.kernel = text, start, lines, kernel
        self.scopes: list[dict[str, str]] = [{}]  # of each open scope: its names → unique ones
        self.opened = 0

    def read(self) -> None:
        while self.scopes:
            rest = re.compile(r"\s*").match(self.text, self.at)
            assert rest is not None
            self.at = rest.end()
            if self.text[self.at] == "{":
                self._open()
            elif self.text[self.at] == "}":
                self.scopes.pop()
                self.at += 1
            elif _LINE_DIRECTIVE.match(self.text, self.at):  # these end with the line
                self.at = self.text.index("\n", self.at)
            elif label := _LABEL.match(self.text, self.at):
                self.kernel.labels[self._unique(label[1])] = len(self.kernel.instructions)
                self.at = label.end()
            else:
                end = self.text.index(";", self.at)
                self._statement(self.text[self.at : end].strip())
                self.at = end + 1

    def _open(self) -> None:
        """A scope: its labels are known before they are read, since branches lead forwards too."""
        self.opened += 1
        self.at += 1
        depth, end = 1, self.at
        while depth:
            depth += {"{": 1, "}": -1}.get(self.text[end], 0)
            end += 1
        inside = self.text[self.at : end]
        labels = {found[1] for found in re.finditer(r"(?m)^\s*([$\w]+):(?!:)", inside)}
        self.scopes.append({name: f"{name}@{self.opened}" for name in labels})

    def _unique(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name

    def _statement(self, text: str) -> None:
        if text.startswith(".reg"):
            self._registers(text)
        elif text.startswith((".shared", ".local")):
            space, _, declared = text.partition(" ")
            variables = self.kernel.shared if space == ".shared" else self.kernel.local
            variables.append(_variable(declared))
        elif not text.startswith("."):
            self._instruction(text)

    def _registers(self, text: str) -> None:
        _, kind, names = text.split(None, 2)
        for name in names.split(","):
            found = re.match(r"\s*([%$\w]+)(?:<(\d+)>)?\s*$", name)
            if found is None:
                raise UnsupportedInstructionError(f"declaration not understood: {text}")
            if found[2] is not None:
                self.kernel.registers.update(dict.fromkeys((f"{found[1]}{n}" for n in range(int(found[2]))), kind[1:]))
                continue
            unique = found[1] if len(self.scopes) == 1 else f"{found[1]}@{self.opened}"
            self.scopes[-1][found[1]] = unique
            self.kernel.registers[unique] = kind[1:]

    def _instruction(self, text: str) -> None:
        line = bisect_right(self.lines, self.at) + 1
        found = _INSTRUCTION.match(text)
        if found is None:
            raise UnsupportedInstructionError(f"line {line}: not understood: {text}")
        operands = found[4]
        if len(self.scopes) > 1:  # only inner scopes rename anything
            operands = _NAME.sub(lambda name: self._unique(name[0]), operands)
        guard = self._unique(found[2]) if found[2] else None
        made = Instruction(
            line, " ".join(text.split()), guard, found[1] == "!", tuple(found[3].split(".")), tuple(_split(operands))
        )
        self.kernel.instructions.append(made)


def _split(operands: str) -> list[str]:
    """Operands between the commas that stand outside of brackets."""
    found, depth, start = [], 0, 0
    for at, character in enumerate(operands):
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(character, 0)
        if character == "," and depth == 0:
            found.append(operands[start:at].strip())
            start = at + 1
    last = operands[start:].strip()
    return [*found, last] if last else found
