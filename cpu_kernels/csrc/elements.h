// Element types at run time, and rows of them to and from float32.
#pragma once

#include <cstddef>

namespace neo {

enum class Element { bf16, fp16, fp32 };

constexpr size_t size_of(Element element) {
    return element == Element::fp32 ? 4 : 2;
}

// dst = src * scale, as float32. count is a multiple of 16.
void widen(float *dst, const void *src, Element element, int count, float scale = 1.0f);

// dst = src * scale, rounded to nearest even. count is a multiple of 16.
void narrow(void *dst, Element element, const float *src, int count, float scale = 1.0f);

} // namespace neo
