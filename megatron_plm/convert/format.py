"""What the converters know of a format. A new one is a module with a table, a reader, a writer and its `FORMAT`.

The table (keymap.py) relates names and layouts. The reader checks the configuration and returns the weights with their
tensors still in the files (weights.import_weights); the writer takes them one by one (weights.export_tensors).
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from megatron_plm.convert.weights import Weights


@dataclass(frozen=True)
class Format:
    """One format.

    Attributes:
        name: of --from and --to.
        mark: a file that every directory which `write` wrote has; one without any format's is never replaced.
        recognises: whether a path holds the format, told quickly; UserError if it holds what is refused by name.
        read: (path, **flags) -> weights; UserError if it cannot be read, OSError if a file cannot be opened.
        write: (weights, empty directory, dtype, **flags) -> sentences on what is not carried; UserError if the format
            cannot hold the model, OSError if the disk refuses.
        read_flags, write_flags: those of the command's flags that `read` and `write` take, as names of arguments.
        looks_like: how to recognise it, for those who gave something else.
        has_contact_head: whether it holds that of a model, too; else the command says that it is not carried.
    """

    name: str
    mark: str
    recognises: Callable[[Path], bool]
    read: Callable[..., Weights]
    write: Callable[..., tuple[str, ...]]
    looks_like: str
    read_flags: tuple[str, ...] = ()
    write_flags: tuple[str, ...] = ()
    has_contact_head: bool = False
