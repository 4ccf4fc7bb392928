#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

namespace megatron_plm {

namespace {

// The entry point of GCC's and LLVM's runtimes: runs `body` once in each thread of a team.
using Parallel = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// torch loads its runtime for all to see.
Parallel openmp() {
    static const auto found = reinterpret_cast<Parallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
    return found;
}

struct Job {
    std::int64_t tasks;
    void (*work)(void*, std::int64_t);
    void* context;
    std::atomic<std::int64_t> next{0};
    std::atomic<bool> failed{false};
    std::exception_ptr error{};  // the first one, which ends the rest

    // An exception that left a thread would end the program.
    void run() {
        try {
            for (std::int64_t task = next++; task < tasks && !failed; task = next++) work(context, task);
        } catch (...) {
            if (!failed.exchange(true)) error = std::current_exception();
        }
    }
};

void run_job(void* job) { static_cast<Job*>(job)->run(); }

}  // namespace

void share_out(std::int64_t tasks, int threads, void (*work)(void*, std::int64_t), void* context) {
    Job job{tasks, work, context};
    if (threads <= 1 || tasks <= 1) {
        job.run();
    } else if (openmp()) {
        // Always all threads: a team of another size than the last one is put together anew.
        openmp()(&run_job, &job, static_cast<unsigned>(threads), 0);
    } else {
        std::vector<std::thread> others;
        others.reserve(threads);
        try {
            for (int i = 1; i < threads && i < tasks; ++i) others.emplace_back(&Job::run, &job);
        } catch (const std::system_error&) {
            // The system has no more threads: those that are there do all.
        }
        job.run();
        for (std::thread& other : others) other.join();
    }
    if (job.error) std::rethrow_exception(job.error);
}

const char* thread_pool() { return openmp() ? "OpenMP" : "threads of its own"; }

}  // namespace megatron_plm
