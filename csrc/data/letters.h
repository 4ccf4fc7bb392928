// What every scanner of sequences shares: letters to token ids, record by record.
//
// A block is a stretch of text that holds whole records only, so blocks can be scanned in any order by any number of
// threads. Lines are counted from the block's first; whoever joins blocks knows how many came before.

#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "hashing.h"

namespace megatron_plm {

// A stretch of bytes.
struct Span {
    const std::uint8_t* begin = nullptr;
    const std::uint8_t* end = nullptr;

    std::size_t size() const { return static_cast<std::size_t>(end - begin); }
    bool empty() const { return begin == end; }
};

// From letters to token ids.
struct Alphabet {
    std::array<std::uint8_t, 256> token_of_byte;
    std::uint8_t unknown_token;
    bool strict;  // an unknown letter is a fault
};

// What one block holds, up to its first fault.
struct RecordBlock {
    std::size_t num_tokens = 0;                    // written to the output
    std::vector<std::int32_t> lengths;             // of the records, num_tokens in all
    std::vector<Hash128> names;                    // hash of each record's name, where asked for
    std::string identifiers;                       // and the names as they stand in the text, end to end
    std::vector<std::int64_t> identifier_ends;     // where each of them ends
    std::array<std::uint64_t, 256> byte_counts{};  // of sequence bytes; white space and final stops left out
    std::int64_t num_lines = 0;                    // newlines
    std::int64_t num_stops = 0;                    // records that ended in '*', which is not kept
    std::string fault;                             // what is wrong, empty: nothing
    std::int64_t fault_line = 0;                   // newlines before it
};

// MurmurHash3 x64 128 of a name: of the first word (up to white space) of `text`; of its ACC where that is "sp|ACC|…"
// or "tr|ACC|…" (UniProt's FASTA headers).
Hash128 hash_name(Span text);

// "'M'", or "byte 0x00" for what cannot be printed.
std::string printed(int byte);

// Newlines in a stretch.
std::int64_t count_lines(Span text);

// One past the last newline of data[start:], 0 where there is none.
std::size_t last_line_end(const std::uint8_t* data, std::size_t size, std::size_t start);

// Writes the records of one block: begin, then add (once or more), then end; nothing more once `failed`.
class RecordWriter {
public:
    // `out` has room for every byte that will be added.
    RecordWriter(const Alphabet& alphabet, std::uint8_t* out);

    // A record begins at `line`; `header` (FASTA's, else null) names it in messages and must stay alive until its end.
    void begin(std::int64_t line, const Span* header = nullptr);

    // More of its sequence; white space is skipped. A byte that can be no letter is a fault.
    void add(Span text, std::int64_t line);

    // Close it: a final '*' is dropped, a record without letters is a fault.
    void end();

    void fail(std::int64_t line, std::string message);
    bool failed() const { return !block_.fault.empty(); }
    // The record's name: of a FASTA header its first word, else the whole `text`.
    void name(Span text);

    RecordBlock finish(std::int64_t num_lines);

    // "record 'NAME'", or "the sequence" where the format has no headers.
    std::string label() const;

private:
    void run(Span letters, std::int64_t line);
    void fail_unknown(std::uint8_t letter, std::int64_t position, std::int64_t line);
    void fail_byte(std::uint8_t byte, std::int64_t line);

    const Alphabet& alphabet_;
    std::uint8_t* const begin_;
    std::uint8_t* out_;
    RecordBlock block_;
    Span header_;
    bool has_header_ = false;
    std::int64_t record_line_ = 0;
    std::int64_t length_ = 0;            // letters of the record so far
    std::uint8_t last_letter_ = 0;
    std::int64_t unknown_stop_line_ = -1;  // strict: of a '*' that is a fault if letters follow it
    std::uint64_t counts_[4][256] = {};
};

}  // namespace megatron_plm
