// A pool of attention threads and all that runs on it, one caller at a time.
#pragma once

#include <chrono>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "attention.h"
#include "kv_copy.h"
#include "thread_pool.h"

namespace neo {

class Context {
  public:
    // cpus: one for each thread, or empty. The last is for whoever calls most: the service.
    Context(int num_threads, const std::vector<int> &cpus, int spin_us);

    int num_threads() const { return pool_.size(); }
    int caller_cpu() const { return caller_cpu_; }
    ThreadPool &pool() { return pool_; }
    // Between the two the pool's threads poll at least so long; begins and ends may overlap.
    void begin_polling(std::chrono::microseconds spin);
    void end_polling();
    // Held by whoever uses the pool.
    std::mutex &turn() { return turn_; }

    void decode(const DecodeBatch &batch);
    void store(const StoreBatch &batch);
    void gather(const KvLayer &layer, uintptr_t block_table, int64_t seq_len, uintptr_t k,
                uintptr_t v);

    // Read memory on all threads and do nothing with it: what attention is measured against.
    void read(uintptr_t address, int64_t num_bytes);

    // Fill memory with zeros on all threads, so that its pages lie near them.
    void touch(uintptr_t address, int64_t num_bytes);

    // For tests: what happens to an exception in a worker.
    void fail_in_worker(const std::string &message);

  private:
    const int caller_cpu_;
    const std::chrono::microseconds idle_spin_;
    std::mutex turn_;
    std::mutex polling_mutex_;
    int num_polling_ = 0;
    ThreadPool pool_;
    DecodeAttention attention_;
};

} // namespace neo
