// The threads' side of the service; service.cpp is the callers' side.
#include "service.h"

#include <algorithm>

#include "polling.h"

namespace neo {

int64_t now_ns() {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    return std::chrono::duration_cast<std::chrono::nanoseconds>(now).count();
}

void Service::State::serve() {
    bind_to(options.cpu);
    Lock lock(mutex);
    for (;;) {
        wake.wait(lock, [&] { return serving || closed; });
        if (!serving)
            return;
        lock.unlock();
        serve_step();
        lock.lock();
        serving = false;
        left.notify_all();
    }
}

void Service::State::serve_step() {
    options.queue->wait(place, [&] { return failed.load(std::memory_order_acquire); });
    serve_lanes();
    options.queue->leave(place);
}

void Service::State::serve_lanes() {
    entered = now_ns();
    const int num_lanes = static_cast<int>(step.lanes.size());
    std::string message;
    try {
        for (int i = 0; i < shape.num_layers * num_lanes && !failed.load(); i++) {
            position.store(i, std::memory_order_relaxed);
            serve_lane(i / num_lanes, i % num_lanes);
        }
        return;
    } catch (const std::exception &exception) {
        message = exception.what();
    } catch (...) {
        message = "attention threw something that is not a std::exception";
    }
    const int at = position.load();
    Lock lock(mutex);
    fail(lock, "attention failed at layer " + std::to_string(at / num_lanes) + ", lane " +
                   std::to_string(at % num_lanes) + ": " + message);
}

void Service::State::serve_lane(int layer, int lane) {
    const DecodeBatch batch = batch_of(shape, step, layer, lane);
    const uint32_t ticket = first[lane] + layer;
    if (!wait_for_ring(lane, ticket))
        return;
    AnswerTimes &at = times[size_t(layer) * step.lanes.size() + lane];
    at.rung = now_ns();
    note_progress(at.rung);
    {
        std::lock_guard<std::mutex> turn(*attention.turn);
        // Given up while others had their turn: its memory may serve something else by now.
        if (failed.load(std::memory_order_acquire))
            return;
        at.started = now_ns();
        attention.compute(lane, batch);
        at.computed = now_ns();
    }
    if (!answer(lane, ticket))
        return;
    at.answered = now_ns();
    note_progress(at.answered);
}

void Service::State::note_progress(int64_t now) {
    progress.store(now, std::memory_order_relaxed);
    options.queue->progress.store(now, std::memory_order_relaxed);
}

// False if the step failed meanwhile.
bool Service::State::wait_for_ring(int lane, uint32_t ticket) {
    const auto over = [&] {
        return reached(bells.request(lane), ticket) || failed.load(std::memory_order_acquire);
    };
    poll_until(over, options.spin);
    return !failed.load(std::memory_order_acquire);
}

// False if the step failed meanwhile: its last ticket has been rung, and bells never go back.
bool Service::State::answer(int lane, uint32_t ticket) {
    Lock lock(mutex);
    if (failed.load(std::memory_order_relaxed))
        return false;
    bells.reply(lane, ticket);
    return true;
}

// Give up the open step: keep the first message, release every wait.
void Service::State::fail(const Lock &, const std::string &message) {
    if (!open || failed.load(std::memory_order_relaxed))
        return;
    error = message;
    failed.store(true, std::memory_order_release);
    for (size_t lane = 0; lane < step.lanes.size(); lane++)
        bells.reply(static_cast<int>(lane), next[lane] - 1);
    left.notify_all();
    options.queue->wake();
}

// Looks up at least once a timeout, so that nobody needs to tell it when a step begins.
void Service::State::watch() {
    const auto timeout = std::chrono::duration_cast<std::chrono::nanoseconds>(options.timeout);
    Lock lock(mutex);
    while (!closed) {
        const int64_t last = std::max(progress.load(std::memory_order_relaxed),
                                      options.queue->progress.load(std::memory_order_relaxed));
        const int64_t idle = now_ns() - last;
        const bool late = serving && !failed.load() && idle >= timeout.count();
        if (late)
            fail(lock, overdue());
        const auto rest = serving && !failed.load() ? timeout.count() - idle : timeout.count();
        end.wait_for(lock, std::chrono::nanoseconds(rest));
    }
}

std::string Service::State::overdue() const {
    const int at = position.load(std::memory_order_relaxed);
    const int num_lanes = static_cast<int>(step.lanes.size());
    const int layer = at / num_lanes;
    const int lane = at % num_lanes;
    const bool rung = reached(bells.request(lane), first[lane] + layer);
    return std::string("overdue: no ") + (rung ? "answer" : "request") + " for layer " +
           std::to_string(layer) + ", lane " + std::to_string(lane) + " within " +
           in_seconds(options.timeout);
}

} // namespace neo
