// The little that these tests need of a test framework.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

inline void check(bool passed, const char *what, const char *file, int line) {
    if (passed)
        return;
    std::fprintf(stderr, "%s:%d: failed: %s\n", file, line, what);
    std::exit(1);
}

#define CHECK(condition) check((condition), #condition, __FILE__, __LINE__)

// What an expression throws as E, which it must.
#define MESSAGE_OF(E, ...)                                                                         \
    [&]() -> std::string {                                                                         \
        try {                                                                                      \
            __VA_ARGS__;                                                                           \
        } catch (const E &error) {                                                                 \
            return error.what();                                                                   \
        }                                                                                          \
        check(false, #__VA_ARGS__ " throws " #E, __FILE__, __LINE__);                              \
        return {};                                                                                 \
    }()

inline bool starts_with(const std::string &text, const std::string &start) {
    return text.compare(0, start.size(), start) == 0;
}

void test_thread_pool();
void test_service();
void test_service_failures();
