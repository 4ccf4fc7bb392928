#include "hashing.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "letters.h"

namespace megatron_plm {

namespace {

constexpr std::uint64_t c1 = 0x87C37B91114253D5, c2 = 0x4CF5AD432745937F;

std::uint64_t rotate_left(std::uint64_t word, int bits) { return (word << bits) | (word >> (64 - bits)); }

std::uint64_t little_endian(const std::uint8_t* bytes, std::size_t size) {
    std::uint64_t word = 0;
    for (std::size_t i = 0; i < size; ++i) word |= std::uint64_t{bytes[i]} << (8 * i);
    return word;
}

std::uint64_t scramble_first(std::uint64_t word) { return rotate_left(word * c1, 31) * c2; }
std::uint64_t scramble_second(std::uint64_t word) { return rotate_left(word * c2, 33) * c1; }

std::uint64_t finalize(std::uint64_t word) {
    word = (word ^ (word >> 33)) * 0xFF51AFD7ED558CCD;
    word = (word ^ (word >> 33)) * 0xC4CEB9FE1A85EC53;
    return word ^ (word >> 33);
}

bool is_blank(std::uint8_t byte) { return byte == ' ' || byte == '\t' || byte == '\r'; }

}  // namespace

Hash128 murmur3_128(const std::uint8_t* data, std::size_t size, std::uint32_t seed) {
    std::uint64_t h1 = seed, h2 = seed;
    const std::uint8_t* const whole_blocks = data + size / 16 * 16;
    for (; data != whole_blocks; data += 16) {
        h1 ^= scramble_first(little_endian(data, 8));
        h1 = (rotate_left(h1, 27) + h2) * 5 + 0x52DCE729;
        h2 ^= scramble_second(little_endian(data + 8, 8));
        h2 = (rotate_left(h2, 31) + h1) * 5 + 0x38495AB5;
    }
    const std::size_t rest = size % 16;
    if (rest > 8) h2 ^= scramble_second(little_endian(data + 8, rest - 8));
    if (rest > 0) h1 ^= scramble_first(little_endian(data, std::min<std::size_t>(rest, 8)));
    h1 ^= size;
    h2 ^= size;
    h1 += h2;
    h2 += h1;
    h1 = finalize(h1);
    h2 = finalize(h2);
    h1 += h2;
    h2 += h1;
    return {h1, h2};
}

LetterTable::LetterTable(const std::vector<std::string>& texts) {
    offsets_.push_back(0);
    for (const std::string& text : texts) {
        bytes_.insert(bytes_.end(), text.begin(), text.end());
        offsets_.push_back(bytes_.size());
    }
    const bool single = std::all_of(texts.begin(), texts.end(), [](const auto& text) { return text.size() == 1; });
    if (single) letter_ = bytes_;
}

template <typename Token>
Hash128 LetterTable::hash(const Token* tokens, std::size_t size, std::uint32_t seed,
                      std::vector<std::uint8_t>& scratch) const {
    // A negative id becomes a huge one.
    std::uint32_t highest = 0;
    for (std::size_t i = 0; i < size; ++i) highest = std::max(highest, static_cast<std::uint32_t>(tokens[i]));
    if (highest + std::size_t{1} >= offsets_.size()) {
        throw std::out_of_range("tokens: an id is outside the table of letters");
    }
    if (!letter_.empty()) {
        scratch.resize(size);
        for (std::size_t i = 0; i < size; ++i) scratch[i] = letter_[static_cast<std::size_t>(tokens[i])];
    } else {
        scratch.clear();
        for (std::size_t i = 0; i < size; ++i) {
            const auto id = static_cast<std::size_t>(tokens[i]);
            scratch.insert(scratch.end(), bytes_.data() + offsets_[id], bytes_.data() + offsets_[id + 1]);
        }
    }
    return murmur3_128(scratch.data(), scratch.size(), seed);
}

template Hash128 LetterTable::hash(const std::uint8_t*, std::size_t, std::uint32_t, std::vector<std::uint8_t>&) const;
template Hash128 LetterTable::hash(const std::uint16_t*, std::size_t, std::uint32_t, std::vector<std::uint8_t>&) const;
template Hash128 LetterTable::hash(const std::int32_t*, std::size_t, std::uint32_t, std::vector<std::uint8_t>&) const;

ClusterLines read_cluster_lines(const std::uint8_t* data, std::size_t size) {
    ClusterLines lines;
    const std::uint8_t* const end = data + size;
    for (std::int64_t number = 0; data != end; ++number) {
        const auto* const newline = static_cast<const std::uint8_t*>(std::memchr(data, '\n', end - data));
        const std::uint8_t* line_end = newline != nullptr ? newline : end;
        const std::uint8_t* const next = newline != nullptr ? newline + 1 : end;
        while (line_end != data && is_blank(line_end[-1])) --line_end;
        if (line_end != data) {
            const std::uint8_t* const tab = std::find(data, line_end, '\t');
            const std::uint8_t* const first_end = std::find_if(data, tab, is_blank);
            const std::uint8_t* const member = tab == line_end ? tab : tab + 1;
            const std::uint8_t* const second_end = std::find_if(member, line_end, is_blank);
            const bool third_column = std::find(member, line_end, '\t') != line_end;
            if (first_end == data || second_end == member || third_column) {
                lines.bad_line = number;
                return lines;
            }
            lines.representatives.push_back(hash_name(Span{data, first_end}));
            lines.members.push_back(hash_name(Span{member, second_end}));
        }
        data = next;
    }
    return lines;
}

}  // namespace megatron_plm
