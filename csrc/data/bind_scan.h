// What the bindings of the scanners share.

#pragma once

#include <cstdint>
#include <stdexcept>
#include <vector>

#include "bindings.h"
#include "letters.h"

namespace megatron_plm {

using ByteArray = py::array_t<std::uint8_t, py::array::c_style>;

inline py::buffer_info bytes_of(const py::buffer& data) {
    py::buffer_info info = data.request();
    if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1) {
        throw std::invalid_argument("data: expected contiguous bytes");
    }
    return info;
}

inline Span span_of(const py::buffer_info& info) {
    const auto* const begin = static_cast<const std::uint8_t*>(info.ptr);
    return {begin, begin + info.size};
}

// The hashes as uint64 [k, 2].
inline py::array_t<std::uint64_t> to_numpy(const std::vector<Hash128>& hashes) {
    py::array_t<std::uint64_t> pairs({static_cast<py::ssize_t>(hashes.size()), py::ssize_t{2}});
    std::uint64_t* out = pairs.mutable_data();
    for (const Hash128& hash : hashes) {
        *out++ = hash.first;
        *out++ = hash.second;
    }
    return pairs;
}

// Call `scan_block(text, tokens)` without the GIL, when `out` has room for a token of every byte.
template <typename ScanBlock>
RecordBlock scan(const py::buffer& data, ByteArray& out, ScanBlock scan_block) {
    const py::buffer_info info = bytes_of(data);
    if (out.ndim() != 1 || out.size() < info.size) {
        throw std::invalid_argument("out: expected a uint8 array with room for every byte of data");
    }
    std::uint8_t* const tokens = out.mutable_data();  // throws where it is read-only
    const py::gil_scoped_release release;
    return scan_block(span_of(info), tokens);
}

}  // namespace megatron_plm
