#include "step.h"

#include <algorithm>

namespace neo {

namespace {

constexpr double ns = 1e-9;

void *advance(void *base, int64_t elements, Element element) {
    return static_cast<char *>(base) + elements * int64_t(size_of(element));
}

} // namespace

DecodeBatch batch_of(const ServiceShape &shape, const Step &step, int layer, int lane) {
    const StepLane &requests = step.lanes[lane];
    const int64_t q_size = int64_t(shape.num_q_heads) * shape.head_dim;
    const int64_t kv_size = int64_t(shape.num_kv_heads) * shape.head_dim;
    const int64_t row = int64_t(lane) * shape.max_rows * shape.row_size();
    const auto rows = [&](int64_t column) {
        return Rows{advance(shape.rows, row + column, shape.element), shape.row_size()};
    };
    KvLayer kv = step.first_layer;
    const int64_t offset = layer * kv.num_blocks * kv.block_stride();
    kv.k = advance(kv.k, offset, kv.element);
    kv.v = advance(kv.v, offset, kv.element);
    DecodeBatch batch;
    batch.layer = kv;
    batch.out = {advance(shape.out, int64_t(lane) * shape.max_rows * q_size, shape.element),
                 q_size};
    batch.q = rows(0);
    batch.k = rows(q_size);
    batch.v = rows(q_size + kv_size);
    batch.element = shape.element;
    batch.block_tables = requests.block_tables.data();
    batch.block_tables_stride = requests.max_blocks;
    batch.max_blocks = requests.max_blocks;
    batch.seq_lens = requests.seq_lens.data();
    batch.num_seqs = static_cast<int>(requests.seq_lens.size());
    batch.num_q_heads = shape.num_q_heads;
    batch.softmax_scale = step.softmax_scale;
    return batch;
}

StepReport report_of(int num_lanes, int64_t entered, const std::vector<AnswerTimes> &times) {
    StepReport report;
    report.attention_s.assign(num_lanes, 0.0);
    report.times = times;
    report.waiting_s = 0.0;
    std::vector<int64_t> handovers;
    int64_t free_since = entered;
    for (size_t i = 0; i < times.size(); i++) {
        const AnswerTimes &at = times[i];
        report.attention_s[i % num_lanes] += ns * (at.computed - at.started);
        report.waiting_s += ns * (at.rung - free_since);
        handovers.push_back(at.started - at.rung + at.answered - at.computed);
        free_since = at.answered;
    }
    const auto middle = handovers.begin() + handovers.size() / 2;
    std::nth_element(handovers.begin(), middle, handovers.end());
    report.handover_s = ns * *middle;
    report.wall_s = ns * (times.back().answered - times.front().rung);
    return report;
}

} // namespace neo
