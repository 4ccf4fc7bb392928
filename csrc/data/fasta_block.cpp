#include "fasta_block.h"

#include <algorithm>
#include <cstring>
#include <limits>

namespace megatron_plm {

namespace {

LineState state_of_line(std::uint8_t first_byte) {
    switch (first_byte) {
        case '\n': return LineState::line_start;
        case '>': return LineState::header;
        case ';': return LineState::comment;
        default: return LineState::sequence;
    }
}

bool is_space(std::uint8_t byte) { return byte == ' ' || byte == '\t' || byte == '\r'; }

// Whether a byte can stand in a sequence: a visible ASCII character other than '>'.
bool is_letter(std::uint8_t byte) { return byte > 0x20 && byte < 0x7f && byte != '>'; }

// Eight bytes at a time: each term has a byte's top bit set where is_letter is false. (A carry from one byte into the
// next comes only of a byte that has its own top bit set.) No early exit, so that the compiler widens it further.
bool all_letters(const std::uint8_t* data, std::size_t size) {
    constexpr std::uint64_t ones = 0x0101010101010101, tops = 0x80 * ones;
    std::uint64_t wrong = 0;
    std::size_t i = 0;
    for (; i + 8 <= size; i += 8) {
        std::uint64_t word;
        std::memcpy(&word, data + i, sizeof word);
        const std::uint64_t below = ~((word | tops) - 0x21 * ones);
        const std::uint64_t deleted = word + ones;
        const std::uint64_t bracket = ~(((word ^ ('>' * ones)) | tops) - ones);
        wrong |= word | below | deleted | bracket;
    }
    return (wrong & tops) == 0 && std::all_of(data + i, data + size, is_letter);
}

class Scanner {
public:
    Scanner(const Alphabet& alphabet, std::uint8_t* out) : alphabet_(alphabet), begin_(out), out_(out) {}

    Block scan(const std::uint8_t* data, std::size_t size, LineState state) {
        const std::uint8_t* const end = data + size;
        while (data < end && block_.fault.kind == FaultKind::none) {
            const bool at_start = state == LineState::line_start;
            if (at_start) state = state_of_line(*data);
            const void* const newline = std::memchr(data, '\n', static_cast<std::size_t>(end - data));
            const std::uint8_t* const stop = newline ? static_cast<const std::uint8_t*>(newline) : end;
            if (state == LineState::header) {
                header_text(at_start ? data + 1 : data, stop, at_start);
            } else if (state == LineState::sequence) {
                letters(data, stop);
            }
            if (!newline) break;
            ++block_.num_lines;
            state = LineState::line_start;
            data = stop + 1;
        }
        return finish();
    }

private:
    // A record begins at most once for every two bytes, so the header's text is only copied at a fault or at the end.
    void header_text(const std::uint8_t* text, const std::uint8_t* stop, bool begins_record) {
        if (begins_record) {
            if (block_.num_headers > 0 && !end_record()) return;
            ++block_.num_headers;
            block_.last_length = 0;
            block_.last_header_line = block_.num_lines;
            header_begin_ = text;
            header_end_ = stop;
        } else {
            block_.leading_header = clipped(text, stop);
        }
        if (const void* nul = std::memchr(text, '\0', static_cast<std::size_t>(stop - text))) {
            fault(FaultKind::binary_byte, *static_cast<const std::uint8_t*>(nul));
            block_.fault.in_header = true;
        }
    }

    bool end_record() {
        if (block_.last_length == 0 || block_.last_length > std::numeric_limits<std::int32_t>::max()) {
            fault(block_.last_length == 0 ? FaultKind::empty_record : FaultKind::too_long, 0);
            block_.fault.line = block_.last_header_line;
            return false;
        }
        block_.lengths.push_back(static_cast<std::int32_t>(block_.last_length));
        return true;
    }

    void letters(const std::uint8_t* data, const std::uint8_t* stop) {
        if (data < stop && stop[-1] == '\r') --stop;
        if (data == stop) return;
        if (all_letters(data, static_cast<std::size_t>(stop - data))) {
            run(data, stop);
            return;
        }
        while (data < stop && block_.fault.kind == FaultKind::none) {
            const std::uint8_t* const run_end = std::find_if_not(data, stop, is_letter);
            if (run_end > data) run(data, run_end);
            data = std::find_if_not(run_end, stop, is_space);
            if (data < stop && !is_letter(*data) && block_.fault.kind == FaultKind::none) {
                note_leading(*data);
                fault(*data == '>' ? FaultKind::missing_line_break : FaultKind::binary_byte, *data);
            }
        }
    }

    // Tokenize and count a stretch of nothing but letters.
    void run(const std::uint8_t* data, const std::uint8_t* stop) {
        note_leading(*data);
        const std::size_t size = static_cast<std::size_t>(stop - data);
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
                fault(FaultKind::unknown_letter, data[place]);
                block_.fault.position += static_cast<std::int64_t>(place);
                return;
            }
        }
        out_ += size;
        (block_.num_headers ? block_.last_length : block_.leading_length) += static_cast<std::int64_t>(size);
    }

    void note_leading(std::uint8_t byte) {
        if (block_.num_headers == 0 && block_.leading_byte < 0) {
            block_.leading_byte = byte;
            block_.leading_line = block_.num_lines;
        }
    }

    void fault(FaultKind kind, std::uint8_t byte) {
        block_.fault.kind = kind;
        block_.fault.byte = byte;
        block_.fault.line = block_.num_lines;
        block_.fault.in_leading = block_.num_headers == 0;
        block_.fault.position = block_.num_headers ? block_.last_length : block_.leading_length;
    }

    static std::string clipped(const std::uint8_t* begin, const std::uint8_t* end) {
        return std::string(begin, begin + std::min(static_cast<std::size_t>(end - begin), max_header));
    }

    Block finish() {
        block_.num_tokens = static_cast<std::size_t>(out_ - begin_);
        if (block_.num_headers) block_.last_header = clipped(header_begin_, header_end_);
        if (!block_.fault.in_leading) block_.fault.header = block_.last_header;
        for (const auto& counts : counts_) {
            for (std::size_t byte = 0; byte < 256; ++byte) block_.byte_counts[byte] += counts[byte];
        }
        return std::move(block_);
    }

    const Alphabet& alphabet_;
    std::uint8_t* const begin_;
    std::uint8_t* out_;
    Block block_;
    const std::uint8_t* header_begin_ = nullptr;
    const std::uint8_t* header_end_ = nullptr;
    std::uint64_t counts_[4][256] = {};
};

}  // namespace

LineState state_after(const std::uint8_t* data, std::size_t size, LineState state) {
    if (size == 0) return state;
    std::size_t line = size;  // where the last line begins
    while (line > 0 && data[line - 1] != '\n') --line;
    if (line == size) return LineState::line_start;
    return line > 0 || state == LineState::line_start ? state_of_line(data[line]) : state;
}

Block scan_block(const Alphabet& alphabet, const std::uint8_t* data, std::size_t size, LineState state,
                 std::uint8_t* out) {
    return Scanner(alphabet, out).scan(data, size, state);
}

}  // namespace megatron_plm
