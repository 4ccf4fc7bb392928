"""Which split a protein belongs to: a pure function of its letters (or its cluster's name) and of the fractions."""

import os
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation

import numpy as np
import numpy.typing as npt

from megatron_plm.errors import UserError, suggestion

SPLIT_NAMES = ("train", "valid", "test")
_EXAMPLE = "train=0.98,valid=0.01,test=0.01"


@dataclass(frozen=True)
class Splits:
    """Names and shares of the splits, in the order that was given; the shares add up to 1."""

    fractions: dict[str, Decimal]

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the splits, in the order of their numbers."""
        return tuple(self.fractions)

    def described(self) -> dict[str, float]:
        """The fractions as JSON holds them."""
        return {name: float(fraction) for name, fraction in self.fractions.items()}

    def of_hashes(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint8]:
        """Return the number of the split that each hash (uint64 [k], evenly distributed) belongs to."""
        bounds, total = [], Decimal(0)
        for fraction in list(self.fractions.values())[:-1]:
            total += fraction
            bounds.append(int(total * 2**64))
        return np.searchsorted(np.array(bounds, dtype=np.uint64), hashes, side="right").astype(np.uint8)


def split_prefix(output_prefix: str | os.PathLike[str], split: str | None) -> str:
    """Return the prefix of a split's dataset; of the whole one for None."""
    return os.fspath(output_prefix) + (f"_{split}" if split else "")


def parse_splits(text: str) -> Splits:
    """Read `train=0.98,valid=0.01,test=0.01`; raises UserError where it is not that."""
    fractions: dict[str, Decimal] = {}
    for part in text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals:
            raise UserError(f"--split: {part.strip()!r} is not NAME=FRACTION; give for example {_EXAMPLE}")
        if name not in SPLIT_NAMES:
            known = ", ".join(SPLIT_NAMES)
            raise UserError(f"--split: unknown split {name!r}{suggestion(name, SPLIT_NAMES)}; expected {known}")
        if name in fractions:
            raise UserError(f"--split: {name} is given twice; give for example {_EXAMPLE}")
        fractions[name] = _fraction(name, value)
    total = sum(fractions.values())
    if total != 1:
        raise UserError(f"--split: the fractions {text!r} add up to {total}, not to 1; give for example {_EXAMPLE}")
    return Splits(fractions)


def _fraction(name: str, value: str) -> Decimal:
    try:
        fraction = Decimal(value)
    except InvalidOperation:
        fraction = Decimal("NaN")
    # Twelve decimals tell apart one protein in 10^12; exact sums need an end somewhere.
    exponent = fraction.as_tuple().exponent
    if not isinstance(exponent, int) or exponent < -12 or not 0 < fraction <= 1:
        raise UserError(
            f"--split: the fraction of {name} is {value!r}, expected a number above 0, at most 1, with at most 12 "
            f"decimals; give for example {_EXAMPLE}"
        )
    return fraction
