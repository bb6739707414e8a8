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
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#include <sys/types.h>

namespace neo {

class ThreadPool {
  public:
    // num_threads: how many work on a job, the caller among them: one thread fewer is started.
    // cpus: the core of each started thread, or empty to let the system place them.
    // spin: how long an idle thread and a waiting caller poll before they sleep.
    ThreadPool(int num_threads, const std::vector<int> &cpus, std::chrono::microseconds spin);
    // Ends and joins the threads.
    ~ThreadPool();
    ThreadPool(const ThreadPool &) = delete;
    ThreadPool &operator=(const ThreadPool &) = delete;

    int size() const { return static_cast<int>(state_->threads.size()) + 1; }

    std::chrono::microseconds spin() const { return state_->spin.load(std::memory_order_relaxed); }
    // Takes effect when a thread next runs out of work.
    void set_spin(std::chrono::microseconds spin) {
        state_->spin.store(spin, std::memory_order_relaxed);
    }

    // Run body(0) ... body(count - 1) on the calling thread and the pool, in any order, and wait
    // for all. Waits for no thread that has not started on them: a sleeper costs nothing.
    // The first exception of a body is rethrown here; bodies not yet started are then dropped.
    // One caller at a time. Throws std::runtime_error in a forked child.
    void for_each(int64_t count, const std::function<void(int64_t)> &body);

  private:
    // On the heap, because a forked child, which has none of the threads, must abandon it whole:
    // destroying a condition variable waits for its sleepers.
    struct State {
        explicit State(std::chrono::microseconds spin) : spin(spin) {}
        void work(int cpu);
        void join_in();
        void drain() noexcept;

        std::atomic<std::chrono::microseconds> spin;
        std::vector<std::thread> threads;

        // The job; for_each writes it while `inside` is marked closed.
        const std::function<void(int64_t)> *body = nullptr;
        int64_t count = 0;
        std::exception_ptr error;
        std::mutex error_mutex;

        alignas(64) std::atomic<int64_t> next{0};
        alignas(64) std::atomic<uint32_t> generation{0};
        // Threads that may be reading the job, plus `closed` while there is none to read.
        static constexpr int closed = 1 << 30;
        alignas(64) std::atomic<int> inside{closed};
        std::atomic<bool> stop{false};
        std::mutex mutex;
        std::condition_variable wake;
        std::condition_variable finished;
    };

    const pid_t owner_;
    std::unique_ptr<State> state_;
};

} // namespace neo
