"""What is predicted of each protein, and what stands in its place: keyed by protein and position, never by row or rank.

Masked: BERT's rule (Devlin et al. 2019, section 3.1). Letters are chosen (a fixed share of each protein, each letter by
itself, or whole stretches as in SpanBERT, Joshi et al. 2020); of the chosen, most become <mask>, some a random amino
acid, the rest stay. Causal: every token is predicted from those before it. The work is done in csrc/data/rows.cpp.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from megatron_plm.config.options import DataOptions
from megatron_plm.data._native import Corruption, Objective, Vocabulary
from megatron_plm.tokenizers import Tokenizer

_LONGEST_SPAN = 10  # letters; SpanBERT's limit
# A row's number of independently chosen letters exceeds its mean by so many standard deviations and labels less than
# once in 10^18 rows (Chernoff's bound), at any share of at least 0.001 and any row of at least 16 tokens.
_SPREAD, _SPARE_LABELS = 10.0, 24


@dataclass(frozen=True)
class Masking:
    """The rule by which letters are chosen and replaced."""

    objective: Objective
    probability: float
    mask_share: float
    random_share: float
    span_length: float

    @staticmethod
    def from_options(options: DataOptions, objective: str) -> "Masking":
        """The rule of `options` for a model of `objective` (mlm or clm)."""
        chosen = {
            "exact": Objective.mlm_exact,
            "bernoulli": Objective.mlm_bernoulli,
            "spans": Objective.mlm_spans,
        }[options.mask_selection]
        return Masking(
            Objective.clm if objective == "clm" else chosen,
            options.mask_prob,
            options.mask_token_share,
            options.mask_random_share,
            options.mask_span_length,
        )

    def num_labels(self, num_letters: NDArray[np.int64]) -> NDArray[np.int64]:
        """The most labels that segments with so many letters have, [n]; 0 where the row's own limit covers them."""
        if self.objective in (Objective.clm, Objective.mlm_bernoulli):
            return np.zeros_like(num_letters)
        share = np.floor(num_letters * self.probability + 0.5).astype(np.int64)
        return np.maximum(np.minimum(num_letters, 1), share)

    def label_limit(self, row_tokens: int, row_segments: int) -> int:
        """How many labels a row of `row_tokens` tokens and at most `row_segments` segments has room for."""
        if self.objective == Objective.clm:
            return row_tokens
        mean = row_tokens * self.probability
        if self.objective == Objective.mlm_bernoulli:
            limit = mean + _SPREAD * math.sqrt(mean * (1 - self.probability)) + _SPARE_LABELS
        else:  # a third more than the mean leaves room for short proteins, whose rounded shares are larger
            limit = max(row_segments, mean * 4 / 3)
        return min(row_tokens, math.ceil(limit) + 1)

    def native(self) -> Corruption:
        """The rule for the extension, with shares as bounds of 32-bit draws."""
        return Corruption(
            objective=self.objective,
            probability=self.probability,
            mask_below=int(self.mask_share * 2**32),
            random_below=int((self.mask_share + self.random_share) * 2**32),
            span_stop=1.0 / self.span_length,
            longest_span=_LONGEST_SPAN,
        )


def native_vocabulary(tokenizer: Tokenizer) -> Vocabulary:
    """What the extension needs to know of a tokenizer: its letters may be chosen, the 20 standard ones replace them."""
    is_letter = np.zeros(tokenizer.vocab_size, dtype=np.uint8)
    is_letter[tokenizer.residue_ids] = 1
    return Vocabulary(
        cls=tokenizer.cls_id,
        eos=tokenizer.eos_id,
        pad=tokenizer.pad_id,
        mask=tokenizer.mask_id,
        is_letter=is_letter.tolist(),
        replacements=tokenizer.standard_ids.tolist(),
    )
