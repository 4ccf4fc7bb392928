// Bindings of packing and of building batches.

#include "bindings.h"

#include <cstdint>
#include <stdexcept>
#include <tuple>
#include <vector>

#include "packing.h"
#include "rows.h"

namespace megatron_plm {

namespace {

template <typename Value>
using Array = py::array_t<Value, py::array::c_style>;

py::tuple pack(const Array<std::int64_t>& tokens, const Array<std::int64_t>& labels, std::int64_t max_tokens,
               std::int64_t max_labels, std::int64_t max_segments) {
    if (tokens.ndim() != 1 || labels.ndim() != 1 || tokens.size() != labels.size()) {
        throw std::invalid_argument("tokens, labels: expected two arrays of one length");
    }
    const auto count = static_cast<std::size_t>(tokens.size());
    for (std::size_t i = 0; i < count; ++i) {
        if (tokens.data()[i] < 1 || tokens.data()[i] > max_tokens || labels.data()[i] > max_labels) {
            throw std::invalid_argument("a segment does not fit into an empty row");
        }
    }
    PackedRows rows;
    {
        const py::gil_scoped_release release;
        rows = pack_best_fit(tokens.data(), labels.data(), count, {max_tokens, max_labels, max_segments});
    }
    return py::make_tuple(to_numpy(rows.items.data(), rows.items.size()),
                          to_numpy(rows.offsets.data(), rows.offsets.size()));
}

const std::int64_t* column(const Array<std::int64_t>& array, py::ssize_t size) {
    if (array.ndim() != 1 || array.size() != size) throw std::invalid_argument("segments: columns of unequal length");
    return array.data();
}

py::tuple build(const std::vector<py::array>& files, const Array<std::int64_t>& file,
                const Array<std::int64_t>& pointer, const Array<std::int64_t>& residues,
                const Array<std::int64_t>& sequence, const Array<std::int64_t>& start,
                const Array<std::int64_t>& length, const Array<std::uint64_t>& key,
                const Array<std::int64_t>& row_offsets, const Vocabulary& vocabulary, const Corruption& corruption,
                py::ssize_t row_tokens, py::ssize_t row_labels, py::ssize_t row_segments) {
    std::vector<TokenFile> token_files;
    for (const py::array& tokens : files) {
        if (tokens.ndim() != 1 || (tokens.size() > 0 && tokens.strides(0) != tokens.itemsize())) {
            throw std::invalid_argument("files: expected contiguous arrays");
        }
        token_files.push_back({static_cast<const std::uint8_t*>(tokens.data()), tokens.nbytes(), tokens.itemsize()});
    }
    const py::ssize_t count = file.size(), rows = row_offsets.size() - 1;
    if (rows < 0 || key.ndim() != 1 || key.size() != count) throw std::invalid_argument("segments: wrong sizes");
    for (py::ssize_t row = 0; row <= rows; ++row) {
        const std::int64_t low = row ? row_offsets.data()[row - 1] : 0;
        const bool ends = row < rows || row_offsets.data()[row] == count;
        if (row_offsets.data()[row] < low || !ends) throw std::invalid_argument("row_offsets: not from 0 to the end");
    }
    for (py::ssize_t i = 0; i < count; ++i) {
        if (file.data()[i] < 0 || file.data()[i] >= static_cast<std::int64_t>(token_files.size())) {
            throw std::invalid_argument("file: no such file");
        }
    }
    const Segments segments{column(file, count),   column(pointer, count), column(residues, count),
                            column(sequence, count), column(start, count),  column(length, count),
                            key.data(),              row_offsets.data(),    static_cast<std::size_t>(rows)};
    py::array_t<std::int64_t> tokens({rows, row_tokens}), positions({rows, row_tokens}), ids({rows, row_tokens});
    py::array_t<std::int64_t> label_index({rows, row_labels}), label_id({rows, row_labels});
    py::array_t<std::int32_t> cu_seqlens(rows * (row_segments + 1) + 1);
    const BatchArrays out{tokens.mutable_data(),      positions.mutable_data(), ids.mutable_data(),
                          label_index.mutable_data(), label_id.mutable_data(),  cu_seqlens.mutable_data(),
                          row_tokens,                 row_labels,               row_segments};
    BatchCounts counts;
    {
        const py::gil_scoped_release release;
        counts = build_rows(token_files, segments, vocabulary, corruption, out);
    }
    return py::make_tuple(tokens, positions, ids, cu_seqlens, label_index, label_id, counts.tokens, counts.labels,
                          counts.cropped);
}

}  // namespace

void bind_rows(py::module_& module) {
    module.def("pack_best_fit", &pack, py::arg("tokens"), py::arg("labels"), py::arg("max_tokens"),
               py::arg("max_labels"), py::arg("max_segments"),
               "Best-fit-decreasing packing; returns (items row after row, where each row begins and the end).");

    py::enum_<Objective>(module, "Objective", "What is predicted.")
        .value("mlm_exact", Objective::mlm_exact)
        .value("mlm_bernoulli", Objective::mlm_bernoulli)
        .value("mlm_spans", Objective::mlm_spans)
        .value("clm", Objective::clm);

    py::class_<Corruption>(module, "Corruption", "Which letters are predicted and what becomes of them.")
        .def(py::init([](Objective objective, double probability, std::uint64_t mask_below, std::uint64_t random_below,
                         double span_stop, std::int64_t longest_span) {
                 return Corruption{objective, probability, mask_below, random_below, span_stop, longest_span};
             }),
             py::kw_only(), py::arg("objective"), py::arg("probability"), py::arg("mask_below"),
             py::arg("random_below"), py::arg("span_stop"), py::arg("longest_span"));

    py::class_<Vocabulary>(module, "Vocabulary", "What the loader needs to know of a tokenizer.")
        .def(py::init([](std::int64_t cls, std::int64_t eos, std::int64_t pad, std::int64_t mask,
                         std::vector<std::uint8_t> is_letter, std::vector<std::int64_t> replacements) {
                 if (replacements.empty()) throw std::invalid_argument("replacements: none");
                 return Vocabulary{cls, eos, pad, mask, std::move(is_letter), std::move(replacements)};
             }),
             py::kw_only(), py::arg("cls"), py::arg("eos"), py::arg("pad"), py::arg("mask"), py::arg("is_letter"),
             py::arg("replacements"));

    module.def("build_rows", &build, py::kw_only(), py::arg("files"), py::arg("file"), py::arg("pointer"),
               py::arg("residues"), py::arg("sequence"), py::arg("start"), py::arg("length"), py::arg("key"),
               py::arg("row_offsets"), py::arg("vocabulary"), py::arg("corruption"), py::arg("row_tokens"),
               py::arg("row_labels"), py::arg("row_segments"),
               "Tokens, positions, segment_ids, cu_seqlens, label_index, label_id, and counts of tokens, labels and "
               "cropped proteins; see data.loader.Batch and csrc/data/rows.h.");
}

}  // namespace megatron_plm
