"""Checks that configurations share; each names the setting, what it may be and what came."""

import math
from collections.abc import Sequence

from spd_fast.errors import InputError


def check_choice(config, name: str, allowed: Sequence[str]) -> None:
    value = getattr(config, name)
    if value not in allowed:
        raise InputError(f"{name} is one of {allowed}, got {value!r}")


def check_number(config, name: str, positive: bool = False) -> None:
    """Finite, and not negative or even `positive`; or None."""
    value = getattr(config, name)
    if value is not None and (not math.isfinite(value) or value < 0 or positive and value == 0):
        rule = "a positive number" if positive else "a number, and not negative"
        raise InputError(f"{name} must be {rule}, got {value}")


def check_at_least(config, name: str, least: int) -> None:
    """Or None."""
    value = getattr(config, name)
    if value is not None and value < least:
        raise InputError(f"{name} must be at least {least}, got {value}")
