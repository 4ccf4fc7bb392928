// Bindings of the FASTA scanner.

#include "bindings.h"

#include <algorithm>
#include <cstdint>
#include <stdexcept>
#include <vector>

#include "fasta_block.h"
#include "fasta_stream.h"

namespace megatron_plm {

namespace {

using ByteArray = py::array_t<std::uint8_t, py::array::c_style>;

Alphabet make_alphabet(const ByteArray& token_of_byte, std::uint8_t unknown_token, bool strict) {
    if (token_of_byte.ndim() != 1 || token_of_byte.size() != 256) {
        throw std::invalid_argument("token_of_byte: expected 256 uint8 values");
    }
    Alphabet alphabet{{}, unknown_token, strict};
    std::copy_n(token_of_byte.data(), 256, alphabet.token_of_byte.begin());
    return alphabet;
}

py::buffer_info bytes_of(const py::buffer& data) {
    py::buffer_info info = data.request();
    if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1) {
        throw std::invalid_argument("data: expected contiguous bytes");
    }
    return info;
}

Block scan(const Alphabet& alphabet, const py::buffer& data, LineState state, ByteArray& out) {
    const py::buffer_info info = bytes_of(data);
    if (out.ndim() != 1 || out.size() < info.size) {
        throw std::invalid_argument("out: expected a uint8 array with room for every byte of data");
    }
    const auto* const begin = static_cast<const std::uint8_t*>(info.ptr);
    std::uint8_t* const tokens = out.mutable_data();  // throws where it is read-only
    const py::gil_scoped_release release;
    return scan_block(alphabet, begin, static_cast<std::size_t>(info.size), state, tokens);
}

// Headers may be in any encoding, so the message is decoded with what does not fit escaped.
void raise_fasta_error(const FastaError& error, const py::handle& type) {
    const py::object message = py::reinterpret_steal<py::object>(
        PyUnicode_DecodeUTF8(error.what(), static_cast<py::ssize_t>(std::char_traits<char>::length(error.what())),
                             "backslashreplace"));
    PyErr_SetObject(type.ptr(), message.ptr());
}

}  // namespace

void bind_fasta(py::module_& module) {
    // Never freed: errors are translated until the interpreter ends.
    static const py::handle fasta_error = py::exception<FastaError>(module, "FastaError", PyExc_ValueError).release();
    py::register_exception_translator([](std::exception_ptr pointer) {
        try {
            if (pointer) std::rethrow_exception(pointer);
        } catch (const FastaError& error) {
            raise_fasta_error(error, fasta_error);
        }
    });

    py::enum_<LineState>(module, "LineState", "What the bytes at some place of a FASTA file belong to.")
        .value("line_start", LineState::line_start)
        .value("header", LineState::header)
        .value("sequence", LineState::sequence)
        .value("comment", LineState::comment);

    py::class_<Alphabet>(module, "Alphabet", "From letters to token ids.")
        .def(py::init(&make_alphabet), py::arg("token_of_byte"), py::arg("unknown_token"), py::arg("strict"));

    py::class_<Block>(module, "Block", "What one block of a FASTA file holds.")
        .def_readonly("num_tokens", &Block::num_tokens);

    module.def("scan_block", &scan, py::arg("alphabet"), py::arg("data"), py::arg("state"), py::arg("out").noconvert(),
               "Scan a block that begins in `state`; its first num_tokens token ids are then in `out`.");
    module.def(
        "state_after",
        [](const py::buffer& data, LineState state) {
            const py::buffer_info info = bytes_of(data);
            return state_after(static_cast<const std::uint8_t*>(info.ptr), static_cast<std::size_t>(info.size), state);
        },
        py::arg("data"), py::arg("state"), "The state after a block that begins in `state`.");

    py::class_<FastaStream>(module, "FastaStream", "Joins scanned blocks, in file order, into records.")
        .def(py::init<>())
        .def("add", &FastaStream::add, py::arg("block"), "Take the next block; FastaError at the file's first fault.")
        .def("finish", &FastaStream::finish, "Close the last record; FastaError where it is empty.")
        .def("take_lengths",
             [](FastaStream& stream) {
                 const std::vector<std::int32_t> lengths = stream.take_lengths();
                 return to_numpy(lengths.data(), lengths.size());
             },
             "Lengths of the records completed since the last call, int32.")
        .def_property_readonly(
            "byte_counts",
            [](const FastaStream& stream) { return to_numpy(stream.byte_counts().data(), 256); },
            "How often each byte stood in a sequence, uint64, shape [256].");
}

}  // namespace megatron_plm
