// The order in which services that share threads serve their steps.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <set>

namespace neo {

// Steps are served one after the other, in the order in which they were begun. Without it the
// threads would go to whichever service asks first: a later step's rows would be answered before an
// earlier step's last ones, which the device needs sooner.
class StepQueue {
  public:
    // Returns a new step's place, behind all others.
    uint64_t join() {
        std::lock_guard<std::mutex> lock(mutex_);
        return end_++;
    }

    // Wait until all steps before it have left, or given_up() is true after wake() was called.
    void wait(uint64_t place, const std::function<bool()> &given_up) {
        std::unique_lock<std::mutex> lock(mutex_);
        moved_.wait(lock, [&] { return first_ == place || given_up(); });
    }

    // A step is over, whether its turn has come or not.
    void leave(uint64_t place) {
        std::lock_guard<std::mutex> lock(mutex_);
        left_.insert(place);
        while (left_.erase(first_) > 0)
            first_++;
        moved_.notify_all();
    }

    void wake() {
        std::lock_guard<std::mutex> lock(mutex_);
        moved_.notify_all();
    }

    // When something last happened in a step, ns: those behind it are not to blame for its time.
    std::atomic<int64_t> progress{0};

  private:
    std::mutex mutex_;
    std::condition_variable moved_;
    uint64_t first_ = 0;
    uint64_t end_ = 0;
    std::set<uint64_t> left_; // those after first_
};

} // namespace neo
