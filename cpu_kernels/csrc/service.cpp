// The callers' side of the service; serving.cpp is the threads' side.
#include "service.h"

#include <cstdio>
#include <utility>

#include <pthread.h>
#include <unistd.h>

#include "polling.h"

namespace neo {

std::string in_seconds(std::chrono::duration<double> time) {
    char text[32];
    std::snprintf(text, sizeof(text), "%.3g s", time.count());
    return text;
}

Service::State::State(const ServiceShape &shape, Bells bells, LaneAttention attention,
                      const ServiceOptions &options)
    : shape(shape), bells(bells), attention(std::move(attention)), options(options) {
    for (int lane = 0; lane < shape.num_lanes; lane++) {
        next.push_back(bells.request(lane) + 1);
        this->bells.reply(lane, next[lane] - 1);
    }
    first = next;
}

void Service::State::check_lane(int lane) const {
    if (lane < 0 || lane >= shape.num_lanes)
        throw std::invalid_argument("lane: expected 0 to " + std::to_string(shape.num_lanes - 1) +
                                    ", got " + std::to_string(lane));
}

Service::Service(const ServiceShape &shape, Bells bells, LaneAttention attention,
                 const ServiceOptions &options)
    : owner_(getpid()),
      state_(std::make_unique<State>(shape, bells, std::move(attention), options)) {
    state_->server = std::thread(&State::serve, state_.get());
    state_->watchdog = std::thread(&State::watch, state_.get());
    pthread_setname_np(state_->server.native_handle(), "neo-service");
    pthread_setname_np(state_->watchdog.native_handle(), "neo-watchdog");
}

Service::~Service() {
    if (getpid() != owner_) {
        static_cast<void>(state_.release());
        return;
    }
    for (bool closed = false; !closed;)
        try {
            close();
            closed = true;
        } catch (const ServiceError &) {
            // Attention still runs on memory that the caller is about to free.
        }
}

Service::State &Service::state() const {
    if (getpid() != owner_)
        throw ServiceError("the attention service was created before a fork and has no threads in "
                           "this process; create it after forking");
    return *state_;
}

void Service::begin_step(Step step) {
    State &state = this->state();
    Lock lock(state.mutex);
    if (state.closed)
        throw ServiceError("begin_step: the service has been closed");
    if (state.open)
        throw ServiceError("begin_step: the previous step is still open; call end_step first");
    if (!state.left.wait_for(lock, state.options.timeout, [&] { return !state.serving; }))
        throw ServiceError("begin_step: attention of an earlier, failed step still runs after " +
                           in_seconds(state.options.timeout));
    const int num_lanes = static_cast<int>(step.lanes.size());
    for (int lane = 0; lane < num_lanes; lane++)
        state.attention.prepare(lane, batch_of(state.shape, step, 0, lane));
    state.step = std::move(step);
    state.times.assign(size_t(state.shape.num_layers) * num_lanes, AnswerTimes{});
    state.first = state.next;
    for (int lane = 0; lane < num_lanes; lane++)
        state.next[lane] += state.shape.num_layers;
    state.failed.store(false, std::memory_order_relaxed);
    state.position.store(0, std::memory_order_relaxed);
    state.progress.store(now_ns(), std::memory_order_relaxed);
    state.place = state.options.queue->join();
    state.open = state.serving = true;
    state.wake.notify_one();
}

uint32_t Service::first_ticket(int lane) const {
    State &state = this->state();
    state.check_lane(lane);
    Lock lock(state.mutex);
    return state.first[lane];
}

void Service::ring(int lane, uint32_t ticket) {
    State &state = this->state();
    state.check_lane(lane);
    state.bells.ring(lane, ticket);
}

void Service::wait(int lane, uint32_t ticket) {
    State &state = this->state();
    state.check_lane(lane);
    {
        Lock lock(state.mutex);
        const uint32_t last = state.next[lane] - 1;
        if (!reached(last, ticket))
            throw std::invalid_argument("ticket: expected at most " + std::to_string(last) +
                                        ", the step's last, got " + std::to_string(ticket));
    }
    poll_until([&] { return reached(state.bells.answer(lane), ticket); }, state.options.spin);
    if (state.failed.load(std::memory_order_acquire)) {
        Lock lock(state.mutex);
        throw ServiceError(state.error);
    }
}

StepReport Service::end_step(std::optional<std::chrono::duration<double>> limit) {
    State &state = this->state();
    Lock lock(state.mutex);
    if (!state.open)
        throw ServiceError("end_step: no step is open");
    const auto over = [&] { return !state.serving || state.failed.load(); };
    if (!limit)
        state.left.wait(lock, over);
    else if (!state.left.wait_for(lock, *limit, over))
        state.fail(lock, "overdue: the step was not served within " + in_seconds(*limit));
    if (state.failed.load())
        state.left.wait_for(lock, state.options.timeout, [&] { return !state.serving; });
    if (!state.open)
        throw ServiceError("end_step: the step was ended by another thread");
    state.open = false;
    if (state.failed.load())
        throw ServiceError(state.error + (state.serving ? "; its attention still runs" : ""));
    return report_of(static_cast<int>(state.step.lanes.size()), state.entered, state.times);
}

void Service::abort_step(const std::string &reason) {
    State &state = this->state();
    Lock lock(state.mutex);
    state.fail(lock, reason);
}

void Service::close() {
    State &state = this->state();
    {
        Lock lock(state.mutex);
        state.fail(lock, "the service was closed");
        if (!state.left.wait_for(lock, state.options.timeout, [&] { return !state.serving; }))
            throw ServiceError("close: attention of a failed step still runs after " +
                               in_seconds(state.options.timeout) + "; close again");
        if (state.closed)
            return;
        state.closed = true;
        state.wake.notify_all();
        state.end.notify_all();
    }
    state.server.join();
    state.watchdog.join();
}

} // namespace neo
