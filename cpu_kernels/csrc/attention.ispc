// The arithmetic of paged decode attention: one segment of one request under one KV head.
//
// Lanes run over tokens for scores (K is transposed inside its block) and over head_dim for the
// weighted sum of V, so neither pass needs a reduction across lanes. Each K and V byte comes from
// memory once; all query heads of the KV head use it while it is in the first-level cache.
#include "elements.isph"
#include "shapes.h"
#include "sums.isph"

// What one call works on. Pointers to the cache are to its first element for this KV head.
struct Segment {
    const int32 *block_table; // of the whole request
    int64 block_stride;       // elements from one block to the next, of K and of V
    int32 block_size;
    int32 head_dim;
    int32 group;       // query heads
    int32 token_begin; // a multiple of NEO_TILE_TOKENS
    int32 token_end;   // > token_begin
    int32 append;      // position to write k_new and v_new to, or -1
    float *q;          // [group, head_dim], times softmax_scale * log2(e)
    float *acc;        // [group, head_dim] out: sum of 2^(score - max) * V
    float *max_score;  // [group] out
    float *sum;        // [group] out: sum of 2^(score - max)
};

// 2^x for x <= 0, relative error below 3e-7; exactly 0 below -126.
static inline float exp2_nonpositive(float x) {
    const float clamped = max(x, -127.0f);
    const float whole = round(clamped);
    const float f = clamped - whole;
    float y = 1.535336188319500e-4f;
    y = y * f + 1.339887440266574e-3f;
    y = y * f + 9.618437357674640e-3f;
    y = y * f + 5.550332471162809e-2f;
    y = y * f + 2.402264791363012e-1f;
    y = y * f + 6.931472028550421e-1f;
    y = y * f + 1.0f;
    const float scaled = floatbits(intbits(y) + (((int)whole) << 23));
    return x < -126.0f ? 0.0f : scaled;
}

// Turn the tile's scores into weights, update each head's maximum and sum, rescale acc.
static inline void softmax_tile(uniform Segment &seg, uniform float *uniform scores,
                                const uniform int count) {
    for (uniform int g = 0; g < seg.group; g++) {
        uniform float *uniform s = scores + g * NEO_TILE_TOKENS;
        float lane_max = -floatbits(0x7f800000);
        for (uniform int t = 0; t < count; t += programCount) {
            const float x = t + programIndex < count ? s[t + programIndex]
                                                     : -floatbits(0x7f800000);
            s[t + programIndex] = x;
            lane_max = max(lane_max, x);
        }
        const uniform float old_max = seg.max_score[g];
        const uniform float new_max = max(old_max, reduce_max(lane_max));
        float lane_sum = 0.0f;
        for (uniform int t = 0; t < count; t += programCount) {
            const float p = exp2_nonpositive(s[t + programIndex] - new_max);
            s[t + programIndex] = p;
            lane_sum += p;
        }
        const float change = old_max - new_max;
        const uniform float keep = extract(exp2_nonpositive(change), 0);
        seg.sum[g] = seg.sum[g] * keep + reduce_add(lane_sum);
        seg.max_score[g] = new_max;
        if (keep != 1.0f) {
            uniform float *uniform acc = seg.acc + g * seg.head_dim;
            for (uniform int d = 0; d < seg.head_dim; d += programCount)
                acc[d + programIndex] *= keep;
        }
    }
}

// Lane vectors at a time: as many sums as hide the latency of an addition and fit the registers.
#define VECTORS_FOR(heads) ((heads) <= 2 || programCount == 16 ? 4 : 2)

#define KV uint16
#define NAME(f) f##_bf16
#include "segment.isph"
#undef KV
#undef NAME

#define KV uint16
#define NAME(f) f##_fp16
#include "segment.isph"
#undef KV
#undef NAME

#define KV float
#define NAME(f) f##_fp32
#include "segment.isph"
