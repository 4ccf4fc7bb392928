// The scanners of sequence files: wherever a file is cut into blocks of whole records, the same records come out, or
// the same fault. A valid FASTA file also holds exactly what the definition of the format says.

#include <algorithm>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "fasta_block.h"
#include "lines.h"
#include "target.h"

using namespace megatron_plm;

namespace {

using Bytes = std::vector<std::uint8_t>;
using Scan = std::function<RecordBlock(const std::uint8_t* data, std::size_t size, std::uint8_t* out)>;
// One past the last whole record of a stretch, 0 where none ends in it.
using Cut = std::function<std::size_t(const std::uint8_t* data, std::size_t size)>;

struct Result {
    Bytes tokens;
    std::vector<std::int32_t> lengths;
    std::vector<Hash128> names;
    std::vector<std::string> identifiers;
    std::array<std::uint64_t, 256> byte_counts{};
    std::int64_t num_stops = 0, num_lines = 0;
    std::string fault;
    std::int64_t fault_line = 0;
};

// Add what `text` holds, scanned from and to memory of exactly its size.
void add(Result& result, const Scan& scan, const Bytes& text) {
    const Bytes data(text.begin(), text.end());
    Bytes out(data.size());
    const RecordBlock block = scan(data.data(), data.size(), out.data());
    PROMISE(block.num_tokens <= data.size());
    if (!block.fault.empty()) {
        result.fault = block.fault;
        result.fault_line = result.num_lines + block.fault_line;
        return;
    }
    std::uint64_t num_letters = 0, counted = 0;
    for (const std::int32_t length : block.lengths) {
        PROMISE(length > 0);
        num_letters += static_cast<std::uint64_t>(length);
    }
    for (std::size_t byte = 0; byte < 256; ++byte) {
        counted += block.byte_counts[byte];
        result.byte_counts[byte] += block.byte_counts[byte];
    }
    PROMISE(num_letters == block.num_tokens && counted == num_letters);
    result.tokens.insert(result.tokens.end(), out.begin(), out.begin() + static_cast<std::ptrdiff_t>(block.num_tokens));
    result.lengths.insert(result.lengths.end(), block.lengths.begin(), block.lengths.end());
    result.names.insert(result.names.end(), block.names.begin(), block.names.end());
    PROMISE(block.identifier_ends.size() == block.names.size());
    std::size_t begin = 0;
    for (const std::int64_t end : block.identifier_ends) {
        PROMISE(begin <= static_cast<std::size_t>(end) && static_cast<std::size_t>(end) <= block.identifiers.size());
        result.identifiers.push_back(block.identifiers.substr(begin, static_cast<std::size_t>(end) - begin));
        begin = static_cast<std::size_t>(end);
    }
    PROMISE(begin == block.identifiers.size());
    result.num_stops += block.num_stops;
    result.num_lines += block.num_lines;
}

// Read `text` in pieces of the sizes that `pieces` gives in turn, and scan as much as is whole.
Result scan_in_pieces(const Scan& scan, const Cut& cut, const Bytes& text, const std::vector<std::size_t>& pieces) {
    Result result;
    Bytes waiting;
    for (std::size_t begin = 0, turn = 0; begin < text.size() && result.fault.empty(); ++turn) {
        const std::size_t size = std::min(pieces[turn % pieces.size()], text.size() - begin);
        waiting.insert(waiting.end(), text.begin() + static_cast<std::ptrdiff_t>(begin),
                       text.begin() + static_cast<std::ptrdiff_t>(begin + size));
        begin += size;
        const Bytes exact(waiting.begin(), waiting.end());
        const std::size_t whole = cut(exact.data(), exact.size());
        PROMISE(whole <= exact.size());
        if (whole == 0) continue;
        add(result, scan, {waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(whole)});
        waiting.erase(waiting.begin(), waiting.begin() + static_cast<std::ptrdiff_t>(whole));
    }
    if (!waiting.empty() && result.fault.empty()) add(result, scan, waiting);
    return result;
}

void check_cuts(const Scan& scan, const Cut& cut, const Bytes& text, const std::vector<std::size_t>& pieces) {
    const Result whole = scan_in_pieces(scan, cut, text, {text.size() + 1});
    for (const auto& sizes : {pieces, std::vector<std::size_t>{1}}) {
        const Result cut_up = scan_in_pieces(scan, cut, text, sizes);
        PROMISE(cut_up.fault == whole.fault && cut_up.fault_line == whole.fault_line);
        if (!whole.fault.empty()) continue;
        PROMISE(cut_up.tokens == whole.tokens && cut_up.lengths == whole.lengths && cut_up.names == whole.names);
        PROMISE(cut_up.identifiers == whole.identifiers);
        PROMISE(cut_up.byte_counts == whole.byte_counts && cut_up.num_stops == whole.num_stops);
        PROMISE(cut_up.num_lines == whole.num_lines);
    }
}

// What a FASTA file holds where it is valid, line by line and letter by letter.
void check_fasta(const Alphabet& alphabet, const Scan& scan, const Bytes& text) {
    Result result;
    add(result, scan, text);
    if (!result.fault.empty()) return;
    std::vector<std::string> records;
    for (std::size_t begin = 0; begin < text.size();) {
        const auto end = static_cast<std::size_t>(std::find(text.begin() + static_cast<std::ptrdiff_t>(begin),
                                                            text.end(), '\n') - text.begin());
        if (text[begin] == '>') records.emplace_back();
        for (std::size_t i = begin; i < end && text[begin] != '>' && text[begin] != ';'; ++i) {
            if (text[i] == ' ' || text[i] == '\t' || text[i] == '\r') continue;
            PROMISE(!records.empty() && text[i] > 0x20 && text[i] < 0x7f && text[i] != '>');
            records.back() += static_cast<char>(text[i]);
        }
        begin = end + 1;
    }
    Bytes tokens;
    PROMISE(records.size() == result.lengths.size());
    for (std::size_t i = 0; i < records.size(); ++i) {
        std::string& record = records[i];
        if (!record.empty() && record.back() == '*') record.pop_back();
        PROMISE(static_cast<std::size_t>(result.lengths[i]) == record.size());
        for (const char letter : record) tokens.push_back(alphabet.token_of_byte[static_cast<std::uint8_t>(letter)]);
    }
    PROMISE(tokens == result.tokens);
    PROMISE(!alphabet.strict || std::find(tokens.begin(), tokens.end(), alphabet.unknown_token) == tokens.end());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
    Input input(data, size);
    const int format = input.byte() % 5;
    Alphabet alphabet{{}, 3, input.byte() % 2 == 1};
    alphabet.token_of_byte.fill(3);
    for (const char letter : std::string("ACDEFGHIKLMNPQRSTVWY")) {
        alphabet.token_of_byte[static_cast<std::uint8_t>(letter)] = static_cast<std::uint8_t>(letter - 'A' + 4);
    }
    const bool with_names = input.byte() % 2 == 1;
    std::vector<std::size_t> pieces(3);
    for (std::size_t& piece : pieces) piece = 1 + input.byte() % 40;
    Bytes text(input.data(), input.data() + input.size());

    const Cut at_line = [](const std::uint8_t* begin, std::size_t length) { return last_line_end(begin, length, 0); };
    if (format == 0) {
        const Scan scan = [&](auto* begin, auto length, auto* out) {
            return scan_fasta(alphabet, begin, length, out, with_names);
        };
        check_cuts(scan, [](auto* begin, auto length) { return last_record_start(begin, length, 0); }, text, pieces);
        check_fasta(alphabet, scan, text);
    } else if (format == 1) {
        const Scan scan = [&](auto* begin, auto length, auto* out) {
            return scan_text(alphabet, {begin, begin + length}, out);
        };
        check_cuts(scan, at_line, text, pieces);
    } else if (format == 2) {
        const auto name_key = with_names ? std::optional<std::string>("id") : std::nullopt;
        const Scan scan = [&](auto* begin, auto length, auto* out) {
            return scan_json_lines(alphabet, {begin, begin + length}, out, "s", name_key);
        };
        check_cuts(scan, at_line, text, pieces);
    } else {
        const std::uint8_t separator = format == 3 ? ',' : '\t';
        const TableHeader header = read_table_header({text.data(), text.data() + text.size()}, separator);
        PROMISE(header.size <= text.size());
        if (!header.fault.empty() || header.fields.empty()) return 0;
        text.erase(text.begin(), text.begin() + static_cast<std::ptrdiff_t>(header.size));
        const Table table{separator, header.fields.size(), header.fields.size() - 1,
                          with_names ? std::optional<std::size_t>(0) : std::nullopt};
        const Scan scan = [&](auto* begin, auto length, auto* out) {
            return scan_table(alphabet, {begin, begin + length}, out, table);
        };
        const Cut cut = [&](auto* begin, auto length) { return last_row_end({begin, begin + length}, separator); };
        check_cuts(scan, cut, text, pieces);
    }
    return 0;
}
