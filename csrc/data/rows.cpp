#include "rows.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <stdexcept>
#include <string>

#include "philox.h"

namespace megatron_plm {

namespace {

constexpr std::int64_t ignored_label = -100;
constexpr double draws_below = 4294967296.0;  // a draw is one of so many numbers

// The draws of one token: which are chosen and what becomes of them depends on nothing but key, sequence and position.
enum class Purpose : std::uint32_t { token = 0, span = 1 };

std::array<std::uint32_t, 4> draw(std::uint64_t key, std::int64_t sequence, std::int64_t position, Purpose purpose) {
    const auto s = static_cast<std::uint64_t>(sequence);
    return philox4x32(key, {static_cast<std::uint32_t>(position), static_cast<std::uint32_t>(purpose),
                            static_cast<std::uint32_t>(s), static_cast<std::uint32_t>(s >> 32)});
}

// The first draws of `count` tokens from `position` on. A loop over tokens alone, so that the compiler widens it; in
// copies for the vector units that a processor may have, of which the loader of the program picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && !defined(__SANITIZE_ADDRESS__)
__attribute__((target_clones("avx512f", "avx2", "default")))
#endif
void first_draws(std::uint64_t key, std::uint64_t sequence, std::int64_t position, std::int64_t count,
                 std::uint32_t* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        out[i] = philox4x32(key, {static_cast<std::uint32_t>(position + i), static_cast<std::uint32_t>(Purpose::token),
                                  static_cast<std::uint32_t>(sequence), static_cast<std::uint32_t>(sequence >> 32)})[0];
    }
}

template <typename Token>
void copy_tokens(const std::uint8_t* data, std::int64_t count, std::int64_t* out) {
    for (std::int64_t i = 0; i < count; ++i) {
        Token token;
        std::memcpy(&token, data + i * static_cast<std::int64_t>(sizeof token), sizeof token);
        out[i] = token;
    }
}

class RowBuilder {
public:
    RowBuilder(const std::vector<TokenFile>& files, const Segments& segments, const Vocabulary& vocabulary,
               const Corruption& corruption, const BatchArrays& out)
        : files_(files), segments_(segments), vocabulary_(vocabulary), corruption_(corruption), out_(out) {}

    BatchCounts build() {
        const auto total = static_cast<std::int64_t>(segments_.num_rows) * out_.L;
        std::int32_t* cut = out_.cu_seqlens;
        std::int32_t* const cuts_end = cut + static_cast<std::int64_t>(segments_.num_rows) * (out_.S + 1) + 1;
        *cut++ = 0;
        for (std::size_t row = 0; row < segments_.num_rows; ++row) {
            begin_row(row);
            const std::int64_t first = segments_.row_offsets[row], last = segments_.row_offsets[row + 1];
            if (last - first > out_.S) throw std::length_error("a row has more segments than it has room for");
            for (std::int64_t segment = first; segment < last; ++segment) {
                add(segment, segment - first + 1);
                *cut++ = static_cast<std::int32_t>(row_begin_ + used_);
            }
            end_row();
            if (cut[-1] != row_begin_ + out_.L) *cut++ = static_cast<std::int32_t>(row_begin_ + out_.L);
        }
        std::fill(cut, cuts_end, static_cast<std::int32_t>(total));
        return counts_;
    }

private:
    void begin_row(std::size_t row) {
        row_begin_ = static_cast<std::int64_t>(row) * out_.L;
        label_begin_ = static_cast<std::int64_t>(row) * out_.M;
        used_ = num_labels_ = 0;
    }

    void end_row() {
        std::fill(out_.tokens + row_begin_ + used_, out_.tokens + row_begin_ + out_.L, vocabulary_.pad);
        std::fill(out_.positions + row_begin_ + used_, out_.positions + row_begin_ + out_.L, 0);
        std::fill(out_.segment_ids + row_begin_ + used_, out_.segment_ids + row_begin_ + out_.L, 0);
        std::fill(out_.label_index + label_begin_ + num_labels_, out_.label_index + label_begin_ + out_.M, 0);
        std::fill(out_.label_id + label_begin_ + num_labels_, out_.label_id + label_begin_ + out_.M, ignored_label);
        counts_.tokens += used_;
        counts_.labels += num_labels_;
    }

    void add(std::int64_t segment, std::int64_t segment_id) {
        const std::int64_t length = segments_.length[segment];
        if (length < 1 || length > out_.L - used_) throw std::length_error("a row has more tokens than it has room for");
        std::int64_t* const tokens = out_.tokens + row_begin_ + used_;
        read(segment, tokens);
        for (std::int64_t i = 0; i < length; ++i) out_.positions[row_begin_ + used_ + i] = i;
        std::fill_n(out_.segment_ids + row_begin_ + used_, length, segment_id);
        if (corruption_.objective == Objective::clm) {
            for (std::int64_t i = 0; i + 1 < length; ++i) label(used_ + i, tokens[i + 1]);
        } else {
            choose(segment, tokens);
            for (const Choice& chosen : chosen_) {
                label(used_ + chosen.index, tokens[chosen.index]);
                tokens[chosen.index] = corrupted(segment, chosen, tokens[chosen.index]);
            }
        }
        counts_.cropped += length < segments_.residues[segment] + 2;
        used_ += length;
    }

    // Copy the segment's stretch of `<cls> residues <eos>`, and check it.
    void read(std::int64_t segment, std::int64_t* tokens) const {
        const TokenFile& file = files_[static_cast<std::size_t>(segments_.file[segment])];
        const std::int64_t residues = segments_.residues[segment], start = segments_.start[segment];
        const std::int64_t length = segments_.length[segment], pointer = segments_.pointer[segment];
        // In this order no sum can overflow.
        if (pointer < 0 || residues < 0 || residues > (file.size - pointer) / file.itemsize || start < 0 ||
            start > residues + 2 - length) {
            throw std::out_of_range("sequence " + std::to_string(segments_.sequence[segment]) +
                                    " lies outside its file");
        }
        const std::int64_t stop = start + length;
        if (start == 0) *tokens++ = vocabulary_.cls;
        const std::int64_t first = std::max<std::int64_t>(start - 1, 0), last = std::min(stop - 1, residues);
        const std::uint8_t* const data = file.data + pointer + first * file.itemsize;
        switch (file.itemsize) {
            case 1: copy_tokens<std::uint8_t>(data, last - first, tokens); break;
            case 2: copy_tokens<std::uint16_t>(data, last - first, tokens); break;
            default: copy_tokens<std::int32_t>(data, last - first, tokens);
        }
        const auto vocab_size = static_cast<std::uint64_t>(vocabulary_.is_letter.size());
        for (std::int64_t i = 0; i < last - first; ++i) {
            if (static_cast<std::uint64_t>(tokens[i]) >= vocab_size) {
                throw std::out_of_range("sequence " + std::to_string(segments_.sequence[segment]) + " holds token id " +
                                        std::to_string(tokens[i]) + " of a vocabulary of " + std::to_string(vocab_size));
            }
        }
        if (stop == residues + 2) tokens[last - first] = vocabulary_.eos;
    }

    // A chosen token, and the token whose draw decides what becomes of it: itself, or the first of its span.
    struct Choice {
        std::int64_t index, decider;
    };

    // Fill `chosen_`, in ascending order, with the tokens of a segment that are predicted.
    void choose(std::int64_t segment, const std::int64_t* tokens) {
        chosen_.clear();
        const std::int64_t length = segments_.length[segment];
        draws_.resize(static_cast<std::size_t>(length));
        first_draws(segments_.key[segment], static_cast<std::uint64_t>(segments_.sequence[segment]),
                    segments_.start[segment], length, draws_.data());
        if (corruption_.objective == Objective::mlm_bernoulli) {
            rank(tokens, length, static_cast<std::uint64_t>(corruption_.probability * draws_below));
            for (const std::uint64_t entry : ranked_) chosen_.push_back({index_of(entry), index_of(entry)});
            return;
        }
        std::int64_t letters = 0;
        for (std::int64_t i = 0; i < length; ++i) letters += is_letter(tokens[i]);
        if (letters == 0) return;
        // The rounded share, and at least one.
        const auto share = std::floor(static_cast<double>(letters) * corruption_.probability + 0.5);
        const auto wanted = std::max<std::size_t>(1, static_cast<std::size_t>(share));
        if (corruption_.objective == Objective::mlm_spans) {
            rank(tokens, length, static_cast<std::uint64_t>(draws_below));
            choose_spans(segment, tokens, wanted);
        } else {
            choose_lowest(tokens, length, letters, wanted);
        }
        std::sort(chosen_.begin(), chosen_.end(), [](Choice a, Choice b) { return a.index < b.index; });
    }

    // The letters of the lowest draws. Nearly always they are among those below a bound a little above their share.
    void choose_lowest(const std::int64_t* tokens, std::int64_t length, std::int64_t letters, std::size_t wanted) {
        const double share = static_cast<double>(wanted) / static_cast<double>(letters);
        const double spread = std::sqrt(share / static_cast<double>(letters));
        rank(tokens, length, static_cast<std::uint64_t>(std::min(1.0, share + 3 * spread) * draws_below));
        if (ranked_.size() < wanted) rank(tokens, length, static_cast<std::uint64_t>(draws_below));
        if (wanted < ranked_.size()) {
            std::nth_element(ranked_.begin(), ranked_.begin() + static_cast<std::ptrdiff_t>(wanted), ranked_.end());
            ranked_.resize(wanted);
        }
        for (const std::uint64_t entry : ranked_) chosen_.push_back({index_of(entry), index_of(entry)});
    }

    // Fill `ranked_` with the letters whose draw is below `bound`: draw, then position, which orders equal draws.
    void rank(const std::int64_t* tokens, std::int64_t length, std::uint64_t bound) {
        ranked_.clear();
        for (std::int64_t i = 0; i < length; ++i) {
            const std::uint64_t first_draw = draws_[static_cast<std::size_t>(i)];
            if (first_draw < bound && is_letter(tokens[i])) {
                ranked_.push_back(first_draw << 32 | static_cast<std::uint64_t>(i));
            }
        }
    }

    static std::int64_t index_of(std::uint64_t ranked) { return static_cast<std::int64_t>(ranked & 0xffffffff); }

    bool is_letter(std::int64_t token) const { return vocabulary_.is_letter[static_cast<std::size_t>(token)] != 0; }

    // Spans of geometric length from the letters in the order of their draws, until `wanted` letters are chosen.
    void choose_spans(std::int64_t segment, const std::int64_t* tokens, std::size_t wanted) {
        std::sort(ranked_.begin(), ranked_.end());
        const std::int64_t length = segments_.length[segment];
        taken_.assign(static_cast<std::size_t>(length), 0);
        for (const std::uint64_t entry : ranked_) {
            const std::int64_t first = index_of(entry);
            std::int64_t left = span_length(segment, first);
            for (std::int64_t i = first; i < length && left > 0; ++i, --left) {
                if (chosen_.size() == wanted) break;
                if (!is_letter(tokens[i]) || taken_[static_cast<std::size_t>(i)]) break;
                taken_[static_cast<std::size_t>(i)] = 1;
                chosen_.push_back({i, first});
            }
            if (chosen_.size() == wanted) break;
        }
    }

    // Geometric, by inversion: P(length > n) = (1 - stop)^n, up to the longest.
    std::int64_t span_length(std::int64_t segment, std::int64_t index) const {
        const auto draws = draw(segments_.key[segment], segments_.sequence[segment], segments_.start[segment] + index,
                                Purpose::span);
        const double uniform = (static_cast<double>(draws[0]) + 0.5) / draws_below;
        std::int64_t n = 1;
        for (double beyond = 1.0 - corruption_.span_stop; n < corruption_.longest_span && uniform < beyond; ++n) {
            beyond *= 1.0 - corruption_.span_stop;
        }
        return n;
    }

    std::int64_t corrupted(std::int64_t segment, Choice chosen, std::int64_t token) const {
        const std::uint64_t key = segments_.key[segment];
        const std::int64_t sequence = segments_.sequence[segment], start = segments_.start[segment];
        const std::uint64_t action = draw(key, sequence, start + chosen.decider, Purpose::token)[1];
        if (action < corruption_.mask_below) return vocabulary_.mask;
        if (action >= corruption_.random_below) return token;
        const std::uint64_t pick = draw(key, sequence, start + chosen.index, Purpose::token)[2];
        return vocabulary_.replacements[static_cast<std::size_t>(pick * vocabulary_.replacements.size() >> 32)];
    }

    void label(std::int64_t index, std::int64_t id) {
        if (num_labels_ == out_.M) throw std::length_error("a row has more labels than it has room for");
        out_.label_index[label_begin_ + num_labels_] = index;
        out_.label_id[label_begin_ + num_labels_] = id;
        ++num_labels_;
    }

    const std::vector<TokenFile>& files_;
    const Segments& segments_;
    const Vocabulary& vocabulary_;
    const Corruption& corruption_;
    const BatchArrays& out_;
    BatchCounts counts_;
    std::int64_t row_begin_ = 0, label_begin_ = 0;  // of the current row, in [rows, L] and [rows, M]
    std::int64_t used_ = 0, num_labels_ = 0;        // in the current row
    std::vector<std::uint32_t> draws_;  // the first draw of each token of the segment
    std::vector<std::uint64_t> ranked_;
    std::vector<Choice> chosen_;
    std::vector<std::uint8_t> taken_;
};

}  // namespace

BatchCounts build_rows(const std::vector<TokenFile>& files, const Segments& segments, const Vocabulary& vocabulary,
                       const Corruption& corruption, const BatchArrays& out) {
    return RowBuilder(files, segments, vocabulary, corruption, out).build();
}

}  // namespace megatron_plm
