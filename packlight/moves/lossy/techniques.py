"""The techniques there are, each with its settings and their names."""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from packlight.moves.lossy.activations import FewBit
from packlight.moves.lossy.linear import Sketched
from packlight.moves.lossy.packed import PackedTo
from packlight.moves.lossy.rewrite import Approximation
from packlight.moves.lossy.saved import SavedValue


class Setting(Approximation, Protocol):
    """A technique with its numbers."""

    @property
    def technique(self) -> str:
        """What `allow=` has to name."""

    @property
    def name(self) -> str:
        """Of the setting, unlike all others."""

    def suits(self, value: SavedValue) -> bool:
        """Whether all that reads a value can read what this makes of it."""

    def kept_bytes(self, value: SavedValue) -> int:
        """Return what is kept of a value."""


_SETTINGS: tuple[Setting, ...] = (
    *map(PackedTo, (8, 4, 2)), *map(FewBit, (4, 3, 2, 1)), *map(Sketched, (0.5, 0.2, 0.1))
)
_BY_NAME = {setting.name: setting for setting in _SETTINGS}
TECHNIQUES = tuple(dict.fromkeys(setting.technique for setting in _SETTINGS))


def settings_of(value: SavedValue, allowed: Collection[str]) -> list[Setting]:
    """Return the settings that a value can have and that save something."""
    return [
        setting for setting in _SETTINGS
        if setting.technique in allowed and setting.suits(value)
        and setting.kept_bytes(value) < value.num_bytes
    ]


def setting_named(name: str) -> Setting:
    """Return the setting of a name.

    Raises:
        KeyError: there is none.
    """
    return _BY_NAME[name]
