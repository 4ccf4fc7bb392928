// Bindings of what the preprocessor does with whole records: hashing, picking, counting.

#include "bindings.h"

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#include "bind_scan.h"
#include "hashing.h"
#include "selection.h"

namespace megatron_plm {

namespace {

template <typename Value>
using Array = py::array_t<Value, py::array::c_style>;

template <typename Token>
Array<std::uint64_t> hash_records(const LetterTable& letters, const Array<Token>& tokens,
                                  const Array<std::int32_t>& lengths, std::uint32_t seed) {
    const auto count = static_cast<std::size_t>(lengths.size());
    const std::int32_t* const length = lengths.data();
    const std::int64_t sum = std::accumulate(length, length + count, std::int64_t{0});
    const bool negative = std::any_of(length, length + count, [](std::int32_t value) { return value < 0; });
    if (tokens.ndim() != 1 || lengths.ndim() != 1 || negative || sum != tokens.size()) {
        throw std::invalid_argument("lengths: expected those of whole records that make up the tokens");
    }
    Array<std::uint64_t> hashes({static_cast<py::ssize_t>(count), py::ssize_t{2}});
    std::uint64_t* out = hashes.mutable_data();
    const Token* token = tokens.data();
    const py::gil_scoped_release release;
    std::vector<std::uint8_t> scratch;
    for (std::size_t i = 0; i < count; ++i) {
        const auto size = static_cast<std::size_t>(length[i]);
        const Hash128 hash = letters.hash(token, size, seed, scratch);
        *out++ = hash.first;
        *out++ = hash.second;
        token += size;
    }
    return hashes;
}

Array<std::uint8_t> gather_bytes(const py::buffer& data, const Array<std::int64_t>& begins,
                                 const Array<std::int64_t>& sizes) {
    const py::buffer_info info = bytes_of(data);
    if (begins.ndim() != 1 || sizes.ndim() != 1 || begins.size() != sizes.size()) {
        throw std::invalid_argument("begins, sizes: expected two arrays of equal length");
    }
    const auto count = static_cast<std::size_t>(begins.size());
    std::int64_t total = 0;
    for (std::size_t i = 0; i < count; ++i) {
        const std::int64_t begin = begins.data()[i], size = sizes.data()[i];
        if (begin < 0 || size < 0 || begin > info.size || size > info.size - begin) {
            throw std::out_of_range("begins, sizes: a stretch lies outside the data");
        }
        total += size;
    }
    Array<std::uint8_t> out(total);
    std::uint8_t* const target = out.mutable_data();
    const py::gil_scoped_release release;
    gather(static_cast<const std::uint8_t*>(info.ptr), begins.data(), sizes.data(), count, target);
    return out;
}

template <typename Token>
void count_tokens(const Array<Token>& tokens, Array<std::uint64_t>& counts) {
    if (counts.ndim() != 1) throw std::invalid_argument("counts: expected one counter for each token id");
    std::uint64_t* const counters = counts.mutable_data();  // throws where it is read-only
    const py::gil_scoped_release release;
    add_token_counts(tokens.data(), static_cast<std::size_t>(tokens.size()), counters,
                     static_cast<std::size_t>(counts.size()));
}

template <typename Token>
void bind_tokens(py::module_& module, py::class_<LetterTable>& letters) {
    letters.def("hash_records", &hash_records<Token>, py::arg("tokens").noconvert(), py::arg("lengths").noconvert(),
                py::arg("seed") = 0, "MurmurHash3 x64 128 of each record's letters, uint64 [k, 2].");
    module.def("add_token_counts", &count_tokens<Token>, py::arg("tokens").noconvert(), py::arg("counts").noconvert(),
               "Add to `counts` (uint64, one for each id) how often each token id occurs.");
}

}  // namespace

void bind_hashing(py::module_& module) {
    py::class_<LetterTable> letters(module, "LetterTable", "The letters that each token id stands for.");
    letters.def(py::init([](const std::vector<py::bytes>& texts) {
                    return LetterTable(std::vector<std::string>(texts.begin(), texts.end()));
                }),
                py::arg("texts"));
    bind_tokens<std::uint8_t>(module, letters);
    bind_tokens<std::uint16_t>(module, letters);
    bind_tokens<std::int32_t>(module, letters);

    module.def(
        "read_cluster_lines",
        [](const py::buffer& data) {
            const py::buffer_info info = bytes_of(data);
            ClusterLines lines;
            {
                const py::gil_scoped_release release;
                lines = read_cluster_lines(static_cast<const std::uint8_t*>(info.ptr),
                                           static_cast<std::size_t>(info.size));
            }
            return py::make_tuple(to_numpy(lines.representatives), to_numpy(lines.members), lines.bad_line);
        },
        py::arg("data"),
        "Hashes of representatives and members (uint64 [k, 2] each) of whole lines, and the number of newlines before the "
        "first line that has not two names, or -1.");
    module.def("gather", &gather_bytes, py::arg("data"), py::arg("begins").noconvert(), py::arg("sizes").noconvert(),
               "The bytes from begins[i] on, sizes[i] of them (int64 [k] each), end to end, as uint8.");
}

}  // namespace megatron_plm
