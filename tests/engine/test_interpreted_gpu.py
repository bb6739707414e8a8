"""The CUDA backend serves as the CPU backend does, as far as can be seen without a GPU."""

from typing import Any

import pytest

from tests.engine.interpreted_gpu import CASES, OWN_LINEAR_CASES
from tests.engine.tiny_models import make_tiny_model
from tests.json_lines import interpreted_json_lines

pytestmark = pytest.mark.ispc


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("qwen")
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    make_tiny_model("qwen3", folder, num_hidden_layers=2, **heads)
    other = tmp_path_factory.mktemp("llama")
    sizes = {"hidden_size": 256, "intermediate_size": 256, "head_dim": 128}
    make_tiny_model("llama-bias", other, num_hidden_layers=3, **heads, **sizes)
    lines = interpreted_json_lines("tests.engine.interpreted_gpu", str(folder), str(other))
    return {line["case"]: line for line in lines}


@pytest.mark.parametrize("case", CASES)
def test_tokens_are_those_of_the_cpu_backend(results: dict[str, Any], case: str) -> None:
    result = results[case]
    assert result["got"] == result["expected"]
    _, options = CASES[case]
    assert options["mode"].replace("-", "_") in result["modes"]
    assert (result["swapped_blocks"] > 0) == (options["mode"] == "overlap")
    assert (result["direct_launches"] > 0) == ("pcie_attention" in options)


@pytest.mark.parametrize("case", OWN_LINEAR_CASES)
def test_own_linear_layers_give_the_same_tokens(results: dict[str, Any], case: str) -> None:
    assert results[case]["got"] == results[case]["expected"]
    assert results[case]["fused_launches"] > 0
