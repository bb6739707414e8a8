#include "attention.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "attention_ispc.h"
#include "rows_ispc.h"
#include "shapes.h"

namespace neo {

namespace {

constexpr float log2_e = 1.44269504088896340736f;
constexpr int tasks_per_thread = 8;
// So many tasks a thread, the last of all, are cut into single KV heads.
constexpr int tail_tasks_per_thread = 1;

int num_segments(int seq_len) {
    return (seq_len + NEO_SEGMENT_TOKENS - 1) / NEO_SEGMENT_TOKENS;
}

// Floats that one segment leaves behind: acc [group, head_dim], max [group], sum [group].
int64_t partial_size(const DecodeBatch &batch) {
    const int group = batch.num_q_heads / batch.layer.num_kv_heads;
    return int64_t(group) * (batch.layer.head_dim + 2);
}

void check(const DecodeBatch &batch) {
    const int64_t capacity = int64_t(batch.max_blocks) * batch.layer.block_size;
    for (int seq = 0; seq < batch.num_seqs; seq++) {
        const int seq_len = batch.seq_lens[seq];
        if (seq_len < 0 || seq_len > capacity)
            throw std::invalid_argument(
                "seq_lens[" + std::to_string(seq) + "]: expected 0 to " + std::to_string(capacity) +
                " (what block_tables holds), got " + std::to_string(seq_len));
        const int32_t *table = batch.block_tables + seq * batch.block_tables_stride;
        const int used = (seq_len + batch.layer.block_size - 1) / batch.layer.block_size;
        for (int i = 0; i < used; i++)
            if (table[i] < 0 || table[i] >= batch.layer.num_blocks)
                throw std::invalid_argument("block_tables[" + std::to_string(seq) + ", " +
                                            std::to_string(i) +
                                            "]: expected a block id from 0 to " +
                                            std::to_string(batch.layer.num_blocks - 1) + ", got " +
                                            std::to_string(table[i]));
    }
}

// A row of batch.q, out, k or v, at one head.
char *at(const Rows &rows, const DecodeBatch &batch, int seq, int head) {
    const int64_t offset = seq * rows.stride + int64_t(head) * batch.layer.head_dim;
    return static_cast<char *>(rows.data) + offset * int64_t(size_of(batch.element));
}

// Convert contiguous rows of the batch's element type to the cache's.
void convert_rows(float *dst, const void *src, const DecodeBatch &batch, int num_heads) {
    alignas(64) float wide[NEO_MAX_TASK_Q_HEADS * NEO_MAX_HEAD_DIM];
    widen(wide, src, batch.element, num_heads * batch.layer.head_dim);
    narrow(dst, batch.layer.element, wide, num_heads * batch.layer.head_dim);
}

template <typename T>
void call(void (*kernel)(ispc::Segment &, T *, T *, const T *, const T *), ispc::Segment &segment,
          const KvLayer &layer, int first_head, const void *k_new, const void *v_new) {
    const int64_t offset = first_head * layer.head_stride();
    kernel(segment, static_cast<T *>(layer.k) + offset, static_cast<T *>(layer.v) + offset,
           static_cast<const T *>(k_new), static_cast<const T *>(v_new));
}

void call(ispc::Segment &segment, const KvLayer &layer, int first_head, const void *k_new,
          const void *v_new) {
    switch (layer.element) {
    case Element::bf16:
        return call<uint16_t>(ispc::attend_segment_bf16, segment, layer, first_head, k_new, v_new);
    case Element::fp16:
        return call<uint16_t>(ispc::attend_segment_fp16, segment, layer, first_head, k_new, v_new);
    case Element::fp32:
        return call<float>(ispc::attend_segment_fp32, segment, layer, first_head, k_new, v_new);
    }
}

} // namespace

void DecodeAttention::run(const DecodeBatch &batch) {
    prepare(batch);
    compute(batch);
}

void DecodeAttention::compute(const DecodeBatch &batch) {
    start(batch);
    pool_.for_each(int64_t(tasks_.size()), [&](int64_t i) { attend(batch, tasks_[i]); });
}

// As many KV heads as leave every thread several tasks: the heads of a block lie side by side, so
// more heads mean longer runs of memory. The choice does not change the result.
int DecodeAttention::choose_heads(const DecodeBatch &batch) const {
    int64_t segments = 0;
    for (int seq = 0; seq < batch.num_seqs; seq++)
        segments += num_segments(batch.seq_lens[seq]);
    const int num_kv_heads = batch.layer.num_kv_heads;
    const int group = batch.num_q_heads / num_kv_heads;
    int heads = std::min(num_kv_heads, NEO_MAX_TASK_Q_HEADS / group);
    const int64_t wanted = int64_t(tasks_per_thread) * pool_.size();
    while (heads > 1 && segments * ((num_kv_heads + heads - 1) / heads) < wanted)
        heads = (heads + 1) / 2;
    return heads;
}

// List the tasks, whole segments before the shorter last ones.
void DecodeAttention::prepare(const DecodeBatch &batch) {
    check(batch);
    const int num_kv_heads = batch.layer.num_kv_heads;
    const int heads = choose_heads(batch);
    const size_t num_counters = size_t(batch.num_seqs) * num_kv_heads;
    if (num_counters > unfinished_size_) {
        unfinished_ = std::make_unique<std::atomic<int>[]>(num_counters);
        unfinished_size_ = num_counters;
    }
    tasks_.clear();
    first_partial_.assign(batch.num_seqs, 0);
    int64_t num_partials = 0, left = 0;
    for (int seq = 0; seq < batch.num_seqs; seq++) {
        const int segments = num_segments(batch.seq_lens[seq]);
        first_partial_[seq] = num_partials;
        num_partials += segments > 1 ? int64_t(segments) * num_kv_heads : 0;
        left += int64_t(segments) * num_kv_heads;
    }
    for (int seq = 0; seq < batch.num_seqs; seq++)
        for (int segment = 0; segment + 1 < num_segments(batch.seq_lens[seq]); segment++)
            cut_segment(batch, seq, segment, left, heads);
    for (int seq = 0; seq < batch.num_seqs; seq++)
        if (batch.seq_lens[seq] > 0)
            cut_segment(batch, seq, num_segments(batch.seq_lens[seq]) - 1, left, heads);
    const size_t floats = size_t(num_partials * partial_size(batch));
    if (floats > partials_.size())
        partials_.resize(floats);
}

// What each computation needs anew: the counts of unfinished segments, zeros for empty requests.
void DecodeAttention::start(const DecodeBatch &batch) {
    const int num_kv_heads = batch.layer.num_kv_heads;
    const size_t row_bytes =
        size_t(batch.num_q_heads) * batch.layer.head_dim * size_of(batch.element);
    for (int seq = 0; seq < batch.num_seqs; seq++) {
        const int segments = num_segments(batch.seq_lens[seq]);
        if (segments == 0)
            std::memset(at(batch.out, batch, seq, 0), 0, row_bytes);
        for (int head = 0; head < num_kv_heads; head++)
            unfinished_[size_t(seq) * num_kv_heads + head].store(segments,
                                                                 std::memory_order_relaxed);
    }
}

// Cut one segment into tasks of `heads` KV heads, or of one when little is left: threads then
// finish within a small task of each other. left: KV heads of segments not yet cut.
void DecodeAttention::cut_segment(const DecodeBatch &batch, int seq, int segment, int64_t &left,
                                  int heads) {
    const int num_kv_heads = batch.layer.num_kv_heads;
    if (left <= int64_t(tail_tasks_per_thread) * pool_.size() * heads)
        heads = 1;
    for (int head = 0; head < num_kv_heads; head += heads)
        tasks_.push_back({seq, head, std::min(heads, num_kv_heads - head), segment});
    left -= num_kv_heads;
}

float *DecodeAttention::partial(const DecodeBatch &batch, int seq, int segment, int head) {
    const int64_t index = first_partial_[seq] + int64_t(segment) * batch.layer.num_kv_heads + head;
    return partials_.data() + index * partial_size(batch);
}

void DecodeAttention::attend(const DecodeBatch &batch, const Task &task) {
    const KvLayer &layer = batch.layer;
    const int head_dim = layer.head_dim;
    const int group = batch.num_q_heads / layer.num_kv_heads;
    const int seq_len = batch.seq_lens[task.seq];
    const int segments = num_segments(seq_len);
    alignas(64) float q[NEO_MAX_TASK_Q_HEADS * NEO_MAX_HEAD_DIM];
    alignas(64) float local[NEO_MAX_TASK_Q_HEADS * (NEO_MAX_HEAD_DIM + 2)];
    alignas(64) float k_new[NEO_MAX_TASK_Q_HEADS * NEO_MAX_HEAD_DIM]; // room for any element type
    alignas(64) float v_new[NEO_MAX_TASK_Q_HEADS * NEO_MAX_HEAD_DIM];

    ispc::Segment segment;
    segment.block_table = batch.block_tables + task.seq * batch.block_tables_stride;
    segment.block_stride = layer.block_stride();
    segment.block_size = layer.block_size;
    segment.block_shift = __builtin_ctz(layer.block_size);
    segment.head_dim = head_dim;
    segment.group = group;
    segment.num_heads = task.num_heads;
    segment.token_begin = task.segment * NEO_SEGMENT_TOKENS;
    segment.token_end = std::min(seq_len, segment.token_begin + NEO_SEGMENT_TOKENS);
    segment.append = -1;
    segment.q = q;
    segment.partial =
        segments > 1 ? partial(batch, task.seq, task.segment, task.first_head) : local;

    widen(q, at(batch.q, batch, task.seq, task.first_head * group), batch.element,
          task.num_heads * group * head_dim, batch.softmax_scale * log2_e);
    if (batch.k.data != nullptr && task.segment == segments - 1) {
        segment.append = seq_len - 1;
        convert_rows(k_new, at(batch.k, batch, task.seq, task.first_head), batch, task.num_heads);
        convert_rows(v_new, at(batch.v, batch, task.seq, task.first_head), batch, task.num_heads);
    }
    call(segment, layer, task.first_head, k_new, v_new);
    if (segments == 1) {
        for (int head = 0; head < task.num_heads; head++) {
            const float *acc = local + head * partial_size(batch);
            const float *sum = acc + group * (head_dim + 1);
            for (int g = 0; g < group; g++)
                narrow(at(batch.out, batch, task.seq, (task.first_head + head) * group + g),
                       batch.element, acc + g * head_dim, head_dim, 1.0f / sum[g]);
        }
        return;
    }
    for (int head = task.first_head; head < task.first_head + task.num_heads; head++) {
        std::atomic<int> &left = unfinished_[size_t(task.seq) * layer.num_kv_heads + head];
        if (left.fetch_sub(1, std::memory_order_acq_rel) == 1)
            merge(batch, task.seq, head, segments);
    }
}

// Whoever finishes a KV head's last segment merges all of them, always in the same order.
void DecodeAttention::merge(const DecodeBatch &batch, int seq, int head, int segments) {
    const int head_dim = batch.layer.head_dim;
    const int group = batch.num_q_heads / batch.layer.num_kv_heads;
    const int64_t stride = partial_size(batch) * batch.layer.num_kv_heads;
    alignas(64) float row[NEO_MAX_HEAD_DIM];
    const float *acc = partial(batch, seq, 0, head);
    const float *max_score = acc + group * head_dim;
    for (int g = 0; g < group; g++) {
        ispc::merge_segments(row, acc + g * head_dim, max_score + g, max_score + group + g,
                             segments, stride, head_dim);
        narrow(at(batch.out, batch, seq, head * group + g), batch.element, row, head_dim);
    }
}

} // namespace neo
