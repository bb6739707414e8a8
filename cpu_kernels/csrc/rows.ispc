// Work on whole rows: conversion to and from float32, merging of segments, plain reading.
#include "elements.isph"

#define CONVERSIONS(NAME, T)                                                                       \
    export void widen_##NAME(uniform float *uniform dst, const uniform T *uniform src,             \
                             const uniform int count, const uniform float scale) {                 \
        for (uniform int i = 0; i < count; i += programCount)                                      \
            dst[i + programIndex] = load_##NAME(src + i) * scale;                                  \
    }                                                                                              \
    export void narrow_##NAME(uniform T *uniform dst, const uniform float *uniform src,            \
                              const uniform int count, const uniform float scale) {                \
        for (uniform int i = 0; i < count; i += programCount)                                      \
            store_##NAME(dst + i, src[i + programIndex] * scale);                                  \
    }

// dst = src * scale; count is a multiple of 16.
CONVERSIONS(bf16, uint16)
CONVERSIONS(fp16, uint16)
CONVERSIONS(fp32, float)

// 2^x, any x <= 0, for a handful of values: accuracy matters here, speed does not.
static inline uniform float exp2_uniform(const uniform float x) {
    return exp(x * 0.6931471805599453f);
}

// out[d] = sum over segments of their acc, each weighed by its share of the softmax sum.
// Segment s has acc + s * stride, max_score[s * stride], sum[s * stride].
export void merge_segments(uniform float *uniform out, const uniform float *uniform acc,
                           const uniform float *uniform max_score, const uniform float *uniform sum,
                           const uniform int num_segments, const uniform int64 stride,
                           const uniform int head_dim) {
    uniform float top = max_score[0];
    for (uniform int s = 1; s < num_segments; s++)
        top = max(top, max_score[s * stride]);
    uniform float total = 0.0f;
    for (uniform int d = 0; d < head_dim; d += programCount)
        out[d + programIndex] = 0.0f;
    for (uniform int s = 0; s < num_segments; s++) {
        const uniform float weight = exp2_uniform(max_score[s * stride] - top);
        total += weight * sum[s * stride];
        for (uniform int d = 0; d < head_dim; d += programCount)
            out[d + programIndex] += weight * acc[s * stride + d + programIndex];
    }
    const uniform float scale = 1.0f / total;
    for (uniform int d = 0; d < head_dim; d += programCount)
        out[d + programIndex] *= scale;
}

// Read memory as fast as plain loads go; the result only keeps the loads alive.
export uniform int32 read_words(const uniform int32 *uniform src, const uniform int64 count) {
    int32 a = 0, b = 0, c = 0, d = 0;
    for (uniform int64 i = 0; i + 4 * programCount <= count; i += 4 * programCount) {
        const uniform int32 *uniform p = src + i;
        a ^= p[programIndex];
        b ^= p[programCount + programIndex];
        c ^= p[2 * programCount + programIndex];
        d ^= p[3 * programCount + programIndex];
    }
    return reduce_add(a ^ b ^ c ^ d);
}
