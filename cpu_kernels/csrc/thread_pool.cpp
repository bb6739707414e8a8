#include "thread_pool.h"

#include <new>
#include <stdexcept>

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
    : spin_(spin), owner_(getpid()) {
    threads_.reserve(num_threads);
    for (int i = 0; i < num_threads; i++)
        threads_.emplace_back(&ThreadPool::work, this, i,
                              cpus.empty() ? -1 : cpus[i % cpus.size()]);
}

ThreadPool::~ThreadPool() {
    if (getpid() != owner_) {
        // The handles name threads of the parent: neither join nor destroy them.
        new std::vector<std::thread>(std::move(threads_));
        return;
    }
    {
        std::lock_guard<std::mutex> lock(mutex_);
        stop_.store(true, std::memory_order_relaxed);
        generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    for (std::thread &thread : threads_)
        thread.join();
}

void ThreadPool::for_each(int64_t count, const std::function<void(int64_t)> &body) {
    if (getpid() != owner_)
        throw std::runtime_error("CPU attention was created before a fork and has no threads in "
                                 "this process; create it after forking");
    if (count <= 0)
        return;
    body_ = &body;
    count_ = count;
    error_ = nullptr;
    next_.store(0, std::memory_order_relaxed);
    busy_.store(size(), std::memory_order_relaxed);
    {
        std::lock_guard<std::mutex> lock(mutex_);
        generation_.fetch_add(1, std::memory_order_release);
    }
    wake_.notify_all();
    const auto done = [this] { return busy_.load(std::memory_order_acquire) == 0; };
    if (!poll(done)) {
        std::unique_lock<std::mutex> lock(mutex_);
        finished_.wait(lock, done);
    }
    if (error_)
        std::rethrow_exception(error_);
}

// True as soon as done() is, false if it still is not when spin_ has passed.
bool ThreadPool::poll(const std::function<bool()> &done) const {
    if (done())
        return true;
    const auto deadline = std::chrono::steady_clock::now() + spin_;
    while (std::chrono::steady_clock::now() < deadline)
        for (int i = 0; i < 16; i++) {
            if (done())
                return true;
            relax();
        }
    return done();
}

void ThreadPool::work(int thread, int cpu) {
    if (cpu >= 0)
        bind_to(cpu);
    const std::string name = "neo-attn-" + std::to_string(thread);
    pthread_setname_np(pthread_self(), name.c_str());
    uint32_t seen = 0;
    const auto called = [&] { return generation_.load(std::memory_order_acquire) != seen; };
    for (;;) {
        if (!poll(called)) {
            std::unique_lock<std::mutex> lock(mutex_);
            wake_.wait(lock, called);
        }
        seen++;
        if (stop_.load(std::memory_order_relaxed))
            return;
        drain();
        if (busy_.fetch_sub(1, std::memory_order_acq_rel) == 1) {
            // Taking the lock keeps the caller from missing the call between test and sleep.
            {
                std::lock_guard<std::mutex> lock(mutex_);
            }
            finished_.notify_one();
        }
    }
}

void ThreadPool::drain() noexcept {
    try {
        for (;;) {
            const int64_t i = next_.fetch_add(1, std::memory_order_relaxed);
            if (i >= count_)
                return;
            (*body_)(i);
        }
    } catch (...) {
        std::lock_guard<std::mutex> lock(error_mutex_);
        if (!error_)
            error_ = std::current_exception();
        next_.store(count_, std::memory_order_relaxed);
    }
}

} // namespace neo
