// Hashes of records and tables of clusters.

#include "hashing.h"

#include <stdexcept>
#include <string>
#include <vector>

#include "letters.h"
#include "selection.h"
#include "target.h"

using namespace megatron_plm;

namespace {

// The hash of tokens is the hash of their letters; the counts are those of a loop. Both refuse ids out of range.
template <typename Token>
void check_tokens(const std::vector<std::string>& texts, const std::vector<Token>& tokens, std::uint32_t seed) {
    std::string letters;
    std::vector<std::uint64_t> expected(texts.size()), counts(texts.size());
    bool inside = true;
    for (const Token token : tokens) {
        inside = inside && token >= 0 && static_cast<std::size_t>(token) < texts.size();
        if (!inside) break;
        letters += texts[static_cast<std::size_t>(token)];
        ++expected[static_cast<std::size_t>(token)];
    }
    std::vector<std::uint8_t> scratch;
    try {
        const Hash128 found = LetterTable(texts).hash(tokens.data(), tokens.size(), seed, scratch);
        const std::vector<std::uint8_t> bytes(letters.begin(), letters.end());
        const Hash128 direct = murmur3_128(bytes.data(), bytes.size(), seed);
        PROMISE(inside && found.first == direct.first && found.second == direct.second);
    } catch (const std::out_of_range&) {
        PROMISE(!inside);
    }
    try {
        add_token_counts(tokens.data(), tokens.size(), counts.data(), counts.size());
        PROMISE(inside && counts == expected);
    } catch (const std::out_of_range&) {
        PROMISE(!inside);
    }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    const int width = input.byte() % 4;
    const auto seed = static_cast<std::uint32_t>(input.word());
    if (width == 3) {
        const std::vector<std::uint8_t> text(input.data(), input.data() + input.size());
        const ClusterLines lines = read_cluster_lines(text.data(), text.size());
        PROMISE(lines.representatives.size() == lines.members.size());
        PROMISE(lines.bad_line <= count_lines({text.data(), text.data() + text.size()}));
        return 0;
    }
    std::vector<std::string> texts(static_cast<std::size_t>(input.between(1, 30)), "A");
    const bool longer = input.byte() % 2 == 1;
    for (std::size_t i = 0; i < texts.size(); ++i) texts[i] = std::string(longer ? i % 4 : 1, static_cast<char>('A' + i % 26));
    std::vector<std::int32_t> tokens;
    while (input.size() > 0) {
        const std::uint8_t byte = input.byte();
        tokens.push_back(byte == 255 ? static_cast<std::int32_t>(input.word()) : byte % 31);
    }
    if (width == 0) check_tokens(texts, std::vector<std::uint8_t>(tokens.begin(), tokens.end()), seed);
    if (width == 1) check_tokens(texts, std::vector<std::uint16_t>(tokens.begin(), tokens.end()), seed);
    if (width == 2) check_tokens(texts, tokens, seed);
    return 0;
}
