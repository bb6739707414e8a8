// The Python border of the attention service. Calls that may wait drop the GIL.
#include <atomic>
#include <chrono>
#include <cstring>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "bindings.h"
#include "service.h"

namespace py = pybind11;

namespace neo {

namespace {

using Seconds = std::chrono::duration<double>;

// A service on a context's pool. Its steps let the pool's threads poll as long as it does.
class ContextService {
  public:
    ContextService(std::shared_ptr<Context> context, const ServiceShape &shape, uintptr_t bells,
                   double timeout_s, int spin_us, std::shared_ptr<StepQueue> queue)
        : context_(std::move(context)), lanes_(make_lanes(*context_, shape.num_lanes)),
          spin_(spin_us), service_(shape, Bells(pointer(bells)), attention(),
                                   {Seconds(timeout_s), spin_, context_->caller_cpu(), queue}) {}

    ~ContextService() { end_polling(); }

    void begin_step(Step &step) {
        service_.begin_step(std::move(step));
        if (!polling_.exchange(true))
            context_->begin_polling(spin_);
    }

    // times: room for [num_layers, num_lanes of the step] AnswerTimes.
    StepReport end_step(std::optional<double> timeout_s, uintptr_t times) {
        std::optional<Seconds> limit;
        if (timeout_s)
            limit = Seconds(*timeout_s);
        struct EndPolling {
            ContextService &service;
            ~EndPolling() { service.end_polling(); }
        } end_polling{*this};
        StepReport report = service_.end_step(limit);
        std::memcpy(pointer(times), report.times.data(), report.times.size() * sizeof(AnswerTimes));
        return report;
    }

    uint32_t first_ticket(int lane) const { return service_.first_ticket(lane); }
    void ring(int lane, uint32_t ticket) { service_.ring(lane, ticket); }
    void wait(int lane, uint32_t ticket) { service_.wait(lane, ticket); }
    void abort_step(const std::string &reason) { service_.abort_step(reason); }
    void close() { service_.close(); }

  private:
    void end_polling() {
        if (polling_.exchange(false))
            context_->end_polling();
    }

    static std::vector<std::unique_ptr<DecodeAttention>> make_lanes(Context &context, int count) {
        std::vector<std::unique_ptr<DecodeAttention>> lanes;
        for (int lane = 0; lane < count; lane++)
            lanes.push_back(std::make_unique<DecodeAttention>(context.pool()));
        return lanes;
    }

    LaneAttention attention() {
        return {[this](int lane, const DecodeBatch &batch) { lanes_[lane]->prepare(batch); },
                [this](int lane, const DecodeBatch &batch) { lanes_[lane]->compute(batch); },
                &context_->turn()};
    }

    std::shared_ptr<Context> context_;
    std::vector<std::unique_ptr<DecodeAttention>> lanes_;
    const std::chrono::microseconds spin_;
    std::atomic<bool> polling_{false};
    Service service_; // last: its threads use the rest
};

ServiceShape make_shape(int num_layers, int num_lanes, int max_rows, int num_q_heads,
                        int num_kv_heads, int head_dim, Element element, uintptr_t rows,
                        uintptr_t out) {
    return {num_layers, num_lanes, max_rows,      num_q_heads, num_kv_heads,
            head_dim,   element,   pointer(rows), pointer(out)};
}

Step make_step(const KvLayer &first_layer, float softmax_scale) {
    return {first_layer, {}, softmax_scale};
}

void add_lane(Step &step, uintptr_t block_tables, int64_t stride, int max_blocks,
              uintptr_t seq_lens, int num_seqs) {
    const auto *tables = static_cast<const int32_t *>(pointer(block_tables));
    const auto *lens = static_cast<const int32_t *>(pointer(seq_lens));
    StepLane &lane = step.lanes.emplace_back();
    lane.max_blocks = max_blocks;
    lane.seq_lens.assign(lens, lens + num_seqs);
    lane.block_tables.reserve(size_t(num_seqs) * max_blocks);
    for (int64_t seq = 0; seq < num_seqs; seq++)
        lane.block_tables.insert(lane.block_tables.end(), tables + seq * stride,
                                 tables + seq * stride + max_blocks);
}

// ServiceError as the class of that name which Python code catches.
void translate(std::exception_ptr error) {
    try {
        std::rethrow_exception(error);
    } catch (const ServiceError &failure) {
        const auto errors = py::module_::import("cpu_kernels.errors");
        PyErr_SetString(errors.attr("ServiceError").ptr(), failure.what());
    }
}

} // namespace

void bind_service(py::module_ &module) {
    using release = py::call_guard<py::gil_scoped_release>;
    py::register_local_exception_translator(&translate);
    py::class_<ServiceShape>(module, "ServiceShape")
        .def(py::init(&make_shape), py::kw_only(), py::arg("num_layers"), py::arg("num_lanes"),
             py::arg("max_rows"), py::arg("num_q_heads"), py::arg("num_kv_heads"),
             py::arg("head_dim"), py::arg("element"), py::arg("rows"), py::arg("out"));
    py::class_<Step>(module, "Step")
        .def(py::init(&make_step), py::kw_only(), py::arg("first_layer"), py::arg("softmax_scale"))
        .def("add_lane", &add_lane, py::kw_only(), py::arg("block_tables"), py::arg("stride"),
             py::arg("max_blocks"), py::arg("seq_lens"), py::arg("num_seqs"));
    py::class_<StepReport>(module, "StepReport")
        .def_readonly("attention_s", &StepReport::attention_s)
        .def_readonly("waiting_s", &StepReport::waiting_s)
        .def_readonly("handover_s", &StepReport::handover_s)
        .def_readonly("wall_s", &StepReport::wall_s);
    py::class_<StepQueue, std::shared_ptr<StepQueue>>(module, "StepQueue").def(py::init<>());
    py::class_<ContextService>(module, "Service")
        .def(py::init<std::shared_ptr<Context>, const ServiceShape &, uintptr_t, double, int,
                      std::shared_ptr<StepQueue>>(),
             py::kw_only(), py::arg("context"), py::arg("shape"), py::arg("bells"),
             py::arg("timeout_s"), py::arg("spin_us"), py::arg("queue"))
        .def("begin_step", &ContextService::begin_step, release())
        .def("first_ticket", &ContextService::first_ticket, release())
        .def("ring", &ContextService::ring)
        .def("wait", &ContextService::wait, release())
        .def("end_step", &ContextService::end_step, release())
        .def("abort_step", &ContextService::abort_step, release())
        .def("close", &ContextService::close, release());
}

} // namespace neo
