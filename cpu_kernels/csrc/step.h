// What one step asks of the service, and what it reports of it. Data only.
#pragma once

#include <cstdint>
#include <vector>

#include "attention.h"

namespace neo {

// What stays the same from step to step. Rows [num_lanes, max_rows, row_size()] hold Q, K and V
// side by side; out [num_lanes, max_rows, num_q_heads * head_dim]; both contiguous.
struct ServiceShape {
    int num_layers;
    int num_lanes;
    int max_rows;
    int num_q_heads;
    int num_kv_heads;
    int head_dim;
    Element element; // of rows and out
    void *rows;
    void *out;

    int64_t row_size() const { return int64_t(num_q_heads + 2 * num_kv_heads) * head_dim; }
};

// The requests of one lane: block_tables [seq_lens.size(), max_blocks].
struct StepLane {
    std::vector<int32_t> block_tables;
    int max_blocks;
    std::vector<int32_t> seq_lens;
};

// Owns all it needs but the pools, rows and bells.
struct Step {
    KvLayer first_layer; // the others follow it, contiguous
    std::vector<StepLane> lanes;
    float softmax_scale;
};

// When one lane of one layer was served, ns of CLOCK_MONOTONIC.
struct AnswerTimes {
    int64_t rung;     // the request bell was seen
    int64_t started;  // attention began
    int64_t computed; // attention ended
    int64_t answered; // the answer bell was rung
};

struct StepReport {
    std::vector<double> attention_s; // of each lane, all layers
    double waiting_s;                // idle, waiting for request bells
    double handover_s;               // median of what an answer takes beside attention
    double wall_s;                   // first request seen to last answer
    std::vector<AnswerTimes> times;  // [num_layers, num_lanes]
};

// One lane of one layer, as attention takes it.
DecodeBatch batch_of(const ServiceShape &shape, const Step &step, int layer, int lane);

// entered: when the service turned to the step.
StepReport report_of(int num_lanes, int64_t entered, const std::vector<AnswerTimes> &times);

} // namespace neo
