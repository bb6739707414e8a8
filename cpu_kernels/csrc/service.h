// The attention service: answers a whole step's decode attention through doorbells.
//
// For each layer, and in it for each lane, a thread of its own waits for the request bell, computes
// and rings the answer bell, once earlier steps of the same queue are done. A second thread watches
// that something happens. Whatever goes wrong, every wait of the step is released: its last ticket
// is rung on all answer bells.
//
// Free of Python and of the kernels: what computes is passed in.
#pragma once

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include <sys/types.h>

#include "bells.h"
#include "step.h"
#include "step_queue.h"

namespace neo {

// A step failed, or the service was called out of turn.
class ServiceError : public std::runtime_error {
    using std::runtime_error::runtime_error;
};

// What a service computes with. prepare is called in begin_step for layer 0 of each lane and
// may refuse the step by throwing; compute is called for every layer on the service's thread, with
// `turn` held: others who use the same threads take it too, and so get in between layers.
struct LaneAttention {
    std::function<void(int lane, const DecodeBatch &)> prepare;
    std::function<void(int lane, const DecodeBatch &)> compute;
    std::mutex *turn;
};

struct ServiceOptions {
    std::chrono::duration<double> timeout; // without a ring or an answer the step fails
    std::chrono::microseconds spin;        // how long a wait polls without yielding the core
    int cpu = -1;                          // of the service's thread, or -1 for any
    // Whose steps wait for one another; by default the service's own alone.
    std::shared_ptr<StepQueue> queue = std::make_shared<StepQueue>();
};

// Every function may be called from any thread. In a forked child all throw ServiceError.
class Service {
  public:
    // Tickets count on from what the request bells hold; answer bells are set to the same.
    Service(const ServiceShape &shape, Bells bells, LaneAttention attention,
            const ServiceOptions &options);
    // Gives up an open step; waits until attention has left its memory, however long.
    ~Service();
    Service(const Service &) = delete;
    Service &operator=(const Service &) = delete;

    // The memory that step and shape point to stays valid until end_step or close returns or, if
    // that says that attention is still running, until a later begin_step or close returns.
    // Throws ServiceError if a step is open, if a failed one still computes after the timeout,
    // and what prepare throws; nothing has changed then.
    void begin_step(Step step);

    // Of layer 0 of the step begun last.
    uint32_t first_ticket(int lane) const;

    // The device's side of the bells where the device is a CPU.
    void ring(int lane, uint32_t ticket);
    void wait(int lane, uint32_t ticket);

    // Wait until the step is served. limit: give the step up then, whatever the timeout.
    // Throws ServiceError if it failed. The step is no longer open, either way.
    StepReport end_step(std::optional<std::chrono::duration<double>> limit);

    // Give the open step up, if there is one.
    void abort_step(const std::string &reason);

    // Give up an open step and end the threads; a second call does nothing.
    // Throws ServiceError if attention still runs after the timeout; call it again then.
    void close();

  private:
    using Lock = std::unique_lock<std::mutex>;

    // On the heap, because a forked child must abandon it whole, like the pool's.
    struct State {
        State(const ServiceShape &shape, Bells bells, LaneAttention attention,
              const ServiceOptions &options);
        void check_lane(int lane) const;

        // The threads, in serving.cpp.
        void serve();
        void serve_step();
        void serve_lanes();
        void serve_lane(int layer, int lane);
        bool wait_for_ring(int lane, uint32_t ticket);
        bool answer(int lane, uint32_t ticket);
        void watch();
        void note_progress(int64_t now);
        std::string overdue() const;
        void fail(const Lock &lock, const std::string &message);

        const ServiceShape shape;
        Bells bells;
        const LaneAttention attention;
        const ServiceOptions options;
        std::thread server;
        std::thread watchdog;

        mutable std::mutex mutex;
        std::condition_variable wake; // the service's thread
        std::condition_variable left; // whoever waits for it to finish or to fail
        std::condition_variable end;  // the watchdog
        bool open = false;            // between begin_step and end_step
        bool serving = false;         // the service's thread is in the step, or called to it
        bool closed = false;
        std::string error;                // of the step that failed
        std::vector<uint32_t> first;      // tickets of the step begun last
        std::vector<uint32_t> next;       // the first tickets that no step has had
        std::atomic<bool> failed{false};  // written under the mutex
        std::atomic<int> position{0};     // layer * lanes + lane
        std::atomic<int64_t> progress{0}; // when something last happened, ns

        // Of the step; the service's thread alone has them while `serving`.
        Step step{};
        uint64_t place = 0; // in the queue
        int64_t entered = 0;
        std::vector<AnswerTimes> times;
    };

    State &state() const;

    const pid_t owner_;
    std::unique_ptr<State> state_;
};

// "10 s", "0.05 s"
std::string in_seconds(std::chrono::duration<double> time);

// Of CLOCK_MONOTONIC.
int64_t now_ns();

} // namespace neo
