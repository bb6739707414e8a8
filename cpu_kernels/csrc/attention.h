// One batch of paged decode attention: cut into tasks, run on a pool, merged.
//
// Free of Python, so that a service thread can drive it as well as the binding does.
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "elements.h"
#include "thread_pool.h"

namespace neo {

// Where one layer's KV lives. K [num_blocks, num_kv_heads, head_dim, block_size],
// V [num_blocks, num_kv_heads, block_size, head_dim], both contiguous.
struct KvLayer {
    void *k;
    void *v;
    Element element;
    int64_t num_blocks;
    int num_kv_heads;
    int head_dim;
    int block_size;

    // Elements of one block of one KV head, and of one block of all.
    int64_t head_stride() const { return int64_t(head_dim) * block_size; }
    int64_t block_stride() const { return head_stride() * num_kv_heads; }
};

// Rows of [num_heads, head_dim] elements; the stride from row to row is free, in elements.
struct Rows {
    void *data;
    int64_t stride;
};

struct DecodeBatch {
    KvLayer layer;
    Rows out;
    Rows q;
    Rows k; // the new token's; data is null if it is in the cache already
    Rows v;
    Element element; // of out, q, k and v
    const int32_t *block_tables;
    int64_t block_tables_stride;
    int max_blocks; // columns of block_tables
    const int32_t *seq_lens;
    int num_seqs;
    int num_q_heads;
    float softmax_scale;
};

class DecodeAttention {
  public:
    explicit DecodeAttention(ThreadPool &pool) : pool_(pool) {}

    // Compute the whole batch. One caller at a time.
    // Throws std::invalid_argument, before anything is written, for a length or a block id out of
    // range.
    void run(const DecodeBatch &batch);

    // The two halves of run, for those who compute one batch at many layers.
    // prepare checks and cuts it and leaves the pool alone; compute may then be called with the
    // same lengths and block tables and any addresses. Throws as run does: only in prepare.
    void prepare(const DecodeBatch &batch);
    void compute(const DecodeBatch &batch);

  private:
    // One request, a range of KV heads, one segment of NEO_SEGMENT_TOKENS tokens.
    struct Task {
        int seq;
        int first_head;
        int num_heads;
        int segment;
    };

    int choose_heads(const DecodeBatch &batch) const;
    void start(const DecodeBatch &batch);
    void cut_segment(const DecodeBatch &batch, int seq, int segment, int64_t &left, int heads);
    void attend(const DecodeBatch &batch, const Task &task);
    void merge(const DecodeBatch &batch, int seq, int head, int num_segments);
    float *partial(const DecodeBatch &batch, int seq, int segment, int head);

    ThreadPool &pool_;
    std::vector<Task> tasks_;
    std::vector<int64_t> first_partial_;             // of each request, in segments times KV heads
    std::vector<float> partials_;                    // acc, max, sum of each unmerged segment
    std::unique_ptr<std::atomic<int>[]> unfinished_; // segments left, by request and KV head
    size_t unfinished_size_ = 0;
};

} // namespace neo
