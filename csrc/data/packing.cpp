#include "packing.h"

#include <algorithm>
#include <numeric>
#include <set>
#include <utility>

namespace megatron_plm {

PackedRows pack_best_fit(const std::int64_t* tokens, const std::int64_t* labels, std::size_t count, RowLimits limits) {
    std::vector<std::size_t> order(count);
    std::iota(order.begin(), order.end(), std::size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return tokens[a] > tokens[b]; });

    std::vector<RowLimits> room;                          // what is left in each row
    std::set<std::pair<std::int64_t, std::size_t>> open;  // (free tokens, row)
    std::vector<std::size_t> row_of(count);
    for (const std::size_t item : order) {
        auto place = open.lower_bound({tokens[item], 0});
        while (place != open.end() && room[place->second].labels < labels[item]) ++place;
        std::size_t row;
        if (place != open.end()) {
            row = place->second;
            open.erase(place);
        } else {
            row = room.size();
            room.push_back(limits);
        }
        row_of[item] = row;
        RowLimits& left = room[row];
        left.tokens -= tokens[item];
        left.labels -= labels[item];
        left.segments -= 1;
        if (left.tokens > 0 && left.segments > 0) open.insert({left.tokens, row});
    }

    PackedRows rows;
    rows.offsets.assign(room.size() + 1, 0);
    for (std::size_t item = 0; item < count; ++item) ++rows.offsets[row_of[item] + 1];
    std::partial_sum(rows.offsets.begin(), rows.offsets.end(), rows.offsets.begin());
    rows.items.resize(count);
    std::vector<std::int64_t> next(rows.offsets.begin(), rows.offsets.end() - 1);
    for (const std::size_t item : order) {
        rows.items[static_cast<std::size_t>(next[row_of[item]]++)] = static_cast<std::int64_t>(item);
    }
    return rows;
}

}  // namespace megatron_plm
