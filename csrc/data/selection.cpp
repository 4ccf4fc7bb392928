#include "selection.h"

#include <cstring>
#include <stdexcept>
#include <vector>

namespace megatron_plm {

void gather(const std::uint8_t* data, const std::int64_t* begins, const std::int64_t* sizes, std::size_t count,
            std::uint8_t* out) {
    for (std::size_t i = 0; i < count; ++i) {
        std::memcpy(out, data + begins[i], static_cast<std::size_t>(sizes[i]));
        out += sizes[i];
    }
}

template <typename Token>
void add_token_counts(const Token* tokens, std::size_t size, std::uint64_t* counts, std::size_t num_ids) {
    // Two tables in turn, so that a run of equal tokens does not wait for one counter.
    std::vector<std::uint64_t> tables(2 * num_ids);
    for (std::size_t i = 0; i < size; ++i) {
        const auto id = static_cast<std::uint32_t>(tokens[i]);
        if (id >= num_ids) throw std::out_of_range("tokens: an id is outside the vocabulary");
        ++tables[(i & 1) * num_ids + id];
    }
    for (std::size_t id = 0; id < num_ids; ++id) counts[id] += tables[id] + tables[num_ids + id];
}

template void add_token_counts(const std::uint8_t*, std::size_t, std::uint64_t*, std::size_t);
template void add_token_counts(const std::uint16_t*, std::size_t, std::uint64_t*, std::size_t);
template void add_token_counts(const std::int32_t*, std::size_t, std::uint64_t*, std::size_t);

}  // namespace megatron_plm
