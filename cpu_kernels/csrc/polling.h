// Waiting for a word in memory, and the core to do it on.
#pragma once

#include <chrono>
#include <thread>

#include <pthread.h>
#include <sched.h>

namespace neo {

inline void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Best effort: a core that has been taken away since is no reason to fail. Negative: any core.
inline void bind_to(int cpu) {
    if (cpu < 0)
        return;
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

// True as soon as done() is, false if it still is not when `spin` has passed.
template <typename Done> bool spin_until(const Done &done, std::chrono::microseconds spin) {
    if (done())
        return true;
    const auto deadline = std::chrono::steady_clock::now() + spin;
    while (std::chrono::steady_clock::now() < deadline)
        for (int i = 0; i < 16; i++) {
            if (done())
                return true;
            relax();
        }
    return done();
}

// Return as soon as done() is true: spin, then for ten times as long offer the core to others
// between looks, then sleep between them. The last phase is for waits so long that 0.1 ms no longer
// matter, and for those who must not spin.
template <typename Done> void poll_until(const Done &done, std::chrono::microseconds spin) {
    constexpr std::chrono::microseconds nap(50);
    if (spin_until(done, spin))
        return;
    const auto deadline = std::chrono::steady_clock::now() + 10 * spin;
    while (std::chrono::steady_clock::now() < deadline) {
        sched_yield();
        if (done())
            return;
    }
    while (!done())
        std::this_thread::sleep_for(nap);
}

} // namespace neo
