// Hashes of whole records: the same letters give the same hash, whatever the ids of the tokens that stand for them.

#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace megatron_plm {

struct Hash128 {
    std::uint64_t first, second;  // h1 and h2 of the published algorithm

    bool operator==(const Hash128& other) const { return first == other.first && second == other.second; }
};

// MurmurHash3_x64_128, Austin Appleby's public-domain algorithm, on any host byte order as on a little-endian one.
Hash128 murmur3_128(const std::uint8_t* data, std::size_t size, std::uint32_t seed);

// The letters that each token id stands for.
class LetterTable {
public:
    explicit LetterTable(const std::vector<std::string>& texts);

    // Hash the letters of `size` tokens; `scratch` saves allocations from call to call. Throws std::out_of_range for
    // an id outside the table.
    template <typename Token>
    Hash128 hash(const Token* tokens, std::size_t size, std::uint32_t seed, std::vector<std::uint8_t>& scratch) const;

private:
    std::vector<std::uint8_t> bytes_;    // all texts, end to end
    std::vector<std::size_t> offsets_;   // where each begins, and the end
    std::vector<std::uint8_t> letter_;   // the one letter of each, where every text has one; else empty
};

// Hashes (hash_name of letters.h) of the two names on each line of a table of clusters: representative, tab, member.
struct ClusterLines {
    std::vector<Hash128> representatives, members;
    std::int64_t bad_line = -1;  // newlines before the first line that is neither empty nor of two names; -1: none
};

// Read `size` bytes of whole lines; stops at a bad one. A name ends at its first blank; "\r\n" ends a line too.
ClusterLines read_cluster_lines(const std::uint8_t* data, std::size_t size);

}  // namespace megatron_plm
