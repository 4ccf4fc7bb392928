"""Several datasets as one stream of rows, by weights."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_plm.data.packing import Place, Row, RowStream


@dataclass(frozen=True)
class Cursor:
    """The next row of a blend: for each dataset its place, and how many of its rows have been taken."""

    places: tuple[Place, ...]
    taken: tuple[int, ...]

    @staticmethod
    def start(num_datasets: int) -> "Cursor":
        """Before the first row."""
        return Cursor((Place(),) * num_datasets, (0,) * num_datasets)

    @staticmethod
    def from_dict(content: dict[str, Any]) -> "Cursor":
        """The cursor that `dataclasses.asdict` took apart."""
        return Cursor(tuple(Place(**place) for place in content["places"]), tuple(content["taken"]))


class Blend:
    """Rows of several streams, each with its share of `weights` (any positive numbers).

    Row after row comes from the stream that lags most behind its share, the first of equals: after n rows, each has
    given its share of n to within one row for two streams, and within their number for more. That depends on nothing
    but how many rows each has given, so any cursor can be gone on from.
    """

    def __init__(self, streams: Sequence[RowStream], weights: Sequence[float]) -> None:
        self._streams = list(streams)
        total = sum(weights)
        self._shares = [weight / total for weight in weights]

    def rows_from(self, cursor: Cursor) -> Iterator[tuple[Row, Cursor]]:
        """The endless stream from `cursor` on: each row with the cursor behind it."""
        sources = [stream.rows_from(place) for stream, place in zip(self._streams, cursor.places, strict=True)]
        places, taken = list(cursor.places), list(cursor.taken)
        while True:
            chosen = self._most_behind(taken, range(len(taken)))
            row, places[chosen] = next(sources[chosen])
            taken[chosen] += 1
            yield row, Cursor(tuple(places), tuple(taken))

    def first_epoch(self) -> Iterator[Row]:
        """Every row of epoch 0 of all streams once, at every point by their shares as long as a stream has rows."""
        sources = dict(enumerate(stream.epoch_rows(0) for stream in self._streams))
        taken = [0] * len(self._streams)
        while sources:
            chosen = self._most_behind(taken, sources)
            row = next(sources[chosen], None)
            if row is None:
                del sources[chosen]
                continue
            taken[chosen] += 1
            yield row

    def _most_behind(self, taken: Sequence[int], among: Iterable[int]) -> int:
        """Which of the streams `among` lags most behind its share, the first of equals."""
        number = sum(taken) + 1
        return max(among, key=lambda index: self._shares[index] * number - taken[index])

    def epochs(self, cursor: Cursor) -> list[float]:
        """How often each dataset has been read, by windows."""
        pairs = zip(self._streams, cursor.places, strict=True)
        return [place.epoch + place.window / stream.num_windows for stream, place in pairs]
