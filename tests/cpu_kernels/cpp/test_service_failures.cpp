// Steps that fail: every wait ends, says why, and the next step works.
#include <stdexcept>

#include "rig.h"

using neo::ServiceError;

namespace {

constexpr double short_s = 0.3;

// Holds attention at one layer until it is let go.
class Gate {
  public:
    explicit Gate(Rig &rig, int at_call) {
        rig.on_compute = [this, at_call, calls = 0](int, const neo::DecodeBatch &) mutable {
            if (calls++ == at_call)
                while (!open_)
                    std::this_thread::sleep_for(std::chrono::milliseconds(1));
        };
    }
    void let_go() { open_ = true; }

  private:
    std::atomic<bool> open_{false};
};

// Begin a step, drive its lanes until they fail, and end it; each must name the same reason. A lane
// that has its last answer may be done before the step fails.
std::string fail_step(Rig &rig, int lanes) {
    rig.service->begin_step(rig.step(lanes));
    std::vector<std::thread> devices;
    std::vector<std::string> messages(lanes);
    for (int lane = 0; lane < lanes; lane++)
        devices.emplace_back([&, lane] {
            try {
                rig.drive(lane, 0);
            } catch (const ServiceError &error) {
                messages[lane] = error.what();
            }
        });
    for (std::thread &device : devices)
        device.join();
    const std::string ended = MESSAGE_OF(ServiceError, rig.service->end_step(std::nullopt));
    CHECK(!messages[lanes - 1].empty());
    for (int lane = 0; lane < lanes; lane++) {
        CHECK(starts_with(ended, messages[lane]));
        const uint32_t last = rig.service->first_ticket(lane) + Rig::num_layers - 1;
        CHECK(rig.memory.words[lane * 32 + 16] == last);
    }
    return ended;
}

void serve_after_failure(Rig &rig) {
    rig.on_compute = nullptr;
    std::fill(rig.k_pool.begin(), rig.k_pool.end(), 0.0f);
    for (int round = 0; round < 3; round++)
        rig.serve(Rig::num_lanes, round);
}

void attention_throws(int at_call) {
    Rig rig;
    rig.on_compute = [&, calls = 0](int, const neo::DecodeBatch &) mutable {
        if (calls++ == at_call)
            rig.pool.for_each(4, [](int64_t) { throw std::runtime_error("out of luck"); });
    };
    const std::string where =
        "layer " + std::to_string(at_call / 2) + ", lane " + std::to_string(at_call % 2);
    CHECK(fail_step(rig, 2) == "attention failed at " + where + ": out of luck");
    serve_after_failure(rig);
    rig.on_compute = [](int, const neo::DecodeBatch &) { throw 7; };
    std::fill(rig.k_pool.begin(), rig.k_pool.end(), 0.0f);
    CHECK(starts_with(fail_step(rig, 1), "attention failed at layer 0, lane 0: "));
    serve_after_failure(rig);
}

void prepare_refuses() {
    Rig rig;
    rig.on_prepare = [](int lane, const neo::DecodeBatch &) {
        if (lane == 1)
            throw std::invalid_argument("no such block");
    };
    CHECK(MESSAGE_OF(std::invalid_argument, rig.service->begin_step(rig.step(2))) ==
          "no such block");
    CHECK(rig.service->first_ticket(0) == 1);
    rig.serve(1, 0);
    CHECK(rig.service->first_ticket(0) == 1);
}

void stuck_attention() {
    Rig rig(short_s);
    Gate gate(rig, 3);
    const std::string message = fail_step(rig, 2);
    CHECK(message ==
          "overdue: no answer for layer 1, lane 1 within 0.3 s; its attention still runs");
    CHECK(MESSAGE_OF(ServiceError, rig.service->begin_step(rig.step(1))) ==
          "begin_step: attention of an earlier, failed step still runs after 0.3 s");
    CHECK(starts_with(MESSAGE_OF(ServiceError, rig.service->close()), "close: attention"));
    const uint32_t released = rig.service->first_ticket(1) + Rig::num_layers - 1;
    gate.let_go();
    rig.service->begin_step(rig.step(1));
    CHECK(rig.memory.words[32 + 16] == released); // the late answer did not turn it back
    rig.service->abort_step("only to see it begin");
    MESSAGE_OF(ServiceError, rig.service->end_step(std::nullopt));
    serve_after_failure(rig);
}

void given_up_while_others_have_their_turn() {
    Rig rig(short_s);
    bool computed = false;
    rig.on_compute = [&](int, const neo::DecodeBatch &) { computed = true; };
    {
        std::lock_guard<std::mutex> lock(rig.turn);
        rig.service->begin_step(rig.step(1));
        rig.service->ring(0, rig.service->first_ticket(0));
        CHECK(starts_with(MESSAGE_OF(ServiceError, rig.service->end_step(std::nullopt)),
                          "overdue: no answer for layer 0, lane 0 within 0.3 s"));
    }
    rig.service->close(); // waits until the service has left the step
    CHECK(!computed);
}

void silent_device() {
    Rig rig(short_s);
    rig.service->begin_step(rig.step(2));
    CHECK(MESSAGE_OF(ServiceError, rig.service->end_step(std::nullopt)) ==
          "overdue: no request for layer 0, lane 0 within 0.3 s");
    serve_after_failure(rig);
    rig.service->begin_step(rig.step(2));
    rig.service->ring(0, rig.service->first_ticket(0));
    CHECK(MESSAGE_OF(ServiceError, rig.service->wait(1, rig.service->first_ticket(1))) ==
          "overdue: no request for layer 0, lane 1 within 0.3 s");
    MESSAGE_OF(ServiceError, rig.service->end_step(std::nullopt));
    serve_after_failure(rig);
}

void slow_but_steady() {
    Rig rig(1.0);
    rig.on_compute = [](int, const neo::DecodeBatch &) {
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
    };
    CHECK(rig.serve(2, 0).wall_s > 1.0);
}

void end_step_with_a_limit() {
    Rig rig;
    rig.service->begin_step(rig.step(1));
    const std::chrono::duration<double> limit(0.02);
    CHECK(MESSAGE_OF(ServiceError, rig.service->end_step(limit)) ==
          "overdue: the step was not served within 0.02 s");
    serve_after_failure(rig);
}

void abort_from_another_thread() {
    Rig rig;
    for (int round = 0; round < 20; round++) {
        std::fill(rig.k_pool.begin(), rig.k_pool.end(), 0.0f);
        std::atomic<int> seen{0};
        rig.on_compute = [&](int, const neo::DecodeBatch &) { seen++; };
        rig.service->begin_step(rig.step(1));
        std::thread killer([&] {
            while (seen < round % 5)
                std::this_thread::yield();
            rig.service->abort_step("changed my mind");
            rig.service->abort_step("too late to be the reason");
        });
        const uint32_t first = rig.service->first_ticket(0);
        rig.service->ring(0, first + 3); // and never for the layers after
        const std::string message =
            MESSAGE_OF(ServiceError, rig.service->end_step(std::chrono::seconds(20)));
        CHECK(message == "changed my mind");
        killer.join();
    }
    serve_after_failure(rig);
}

// Neither a step that is given up while it waits nor one that fails holds others up.
void failures_in_a_queue() {
    const auto queue = std::make_shared<neo::StepQueue>();
    Rig first(short_s, 0, 2, queue);
    Rig second(short_s, 0, 2, queue);
    first.service->begin_step(first.step(1));
    second.service->begin_step(second.step(1));
    second.ring_all(0);
    second.service->abort_step("not waiting for that");
    CHECK(MESSAGE_OF(ServiceError, second.service->end_step(std::nullopt)) ==
          "not waiting for that");
    std::this_thread::sleep_for(std::chrono::milliseconds(150)); // the first is overdue before it
    second.service->begin_step(second.step(1));
    second.ring_all(0);
    CHECK(MESSAGE_OF(ServiceError, first.service->end_step(std::nullopt)) ==
          "overdue: no request for layer 0, lane 0 within 0.3 s");
    second.service->end_step(std::nullopt);
    serve_after_failure(first);
    serve_after_failure(second);
}

// Who waits behind a step that takes long, but gets on, is not late.
void behind_a_slow_step() {
    const auto queue = std::make_shared<neo::StepQueue>();
    Rig first(1.0, 0, 2, queue);
    Rig second(1.0, 0, 2, queue);
    first.on_compute = [](int, const neo::DecodeBatch &) {
        std::this_thread::sleep_for(std::chrono::milliseconds(250));
    };
    first.service->begin_step(first.step(1));
    second.service->begin_step(second.step(1));
    first.ring_all(0);
    second.ring_all(0);
    second.service->end_step(std::nullopt);
    first.service->end_step(std::nullopt);
}

void close_with_an_open_step() {
    Rig rig;
    rig.service->begin_step(rig.step(2));
    rig.service->ring(0, rig.service->first_ticket(0));
    std::thread waiting([&] {
        CHECK(MESSAGE_OF(ServiceError, rig.service->wait(1, rig.service->first_ticket(1))) ==
              "the service was closed");
    });
    std::thread also_closing([&] { rig.service->close(); });
    rig.service->close();
    waiting.join();
    also_closing.join();
    rig.service->close();
    CHECK(MESSAGE_OF(ServiceError, rig.service->begin_step(rig.step(1))) ==
          "begin_step: the service has been closed");
}

void destroyed_while_stuck() {
    Rig rig(short_s);
    Gate gate(rig, 0);
    rig.service->begin_step(rig.step(1));
    rig.service->ring(0, rig.service->first_ticket(0));
    std::thread later([&] {
        std::this_thread::sleep_for(std::chrono::milliseconds(700));
        gate.let_go();
    });
    rig.service.reset();
    later.join();
}

} // namespace

void test_service_failures() {
    for (int at_call : {0, 1, 7, 11})
        attention_throws(at_call);
    prepare_refuses();
    stuck_attention();
    given_up_while_others_have_their_turn();
    silent_device();
    slow_but_steady();
    end_step_with_a_limit();
    abort_from_another_thread();
    failures_in_a_queue();
    behind_a_slow_step();
    close_with_an_open_step();
    destroyed_while_stuck();
}
