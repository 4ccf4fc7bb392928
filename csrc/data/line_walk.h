// Walking over the lines of a block.

#pragma once

#include <algorithm>
#include <cstring>

#include "letters.h"

namespace megatron_plm {

inline bool is_blank(Span line) {
    return std::all_of(line.begin, line.end,
                       [](std::uint8_t byte) { return byte == ' ' || byte == '\t' || byte == '\r'; });
}

// Call `scan(line, number)` for each line that is not blank, until `writer` has failed; returns the newlines passed.
template <typename Scan>
std::int64_t for_each_line(Span data, const RecordWriter& writer, Scan scan) {
    std::int64_t number = 0;
    while (!data.empty()) {
        const void* const newline = std::memchr(data.begin, '\n', data.size());
        const Span line{data.begin, newline ? static_cast<const std::uint8_t*>(newline) : data.end};
        if (!is_blank(line)) scan(line, number);
        if (!newline || writer.failed()) break;
        ++number;
        data.begin = line.end + 1;
    }
    return number;
}

}  // namespace megatron_plm
