#include "fasta_stream.h"

#include <cstdio>
#include <limits>

namespace megatron_plm {

namespace {

std::string at_line(std::int64_t newlines_before) { return "line " + std::to_string(newlines_before + 1) + ": "; }

// "'M'", or "byte 0x00" for what cannot be printed.
std::string printed(int byte) {
    if (byte > 0x20 && byte < 0x7f) return std::string("'") + static_cast<char>(byte) + "'";
    char text[16];
    std::snprintf(text, sizeof text, "byte 0x%02X", static_cast<unsigned>(byte));
    return text;
}

// "record 'NAME'": the header's first word, control characters replaced. A NUL ends it: that is a fault, and what
// follows may lie in the next block.
std::string record(const std::string& header) {
    std::string name;
    for (const char c : header) {
        const bool space = c == ' ' || c == '\t' || c == '\r';
        if (c == '\0' || (space && !name.empty())) break;
        if (!space) name += (c > 0 && c < 0x20) || c == 0x7f ? '?' : c;
    }
    return name.empty() ? "a record with an empty header" : "record '" + name + "'";
}

}  // namespace

void FastaStream::add(const Block& block) {
    if (header_.size() < max_header) header_.append(block.leading_header, 0, max_header - header_.size());
    if (num_records_ == 0) check_first_record(block);
    if (block.fault.kind != FaultKind::none && block.fault.in_leading) fail(block);
    length_ += block.leading_length;
    if (block.num_headers > 0) {
        if (num_records_ > 0) end_record();
        lengths_.insert(lengths_.end(), block.lengths.begin(), block.lengths.end());
        num_records_ += block.num_headers;
        header_ = block.last_header;
        header_line_ = num_lines_ + block.last_header_line;
        length_ = block.last_length;
    }
    if (block.fault.kind != FaultKind::none) fail(block);
    num_lines_ += block.num_lines;
    for (std::size_t byte = 0; byte < byte_counts_.size(); ++byte) byte_counts_[byte] += block.byte_counts[byte];
}

void FastaStream::finish() {
    if (num_records_ == 0) throw FastaError("no FASTA record: expected a line that begins with '>'");
    end_record();
}

void FastaStream::end_record() {
    if (length_ == 0) fail_empty(header_, header_line_);
    if (length_ > std::numeric_limits<std::int32_t>::max()) fail_too_long(header_, header_line_);
    lengths_.push_back(static_cast<std::int32_t>(length_));
}

void FastaStream::check_first_record(const Block& block) const {
    if (block.leading_byte < 0) return;
    throw FastaError(at_line(num_lines_ + block.leading_line) +
                     "expected '>' at the start of the first FASTA record, found " + printed(block.leading_byte));
}

void FastaStream::fail(const Block& block) const {
    const Fault& fault = block.fault;
    const std::int64_t line = num_lines_ + fault.line;
    const std::string& header = fault.in_leading ? header_ : fault.header;
    const std::int64_t position = fault.position + (fault.in_leading ? length_ : 0);
    switch (fault.kind) {
        case FaultKind::unknown_letter:
            throw FastaError(at_line(line) + "unknown letter " + printed(fault.byte) + " at position " +
                             std::to_string(position + 1) + " of " + record(header));
        case FaultKind::missing_line_break:
            throw FastaError(at_line(line) + "'>' inside the sequence of " + record(header) +
                             " after " + std::to_string(position) +
                             " letters: a line break is missing before it (were files joined without one?)");
        case FaultKind::empty_record: fail_empty(header, line);
        case FaultKind::too_long: fail_too_long(header, line);
        default:
            throw FastaError(at_line(line) + printed(fault.byte) + " in the " +
                             (fault.in_header ? "header" : "sequence") + " of " + record(header) +
                             ": the file is damaged or not plain text");
    }
}

void FastaStream::fail_empty(const std::string& header, std::int64_t line) const {
    // One long line of "\r" line ends looks like a header without a sequence.
    const std::size_t last = header.find_last_not_of('\r');
    const bool old_line_ends = last != std::string::npos && header.find('\r') < last;
    const char* const reason =
        old_line_ends ? "; the lines end in bare carriage returns (old Mac text): convert them to newlines" : "";
    throw FastaError(at_line(line) + record(header) + " has no sequence" + reason);
}

void FastaStream::fail_too_long(const std::string& header, std::int64_t line) const {
    throw FastaError(at_line(line) + record(header) + " is longer than 2147483647 letters, the format's limit");
}

}  // namespace megatron_plm
