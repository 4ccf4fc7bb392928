// From packed segments to the tensors of a batch: tokens copied from the datasets, corrupted, and their labels listed.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_plm {

// What is predicted. In the first three, chosen letters are hidden behind <mask>, replaced or left (BERT); exact
// chooses a fixed share of each segment, bernoulli each letter by itself, spans a fixed share in stretches.
enum class Objective : std::uint8_t { mlm_exact, mlm_bernoulli, mlm_spans, clm };

struct Corruption {
    Objective objective;
    double probability;            // share of the letters that is chosen
    std::uint64_t mask_below;      // a chosen letter's draw (32 bits) below this: <mask>
    std::uint64_t random_below;    // else below this: a random letter; else it stays
    double span_stop;              // of the geometric law of span lengths: 1 / mean
    std::int64_t longest_span;
};

struct Vocabulary {
    std::int64_t cls, eos, pad, mask;
    std::vector<std::uint8_t> is_letter;     // of token id: may be chosen
    std::vector<std::int64_t> replacements;  // ids that a random letter is drawn from
};

// The .bin of one dataset, `itemsize` bytes a token.
struct TokenFile {
    const std::uint8_t* data;
    std::int64_t size;  // bytes
    std::int64_t itemsize;
};

// Segments by arrays, one entry each: `length` tokens from token `start` on of `<cls> residues <eos>` of a sequence
// with `residues` residues at byte `pointer` of file `file`.
struct Segments {
    const std::int64_t *file, *pointer, *residues, *sequence, *start, *length;
    const std::uint64_t* key;  // of its dataset's masks in its epoch
    const std::int64_t* row_offsets;  // where each row begins, and the end
    std::size_t num_rows;
};

// Output: rows of L tokens, M labels and at most S segments; see data.loader.Batch.
struct BatchArrays {
    std::int64_t *tokens, *positions, *segment_ids;  // [rows, L]
    std::int64_t *label_index, *label_id;            // [rows, M]
    std::int32_t* cu_seqlens;                        // [rows * (S + 1) + 1]
    std::int64_t L, M, S;
};

struct BatchCounts {
    std::int64_t tokens = 0, labels = 0, cropped = 0;
};

// Fill the whole of `out`. Throws std::out_of_range where a segment leaves its file or a token its vocabulary, and
// std::length_error where a row has more labels or segments than it has room for.
BatchCounts build_rows(const std::vector<TokenFile>& files, const Segments& segments, const Vocabulary& vocabulary,
                       const Corruption& corruption, const BatchArrays& out);

}  // namespace megatron_plm
