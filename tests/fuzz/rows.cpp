// Building batches: whatever the segments say, a whole and valid batch or an exception, and no byte beyond the arrays.

#include "rows.h"

#include <algorithm>
#include <limits>
#include <stdexcept>
#include <vector>

#include "target.h"

using namespace megatron_plm;

namespace {

constexpr std::int64_t vocab_size = 33, pad = 1, ignored_label = -100;

// A value that a segment may have; now and then one that it must not have.
std::int64_t value(Input& input, std::int64_t low, std::int64_t high) {
    switch (input.byte()) {
        case 0xff: return static_cast<std::int64_t>(input.word());
        case 0xfe: return high + 1;
        case 0xfd: return low - 1;
        case 0xfc: return std::numeric_limits<std::int64_t>::max() - input.byte() % 4;
        case 0xfb: return std::numeric_limits<std::int64_t>::min() + input.byte() % 4;
        default: return input.between(low, high);
    }
}

struct Columns {
    std::vector<std::int64_t> file, pointer, residues, sequence, start, length, row_offsets{0};
    std::vector<std::uint64_t> key;
};

Columns read_columns(Input& input, const std::vector<TokenFile>& files, std::size_t num_rows) {
    Columns columns;
    for (std::size_t row = 0; row < num_rows; ++row) {
        for (std::int64_t left = input.between(0, 5); left > 0; --left) {
            const std::int64_t file = input.between(0, static_cast<std::int64_t>(files.size()) - 1);
            const TokenFile& tokens = files[static_cast<std::size_t>(file)];
            const std::int64_t pointer = value(input, 0, tokens.size);
            const std::int64_t room = std::clamp<std::int64_t>(tokens.size - std::max<std::int64_t>(pointer, 0), 0, 255);
            const std::int64_t residues = value(input, 0, room / tokens.itemsize);
            const std::int64_t start = value(input, 0, 3);
            columns.file.push_back(file);
            columns.pointer.push_back(pointer);
            columns.residues.push_back(residues);
            columns.start.push_back(start);
            columns.length.push_back(value(input, 1, std::clamp<std::int64_t>(residues, 0, 255) + 2));
            columns.sequence.push_back(static_cast<std::int64_t>(input.word()));
            columns.key.push_back(input.word());
        }
        columns.row_offsets.push_back(static_cast<std::int64_t>(columns.file.size()));
    }
    return columns;
}

void check(const BatchArrays& out, std::int64_t rows, const BatchCounts& counts) {
    std::int64_t tokens = 0, labels = 0;
    for (std::int64_t row = 0; row < rows; ++row) {
        std::int64_t segment = 0, position = -1;
        bool padding = false;
        for (std::int64_t i = row * out.L; i < (row + 1) * out.L; ++i) {
            PROMISE(out.tokens[i] >= 0 && out.tokens[i] < vocab_size);
            if (out.segment_ids[i] == 0) {
                PROMISE(out.tokens[i] == pad && out.positions[i] == 0);
                padding = true;
                continue;
            }
            PROMISE(!padding);
            position = out.segment_ids[i] == segment ? position + 1 : 0;
            PROMISE(out.segment_ids[i] == segment || out.segment_ids[i] == segment + 1);
            PROMISE(out.positions[i] == position);
            segment = out.segment_ids[i];
            ++tokens;
        }
        std::int64_t before = -1;
        bool unused = false;
        for (std::int64_t i = row * out.M; i < (row + 1) * out.M; ++i) {
            if (out.label_id[i] == ignored_label) {
                PROMISE(out.label_index[i] == 0);
                unused = true;
                continue;
            }
            PROMISE(!unused && out.label_index[i] > before && out.label_index[i] < out.L);
            PROMISE(out.label_id[i] >= 0 && out.label_id[i] < vocab_size);
            PROMISE(out.segment_ids[row * out.L + out.label_index[i]] != 0);
            before = out.label_index[i];
            ++labels;
        }
    }
    PROMISE(tokens == counts.tokens && labels == counts.labels);
    const std::int64_t num_cuts = rows * (out.S + 1) + 1;
    PROMISE(out.cu_seqlens[0] == 0 && out.cu_seqlens[num_cuts - 1] == rows * out.L);
    PROMISE(std::is_sorted(out.cu_seqlens, out.cu_seqlens + num_cuts));
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    // Exactly as large as promised, so that AddressSanitizer sees a byte beyond.
    const std::int64_t itemsizes[] = {1, 2, 4};
    std::vector<std::vector<std::uint8_t>> contents(static_cast<std::size_t>(input.between(1, 3)));
    std::vector<TokenFile> files;
    for (auto& content : contents) {
        const std::int64_t itemsize = itemsizes[input.byte() % 3];
        content.assign(static_cast<std::size_t>(input.between(0, 200)), 0);
        for (std::size_t i = 0; i < content.size(); ++i) {
            const std::uint8_t token = input.byte();
            // Mostly ids of the vocabulary, in the low byte.
            const bool low = i % static_cast<std::size_t>(itemsize) == 0;
            content[i] = token == 255 ? vocab_size : token > 250 ? token : low ? token % vocab_size : 0;
        }
        files.push_back({content.data(), static_cast<std::int64_t>(content.size()), itemsize});
    }
    Vocabulary vocabulary{0, 2, pad, 32, std::vector<std::uint8_t>(vocab_size, 0), {}};
    for (std::int64_t id = 4; id < 30; ++id) vocabulary.is_letter[static_cast<std::size_t>(id)] = 1;
    for (std::int64_t id = 4; id < 24; ++id) vocabulary.replacements.push_back(id);
    const std::uint64_t mask_below = input.word() >> 32, random_below = input.word() >> 32;
    const Corruption corruption{static_cast<Objective>(input.byte() % 4),
                                static_cast<double>(1 + input.byte()) / 256.0,
                                mask_below,
                                std::max(mask_below, random_below),
                                static_cast<double>(1 + input.byte()) / 256.0,
                                input.between(1, 20)};
    const auto rows = static_cast<std::size_t>(input.between(0, 3));
    const std::int64_t L = input.between(1, 100), M = input.between(0, 100), S = input.between(1, 6);
    const Columns columns = read_columns(input, files, rows);
    const Segments segments{columns.file.data(),  columns.pointer.data(), columns.residues.data(),
                            columns.sequence.data(), columns.start.data(), columns.length.data(),
                            columns.key.data(),   columns.row_offsets.data(), rows};
    std::vector<std::int64_t> tokens(rows * L, -1), positions(rows * L, -1), ids(rows * L, -1);
    std::vector<std::int64_t> label_index(rows * M, -1), label_id(rows * M, -1);
    std::vector<std::int32_t> cu_seqlens(rows * (S + 1) + 1, -1);
    const BatchArrays out{tokens.data(), positions.data(), ids.data(), label_index.data(), label_id.data(),
                          cu_seqlens.data(), L, M, S};
    try {
        const BatchCounts counts = build_rows(files, segments, vocabulary, corruption, out);
        check(out, static_cast<std::int64_t>(rows), counts);
    } catch (const std::out_of_range&) {
    } catch (const std::length_error&) {
    }
    return 0;
}
