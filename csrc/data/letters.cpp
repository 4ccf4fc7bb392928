#include "letters.h"

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <limits>
#include <utility>

namespace megatron_plm {

namespace {

constexpr std::size_t max_name = 256;  // bytes of a name that messages show

bool is_space(std::uint8_t byte) { return byte == ' ' || byte == '\t' || byte == '\r' || byte == '\n'; }

// Whether a byte can stand in a sequence: a visible ASCII character other than '>'.
bool is_letter(std::uint8_t byte) { return byte > 0x20 && byte < 0x7f && byte != '>'; }

// Eight bytes at a time: each term has a byte's top bit set where is_letter is false. (A carry from one byte into the
// next comes only of a byte that has its own top bit set.) No early exit, so that the compiler widens it further.
bool all_letters(Span text) {
    constexpr std::uint64_t ones = 0x0101010101010101, tops = 0x80 * ones;
    std::uint64_t wrong = 0;
    const std::size_t size = text.size();
    std::size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, text.begin + i, sizeof word);
        const std::uint64_t below = ~((word | tops) - 0x21 * ones);
        const std::uint64_t deleted = word + ones;
        const std::uint64_t bracket = ~(((word ^ ('>' * ones)) | tops) - ones);
        wrong |= word | below | deleted | bracket;
    }
    return (wrong & tops) == 0 && std::all_of(text.begin + i, text.end, is_letter);
}

// The first word of a header; white space before it is passed over.
Span first_word(Span text) {
    const std::uint8_t* const begin = std::find_if_not(text.begin, text.end, is_space);
    return {begin, std::find_if(begin, text.end, is_space)};
}

// ACC of UniProt's "sp|ACC|NAME" and "tr|ACC|NAME"; other names as they are. Tables of clusters name proteins either way.
Span accession(Span name) {
    if (name.end - name.begin < 4 || name.begin[2] != '|') return name;
    if (std::memcmp(name.begin, "sp", 2) != 0 && std::memcmp(name.begin, "tr", 2) != 0) return name;
    return {name.begin + 3, std::find(name.begin + 3, name.end, '|')};
}

}  // namespace

// The seed is part of the format: the split of a cluster goes by the hash of its name.
Hash128 hash_name(Span text) {
    const Span word = accession(first_word(text));
    return murmur3_128(word.begin, word.size(), 0);
}

std::string printed(int byte) {
    if (byte > 0x20 && byte < 0x7f) return std::string("'") + static_cast<char>(byte) + "'";
    char text[16];
    std::snprintf(text, sizeof text, "byte 0x%02X", static_cast<unsigned>(byte));
    return text;
}

std::int64_t count_lines(Span text) { return std::count(text.begin, text.end, '\n'); }

std::size_t last_line_end(const std::uint8_t* data, std::size_t size, std::size_t start) {
    while (size > start && data[size - 1] != '\n') --size;
    return size > start ? size : 0;
}

RecordWriter::RecordWriter(const Alphabet& alphabet, std::uint8_t* out) : alphabet_(alphabet), begin_(out), out_(out) {}

void RecordWriter::begin(std::int64_t line, const Span* header) {
    has_header_ = header != nullptr;
    if (header) header_ = *header;
    record_line_ = line;
    length_ = 0;
    last_letter_ = 0;
    unknown_stop_line_ = -1;
}

void RecordWriter::add(Span text, std::int64_t line) {
    if (!text.empty() && text.end[-1] == '\r') --text.end;
    if (text.empty()) return;
    if (all_letters(text)) {
        run(text, line);
        return;
    }
    while (!text.empty() && !failed()) {
        const std::uint8_t* const run_end = std::find_if_not(text.begin, text.end, is_letter);
        if (run_end > text.begin) run({text.begin, run_end}, line);
        text.begin = std::find_if_not(run_end, text.end, is_space);
        if (!text.empty() && !is_letter(*text.begin) && !failed()) fail_byte(*text.begin, line);
    }
}

// Tokenize and count a stretch of nothing but letters, at least one.
void RecordWriter::run(Span letters, std::int64_t line) {
    if (unknown_stop_line_ >= 0) {
        fail_unknown('*', length_, unknown_stop_line_);
        return;
    }
    const std::size_t size = letters.size();
    const std::uint8_t* const data = letters.begin;
    // Local, because a store through a byte pointer might change any member.
    const std::uint8_t* const token = alphabet_.token_of_byte.data();
    std::uint8_t* const out = out_;
    std::size_t i = 0;
    // Four counters a letter: adding to the counter that was just written would wait for the store.
    for (; i + 4 <= size; i += 4) {
        const std::uint8_t a = data[i], b = data[i + 1], c = data[i + 2], d = data[i + 3];
        ++counts_[0][a];
        ++counts_[1][b];
        ++counts_[2][c];
        ++counts_[3][d];
        out[i] = token[a];
        out[i + 1] = token[b];
        out[i + 2] = token[c];
        out[i + 3] = token[d];
    }
    for (; i < size; ++i) {
        ++counts_[0][data[i]];
        out[i] = token[data[i]];
    }
    if (alphabet_.strict) {
        if (const void* unknown = std::memchr(out_, alphabet_.unknown_token, size)) {
            const std::size_t place = static_cast<std::size_t>(static_cast<const std::uint8_t*>(unknown) - out_);
            if (data[place] != '*' || place + 1 < size) {
                fail_unknown(data[place], length_ + static_cast<std::int64_t>(place) + 1, line);
                return;
            }
            unknown_stop_line_ = line;
        }
    }
    out_ += size;
    length_ += static_cast<std::int64_t>(size);
    last_letter_ = data[size - 1];
}

void RecordWriter::end() {
    if (failed()) return;
    if (last_letter_ == '*') {
        --out_;
        --length_;
        ++block_.num_stops;
    }
    if (length_ == 0) {
        std::string reason;
        // One long line of "\r" line ends looks like a header without a sequence.
        if (has_header_ && !header_.empty() && std::memchr(header_.begin, '\r', header_.size() - 1)) {
            reason = "; the lines end in bare carriage returns (old Mac text): convert them to newlines";
        }
        fail(record_line_, has_header_ ? label() + " has no sequence" + reason : "the sequence is empty");
    } else if (length_ > std::numeric_limits<std::int32_t>::max()) {
        fail(record_line_, label() + " is longer than 2147483647 letters, the format's limit");
    } else {
        block_.lengths.push_back(static_cast<std::int32_t>(length_));
    }
}

void RecordWriter::fail(std::int64_t line, std::string message) {
    block_.fault = std::move(message);
    block_.fault_line = line;
}

void RecordWriter::fail_unknown(std::uint8_t letter, std::int64_t position, std::int64_t line) {
    fail(line, "unknown letter " + printed(letter) + " at position " + std::to_string(position) + " of " + label());
}

void RecordWriter::fail_byte(std::uint8_t byte, std::int64_t line) {
    const std::string where = has_header_ ? "the sequence of " + label() : label();
    if (byte != '>') {
        fail(line, printed(byte) + " in " + where + ": the file is damaged or not plain text");
        return;
    }
    const char* const why =
        has_header_ ? " letters: a line break is missing before it (were files joined without one?)"
                    : " letters: no sequence holds it (is this FASTA?)";
    fail(line, "'>' inside " + where + " after " + std::to_string(length_) + why);
}

// Control characters are replaced. A NUL ends the name: that is a fault, which the message is about.
std::string RecordWriter::label() const {
    if (!has_header_) return "the sequence";
    std::string name;
    const Span word = first_word(header_);
    for (const std::uint8_t* byte = word.begin; byte < word.end && *byte != 0 && name.size() < max_name; ++byte) {
        name += *byte < 0x20 || *byte == 0x7f ? '?' : static_cast<char>(*byte);
    }
    return name.empty() ? "a record with an empty header" : "record '" + name + "'";
}

void RecordWriter::name(Span text) {
    block_.names.push_back(hash_name(text));
    const Span identifier = has_header_ ? first_word(text) : text;
    block_.identifiers.append(identifier.begin, identifier.end);
    block_.identifier_ends.push_back(static_cast<std::int64_t>(block_.identifiers.size()));
}

RecordBlock RecordWriter::finish(std::int64_t num_lines) {
    block_.num_tokens = static_cast<std::size_t>(out_ - begin_);
    block_.num_lines = num_lines;
    for (const auto& counts : counts_) {
        for (std::size_t byte = 0; byte < 256; ++byte) block_.byte_counts[byte] += counts[byte];
    }
    block_.byte_counts['*'] -= static_cast<std::uint64_t>(block_.num_stops);
    return std::move(block_);
}

}  // namespace megatron_plm
