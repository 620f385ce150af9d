"""What a forward or a backward does again for calls like an earlier one: choices, and launches without their tensors."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .. import tracing
from . import launch, tuning
from .tuning import Candidate, Problem


class Steps:
    """The steps of one forward or backward, filled by its first run.

    They fit calls whose tensors agree in shape, strides, dtype, device and alignment to 16 bytes, and whose options agree. They
    hold no tensor. Threads may share them: what one of them puts in is what another would have put in.
    """

    __slots__ = ("_choices", "_generation", "_launches", "_while_off", "dtype", "tma")

    def __init__(self) -> None:
        # Whether tiles go through descriptors, and the dtype of the output; None before they were asked for.
        self.tma: bool | None = None
        self.dtype: torch.dtype | None = None
        self._generation = tuning.generation()
        self._while_off = False
        self._choices: dict[str, Candidate] = {}
        self._launches: dict[str, tuple[object, launch.Repeated]] = {}

    def is_current(self) -> bool:
        """Whether the choices would be the same now."""
        return self._generation is tuning.generation() and (not self._while_off or tuning.is_off())

    def chosen(self, stage: str) -> Candidate | None:
        """What `choose` chose before and would choose again."""
        return self._choices.get(stage)

    def choose(
        self,
        problem: Problem,
        candidates: Sequence[Candidate],
        run: Callable[[Candidate, Steps], object],
        device: torch.device,
    ) -> Candidate:
        """As `tuning.choose`, remembering what lasts. `run` gets steps of its own: what it times are other candidates."""
        candidate, lasts = tuning.decide(problem, candidates, lambda tried: run(tried, Steps()), device)
        if lasts == tuning.WHILE_OFF:
            self._while_off = True
        if lasts != tuning.ONCE:
            self._choices[problem.stage] = candidate
        return candidate

    def launch(
        self,
        site: str,
        config: object,
        make: Callable[[], launch.Launch],
        names: Sequence[str],
        tensors: Sequence[Tensor | None],
    ) -> None:
        """Launch a kernel.

        Args:
            site: What tells this launch from the others of these steps.
            config: The tile, or None.
            make: Makes the launch of `tensors`, where it was not made before.
            names: The kernel's arguments that tensors are passed for.
            tensors: They, in the same order.
        """
        known = self._launches.get(site)
        if known is not None and known[0] is config:  # a choice that did not last may be another one now
            again = known[1]
            tracing.note(again.name, again.detail)
            again.run(tensors)
            return
        made, detail = make(), "" if config is None else str(config)
        tracing.note(made.name, detail)
        made.run()
        if not launch.INTERPRETED:  # the interpreter goes by Triton's own way each time
            self._launches[site] = config, launch.Repeated(made, detail, names, tensors)
