#include "lines.h"

#include <cstring>

#include "line_walk.h"

namespace megatron_plm {

RecordBlock scan_text(const Alphabet& alphabet, Span data, std::uint8_t* out) {
    RecordWriter writer(alphabet, out);
    const std::int64_t num_lines = for_each_line(data, writer, [&](Span line, std::int64_t number) {
        if (std::memchr(line.begin, '\t', line.size())) {
            writer.fail(number, "a tab inside a line that should be one sequence: is this a table (tsv)?");
            return;
        }
        writer.begin(number);
        writer.add(line, number);
        writer.end();
    });
    return writer.finish(num_lines);
}

RecordBlock scan_values(const Alphabet& alphabet, const std::uint8_t* data, const std::int64_t* offsets,
                        std::size_t num_values, std::uint8_t* out) {
    RecordWriter writer(alphabet, out);
    for (std::size_t i = 0; i < num_values && !writer.failed(); ++i) {
        const auto number = static_cast<std::int64_t>(i);
        writer.begin(number);
        writer.add({data + offsets[i], data + offsets[i + 1]}, number);
        writer.end();
    }
    return writer.finish(static_cast<std::int64_t>(num_values));
}

}  // namespace megatron_plm
