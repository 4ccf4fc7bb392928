"""Sequences of any input format as batches of whole records of token ids.

`open_inputs` finds files and tells their formats; `SequenceReader` reads them.
"""

from megatron_plm.data.readers.inputs import Input, open_inputs
from megatron_plm.data.readers.reader import SequenceReader
from megatron_plm.data.readers.sniff import FORMATS

__all__ = ["FORMATS", "Input", "SequenceReader", "open_inputs"]
