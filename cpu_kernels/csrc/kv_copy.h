// Copies between token-major rows and the host KV cache. No arithmetic but conversion.
#pragma once

#include "attention.h"

namespace neo {

// Write the K and V rows of many tokens into the cache.
struct StoreBatch {
    KvLayer layer;
    Rows k;
    Rows v;
    Element element;             // of k and v
    const int64_t *slot_mapping; // block * block_size + offset, negative: skip this token
    int64_t num_tokens;
};

// Throws std::invalid_argument, before anything is written, for a slot out of range.
void store_kv(ThreadPool &pool, const StoreBatch &batch);

// Copy the first seq_len tokens of one request to k and v, contiguous
// [seq_len, num_kv_heads, head_dim] in the cache's element type.
// Throws std::invalid_argument for a block id out of range.
void gather_kv(ThreadPool &pool, const KvLayer &layer, const int32_t *block_table, int64_t seq_len,
               void *k, void *v);

} // namespace neo
