// A service on a pool with a stand-in for attention, and a device to drive it.
#pragma once

#include <atomic>
#include <functional>
#include <memory>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "check.h"
#include "service.h"
#include "thread_pool.h"

// The stand-in: out = softmax_scale * q + seq_len + what the layer's K holds for the block; each
// pass counts K up by one. All of it with plain loads and stores.
struct Rig {
    static constexpr int num_layers = 6;
    static constexpr int num_lanes = 3;
    static constexpr int max_rows = 4;
    static constexpr int num_blocks = 16;

    struct alignas(64) Words {
        uint32_t words[num_lanes * 2 * 16] = {};
    };

    explicit Rig(double timeout_s = 20, uint32_t first_bell = 0, int num_threads = 2,
                 std::shared_ptr<neo::StepQueue> queue = std::make_shared<neo::StepQueue>())
        : rows(num_lanes * max_rows * 3), out(num_lanes * max_rows),
          k_pool(num_layers * num_blocks), pool(num_threads, {}, std::chrono::microseconds(20)) {
        for (int lane = 0; lane < num_lanes; lane++)
            memory.words[lane * 32] = first_bell;
        shape = {num_layers, num_lanes,          max_rows,    1,         1,
                 1,          neo::Element::fp32, rows.data(), out.data()};
        neo::LaneAttention attention{[this](int lane, const neo::DecodeBatch &batch) {
                                         if (on_prepare)
                                             on_prepare(lane, batch);
                                     },
                                     [this](int lane, const neo::DecodeBatch &batch) {
                                         if (on_compute)
                                             on_compute(lane, batch);
                                         compute(batch);
                                     },
                                     &turn};
        const neo::ServiceOptions options{std::chrono::duration<double>(timeout_s),
                                          std::chrono::microseconds(50), -1, std::move(queue)};
        service.emplace(shape, neo::Bells(&memory), attention, options);
    }

    void compute(const neo::DecodeBatch &batch) {
        pool.for_each(batch.num_seqs, [&](int64_t seq) {
            float &k = static_cast<float *>(batch.layer.k)[batch.block_tables[seq]];
            const float *q = static_cast<float *>(batch.q.data) + seq * batch.q.stride;
            float *result = static_cast<float *>(batch.out.data) + seq * batch.out.stride;
            *result = batch.softmax_scale * *q + float(batch.seq_lens[seq]) + k;
            k += 1;
        });
    }

    // Lane i has i + 1 requests in blocks of their own.
    neo::Step step(int lanes) {
        neo::Step step{
            {k_pool.data(), k_pool.data(), neo::Element::fp32, num_blocks, 1, 1, 1}, {}, 0.5f};
        for (int lane = 0; lane < lanes; lane++) {
            neo::StepLane &requests = step.lanes.emplace_back();
            requests.max_blocks = 1;
            for (int seq = 0; seq <= lane; seq++) {
                requests.block_tables.push_back(lane * max_rows + seq);
                requests.seq_lens.push_back(10 * lane + seq);
            }
        }
        return step;
    }

    // A lane's rows for all layers at once, as a device that does not look at answers would.
    void ring_all(int lane) { service->ring(lane, service->first_ticket(lane) + num_layers - 1); }

    // The device's side of one lane: write rows, ring, wait, check. round: steps before this one.
    void drive(int lane, int round) {
        const uint32_t first = service->first_ticket(lane);
        for (int layer = 0; layer < num_layers; layer++) {
            for (int seq = 0; seq <= lane; seq++)
                rows[(lane * max_rows + seq) * 3] = float(layer + 2 * seq);
            service->ring(lane, first + layer);
            service->wait(lane, first + layer);
            for (int seq = 0; seq <= lane; seq++)
                CHECK(out[lane * max_rows + seq] ==
                      0.5f * float(layer + 2 * seq) + float(10 * lane + seq) + float(round));
        }
    }

    // A whole step, its lanes driven side by side.
    neo::StepReport serve(int lanes, int round) {
        service->begin_step(step(lanes));
        std::vector<std::thread> devices;
        for (int lane = 0; lane < lanes; lane++)
            devices.emplace_back([=] { drive(lane, round); });
        for (std::thread &device : devices)
            device.join();
        return service->end_step(std::nullopt);
    }

    std::vector<float> rows;
    std::vector<float> out;
    std::vector<float> k_pool;
    Words memory;
    neo::ServiceShape shape;
    std::mutex turn;
    neo::ThreadPool pool;
    std::function<void(int, const neo::DecodeBatch &)> on_prepare;
    std::function<void(int, const neo::DecodeBatch &)> on_compute;
    std::optional<neo::Service> service; // last: it uses the rest
};
