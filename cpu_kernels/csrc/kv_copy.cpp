#include "kv_copy.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "shapes.h"

namespace neo {

namespace {

constexpr int64_t tokens_per_task = 16;

// The row of one token and KV head, in the cache's element type; `buffer` holds a converted one.
const void *cache_row(const StoreBatch &batch, const Rows &rows, int64_t token, int head,
                      float *wide, void *buffer) {
    const int head_dim = batch.layer.head_dim;
    const int64_t offset = token * rows.stride + int64_t(head) * head_dim;
    const char *row =
        static_cast<const char *>(rows.data) + offset * int64_t(size_of(batch.element));
    if (batch.element == batch.layer.element)
        return row;
    widen(wide, row, batch.element, head_dim);
    narrow(buffer, batch.layer.element, wide, head_dim);
    return buffer;
}

template <typename T> void store_token(const StoreBatch &batch, int64_t token) {
    const KvLayer &layer = batch.layer;
    const int64_t slot = batch.slot_mapping[token];
    if (slot < 0)
        return;
    const int64_t block = slot / layer.block_size;
    const int64_t offset = slot % layer.block_size;
    alignas(64) float wide[NEO_MAX_HEAD_DIM];
    alignas(64) float buffer[NEO_MAX_HEAD_DIM];
    for (int head = 0; head < layer.num_kv_heads; head++) {
        const int64_t base = block * layer.block_stride() + head * layer.head_stride();
        T *k = static_cast<T *>(layer.k) + base + offset;
        const T *row = static_cast<const T *>(cache_row(batch, batch.k, token, head, wide, buffer));
        for (int d = 0; d < layer.head_dim; d++)
            k[int64_t(d) * layer.block_size] = row[d];
        row = static_cast<const T *>(cache_row(batch, batch.v, token, head, wide, buffer));
        T *v = static_cast<T *>(layer.v) + base + offset * layer.head_dim;
        std::memcpy(v, row, layer.head_dim * sizeof(T));
    }
}

template <typename T>
void gather_block(const KvLayer &layer, int64_t block, int64_t tokens, T *k_out, T *v_out) {
    const int64_t row = int64_t(layer.num_kv_heads) * layer.head_dim;
    for (int head = 0; head < layer.num_kv_heads; head++) {
        const int64_t base = block * layer.block_stride() + head * layer.head_stride();
        const T *k = static_cast<const T *>(layer.k) + base;
        const T *v = static_cast<const T *>(layer.v) + base;
        for (int64_t t = 0; t < tokens; t++) {
            T *dst = k_out + t * row + int64_t(head) * layer.head_dim;
            for (int d = 0; d < layer.head_dim; d++)
                dst[d] = k[int64_t(d) * layer.block_size + t];
            std::memcpy(v_out + t * row + int64_t(head) * layer.head_dim, v + t * layer.head_dim,
                        layer.head_dim * sizeof(T));
        }
    }
}

template <typename T>
void gather(ThreadPool &pool, const KvLayer &layer, const int32_t *block_table, int64_t seq_len,
            T *k, T *v) {
    const int64_t row = int64_t(layer.num_kv_heads) * layer.head_dim;
    const int64_t num_blocks = (seq_len + layer.block_size - 1) / layer.block_size;
    pool.for_each(num_blocks, [&](int64_t i) {
        const int64_t first = i * layer.block_size;
        const int64_t tokens = std::min<int64_t>(layer.block_size, seq_len - first);
        gather_block<T>(layer, block_table[i], tokens, k + first * row, v + first * row);
    });
}

} // namespace

void store_kv(ThreadPool &pool, const StoreBatch &batch) {
    const int64_t num_slots = batch.layer.num_blocks * batch.layer.block_size;
    for (int64_t token = 0; token < batch.num_tokens; token++)
        if (batch.slot_mapping[token] >= num_slots)
            throw std::invalid_argument("slot_mapping[" + std::to_string(token) +
                                        "]: expected less than " + std::to_string(num_slots) +
                                        ", got " + std::to_string(batch.slot_mapping[token]));
    const int64_t num_tasks = (batch.num_tokens + tokens_per_task - 1) / tokens_per_task;
    pool.for_each(num_tasks, [&](int64_t task) {
        const int64_t end = std::min(batch.num_tokens, (task + 1) * tokens_per_task);
        for (int64_t token = task * tokens_per_task; token < end; token++)
            if (batch.layer.element == Element::fp32)
                store_token<uint32_t>(batch, token);
            else
                store_token<uint16_t>(batch, token);
    });
}

void gather_kv(ThreadPool &pool, const KvLayer &layer, const int32_t *block_table, int64_t seq_len,
               void *k, void *v) {
    for (int64_t i = 0; i * layer.block_size < seq_len; i++)
        if (block_table[i] < 0 || block_table[i] >= layer.num_blocks)
            throw std::invalid_argument(
                "block_table[" + std::to_string(i) + "]: expected a block id from 0 to " +
                std::to_string(layer.num_blocks - 1) + ", got " + std::to_string(block_table[i]));
    if (layer.element == Element::fp32)
        gather(pool, layer, block_table, seq_len, static_cast<uint32_t *>(k),
               static_cast<uint32_t *>(v));
    else
        gather(pool, layer, block_table, seq_len, static_cast<uint16_t *>(k),
               static_cast<uint16_t *>(v));
}

} // namespace neo
