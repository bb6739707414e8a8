// Steps that go well: answers, tickets, reports, turns.
#include <numeric>

#include "rig.h"

namespace {

void many_steps(int lanes, uint32_t first_bell, int num_threads) {
    Rig rig(20, first_bell, num_threads);
    for (int round = 0; round < 30; round++) {
        rig.serve(lanes, round);
        CHECK(rig.service->first_ticket(0) == first_bell + 1 + uint32_t(round * Rig::num_layers));
    }
    for (int lane = 0; lane < lanes; lane++)
        CHECK(rig.memory.words[lane * 32 + 16] == first_bell + 30 * Rig::num_layers);
}

void lanes_come_and_go() {
    Rig rig;
    rig.serve(3, 0);
    rig.serve(1, 1);
    CHECK(rig.service->first_ticket(2) == rig.service->first_ticket(1));
    rig.serve(1, 2);
    rig.service->begin_step(rig.step(2));
    CHECK(rig.service->first_ticket(0) == 1 + 3 * Rig::num_layers);
    CHECK(rig.service->first_ticket(1) == 1 + Rig::num_layers);
    rig.service->abort_step("enough");
    MESSAGE_OF(neo::ServiceError, rig.service->end_step(std::nullopt));
}

void rung_ahead() {
    Rig rig;
    rig.service->begin_step(rig.step(2));
    for (int lane = 1; lane >= 0; lane--)
        rig.service->ring(lane, rig.service->first_ticket(lane) + Rig::num_layers - 1);
    rig.service->end_step(std::nullopt);
    rig.service->wait(1, rig.service->first_ticket(1) + Rig::num_layers - 1);
}

void reports_add_up() {
    Rig rig;
    const neo::StepReport report = rig.serve(2, 0);
    CHECK(report.times.size() == size_t(2 * Rig::num_layers));
    double attention = 0;
    int64_t before = 0;
    for (const neo::AnswerTimes &at : report.times) {
        CHECK(before <= at.rung && at.rung <= at.started);
        CHECK(at.started <= at.computed && at.computed <= at.answered);
        attention += 1e-9 * double(at.computed - at.started);
        before = at.answered;
    }
    const double sum = std::accumulate(report.attention_s.begin(), report.attention_s.end(), 0.0);
    CHECK(std::abs(sum - attention) < 1e-9);
    CHECK(report.attention_s.size() == 2 && sum < report.wall_s);
    CHECK(report.waiting_s >= 0 && report.handover_s >= 0);
}

void others_take_turns_on_the_pool() {
    Rig rig;
    std::atomic<bool> stop{false};
    int64_t jobs = 0; // plain: only the turn protects it
    const auto work = [&] {
        while (!stop) {
            std::lock_guard<std::mutex> lock(rig.turn);
            rig.pool.for_each(8, [](int64_t) {});
            jobs++;
        }
    };
    std::thread first(work);
    std::thread second(work);
    for (int round = 0; round < 20; round++)
        rig.serve(2, round);
    stop = true;
    first.join();
    second.join();
    CHECK(jobs > 0);
}

// The later step's rows come first, all of them, and wait for the earlier step's.
void steps_of_a_queue_keep_their_order() {
    const auto queue = std::make_shared<neo::StepQueue>();
    Rig first(20, 0, 2, queue);
    Rig second(20, 0, 2, queue);
    std::vector<int> served; // plain: only the queue protects it
    first.on_compute = [&](int, const neo::DecodeBatch &) { served.push_back(1); };
    second.on_compute = [&](int, const neo::DecodeBatch &) { served.push_back(2); };
    for (int round = 0; round < 10; round++) {
        served.clear();
        first.service->begin_step(first.step(2));
        second.service->begin_step(second.step(1));
        second.ring_all(0);
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
        first.ring_all(0);
        first.ring_all(1);
        second.service->end_step(std::nullopt);
        std::vector<int> expected(2 * Rig::num_layers, 1);
        expected.insert(expected.end(), Rig::num_layers, 2);
        CHECK(served == expected);
        first.service->end_step(std::nullopt);
    }
}

void out_of_turn() {
    Rig rig;
    CHECK(MESSAGE_OF(neo::ServiceError, rig.service->end_step(std::nullopt)) ==
          "end_step: no step is open");
    rig.service->abort_step("nothing to abort");
    rig.service->begin_step(rig.step(1));
    CHECK(starts_with(MESSAGE_OF(neo::ServiceError, rig.service->begin_step(rig.step(1))),
                      "begin_step: the previous step is still open"));
    const uint32_t past = rig.service->first_ticket(0) + Rig::num_layers;
    CHECK(starts_with(MESSAGE_OF(std::invalid_argument, rig.service->wait(0, past)), "ticket: "));
    CHECK(starts_with(MESSAGE_OF(std::invalid_argument, rig.service->ring(3, 1)), "lane: "));
    rig.drive(0, 0);
    rig.service->end_step(std::nullopt);
    rig.serve(1, 1);
}

} // namespace

void test_service() {
    for (int lanes : {1, 2, 3})
        for (uint32_t first_bell : {0u, 0x7ffffffdu, 0xfffffffau})
            many_steps(lanes, first_bell, lanes);
    lanes_come_and_go();
    rung_ahead();
    reports_add_up();
    others_take_turns_on_the_pool();
    steps_of_a_queue_keep_their_order();
    out_of_turn();
}
