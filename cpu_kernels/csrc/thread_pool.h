// A persistent pool of threads, each bound to one core.
//
// Made once and kept: starting a team for every call costs more than a small attention batch.
// Knows nothing of Python or of attention.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include <sys/types.h>

namespace neo {

class ThreadPool {
  public:
    // cpus: the core of each thread, or empty to let the system place them.
    // spin: how long an idle thread and a waiting caller poll before they sleep.
    ThreadPool(int num_threads, const std::vector<int> &cpus, std::chrono::microseconds spin);
    // Ends and joins the threads. After a fork the child has none, and drops their handles.
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    int size() const { return static_cast<int>(threads_.size()); }

    // Run body(0) ... body(count - 1) on the pool, in any order, and wait for all.
    // The first exception of a body is rethrown here; bodies not yet started are then dropped.
    // One caller at a time. Throws std::runtime_error in a forked child.
    void for_each(int64_t count, const std::function<void(int64_t)> &body);

  private:
    void work(int thread, int cpu);
    void drain() noexcept;
    bool poll(const std::function<bool()> &done) const;

    const std::chrono::microseconds spin_;
    const pid_t owner_;
    std::vector<std::thread> threads_;

    // The job; written by for_each before generation_ announces it.
    const std::function<void(int64_t)> *body_ = nullptr;
    int64_t count_ = 0;
    std::exception_ptr error_;
    std::mutex error_mutex_;

    alignas(64) std::atomic<int64_t> next_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<int> busy_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::condition_variable finished_;
};

} // namespace neo
