// Tables: fields between separators, quoted as RFC 4180 has it.

#include <cstring>

#include "lines.h"

namespace megatron_plm {

namespace {

struct Field {
    enum class End { separator, newline, data, stray_text, open_quote } end = End::data;
    Span text;             // without its quotes
    bool doubled = false;  // it holds quotes, each written twice
};

const std::uint8_t* find(Span text, std::uint8_t byte) {
    const void* const found = text.empty() ? nullptr : std::memchr(text.begin, byte, text.size());
    return found ? static_cast<const std::uint8_t*>(found) : text.end;
}

// The closing quote of a field whose text begins at text.begin, the end of `text` without one.
const std::uint8_t* closing_quote(Span text, bool& doubled) {
    for (;;) {
        const std::uint8_t* const quote = find(text, '"');
        if (text.end - quote < 2 || quote[1] != '"') return quote;
        doubled = true;
        text.begin = quote + 2;
    }
}

// Read the field at data.begin and stand behind what ended it.
Field next_field(Span& data, std::uint8_t separator) {
    Field field;
    if (!data.empty() && *data.begin == '"') {
        ++data.begin;
        field.text.begin = data.begin;
        field.text.end = data.begin = closing_quote(data, field.doubled);
        if (data.empty()) {
            field.end = Field::End::open_quote;
            return field;
        }
        ++data.begin;
        if (data.size() > 1 && data.begin[0] == '\r' && data.begin[1] == '\n') ++data.begin;
        if (data.size() == 1 && data.begin[0] == '\r') ++data.begin;
    } else {
        const std::uint8_t* stop = data.begin;
        while (stop < data.end && *stop != separator && *stop != '\n') ++stop;
        field.text = {data.begin, stop};
        data.begin = stop;
        if ((data.empty() || *stop == '\n') && !field.text.empty() && stop[-1] == '\r') --field.text.end;
    }
    if (data.empty()) return field;
    if (*data.begin != separator && *data.begin != '\n') {
        field.end = Field::End::stray_text;
        return field;
    }
    field.end = *data.begin == '\n' ? Field::End::newline : Field::End::separator;
    ++data.begin;
    return field;
}

const char* fault_of(Field::End end) {
    if (end == Field::End::open_quote) return "the quote that opens a field of this row is never closed";
    if (end == Field::End::stray_text) {
        return "text after the quote that closes a field (is a quote inside not doubled?)";
    }
    return nullptr;
}

std::string text_of(const Field& field) {
    std::string text(field.text.begin, field.text.end);
    if (!field.doubled) return text;
    for (std::size_t i = 0; (i = text.find("\"\"", i)) != std::string::npos; ++i) text.erase(i, 1);
    return text;
}

// Pass over line ends.
std::int64_t skip_blank_lines(Span& data) {
    std::int64_t num_lines = 0;
    for (;;) {
        const bool carriage_return = data.size() > 1 && data.begin[0] == '\r' && data.begin[1] == '\n';
        const std::uint8_t* const place = data.begin + (carriage_return ? 1 : 0);
        if (place == data.end || *place != '\n') return num_lines;
        data.begin = place + 1;
        ++num_lines;
    }
}

// What a row holds where the caller looks; the others are passed over.
struct Row {
    Field sequence, name;
    std::size_t num_fields = 0;
    const char* fault = nullptr;
};

Row read_row(Span& data, const Table& table) {
    Row row;
    for (;;) {
        const Field field = next_field(data, table.separator);
        if (row.num_fields == table.column) row.sequence = field;
        if (table.name_column == row.num_fields) row.name = field;
        ++row.num_fields;
        if (field.end == Field::End::separator) continue;
        row.fault = fault_of(field.end);
        return row;
    }
}

}  // namespace

RecordBlock scan_table(const Alphabet& alphabet, Span data, std::uint8_t* out, const Table& table) {
    RecordWriter writer(alphabet, out);
    std::int64_t line = skip_blank_lines(data);
    std::string text;
    const auto plain = [&text](const Field& field) -> Span {
        if (!field.doubled) return field.text;
        text = text_of(field);
        const auto* const begin = reinterpret_cast<const std::uint8_t*>(text.data());
        return {begin, begin + text.size()};
    };
    while (!data.empty() && !writer.failed()) {
        const std::uint8_t* const begin = data.begin;
        const Row row = read_row(data, table);
        if (row.fault) {
            writer.fail(line, row.fault);
        } else if (row.num_fields != table.num_columns) {
            writer.fail(line, "the row has " + std::to_string(row.num_fields) + " fields, the header " +
                                  std::to_string(table.num_columns));
        } else if (std::memchr(begin, '\0', static_cast<std::size_t>(data.begin - begin))) {
            writer.fail(line, printed(0) + " in the row: the file is damaged or not plain text");
        } else {
            writer.begin(line);
            writer.add(plain(row.sequence), line);
            writer.end();
            if (table.name_column && !writer.failed()) writer.name(plain(row.name));
        }
        line += count_lines({begin, data.begin}) + skip_blank_lines(data);
    }
    return writer.finish(line);
}

TableHeader read_table_header(Span data, std::uint8_t separator) {
    TableHeader header;
    const std::uint8_t* const begin = data.begin;
    const std::int64_t blank_lines = skip_blank_lines(data);
    while (!data.empty() || !header.fields.empty()) {
        const Field field = next_field(data, separator);
        header.fields.push_back(text_of(field));
        if (field.end == Field::End::separator) continue;
        if (const char* const fault = fault_of(field.end)) header.fault = fault;
        break;
    }
    header.size = static_cast<std::size_t>(data.begin - begin);
    header.num_lines = header.fault.empty() ? count_lines({begin, data.begin}) : blank_lines;
    return header;
}

// Only quotes tell whether a newline ends a row, and only where they open a field: from one to the next.
std::size_t last_row_end(Span data, std::uint8_t separator) {
    const std::uint8_t* const begin = data.begin;
    std::size_t end = 0;
    for (;;) {
        const std::uint8_t* const quote = find(data, '"');
        const std::size_t found = last_line_end(begin, static_cast<std::size_t>(quote - begin),
                                                static_cast<std::size_t>(data.begin - begin));
        if (found) end = found;
        if (quote == data.end) return end;
        const bool opens = quote == begin || quote[-1] == separator || quote[-1] == '\n';
        data.begin = quote + 1;
        if (!opens) continue;
        bool doubled = false;
        data.begin = closing_quote(data, doubled);
        if (data.empty()) return end;
        ++data.begin;
    }
}

}  // namespace megatron_plm
