// Bindings of the scanners of lines, values and tables.

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_scan.h"
#include "lines.h"

namespace megatron_plm {

namespace {

using OffsetArray = py::array_t<std::int64_t, py::array::c_style>;

// The number of values that `offsets` tells, all of them inside `size` bytes.
std::size_t checked_values(const OffsetArray& offsets, std::size_t size) {
    if (offsets.ndim() != 1 || offsets.size() < 1) {
        throw std::invalid_argument("offsets: expected one more than values");
    }
    const std::int64_t* const offset = offsets.data();
    const auto num_values = static_cast<std::size_t>(offsets.size() - 1);
    bool good = offset[0] >= 0 && offset[num_values] <= static_cast<std::int64_t>(size);
    for (std::size_t i = 0; i < num_values; ++i) good = good && offset[i] <= offset[i + 1];
    if (!good) throw std::invalid_argument("offsets: expected ascending ones inside data");
    return num_values;
}

py::array_t<std::uint64_t> hash_names(const py::buffer& data, const OffsetArray& offsets) {
    const py::buffer_info info = bytes_of(data);
    const Span text = span_of(info);
    const std::size_t num_values = checked_values(offsets, text.size());
    std::vector<Hash128> names(num_values);
    const std::int64_t* const offset = offsets.data();
    for (std::size_t i = 0; i < num_values; ++i) {
        names[i] = hash_name({text.begin + offset[i], text.begin + offset[i + 1]});
    }
    return to_numpy(names);
}

py::tuple table_header(const py::buffer& data, char separator) {
    const py::buffer_info info = bytes_of(data);
    const TableHeader header = read_table_header(span_of(info), static_cast<std::uint8_t>(separator));
    py::list fields;
    for (const std::string& field : header.fields) fields.append(py::bytes(field));
    return py::make_tuple(fields, header.size, header.num_lines, header.fault);
}

}  // namespace

void bind_lines(py::module_& module) {
    module.def(
        "scan_text",
        [](const Alphabet& alphabet, const py::buffer& data, ByteArray& out) {
            return scan(data, out, [&](Span text, std::uint8_t* tokens) { return scan_text(alphabet, text, tokens); });
        },
        py::arg("alphabet"), py::arg("data"), py::arg("out").noconvert(), "Scan lines of one sequence each.");
    module.def(
        "scan_values",
        [](const Alphabet& alphabet, const py::buffer& data, const OffsetArray& offsets, ByteArray& out) {
            return scan(data, out, [&](Span text, std::uint8_t* tokens) {
                const std::size_t num_values = checked_values(offsets, text.size());
                return scan_values(alphabet, text.begin, offsets.data(), num_values, tokens);
            });
        },
        py::arg("alphabet"), py::arg("data"), py::arg("offsets"), py::arg("out").noconvert(),
        "Scan sequences data[offsets[i] : offsets[i + 1]].");
    module.def(
        "scan_json_lines",
        [](const Alphabet& alphabet, const py::buffer& data, ByteArray& out, const std::string& key,
           const std::optional<std::string>& name_key) {
            return scan(data, out, [&](Span text, std::uint8_t* tokens) {
                return scan_json_lines(alphabet, text, tokens, key, name_key);
            });
        },
        py::arg("alphabet"), py::arg("data"), py::arg("out").noconvert(), py::arg("key"), py::arg("name_key"),
        "Scan lines of one JSON object each, whose value of `key` is the sequence.");
    module.def(
        "scan_table",
        [](const Alphabet& alphabet, const py::buffer& data, ByteArray& out, char separator, std::size_t num_columns,
           std::size_t column, std::optional<std::size_t> name_column) {
            const Table table{static_cast<std::uint8_t>(separator), num_columns, column, name_column};
            return scan(data, out,
                        [&](Span text, std::uint8_t* tokens) { return scan_table(alphabet, text, tokens, table); });
        },
        py::arg("alphabet"), py::arg("data"), py::arg("out").noconvert(), py::arg("separator"), py::arg("num_columns"),
        py::arg("column"), py::arg("name_column"), "Scan rows of a table, one field of which is the sequence.");
    module.def("read_table_header", &table_header, py::arg("data"), py::arg("separator"),
               "Its fields, its bytes, its newlines and what is wrong with it ('' for nothing).");
    module.def(
        "last_line_end",
        [](const py::buffer& data, std::size_t start) {
            const py::buffer_info info = bytes_of(data);
            return last_line_end(span_of(info).begin, span_of(info).size(), start);
        },
        py::arg("data"), py::arg("start"), "One past the last newline of data[start:], 0 without one.");
    module.def(
        "last_row_end",
        [](const py::buffer& data, char separator) {
            const py::buffer_info info = bytes_of(data);
            return last_row_end(span_of(info), static_cast<std::uint8_t>(separator));
        },
        py::arg("data"), py::arg("separator"), "One past the newline that ends the last whole row, 0 without one.");
    module.def("hash_names", &hash_names, py::arg("data"), py::arg("offsets"),
               "128-bit hashes of the names data[offsets[i] : offsets[i + 1]], each of its first word; uint64 [k, 2].");
}

}  // namespace megatron_plm
