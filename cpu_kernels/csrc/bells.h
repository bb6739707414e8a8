// Doorbells: 32-bit words through which a device and the service wait for each other.
//
// They count up and wrap around; a wait for a ticket passes from that ticket on, by the sign of the
// difference, as cuStreamWaitValue32 does with CU_STREAM_WAIT_VALUE_GEQ. Raw words and not
// std::atomic, because the other side may be a GPU.
#pragma once

#include <cstdint>

namespace neo {

inline bool reached(uint32_t value, uint32_t ticket) {
    return static_cast<int32_t>(value - ticket) >= 0;
}

// [num_lanes, 2, 16] words, each pair a request and an answer bell on a cache line of its own.
class Bells {
  public:
    explicit Bells(void *words) : words_(static_cast<uint32_t *>(words)) {}

    uint32_t request(int lane) const { return __atomic_load_n(at(lane, 0), __ATOMIC_ACQUIRE); }
    uint32_t answer(int lane) const { return __atomic_load_n(at(lane, 1), __ATOMIC_ACQUIRE); }
    void ring(int lane, uint32_t ticket) {
        __atomic_store_n(at(lane, 0), ticket, __ATOMIC_RELEASE);
    }
    void reply(int lane, uint32_t ticket) {
        __atomic_store_n(at(lane, 1), ticket, __ATOMIC_RELEASE);
    }

  private:
    uint32_t *at(int lane, int which) const { return words_ + (lane * 2 + which) * 16; }

    uint32_t *words_;
};

} // namespace neo
