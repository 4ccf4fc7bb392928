// Work shared out to the threads that torch uses.

#pragma once

#include <cstdint>

namespace megatron_plm {

// Calls work(context, i) for every i below `tasks`, from so many threads, each taking the next that none has taken.
//
// The threads are those of torch's own OpenMP runtime, which wait for work by spinning for a while: a second pool beside
// it would have to share the cores with them. Where torch brings none, threads are started anew. What work throws first is
// thrown here, when all threads have stopped.
void share_out(std::int64_t tasks, int threads, void (*work)(void* context, std::int64_t task), void* context);

// The same of a function object: work(i).
template <typename Work>
void share_out(std::int64_t tasks, int threads, const Work& work) {
    const auto run = [](void* context, std::int64_t task) { (*static_cast<const Work*>(context))(task); };
    share_out(tasks, threads, run, const_cast<Work*>(&work));
}

// Which runtime that is: "OpenMP", or "threads of its own".
const char* thread_pool();

}  // namespace megatron_plm
