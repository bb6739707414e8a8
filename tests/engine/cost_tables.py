"""Cost models for scheduler tests: simple ones, and any at all."""

from hypothesis import strategies as st

from engine.cost_model import CostModelKey, StepTables, Table, TableCostModel

KEY = CostModelKey(gpu="g", cpu="c", num_threads=1, model_shape="m", dtype="float32")


def make_cost_model(
    *,
    weights_s: float = 1e-4,
    row_s: float = 1e-6,
    gpu_token_s: float = 1e-7,
    cpu_token_s: float = 1e-6,
    handover_s: float = 1e-6,
    swap_token_s: float = 1e-6,
    fixed_s: float = 1e-4,
    num_layers: int = 3,
) -> TableCostModel:
    tables = StepTables(
        linear=Table([(1, weights_s), (100, weights_s), (200, weights_s + 100 * row_s)]),
        prefill_attention=Table([(0, 0), (1000, gpu_token_s * 100)]),
        gpu_attention=Table([(0, 1e-6), (1000, 1e-6 + 1000 * gpu_token_s)]),
        cpu_attention=Table([(0, 0), (1000, 1000 * cpu_token_s)]),
        swap=Table([(0, 0), (1000, 1000 * swap_token_s)]),
        fixed_step=Table([(0, fixed_s)]),
        handover_s=handover_s,
    )
    return TableCostModel(KEY, num_layers, tables)


SECONDS = st.sampled_from([1e-8, 1e-7, 1e-6, 1e-5, 1e-4, 1e-3])
COST_MODELS = st.builds(
    make_cost_model,
    weights_s=SECONDS,
    row_s=SECONDS,
    gpu_token_s=SECONDS,
    cpu_token_s=SECONDS,
    handover_s=SECONDS,
    swap_token_s=SECONDS,
    fixed_s=SECONDS,
    num_layers=st.integers(1, 4),
)
