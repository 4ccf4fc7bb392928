// Best-fit packing: exactly the rows of the definition, spelt out in quadratic time.

#include "packing.h"

#include <algorithm>
#include <numeric>
#include <vector>

#include "target.h"

using namespace megatron_plm;

namespace {

std::vector<std::vector<std::int64_t>> by_definition(const std::vector<std::int64_t>& tokens,
                                                     const std::vector<std::int64_t>& labels, RowLimits limits) {
    std::vector<std::size_t> order(tokens.size());
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return tokens[a] > tokens[b]; });
    std::vector<std::vector<std::int64_t>> rows;
    std::vector<RowLimits> room;
    for (const std::size_t item : order) {
        std::size_t best = rows.size();
        for (std::size_t row = 0; row < rows.size(); ++row) {
            const bool fits = room[row].tokens >= tokens[item] && room[row].labels >= labels[item] &&
                              room[row].segments >= 1;
            if (fits && (best == rows.size() || room[row].tokens < room[best].tokens)) best = row;
        }
        if (best == rows.size()) {
            rows.emplace_back();
            room.push_back(limits);
        }
        rows[best].push_back(static_cast<std::int64_t>(item));
        room[best].tokens -= tokens[item];
        room[best].labels -= labels[item];
        room[best].segments -= 1;
    }
    return rows;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    const RowLimits limits{input.between(1, 300), input.between(0, 60), input.between(1, 20)};
    std::vector<std::int64_t> tokens, labels;
    while (input.size() > 0 && tokens.size() < 300) {
        tokens.push_back(1 + input.byte() % limits.tokens);
        labels.push_back(input.byte() % (limits.labels + 1));
    }
    const PackedRows packed = pack_best_fit(tokens.data(), labels.data(), tokens.size(), limits);
    const auto expected = by_definition(tokens, labels, limits);
    PROMISE(packed.items.size() == tokens.size() && packed.offsets.size() == expected.size() + 1);
    for (std::size_t row = 0; row < expected.size(); ++row) {
        const auto begin = packed.items.begin() + packed.offsets[row], end = packed.items.begin() + packed.offsets[row + 1];
        PROMISE(std::vector<std::int64_t>(begin, end) == expected[row]);
    }
    return 0;
}
