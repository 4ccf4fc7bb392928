// Tokenizing one block of a FASTA stream, on its own.
//
// A block is any stretch of bytes; it may begin and end in the middle of a record, a line or a "\r\n". Given only how
// the line at its start began (LineState), a block is scanned without knowing what came before, so that blocks can be
// scanned in any order by any number of threads. fasta_stream.h joins the results in file order.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace megatron_plm {

// What the bytes at some place of the file belong to.
enum class LineState : std::uint8_t { line_start, header, sequence, comment };

// The state after `size` bytes that begin in `state`. Looks back from the end for the last newline only.
LineState state_after(const std::uint8_t* data, std::size_t size, LineState state);

// From letters to token ids.
struct Alphabet {
    std::array<std::uint8_t, 256> token_of_byte;
    std::uint8_t unknown_token;
    bool strict;  // an unknown letter is a fault
};

enum class FaultKind : std::uint8_t { none, unknown_letter, binary_byte, missing_line_break, empty_record, too_long };

// The first fault of a block, at which its scan stopped.
struct Fault {
    FaultKind kind = FaultKind::none;
    std::uint8_t byte = 0;       // the offending byte, where there is one
    std::int64_t line = 0;       // newlines before it in the block; for a record's fault, before its header
    std::int64_t position = 0;   // letters of the record that precede it in the block
    bool in_header = false;
    bool in_leading = false;     // it lies before the block's first header, in a record begun earlier
    std::string header;          // of its record, unless in_leading
};

// What one block holds. "Leading" is what stands before the block's first header: the rest of an earlier record.
struct Block {
    std::size_t num_tokens = 0;               // written to the output
    std::int64_t num_lines = 0;               // newlines
    std::int64_t num_headers = 0;
    std::string leading_header;               // the rest of a header begun earlier
    std::int64_t leading_length = 0;          // letters
    int leading_byte = -1;                    // the first letter (or faulty byte) of the leading part, -1: none
    std::int64_t leading_line = 0;            // newlines before that letter
    std::vector<std::int32_t> lengths;        // of the records begun and ended here
    std::int64_t last_length = 0;             // letters so far of the last record begun here
    std::int64_t last_header_line = 0;        // newlines before its header
    std::string last_header;                  // its header, as far as it lies here
    std::array<std::uint64_t, 256> byte_counts{};  // of sequence bytes, white space left out
    Fault fault;
};

// Headers are kept for messages only, up to this many bytes.
constexpr std::size_t max_header = 256;

// Scan `size` bytes and write their token ids to `out`, which has room for `size` of them.
Block scan_block(const Alphabet& alphabet, const std::uint8_t* data, std::size_t size, LineState state,
                 std::uint8_t* out);

}  // namespace megatron_plm
