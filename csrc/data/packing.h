// Best-fit-decreasing packing of segments into rows (Johnson 1973).

#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace megatron_plm {

// What one row can hold, or one segment needs.
struct RowLimits {
    std::int64_t tokens, labels, segments;
};

struct PackedRows {
    std::vector<std::int64_t> items;    // indices of the segments, row after row
    std::vector<std::int64_t> offsets;  // where each row begins in `items`, and the end
};

// Pack `count` segments of `tokens[i]` tokens and `labels[i]` labels: longest first (equal ones in their order), each
// into the fullest row that still takes it, the lowest-numbered of equally full ones. Every segment fits an empty row.
PackedRows pack_best_fit(const std::int64_t* tokens, const std::int64_t* labels, std::size_t count, RowLimits limits);

}  // namespace megatron_plm
