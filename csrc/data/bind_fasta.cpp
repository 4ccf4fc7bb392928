// Bindings of the FASTA scanner and of what all scanners share.

#include <algorithm>
#include <cstdint>
#include <stdexcept>

#include "bind_scan.h"
#include "fasta_block.h"

namespace megatron_plm {

namespace {

Alphabet make_alphabet(const ByteArray& token_of_byte, std::uint8_t unknown_token, bool strict) {
    if (token_of_byte.ndim() != 1 || token_of_byte.size() != 256) {
        throw std::invalid_argument("token_of_byte: expected 256 uint8 values");
    }
    Alphabet alphabet{{}, unknown_token, strict};
    std::copy_n(token_of_byte.data(), 256, alphabet.token_of_byte.begin());
    return alphabet;
}

// Headers may be in any encoding, so what is no UTF-8 in a message is escaped.
py::object fault_of(const RecordBlock& block) {
    if (block.fault.empty()) return py::none();
    PyObject* const message = PyUnicode_DecodeUTF8(block.fault.data(), static_cast<py::ssize_t>(block.fault.size()),
                                                   "backslashreplace");
    return py::make_tuple(block.fault_line, py::reinterpret_steal<py::object>(message));
}

}  // namespace

void bind_fasta(py::module_& module) {
    py::class_<Alphabet>(module, "Alphabet", "From letters to token ids.")
        .def(py::init(&make_alphabet), py::arg("token_of_byte"), py::arg("unknown_token"), py::arg("strict"));

    py::class_<RecordBlock>(module, "RecordBlock", "What a block of whole records holds, up to its first fault.")
        .def_readonly("num_tokens", &RecordBlock::num_tokens)
        .def_readonly("num_lines", &RecordBlock::num_lines)
        .def_readonly("num_stops", &RecordBlock::num_stops)
        .def_property_readonly(
            "lengths", [](const RecordBlock& block) { return to_numpy(block.lengths.data(), block.lengths.size()); })
        .def_property_readonly("names", [](const RecordBlock& block) { return to_numpy(block.names); })
        .def_property_readonly("identifiers", [](const RecordBlock& block) { return py::bytes(block.identifiers); })
        .def_property_readonly("identifier_ends",
                               [](const RecordBlock& block) {
                                   return to_numpy(block.identifier_ends.data(), block.identifier_ends.size());
                               })
        .def_property_readonly(
            "byte_counts", [](const RecordBlock& block) { return to_numpy(block.byte_counts.data(), 256); })
        .def_property_readonly("fault", &fault_of);

    module.def(
        "scan_fasta",
        [](const Alphabet& alphabet, const py::buffer& data, ByteArray& out, bool with_names) {
            return scan(data, out, [&](Span text, std::uint8_t* tokens) {
                return scan_fasta(alphabet, text.begin, text.size(), tokens, with_names);
            });
        },
        py::arg("alphabet"), py::arg("data"), py::arg("out").noconvert(), py::arg("with_names"),
        "Scan whole FASTA records; their num_tokens token ids are then in `out`.");
    module.def(
        "last_record_start",
        [](const py::buffer& data, std::size_t start) {
            const py::buffer_info info = bytes_of(data);
            const Span text = span_of(info);
            return last_record_start(text.begin, text.size(), start);
        },
        py::arg("data"), py::arg("start"),
        "Where the last FASTA record that begins behind data[start] does, 0 without one.");
}

}  // namespace megatron_plm
