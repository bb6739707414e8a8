// The Python border: addresses and sizes in, exceptions out. Every call drops the GIL.
//
// Shapes, types and strides are checked by the Python side; lengths and block ids by the C++ side.
#include <memory>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"

namespace py = pybind11;

namespace {

using neo::pointer;

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
    py::class_<neo::Context, std::shared_ptr<neo::Context>>(module, "Context")
        .def(py::init<int, const std::vector<int> &, int>(), py::arg("num_threads"),
             py::arg("cpus"), py::arg("spin_us"))
        .def_property_readonly("num_threads", &neo::Context::num_threads)
        .def("decode", &neo::Context::decode, release())
        .def("store", &neo::Context::store, release())
        .def("gather", &neo::Context::gather, release())
        .def("read", &neo::Context::read, release())
        .def("touch", &neo::Context::touch, release())
        .def("fail_in_worker", &neo::Context::fail_in_worker, release());
    neo::bind_service(module);
}
