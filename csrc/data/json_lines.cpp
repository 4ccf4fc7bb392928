// JSON lines: every line is checked to be an object, and the value of one or two of its keys is found.

#include <array>

#include "line_walk.h"
#include "lines.h"

namespace megatron_plm {

namespace {

constexpr int max_depth = 500;  // of lists and objects in each other; deeper ones are refused

bool is_digit(std::uint8_t byte) { return byte >= '0' && byte <= '9'; }

// What a string may hold unescaped, but for its end.
const std::array<bool, 256> plain_in_string = [] {
    std::array<bool, 256> plain{};
    for (std::size_t byte = 0x20; byte < 256; ++byte) plain[byte] = byte != '"' && byte != '\\';
    return plain;
}();

struct Value {
    enum class Kind { missing, string, number, other } kind = Kind::missing;
    Span text;             // of a string: between its quotes
    bool escaped = false;  // the string holds backslashes
};

int hex_value(std::uint8_t byte) {
    if (is_digit(byte)) return byte - '0';
    const int letter = byte | 0x20;
    return letter >= 'a' && letter <= 'f' ? letter - 'a' + 10 : -1;
}

void append_utf8(std::string& text, unsigned code) {
    if (code < 0x80) {
        text += static_cast<char>(code);
    } else if (code < 0x800) {
        text += static_cast<char>(0xc0 | (code >> 6));
        text += static_cast<char>(0x80 | (code & 0x3f));
    } else if (code < 0x10000) {
        text += static_cast<char>(0xe0 | (code >> 12));
        text += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
        text += static_cast<char>(0x80 | (code & 0x3f));
    } else {
        text += static_cast<char>(0xf0 | (code >> 18));
        text += static_cast<char>(0x80 | ((code >> 12) & 0x3f));
        text += static_cast<char>(0x80 | ((code >> 6) & 0x3f));
        text += static_cast<char>(0x80 | (code & 0x3f));
    }
}

unsigned hex_code(const std::uint8_t* digits) {
    unsigned code = 0;
    for (int i = 0; i < 4; ++i) code = code * 16 + static_cast<unsigned>(hex_value(digits[i]));
    return code;
}

// The UTF-8 text of a string that was checked before.
std::string unescaped(Span text) {
    std::string result;
    for (const std::uint8_t* byte = text.begin; byte < text.end; ++byte) {
        if (*byte != '\\') {
            result += static_cast<char>(*byte);
            continue;
        }
        ++byte;
        switch (*byte) {
            case 'b': result += '\b'; break;
            case 'f': result += '\f'; break;
            case 'n': result += '\n'; break;
            case 'r': result += '\r'; break;
            case 't': result += '\t'; break;
            case 'u': {
                unsigned code = hex_code(byte + 1);
                byte += 4;
                const bool pair = code >= 0xd800 && code < 0xdc00 && text.end - byte > 6 && byte[1] == '\\' &&
                                  byte[2] == 'u';
                const unsigned low = pair ? hex_code(byte + 3) : 0;
                if (low >= 0xdc00 && low < 0xe000) {
                    code = 0x10000 + ((code - 0xd800) << 10) + (low - 0xdc00);
                    byte += 6;
                }
                append_utf8(result, code);
                break;
            }
            default: result += static_cast<char>(*byte);
        }
    }
    return result;
}

// Reads one line; every method returns whether the line is still good JSON, and stands behind what it read then.
class Parser {
public:
    Parser(Span line, const std::string& key, const std::string* name_key)
        : at_(line.begin), end_(line.end), key_(key), name_key_(name_key) {}

    bool line() {
        skip_space();
        if (!object(0)) return false;
        skip_space();
        return at_ == end_;
    }

    const Value& sequence() const { return sequence_; }
    const Value& name() const { return name_; }

private:
    void skip_space() {
        while (at_ < end_ && (*at_ == ' ' || *at_ == '\t' || *at_ == '\r')) ++at_;
    }

    bool take(std::uint8_t byte) {
        if (at_ == end_ || *at_ != byte) return false;
        ++at_;
        return true;
    }

    bool object(int depth) {
        if (depth == max_depth || !take('{')) return false;
        skip_space();
        if (take('}')) return true;
        do {
            Value key, found;
            skip_space();
            if (!string(key)) return false;
            skip_space();
            if (!take(':')) return false;
            skip_space();
            if (!value(found, depth + 1)) return false;
            if (depth == 0 && is(key, key_)) sequence_ = found;
            if (depth == 0 && name_key_ && is(key, *name_key_)) name_ = found;
            skip_space();
        } while (take(','));
        return take('}');
    }

    bool list(int depth) {
        if (depth == max_depth || !take('[')) return false;
        skip_space();
        if (take(']')) return true;
        do {
            Value item;
            skip_space();
            if (!value(item, depth + 1)) return false;
            skip_space();
        } while (take(','));
        return take(']');
    }

    bool value(Value& found, int depth) {
        if (at_ == end_) return false;
        found.kind = Value::Kind::other;
        switch (*at_) {
            case '"': return string(found);
            case '{': return object(depth);
            case '[': return list(depth);
            case 't': return word("true");
            case 'f': return word("false");
            case 'n': return word("null");
            // Python's json writes and reads these three.
            case 'N': return word("NaN");
            case 'I': return word("Infinity");
            default: return (*at_ == '-' && word("-Infinity")) || number(found);
        }
    }

    bool word(const char* text) {
        const std::size_t size = std::strlen(text);
        if (static_cast<std::size_t>(end_ - at_) < size || std::memcmp(at_, text, size) != 0) return false;
        at_ += size;
        return true;
    }

    bool digits() {
        if (at_ == end_ || !is_digit(*at_)) return false;
        while (at_ < end_ && is_digit(*at_)) ++at_;
        return true;
    }

    bool number(Value& found) {
        found.kind = Value::Kind::number;
        found.text.begin = at_;
        take('-');
        if (!take('0') && !digits()) return false;
        if (take('.') && !digits()) return false;
        if (take('e') || take('E')) {
            if (!take('+')) take('-');
            if (!digits()) return false;
        }
        found.text.end = at_;
        return true;
    }

    bool string(Value& found) {
        if (!take('"')) return false;
        found.kind = Value::Kind::string;
        found.text.begin = at_;
        for (;;) {
            while (at_ < end_ && plain_in_string[*at_]) ++at_;
            found.text.end = at_;
            if (take('"')) return true;
            if (!take('\\')) return false;  // the line's end, or a control character
            found.escaped = true;
            if (take('u')) {
                for (int i = 0; i < 4; ++i) {
                    if (at_ == end_ || hex_value(*at_++) < 0) return false;
                }
            } else if (at_ == end_ || *at_ == 0 || !std::strchr("\"\\/bfnrt", *at_++)) {
                return false;
            }
        }
    }

    static bool is(const Value& key, const std::string& wanted) {
        if (key.escaped) return unescaped(key.text) == wanted;
        return key.text.size() == wanted.size() && std::memcmp(key.text.begin, wanted.data(), wanted.size()) == 0;
    }

    const std::uint8_t* at_;
    const std::uint8_t* const end_;
    const std::string& key_;
    const std::string* const name_key_;
    Value sequence_, name_;
};

Span span_of(const std::string& text) {
    const auto* const begin = reinterpret_cast<const std::uint8_t*>(text.data());
    return {begin, begin + text.size()};
}

}  // namespace

RecordBlock scan_json_lines(const Alphabet& alphabet, Span data, std::uint8_t* out, const std::string& key,
                            const std::optional<std::string>& name_key) {
    RecordWriter writer(alphabet, out);
    const std::int64_t num_lines = for_each_line(data, writer, [&](Span line, std::int64_t number) {
        Parser parser(line, key, name_key ? &*name_key : nullptr);
        if (!parser.line()) {
            writer.fail(number, "not a JSON object: expected one a line, as {\"" + key + "\": \"MKV\"}");
            return;
        }
        const Value& sequence = parser.sequence();
        if (sequence.kind != Value::Kind::string) {
            const bool missing = sequence.kind == Value::Kind::missing;
            writer.fail(number, missing ? "the object has no key '" + key + "': name the sequence's with --json-key"
                                        : "the value of '" + key + "' is not a string");
            return;
        }
        writer.begin(number);
        writer.add(sequence.escaped ? span_of(unescaped(sequence.text)) : sequence.text, number);
        writer.end();
        if (!name_key || writer.failed()) return;
        const Value& name = parser.name();
        if (name.kind == Value::Kind::string || name.kind == Value::Kind::number) {
            writer.name(name.escaped ? span_of(unescaped(name.text)) : name.text);
        } else {
            writer.fail(number, "the record's name, the value of '" + *name_key + "', is not a string or a number");
        }
    });
    return writer.finish(num_lines);
}

}  // namespace megatron_plm
