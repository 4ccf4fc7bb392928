// What every fuzz target shares: the entry that libFuzzer and engine.cpp call, and reading values from the input.

#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);

// A promise that must hold for every input. An abort, so that the engine keeps the input that broke it.
#define PROMISE(condition)                                                                     \
    do {                                                                                       \
        if (!(condition)) {                                                                    \
            std::fprintf(stderr, "%s:%d: broken promise: %s\n", __FILE__, __LINE__, #condition); \
            std::abort();                                                                      \
        }                                                                                      \
    } while (false)

// Consumes the input from its front; gives zeros at its end.
class Input {
public:
    Input(const std::uint8_t* data, std::size_t size) : data_(data), end_(data + size) {}

    std::uint8_t byte() { return data_ < end_ ? *data_++ : 0; }

    std::uint64_t word() {
        std::uint64_t value = 0;
        for (int i = 0; i < 8; ++i) value = value << 8 | byte();
        return value;
    }

    // In [low, high].
    std::int64_t between(std::int64_t low, std::int64_t high) {
        const auto range = static_cast<std::uint64_t>(high - low) + 1;
        const std::uint64_t value = std::uint64_t{byte()} << 8 | byte();
        return low + static_cast<std::int64_t>(value % range);
    }

    const std::uint8_t* data() const { return data_; }
    std::size_t size() const { return static_cast<std::size_t>(end_ - data_); }

private:
    const std::uint8_t* data_;
    const std::uint8_t* const end_;
};
