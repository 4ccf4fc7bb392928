// Fuzzing without libFuzzer: mutates inputs and keeps those that reach new code (GCC's -fsanitize-coverage=trace-pc).
//
//   TARGET SEED INPUTS SECONDS KEEP FILE...
//
// Runs each FILE, then mutations of what is kept, until INPUTS were run or SECONDS have passed. An input that breaks a
// promise, trips a sanitizer or takes longer than 20 seconds is written to KEEP; `TARGET 0 0 0 KEEP FILE` runs one again.

#include <fcntl.h>
#include <sanitizer/common_interface_defs.h>
#include <unistd.h>

#include <algorithm>
#include <bitset>
#include <csignal>
#include <chrono>
#include <fstream>
#include <iterator>
#include <random>
#include <vector>

#include "target.h"

namespace {

using Bytes = std::vector<std::uint8_t>;

std::bitset<1 << 16> seen;
std::size_t num_seen = 0;
std::uintptr_t previous = 0;

constexpr unsigned max_seconds = 20;  // of one input

// The input under way, for the handlers below.
const std::uint8_t* current = nullptr;
std::size_t current_size = 0;
const char* keep = nullptr;

void keep_current() {
    const int file = open(keep, O_WRONLY | O_CREAT | O_TRUNC, 0666);
    if (file < 0 || write(file, current, current_size) != static_cast<ssize_t>(current_size)) {
        std::fprintf(stderr, "%s cannot be written\n", keep);
    }
}

void on_abort(int) { keep_current(); }

void on_alarm(int) {
    std::fprintf(stderr, "an input took longer than %u s\n", max_seconds);
    std::abort();
}

class Mutator {
public:
    explicit Mutator(std::uint64_t seed) : random_(seed) {}

    std::size_t below(std::size_t size) { return std::uniform_int_distribution<std::size_t>(0, size - 1)(random_); }

    Bytes mutate(const std::vector<Bytes>& corpus) {
        Bytes bytes = corpus[below(corpus.size())];
        for (std::size_t left = 1 + below(6); left > 0; --left) change(bytes, corpus[below(corpus.size())]);
        if (bytes.size() > longest) bytes.resize(longest);
        return bytes;
    }

private:
    void change(Bytes& bytes, const Bytes& other) {
        const std::size_t place = below(bytes.size() + 1);
        const auto at = bytes.begin() + static_cast<std::ptrdiff_t>(place);
        switch (below(6)) {
            case 0: bytes.insert(at, 1 + below(8), interesting()); break;
            case 1: if (at != bytes.end()) *at = interesting(); break;
            case 2: if (at != bytes.end()) *at ^= static_cast<std::uint8_t>(1u << below(8)); break;
            case 3: bytes.erase(at, at + static_cast<std::ptrdiff_t>(below(bytes.size() - place + 1))); break;
            case 4: {
                const std::size_t begin = below(other.size() + 1), size = below(other.size() - begin + 1);
                const Bytes part(other.begin() + static_cast<std::ptrdiff_t>(begin),
                                 other.begin() + static_cast<std::ptrdiff_t>(begin + size));
                bytes.insert(at, part.begin(), part.end());
                break;
            }
            default:
                for (std::size_t i = place; i < std::min(place + 8, bytes.size()); ++i) bytes[i] = interesting();
        }
    }

    std::uint8_t interesting() {
        static const char text[] = "\n\n\n>>;\r \t*-JXMKL\x00\x01\x7f\x80\xff";
        return below(3) ? static_cast<std::uint8_t>(text[below(sizeof text - 1)]) : static_cast<std::uint8_t>(below(256));
    }

    static constexpr std::size_t longest = 4096;
    std::mt19937_64 random_;
};

class Engine {
public:
    explicit Engine(std::uint64_t seed) : mutator_(seed) {}

    void run(const Bytes& bytes) {
        const std::size_t before = num_seen;
        // An exact copy on the heap, so that AddressSanitizer sees a read of one byte more.
        const Bytes exact(bytes.begin(), bytes.end());
        current = exact.data();
        current_size = exact.size();
        alarm(max_seconds);
        LLVMFuzzerTestOneInput(exact.data(), exact.size());
        ++num_run_;
        if (num_seen > before || corpus_.empty()) corpus_.push_back(bytes);
    }

    void mutate() { run(mutator_.mutate(corpus_)); }

    std::size_t num_run() const { return num_run_; }
    std::size_t num_kept() const { return corpus_.size(); }

private:
    Mutator mutator_;
    std::vector<Bytes> corpus_;
    std::size_t num_run_ = 0;
};

}  // namespace

// Called at every branch of the code under test: one bit for each pair of places that followed one another.
extern "C" void __sanitizer_cov_trace_pc() {
    const auto place = reinterpret_cast<std::uintptr_t>(__builtin_return_address(0));
    const std::size_t edge = (place ^ previous * 31) % seen.size();
    previous = place;
    if (!seen[edge]) {
        seen[edge] = true;
        ++num_seen;
    }
}

int main(int argc, char** argv) {
    if (argc < 5) {
        std::fprintf(stderr, "usage: %s SEED INPUTS SECONDS KEEP [FILE...]\n", argv[0]);
        return 2;
    }
    const auto max_inputs = std::strtoull(argv[2], nullptr, 10);
    const auto end = std::chrono::steady_clock::now() + std::chrono::seconds(std::strtoull(argv[3], nullptr, 10));
    keep = argv[4];
    std::signal(SIGABRT, on_abort);
    std::signal(SIGALRM, on_alarm);
    __sanitizer_set_death_callback(keep_current);
    Engine engine(std::strtoull(argv[1], nullptr, 10));
    engine.run({});
    for (int i = 5; i < argc; ++i) {
        std::ifstream file(argv[i], std::ios::binary);
        if (!file) {
            std::fprintf(stderr, "%s cannot be read\n", argv[i]);
            return 2;
        }
        engine.run(Bytes(std::istreambuf_iterator<char>(file), {}));
    }
    while (engine.num_run() < max_inputs && std::chrono::steady_clock::now() < end) engine.mutate();
    std::printf("%zu inputs, %zu reached new code, %zu edges\n", engine.num_run(), engine.num_kept(), num_seen);
    return 0;
}
