#include "thread_pool.h"

#include <stdexcept>
#include <string>

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

namespace neo {

namespace {

void relax() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Best effort: a core that has been taken away since is no reason to fail.
void bind_to(int cpu) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET(cpu, &set);
    pthread_setaffinity_np(pthread_self(), sizeof(set), &set);
}

} // namespace

ThreadPool::ThreadPool(int num_threads, const std::vector<int> &cpus,
                       std::chrono::microseconds spin)
    : owner_(getpid()), state_(std::make_unique<State>(spin)) {
    state_->threads.reserve(num_threads);
    for (int i = 0; i < num_threads; i++) {
        const int cpu = cpus.empty() ? -1 : cpus[i % cpus.size()];
        std::thread &thread = state_->threads.emplace_back(&State::work, state_.get(), cpu);
        const std::string name = "neo-attn-" + std::to_string(i);
        pthread_setname_np(thread.native_handle(), name.c_str());
    }
}

ThreadPool::~ThreadPool() {
    if (getpid() != owner_) {
        static_cast<void>(state_.release());
        return;
    }
    {
        std::lock_guard<std::mutex> lock(state_->mutex);
        state_->stop.store(true, std::memory_order_relaxed);
        state_->generation.fetch_add(1, std::memory_order_release);
    }
    state_->wake.notify_all();
    for (std::thread &thread : state_->threads)
        thread.join();
}

void ThreadPool::for_each(int64_t count, const std::function<void(int64_t)> &body) {
    if (getpid() != owner_)
        throw std::runtime_error("CPU attention was created before a fork and has no threads in "
                                 "this process; create it after forking");
    if (count <= 0)
        return;
    State &state = *state_;
    state.body = &body;
    state.count = count;
    state.error = nullptr;
    state.next.store(0, std::memory_order_relaxed);
    state.busy.store(size(), std::memory_order_relaxed);
    {
        std::lock_guard<std::mutex> lock(state.mutex);
        state.generation.fetch_add(1, std::memory_order_release);
    }
    state.wake.notify_all();
    const auto done = [&] { return state.busy.load(std::memory_order_acquire) == 0; };
    if (!state.poll(done)) {
        std::unique_lock<std::mutex> lock(state.mutex);
        state.finished.wait(lock, done);
    }
    if (state.error)
        std::rethrow_exception(state.error);
}

// True as soon as done() is, false if it still is not when `spin` has passed.
template <typename Done> bool ThreadPool::State::poll(const Done &done) const {
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

void ThreadPool::State::work(int cpu) {
    if (cpu >= 0)
        bind_to(cpu);
    uint32_t seen = 0;
    const auto called = [&] { return generation.load(std::memory_order_acquire) != seen; };
    for (;;) {
        if (!poll(called)) {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, called);
        }
        seen++;
        if (stop.load(std::memory_order_relaxed))
            return;
        drain();
        if (busy.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            // Notified under the lock, so that the caller cannot return, and destroy the pool,
            // in between.
            std::lock_guard<std::mutex> lock(mutex);
            finished.notify_one();
        }
    }
}

void ThreadPool::State::drain() noexcept {
    try {
        for (;;) {
            const int64_t i = next.fetch_add(1, std::memory_order_relaxed);
            if (i >= count)
                return;
            (*body)(i);
        }
    } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex);
        if (!error)
            error = std::current_exception();
        next.store(count, std::memory_order_relaxed);
    }
}

} // namespace neo
