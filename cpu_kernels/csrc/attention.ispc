// The arithmetic of paged decode attention: one segment of one request under one KV head.
//
// Lanes run over tokens for scores (K is transposed inside its block) and over head_dim for the
// weighted sum of V, so neither pass needs a reduction across lanes. Each K and V byte comes from
// memory once; all query heads of the KV head use it while it is in the first-level cache.
#include "elements.isph"
#include "shapes.h"
#include "sums.isph"

// What one call works on. Pointers to the cache are to its first element for the first KV head.
struct Segment {
    const int32 *block_table; // of the whole request
    int64 block_stride;       // elements from one block to the next, of K and of V
    int32 block_size;
    int32 block_shift; // its logarithm
    int32 head_dim;
    int32 group;       // query heads of each KV head
    int32 num_heads;   // KV heads
    int32 token_begin; // a multiple of NEO_TILE_TOKENS
    int32 token_end;   // > token_begin
    int32 append;      // position to write k_new and v_new to, or -1
    float *q;          // [num_heads, group, head_dim], times softmax_scale * log2(e)
    // Out, of each KV head: acc [group, head_dim], the sum of 2^(score - max) * V;
    // max [group]; sum [group] of 2^(score - max).
    float *partial;
};

// The part of a segment under one KV head; the same names.
struct Head {
    int32 block_size;
    int32 block_shift;
    int32 head_dim;
    int32 group;
    float *q;
    float *acc;
    float *max_score;
    float *sum;
};

static inline void select_head(uniform Segment &seg, const uniform int h, uniform Head &head) {
    const uniform int acc_size = seg.group * seg.head_dim;
    head.block_size = seg.block_size;
    head.block_shift = seg.block_shift;
    head.head_dim = seg.head_dim;
    head.group = seg.group;
    head.q = seg.q + h * acc_size;
    head.acc = seg.partial + h * (acc_size + 2 * seg.group);
    head.max_score = head.acc + acc_size;
    head.sum = head.max_score + seg.group;
}

static inline void clear_heads(uniform Segment &seg) {
    uniform Head head;
    for (uniform int h = 0; h < seg.num_heads; h++) {
        select_head(seg, h, head);
        for (uniform int d = 0; d < seg.group * seg.head_dim; d += programCount)
            head.acc[d + programIndex] = 0.0f;
        for (uniform int g = 0; g < seg.group; g++) {
            head.max_score[g] = -floatbits(0x7f800000);
            head.sum[g] = 0.0f;
        }
    }
}

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

// Position in the tile of the token whose score is at index i: 16 tokens are kept as 8 even ones,
// then 8 odd ones, if lane vectors were read in pairs.
#define TOKEN_AT(i) (PAIRED ? ((i) & ~15) + ((i) & 7) * 2 + (((i) >> 3) & 1) : (i))

// Turn the tile's scores into weights, update each head's maximum and sum, rescale acc.
static inline void softmax_tile(const uniform bool PAIRED, uniform Head &head,
                                uniform float *uniform scores, const uniform int count,
                                const uniform int padded) {
    for (uniform int g = 0; g < head.group; g++) {
        uniform float *uniform s = scores + g * NEO_TILE_TOKENS;
        float lane_max = -floatbits(0x7f800000);
        for (uniform int t = 0; t < padded; t += programCount) {
            const int i = t + programIndex;
            const float x = TOKEN_AT(i) < count ? s[t + programIndex] : -floatbits(0x7f800000);
            s[t + programIndex] = x;
            lane_max = max(lane_max, x);
        }
        const uniform float old_max = head.max_score[g];
        const uniform float new_max = max(old_max, reduce_max(lane_max));
        float lane_sum = 0.0f;
        for (uniform int t = 0; t < padded; t += programCount) {
            const float p = exp2_nonpositive(s[t + programIndex] - new_max);
            s[t + programIndex] = p;
            lane_sum += p;
        }
        const float change = old_max - new_max;
        const uniform float keep = extract(exp2_nonpositive(change), 0);
        head.sum[g] = head.sum[g] * keep + reduce_add(lane_sum);
        head.max_score[g] = new_max;
        if (keep != 1.0f) {
            uniform float *uniform acc = head.acc + g * head.head_dim;
            for (uniform int d = 0; d < head.head_dim; d += programCount)
                acc[d + programIndex] *= keep;
        }
    }
}

// Put acc, kept as even and odd elements wherever two lane vectors were read, in order.
static inline void unpair_heads(uniform Segment &seg) {
    uniform Head head;
    for (uniform int h = 0; h < seg.num_heads; h++) {
        select_head(seg, h, head);
        for (uniform int g = 0; g < seg.group; g++) {
            uniform float *uniform acc = head.acc + g * seg.head_dim;
            for (uniform int d = 0; d + 2 * programCount <= seg.head_dim; d += 2 * programCount) {
                const float even = acc[d + programIndex];
                const float odd = acc[d + programCount + programIndex];
                const int lane = (programIndex >> 1) + (programIndex & 1) * programCount;
                acc[d + programIndex] = shuffle(even, odd, lane);
                acc[d + programCount + programIndex] = shuffle(even, odd, lane + programCount / 2);
            }
        }
    }
}

// Query heads at a time, at most, and lane vectors with them: as many sums as hide the latency of
// an addition and fit the registers. More heads convert each K and V element less often.
#define HEADS_AT_ONCE (programCount == 16 ? 8 : 4)
#define VECTORS_FOR(heads) ((heads) <= 2 || (programCount == 16 && (heads) <= 4) ? 4 : 2)

// With 16 lanes a pair of K vectors would be longer than the smallest block.
#define KV uint16
#define NAME(f) f##_bf16
#define K_PAIRED (programCount == 8)
#define V_PAIRED true
#include "segment.isph"
#undef KV
#undef NAME
#undef K_PAIRED
#undef V_PAIRED

#define K_PAIRED false
#define V_PAIRED false
#define KV uint16
#define NAME(f) f##_fp16
#include "segment.isph"
#undef KV
#undef NAME

#define KV float
#define NAME(f) f##_fp32
#include "segment.isph"
