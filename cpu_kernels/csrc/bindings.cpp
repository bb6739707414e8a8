// The Python border: addresses and sizes in, exceptions out. Every call drops the GIL.
//
// Shapes, types and strides are checked by the Python side; lengths and block ids by the C++ side.
#include <chrono>
#include <mutex>
#include <stdexcept>
#include <string>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "attention.h"
#include "kv_copy.h"
#include "rows_ispc.h"

namespace py = pybind11;

namespace {

void *pointer(uintptr_t address) {
    return reinterpret_cast<void *>(address);
}

// A pool and what runs on it. Callers from several Python threads take turns.
class Context {
  public:
    Context(int num_threads, const std::vector<int> &cpus, int spin_us)
        : pool_(num_threads, cpus, std::chrono::microseconds(spin_us)), attention_(pool_) {}

    int num_threads() const { return pool_.size(); }

    void decode(const neo::DecodeBatch &batch) {
        std::lock_guard<std::mutex> lock(mutex_);
        attention_.run(batch);
    }

    void store(const neo::StoreBatch &batch) {
        std::lock_guard<std::mutex> lock(mutex_);
        neo::store_kv(pool_, batch);
    }

    void gather(const neo::KvLayer &layer, uintptr_t block_table, int64_t seq_len, uintptr_t k,
                uintptr_t v) {
        std::lock_guard<std::mutex> lock(mutex_);
        neo::gather_kv(pool_, layer, static_cast<const int32_t *>(pointer(block_table)), seq_len,
                       pointer(k), pointer(v));
    }

    // Read memory on all threads and do nothing with it: what attention is measured against.
    void read(uintptr_t address, int64_t num_bytes) {
        constexpr int64_t chunk = 256 << 10;
        std::lock_guard<std::mutex> lock(mutex_);
        pool_.for_each((num_bytes + chunk - 1) / chunk, [&](int64_t i) {
            const int64_t bytes = std::min(chunk, num_bytes - i * chunk);
            const char *first = static_cast<const char *>(pointer(address)) + i * chunk;
            ispc::read_words(reinterpret_cast<const int32_t *>(first), bytes / 4);
        });
    }

    // For tests: what happens to an exception in a worker.
    void fail_in_worker(const std::string &message) {
        std::lock_guard<std::mutex> lock(mutex_);
        pool_.for_each(100, [&](int64_t i) {
            if (i == 7)
                throw std::runtime_error(message);
        });
    }

  private:
    std::mutex mutex_;
    neo::ThreadPool pool_;
    neo::DecodeAttention attention_;
};

neo::KvLayer make_layer(uintptr_t k, uintptr_t v, neo::Element element, int64_t num_blocks,
                        int num_kv_heads, int head_dim, int block_size) {
    return {pointer(k), pointer(v), element, num_blocks, num_kv_heads, head_dim, block_size};
}

neo::Rows make_rows(uintptr_t data, int64_t stride) {
    return {pointer(data), stride};
}

neo::DecodeBatch make_decode(const neo::KvLayer &layer, const neo::Rows &out, const neo::Rows &q,
                             const neo::Rows &k, const neo::Rows &v, neo::Element element,
                             uintptr_t block_tables, int64_t block_tables_stride, int max_blocks,
                             uintptr_t seq_lens, int num_seqs, int num_q_heads,
                             float softmax_scale) {
    return {layer,
            out,
            q,
            k,
            v,
            element,
            static_cast<const int32_t *>(pointer(block_tables)),
            block_tables_stride,
            max_blocks,
            static_cast<const int32_t *>(pointer(seq_lens)),
            num_seqs,
            num_q_heads,
            softmax_scale};
}

neo::StoreBatch make_store(const neo::KvLayer &layer, const neo::Rows &k, const neo::Rows &v,
                           neo::Element element, uintptr_t slot_mapping, int64_t num_tokens) {
    return {layer, k, v, element, static_cast<const int64_t *>(pointer(slot_mapping)), num_tokens};
}

} // namespace

PYBIND11_MODULE(_native, module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::enum_<neo::Element>(module, "Element")
        .value("bf16", neo::Element::bf16)
        .value("fp16", neo::Element::fp16)
        .value("fp32", neo::Element::fp32);
    py::class_<neo::KvLayer>(module, "KvLayer")
        .def(py::init(&make_layer), py::kw_only(), py::arg("k"), py::arg("v"), py::arg("element"),
             py::arg("num_blocks"), py::arg("num_kv_heads"), py::arg("head_dim"),
             py::arg("block_size"));
    py::class_<neo::Rows>(module, "Rows")
        .def(py::init(&make_rows), py::arg("data"), py::arg("stride"));
    py::class_<neo::DecodeBatch>(module, "DecodeBatch")
        .def(py::init(&make_decode), py::kw_only(), py::arg("layer"), py::arg("out"), py::arg("q"),
             py::arg("k"), py::arg("v"), py::arg("element"), py::arg("block_tables"),
             py::arg("block_tables_stride"), py::arg("max_blocks"), py::arg("seq_lens"),
             py::arg("num_seqs"), py::arg("num_q_heads"), py::arg("softmax_scale"));
    py::class_<neo::StoreBatch>(module, "StoreBatch")
        .def(py::init(&make_store), py::kw_only(), py::arg("layer"), py::arg("k"), py::arg("v"),
             py::arg("element"), py::arg("slot_mapping"), py::arg("num_tokens"));
    py::class_<Context>(module, "Context")
        .def(py::init<int, const std::vector<int> &, int>(), py::arg("num_threads"),
             py::arg("cpus"), py::arg("spin_us"))
        .def_property_readonly("num_threads", &Context::num_threads)
        .def("decode", &Context::decode, release())
        .def("store", &Context::store, release())
        .def("gather", &Context::gather, release())
        .def("read", &Context::read, release())
        .def("fail_in_worker", &Context::fail_in_worker, release());
}
