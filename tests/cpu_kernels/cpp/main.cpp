// Tests of the thread pool and the attention service without Python and without the kernels, to be
// built with sanitizers: `make sanitize`.
#include <cstdio>

#include "check.h"

int main() {
    test_thread_pool();
    test_service();
    test_service_failures();
    std::puts("thread pool and attention service: passed");
}
