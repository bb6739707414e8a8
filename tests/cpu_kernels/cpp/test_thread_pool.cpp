#include <atomic>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "check.h"
#include "thread_pool.h"

using neo::ThreadPool;
using std::chrono::microseconds;

namespace {

void every_index_once(int num_threads, microseconds spin) {
    ThreadPool pool(num_threads, {}, spin);
    CHECK(pool.size() == num_threads);
    for (int round = 0; round < 500; round++) {
        // Plain ints: a race between jobs, or with the caller, is for ThreadSanitizer to find.
        std::vector<int> done(round % 37);
        pool.for_each(int64_t(done.size()), [&](int64_t i) { done[i]++; });
        CHECK(std::accumulate(done.begin(), done.end(), 0) == round % 37);
        if (round % 100 == 50)
            pool.set_spin(microseconds(round));
    }
}

void first_exception_reaches_the_caller(int num_threads) {
    ThreadPool pool(num_threads, {}, microseconds(10));
    for (int round = 0; round < 100; round++) {
        std::atomic<int> done{0};
        const std::string message =
            MESSAGE_OF(std::runtime_error, pool.for_each(1000, [&](int64_t i) {
                if (i == 3)
                    throw std::runtime_error("on purpose");
                done++;
            }));
        CHECK(message == "on purpose");
        CHECK(done < 1000);
        done = 0;
        pool.for_each(10, [&](int64_t) { done++; });
        CHECK(done == 10);
    }
}

void ends_while_threads_sleep_or_spin() {
    for (int spin : {0, 10, 100'000}) {
        ThreadPool idle(3, {}, microseconds(spin));
        ThreadPool used(3, {}, microseconds(spin));
        used.for_each(5, [](int64_t) {});
    }
}

} // namespace

void test_thread_pool() {
    for (int num_threads : {1, 2, 4})
        for (int spin : {0, 50})
            every_index_once(num_threads, microseconds(spin));
    for (int num_threads : {1, 3})
        first_exception_reaches_the_caller(num_threads);
    ends_while_threads_sleep_or_spin();
}
