// What the two files of bindings share.
#pragma once

#include <cstdint>

#include <pybind11/pybind11.h>

#include "context.h"

namespace neo {

inline void *pointer(uintptr_t address) {
    return reinterpret_cast<void *>(address);
}

// Add the attention service to the module.
void bind_service(pybind11::module_ &module);

} // namespace neo
