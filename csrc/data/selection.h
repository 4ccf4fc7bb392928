// Picking records out of a batch, and counting tokens.

#pragma once

#include <cstddef>
#include <cstdint>

namespace megatron_plm {

// Copy `count` stretches of `data`, the i-th of `sizes[i]` bytes from `begins[i]`, end to end to `out`.
void gather(const std::uint8_t* data, const std::int64_t* begins, const std::int64_t* sizes, std::size_t count,
            std::uint8_t* out);

// Add to `counts[id]` how often each id occurs. Throws std::out_of_range for an id that is not below `num_ids`.
template <typename Token>
void add_token_counts(const Token* tokens, std::size_t size, std::uint64_t* counts, std::size_t num_ids);

}  // namespace megatron_plm
