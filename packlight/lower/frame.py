"""The values of one run of a program, in flight between its sections.

Several frames of one program may be under way at once (the microbatches of a pipeline stage), in
any order: they share nothing but the code. Where buffers are transferred, each frame needs a tier
of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from packlight.lower.program import Program

# Runs a section's module with a list of arguments, which it empties.
Call = Callable[[fx.GraphModule, list[Any]], Sequence[Any]]


def call_module(module: fx.GraphModule, arguments: list[Any]) -> Sequence[Any]:
    """Run generated code."""
    results: Sequence[Any] = module.forward(arguments)
    return results


class Frame:
    """One run of a program; its sections are run one after the other.

    Args:
        program: what to run.
        helpers: those of the program's helpers that there are, by name; None for the others.
        call: runs a section's module.

    Attributes:
        values: what sections have left for later ones, by buffer.
    """

    def __init__(self, program: Program, helpers: dict[str, Any], call: Call = call_module) -> None:
        self.program, self._call = program, call
        self._helpers = [helpers.get(name) for name in program.helpers]
        self._sections = iter(program.sections)
        self.values: dict[int, Any] = {}

    def run(self, arguments: list[Any]) -> Sequence[Any]:
        """Run the next section and return its results.

        Args:
            arguments: the primals, if it is the first section; then the tangents, if it takes them.
                The list is emptied: what nobody else holds dies where the section is done with it.
        """
        section = next(self._sections)
        taken = [
            self.values[b] if b in section.passes else self.values.pop(b) for b in section.takes
        ]
        everything = [*taken, *arguments, *self._helpers]
        taken.clear()
        arguments.clear()
        returned = self._call(section.module, everything)
        self.values.update(zip(section.leaves, returned[section.num_results :], strict=True))
        return returned[: section.num_results]

    def copy(self) -> Frame:
        """Return a frame that goes on from here, its overwritten values copied: this one stays."""
        copied = Frame(self.program, {}, self._call)
        copied._helpers = self._helpers
        done = len(self.program.sections) - len(list(self._sections))
        self._sections = iter(self.program.sections[done:])
        copied._sections = iter(self.program.sections[done:])
        overwritten = self.program.sections[done].overwrites
        copied.values = {
            b: value.clone() if b in overwritten else value for b, value in self.values.items()
        }
        return copied

    def continued_by(self, program: Program) -> Frame | None:
        """Return a frame that goes on in another program of the same step, and lets go of the rest.

        Args:
            program: whose sections so far make what this one's have made.

        Returns:
            None if that program needs something else from here on.
        """
        done = len(self.program.sections) - len(list(self._sections))
        self._sections = iter(self.program.sections[done:])
        takes = program.sections[done].takes
        if not self.values.keys() >= set(takes):
            return None
        continued = Frame(program, {}, self._call)
        continued._sections = iter(program.sections[done:])
        continued.values = {b: self.values[b] for b in takes}
        return continued
