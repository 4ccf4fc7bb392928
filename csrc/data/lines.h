// Sequences without FASTA headers: plain lines, values of a column, fields of JSON lines and of CSV tables.

#pragma once

#include <optional>
#include <string>

#include "letters.h"

namespace megatron_plm {

// One sequence a line. Blank lines are skipped; spaces inside a line too, but a tab is a fault (it is a table).
RecordBlock scan_text(const Alphabet& alphabet, Span data, std::uint8_t* out);

// One sequence a value: value i is data[offsets[i] : offsets[i + 1]]. A fault's line is its value's number, from 0.
RecordBlock scan_values(const Alphabet& alphabet, const std::uint8_t* data, const std::int64_t* offsets,
                        std::size_t num_values, std::uint8_t* out);

// One JSON object a line: the string under `key`, and where `name_key` is given the record's name under that one (a
// string or a number). Only the object's own keys count; of an equal pair the last does, as in Python's json. Blank
// lines are skipped.
RecordBlock scan_json_lines(const Alphabet& alphabet, Span data, std::uint8_t* out, const std::string& key,
                            const std::optional<std::string>& name_key);

// How a table is laid out.
struct Table {
    std::uint8_t separator;
    std::size_t num_columns;
    std::size_t column;                     // of the sequence
    std::optional<std::size_t> name_column;
};

// One row a record, fields quoted as RFC 4180 has it. Blank lines are skipped. The header is no row: leave it out.
RecordBlock scan_table(const Alphabet& alphabet, Span data, std::uint8_t* out, const Table& table);

// The fields of the first row that is not blank, and what follows it.
struct TableHeader {
    std::vector<std::string> fields;
    std::size_t size = 0;         // bytes up to the row after it
    std::int64_t num_lines = 0;   // newlines in them; of a fault, before it
    std::string fault;            // what is wrong with it, empty: nothing
};
TableHeader read_table_header(Span data, std::uint8_t separator);

// One past the newline that ends the last whole row of `data`, which begins with a row; 0 where none ends.
std::size_t last_row_end(Span data, std::uint8_t separator);

}  // namespace megatron_plm
