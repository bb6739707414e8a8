#include "thread_pool.h"

#include <stdexcept>
#include <string>

#include <pthread.h>
#include <unistd.h>

#include "polling.h"

namespace neo {

ThreadPool::ThreadPool(int num_threads, const std::vector<int> &cpus,
                       std::chrono::microseconds spin)
    : owner_(getpid()), state_(std::make_unique<State>(spin)) {
    state_->threads.reserve(num_threads);
    for (int i = 0; i + 1 < num_threads; i++) {
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
    State &state = *state_;
    if (count <= 1 || state.threads.empty()) {
        for (int64_t i = 0; i < count; i++)
            body(i);
        return;
    }
    state.body = &body;
    state.count = count;
    state.error = nullptr;
    state.next.store(0, std::memory_order_relaxed);
    state.inside.fetch_sub(State::closed, std::memory_order_acq_rel);
    {
        std::lock_guard<std::mutex> lock(state.mutex);
        state.generation.fetch_add(1, std::memory_order_release);
    }
    state.wake.notify_all();
    state.drain();
    state.inside.fetch_add(State::closed, std::memory_order_acq_rel);
    const auto done = [&] { return state.inside.load(std::memory_order_acquire) == State::closed; };
    if (!spin_until(done, spin())) {
        std::unique_lock<std::mutex> lock(state.mutex);
        state.finished.wait(lock, done);
    }
    if (state.error)
        std::rethrow_exception(state.error);
}

void ThreadPool::State::work(int cpu) {
    bind_to(cpu);
    uint32_t seen = 0;
    const auto called = [&] { return generation.load(std::memory_order_acquire) != seen; };
    for (;;) {
        if (!spin_until(called, spin.load(std::memory_order_relaxed))) {
            std::unique_lock<std::mutex> lock(mutex);
            wake.wait(lock, called);
        }
        seen = generation.load(std::memory_order_acquire);
        if (stop.load(std::memory_order_relaxed))
            return;
        join_in();
    }
}

// Work on the job there is, if there is one: who comes late finds it closed, or the next one.
void ThreadPool::State::join_in() {
    if (inside.fetch_add(1, std::memory_order_acq_rel) < closed)
        drain();
    if (inside.fetch_sub(1, std::memory_order_acq_rel) == closed + 1) {
        // Under the lock, or it could fall between the caller's last look and its sleep.
        std::lock_guard<std::mutex> lock(mutex);
        finished.notify_one();
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
