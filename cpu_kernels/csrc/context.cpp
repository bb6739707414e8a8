#include "context.h"

#include <algorithm>
#include <chrono>
#include <cstring>
#include <stdexcept>

#include "rows_ispc.h"

namespace neo {

namespace {

char *bytes(uintptr_t address) {
    return reinterpret_cast<char *>(address);
}

} // namespace

Context::Context(int num_threads, const std::vector<int> &cpus, int spin_us)
    : caller_cpu_(cpus.empty() ? -1 : cpus.back()), idle_spin_(spin_us),
      pool_(num_threads, cpus, idle_spin_), attention_(pool_) {}

void Context::begin_polling(std::chrono::microseconds spin) {
    std::lock_guard<std::mutex> lock(polling_mutex_);
    num_polling_++;
    pool_.set_spin(std::max(spin, idle_spin_));
}

void Context::end_polling() {
    std::lock_guard<std::mutex> lock(polling_mutex_);
    if (--num_polling_ == 0)
        pool_.set_spin(idle_spin_);
}

void Context::decode(const DecodeBatch &batch) {
    std::lock_guard<std::mutex> lock(turn_);
    attention_.run(batch);
}

void Context::store(const StoreBatch &batch) {
    std::lock_guard<std::mutex> lock(turn_);
    store_kv(pool_, batch);
}

void Context::gather(const KvLayer &layer, uintptr_t block_table, int64_t seq_len, uintptr_t k,
                     uintptr_t v) {
    std::lock_guard<std::mutex> lock(turn_);
    gather_kv(pool_, layer, reinterpret_cast<const int32_t *>(block_table), seq_len, bytes(k),
              bytes(v));
}

void Context::read(uintptr_t address, int64_t num_bytes) {
    constexpr int64_t chunk = 256 << 10;
    std::lock_guard<std::mutex> lock(turn_);
    pool_.for_each((num_bytes + chunk - 1) / chunk, [&](int64_t i) {
        const int64_t size = std::min(chunk, num_bytes - i * chunk);
        const char *first = bytes(address) + i * chunk;
        ispc::read_words(reinterpret_cast<const int32_t *>(first), size / 4);
    });
}

// Chunks begin where huge pages do: two threads in one page would make it twice.
void Context::touch(uintptr_t address, int64_t num_bytes) {
    constexpr int64_t page = 2 << 20;
    const int64_t skew = int64_t(address % page);
    std::lock_guard<std::mutex> lock(turn_);
    pool_.for_each((skew + num_bytes + page - 1) / page, [&](int64_t i) {
        const int64_t begin = std::max<int64_t>(0, i * page - skew);
        const int64_t end = std::min(num_bytes, (i + 1) * page - skew);
        std::memset(bytes(address) + begin, 0, end - begin);
    });
}

void Context::fail_in_worker(const std::string &message) {
    std::lock_guard<std::mutex> lock(turn_);
    pool_.for_each(100, [&](int64_t i) {
        if (i == 7)
            throw std::runtime_error(message);
    });
}

} // namespace neo
