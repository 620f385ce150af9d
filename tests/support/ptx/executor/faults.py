"""What a program did that a GPU would not define, refuse, or wait for without end."""

from __future__ import annotations


class ProgramError(Exception):
    """The program is wrong: the message says how, and `machine` adds where."""


class UnsupportedInstructionError(Exception):
    """The program may be right, but this executor does not know one of its instructions."""
