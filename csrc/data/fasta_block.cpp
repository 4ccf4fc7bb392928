#include "fasta_block.h"

#include <algorithm>
#include <cstring>

namespace megatron_plm {

namespace {

// What stands before the first record: only white space may.
void check_leading(Span text, std::int64_t line, RecordWriter& writer) {
    const std::uint8_t* const found = std::find_if_not(
        text.begin, text.end, [](std::uint8_t byte) { return byte == ' ' || byte == '\t' || byte == '\r'; });
    if (found == text.end) return;
    writer.fail(line, "expected '>' at the start of the first FASTA record, found " + printed(*found));
}

}  // namespace

RecordBlock scan_fasta(const Alphabet& alphabet, const std::uint8_t* data, std::size_t size, std::uint8_t* out,
                       bool with_names) {
    RecordWriter writer(alphabet, out);
    const std::uint8_t* const end = data + size;
    std::int64_t line = 0;
    bool in_record = false;
    while (data < end && !writer.failed()) {
        const void* const newline = std::memchr(data, '\n', static_cast<std::size_t>(end - data));
        const Span text{data, newline ? static_cast<const std::uint8_t*>(newline) : end};
        if (!text.empty() && *data == '>') {
            if (in_record) writer.end();
            if (writer.failed()) break;
            in_record = true;
            const Span header{data + 1, text.end};
            writer.begin(line, &header);
            if (with_names) writer.name(header);
            if (std::memchr(header.begin, '\0', header.size())) {
                writer.fail(line, printed(0) + " in the header of " + writer.label() +
                                      ": the file is damaged or not plain text");
            }
        } else if (!text.empty() && *data != ';') {
            if (in_record) {
                writer.add(text, line);
            } else {
                check_leading(text, line, writer);
            }
        }
        if (!newline) break;
        ++line;
        data = text.end + 1;
    }
    if (in_record) writer.end();
    return writer.finish(line);
}

std::size_t last_record_start(const std::uint8_t* data, std::size_t size, std::size_t start) {
    for (std::size_t place = size; place > start + 1; --place) {
        if (data[place - 1] == '>' && data[place - 2] == '\n') return place - 1;
    }
    return 0;
}

}  // namespace megatron_plm
