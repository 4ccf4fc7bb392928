// Joining scanned blocks, in file order, into the records of one FASTA file.

#pragma once

#include <array>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "fasta_block.h"

namespace megatron_plm {

// A file that is no valid FASTA: the message names the line and the record, not the file.
class FastaError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// The joined result does not depend on where the file was cut into blocks, nor does the error.
class FastaStream {
public:
    // Take the next block in file order. Throws FastaError at the first fault of the file.
    void add(const Block& block);

    // The file is at its end: close the last record. Throws FastaError where it is empty.
    void finish();

    // Lengths of the records completed since the last call, in file order.
    std::vector<std::int32_t> take_lengths() { return std::exchange(lengths_, {}); }

    // How often each byte stood in a sequence, white space left out.
    const std::array<std::uint64_t, 256>& byte_counts() const { return byte_counts_; }

private:
    void end_record();
    void check_first_record(const Block& block) const;
    [[noreturn]] void fail(const Block& block) const;
    [[noreturn]] void fail_empty(const std::string& header, std::int64_t line) const;
    [[noreturn]] void fail_too_long(const std::string& header, std::int64_t line) const;

    std::int64_t num_lines_ = 0;    // newlines before the next block
    std::int64_t num_records_ = 0;  // begun
    std::int64_t length_ = 0;       // letters so far of the open record
    std::int64_t header_line_ = 0;  // newlines before its header
    std::string header_;
    std::vector<std::int32_t> lengths_;
    std::array<std::uint64_t, 256> byte_counts_{};
};

}  // namespace megatron_plm
