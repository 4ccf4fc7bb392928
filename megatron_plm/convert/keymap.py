"""The one mechanism of every converter: a table of (our names, their names, transform), read in either direction.

A pattern holds `{i}` where the layer number stands. One table gives both directions, because every transform carries
its inverse: `key_map.stream` goes from our names to theirs, `key_map.inverse.stream` comes back. A table is worked off
entry by entry, so that of a model's tensors only those of one entry need be in memory.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_plm.convert.lazy import LazyTensors, meta_of
from megatron_plm.errors import UserError

_MAX_LISTED = 20


@dataclass(frozen=True)
class Transform:
    """What happens to the tensors of one entry, and its exact inverse.

    Both take and return lists, in the order of the entry's keys, also of tensors of the meta device. A ValueError they
    raise names no key; the entry adds it.
    """

    forward: Callable[[list[Tensor]], list[Tensor]]
    backward: Callable[[list[Tensor]], list[Tensor]]

    @property
    def inverse(self) -> "Transform":
        return Transform(self.backward, self.forward)


IDENTITY = Transform(forward=list, backward=list)


@dataclass(frozen=True)
class Entry:
    """One row of a table: the tensors `ours` hold the same numbers as the tensors `theirs`.

    With `{i}` on both sides the row stands for one entry a layer; with `{i}` on one side only, that side's list runs
    over all layers. Keys in `optional` may be absent where they are read; they are always produced.
    """

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    transform: Transform = IDENTITY
    optional: tuple[str, ...] = ()

    @property
    def inverse(self) -> "Entry":
        return Entry(self.theirs, self.ours, self.transform.inverse, self.optional)

    def run(self, tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
        """Read this entry's tensors of ours and return theirs: none, if all of ours are optional and absent.

        Raises UserError, naming `place` and the keys, if the transform finds them unfit.
        """
        sources = [tensors[key] for key in self.ours if key in tensors]
        if not sources:
            return {}
        try:
            return dict(zip(self.theirs, self.transform.forward(sources), strict=True))
        except ValueError as error:
            raise UserError(f"{place}: {listed(self.ours)}: {error}") from None

    def expand(self, num_layers: int) -> list["Entry"]:
        """The entries without wildcard that this one stands for in a model of `num_layers` layers."""

        def over_layers(patterns: Sequence[str]) -> tuple[str, ...]:
            return tuple(key for pattern in patterns for key in _layers_of(pattern, num_layers))

        def of_layer(patterns: Sequence[str], i: int) -> tuple[str, ...]:
            return tuple(pattern.replace("{i}", str(i)) for pattern in patterns)

        if _has_wildcard(self.ours) and _has_wildcard(self.theirs):
            sides = (self.ours, self.theirs, self.optional)
            layers = [[of_layer(side, i) for side in sides] for i in range(num_layers)]
        else:
            layers = [[over_layers(side) for side in (self.ours, self.theirs, self.optional)]]
        return [Entry(ours, theirs, self.transform, optional) for ours, theirs, optional in layers]


def module(ours: str, *theirs: str, transform: Transform = IDENTITY, optional: bool = False) -> list[Entry]:
    """The entries of the `weight` and the `bias` of a module of ours and one or more of theirs.

    An `optional` one may be absent on either side.
    """
    keys = [((f"{ours}.{kind}",), tuple(f"{name}.{kind}" for name in theirs)) for kind in ("weight", "bias")]
    return [Entry(one, other, transform, (*one, *other) if optional else ()) for one, other in keys]


@dataclass(frozen=True)
class KeyMap:
    """A table expanded for one model: every key of either side stands in exactly one entry."""

    entries: tuple[Entry, ...]

    @staticmethod
    def build(table: Iterable[Entry], num_layers: int) -> "KeyMap":
        """Expand a table; ValueError if it claims a key twice."""
        entries = tuple(entry for row in table for entry in row.expand(num_layers))
        for side in ("ours", "theirs"):
            claims = Counter(key for entry in entries for key in getattr(entry, side))
            twice = [key for key, count in claims.items() if count > 1]
            if twice:
                raise ValueError(f"the table claims {', '.join(twice)} twice")
        return KeyMap(entries)

    @property
    def inverse(self) -> "KeyMap":
        return KeyMap(tuple(entry.inverse for entry in self.entries))

    def knows(self, ours: Sequence[str]) -> bool:
        """Whether keys of ours stand in the table."""
        return {key for entry in self.entries for key in entry.ours}.issuperset(ours)

    def theirs_of(self, ours: Iterable[str]) -> set[str]:
        """Their keys of the entries with some of these keys of ours."""
        wanted = set(ours)
        return {key for entry in self.entries if not wanted.isdisjoint(entry.ours) for key in entry.theirs}

    def without(self, ours: Iterable[str]) -> "KeyMap":
        """The table without the entries of these keys of ours."""
        left_out = set(ours)
        return KeyMap(tuple(entry for entry in self.entries if left_out.isdisjoint(entry.ours)))

    def stream(self, tensors: Mapping[str, Tensor], place: str) -> Iterator[tuple[str, Tensor]]:
        """Their names with their tensors, each made of `tensors` when it is asked for; works on the meta device, too.

        Raises UserError, naming `place`, if keys are missing or left over: at once, before a tensor is read.
        """
        self._check_keys(tensors, place)
        return (pair for entry in self.entries for pair in entry.run(tensors, place).items())

    def apply(self, tensors: Mapping[str, Tensor], place: str) -> dict[str, Tensor]:
        """All of `stream`, in memory."""
        return dict(self.stream(tensors, place))

    def lazy(self, tensors: Mapping[str, Tensor], place: str) -> LazyTensors:
        """What `apply` returns, each tensor made when it is asked for.

        Raises UserError at once for what names, shapes and types tell.
        """
        meta = self.apply(meta_of(tensors), place)
        entry_of = {key: entry for entry in self.entries for key in entry.theirs}
        return LazyTensors(meta, lambda key: entry_of[key].run(tensors, place)[key])

    def _check_keys(self, tensors: Iterable[str], place: str) -> None:
        known = {key for entry in self.entries for key in entry.ours}
        optional = {key for entry in self.entries for key in entry.optional}
        check_keys(tensors, known, optional, place)

    def shapes(self, ours: Mapping[str, torch.Size]) -> dict[str, torch.Size]:
        """The shapes of their tensors for tensors of ours of the given shapes."""
        meta = {key: torch.empty(shape, device="meta") for key, shape in ours.items()}
        return {key: tensor.shape for key, tensor in self.apply(meta, "shapes").items()}


def check_keys(tensors: Iterable[str], known: set[str], optional: set[str], place: str) -> None:
    """Raise UserError listing what `place` lacks of `known` and what it holds beyond; `optional` may be absent."""
    present = set(tensors)
    missing, unknown = sorted(known - optional - present), sorted(present - known)
    faults = [
        f"{len(keys)} {'tensor is' if len(keys) == 1 else 'tensors are'} {fault} ({listed(keys)})"
        for keys, fault in ((missing, "missing"), (unknown, "unknown"))
        if keys
    ]
    if faults:
        raise UserError(
            f"{place}: {' and '.join(faults)}; give a complete checkpoint of the model that its configuration describes"
        )


def check_shapes(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], place: str) -> None:
    """Raise UserError naming the first tensor of another shape than `expected`, and both shapes."""
    for key in sorted(found):
        if found[key] != expected[key]:
            raise UserError(
                f"{place}: {key} has shape {list(found[key])}, but the configuration beside it describes "
                f"{list(expected[key])}; give the configuration that belongs to these weights"
            )


def listed(keys: Sequence[str]) -> str:
    """The keys, comma-separated, the long tail as a count."""
    rest = len(keys) - _MAX_LISTED
    return ", ".join(keys[:_MAX_LISTED]) + (f" and {rest} more" if rest > 0 else "")


def _has_wildcard(patterns: Sequence[str]) -> bool:
    return any("{i}" in pattern for pattern in patterns)


def _layers_of(pattern: str, num_layers: int) -> list[str]:
    return [pattern.replace("{i}", str(i)) for i in range(num_layers if "{i}" in pattern else 1)]
