// FASTA: a record is a line that begins with '>' and the lines up to the next such line.

#pragma once

#include "letters.h"

namespace megatron_plm {

// Scan whole records and write their token ids to `out`, which has room for `size` of them. White space inside a
// sequence, blank lines and lines that begin with ';' are skipped; lines of them may stand before the first record.
RecordBlock scan_fasta(const Alphabet& alphabet, const std::uint8_t* data, std::size_t size, std::uint8_t* out,
                       bool with_names);

// Where the last record of the block begins: the last '>' after a newline at data[start] or later, 0 without one. What
// lies before it is whole records. Looks back from the end.
std::size_t last_record_start(const std::uint8_t* data, std::size_t size, std::size_t start);

}  // namespace megatron_plm
