#include "elements.h"

#include <cstdint>

#include "rows_ispc.h"

namespace neo {

void widen(float *dst, const void *src, Element element, int count, float scale) {
    switch (element) {
    case Element::bf16:
        return ispc::widen_bf16(dst, static_cast<const uint16_t *>(src), count, scale);
    case Element::fp16:
        return ispc::widen_fp16(dst, static_cast<const uint16_t *>(src), count, scale);
    case Element::fp32:
        return ispc::widen_fp32(dst, static_cast<const float *>(src), count, scale);
    }
}

void narrow(void *dst, Element element, const float *src, int count, float scale) {
    switch (element) {
    case Element::bf16:
        return ispc::narrow_bf16(static_cast<uint16_t *>(dst), src, count, scale);
    case Element::fp16:
        return ispc::narrow_fp16(static_cast<uint16_t *>(dst), src, count, scale);
    case Element::fp32:
        return ispc::narrow_fp32(static_cast<float *>(dst), src, count, scale);
    }
}

} // namespace neo
