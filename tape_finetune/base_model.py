"""What every base model is: features of tokens.

Shapes: T packed tokens, D width of a feature vector.
"""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor, nn

from megatron_plm.tokenizers import Tokenizer
from tape_finetune.batching import Packed


class BaseModel(nn.Module, ABC):
    """From packed proteins to a feature vector a token, [T, D]."""

    options: Any  # a dataclass: what the model is built from, where there is a choice

    def __init__(self, tokenizer: Tokenizer, num_features: int) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.num_features = num_features

    @property
    def max_residues(self) -> int | None:
        """Residues of the longest protein that it can take; None if there is no limit."""
        return None

    @abstractmethod
    def forward(self, packed: Packed) -> Tensor:
        """The tokens' features."""
