"""From GGUF tensors to Hugging Face's: names, row order and element type."""

import re
from typing import TYPE_CHECKING

import numpy as np
from gguf import GGMLQuantizationType, dequantize
from numpy.typing import NDArray

from engine.checkpoint.gguf_file import GGUFFile
from engine.errors import CheckpointError

if TYPE_CHECKING:  # see `engine.checkpoint.checkpoint`
    import torch

GLOBAL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Rotary tables: what they say is in the config.
IGNORED = re.compile(r"rope_freqs\.weight|blk\.\d+\.attn_rot_embd(\.weight)?")


def hugging_face_names(file: GGUFFile) -> dict[str, str]:
    """Return the GGUF name of each tensor by its Hugging Face name, in the file's order.

    Raises:
        CheckpointError: A tensor is none that the supported architectures have.
    """
    names = {}
    for name in file.tensors:
        if IGNORED.fullmatch(name):
            continue
        if (translated := _translate(name)) is None:
            raise CheckpointError(
                f"{file.path}: the tensor {name} belongs to no supported architecture"
            )
        names[translated] = name
    return names


def _translate(name: str) -> str | None:
    stem, _, kind = name.rpartition(".")
    if kind not in ("weight", "bias"):
        return None
    if stem in GLOBAL_NAMES:
        return f"{GLOBAL_NAMES[stem]}.{kind}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in LAYER_NAMES:
        return None
    return f"model.layers.{match[1]}.{LAYER_NAMES[match[2]]}.{kind}"


def read_gguf_tensor(file: GGUFFile, name: str, num_permuted_heads: int | None) -> "torch.Tensor":
    """Read one tensor.

    Args:
        file: Where from.
        name: Its GGUF name.
        num_permuted_heads: For Q and K of `llama` files, the number of heads: their rows are
            brought back to Hugging Face's order. None for all others.

    Returns:
        A CPU tensor of its own memory; float16 and bfloat16 as stored, all else float32.

    Raises:
        CheckpointError: The quantisation type is unknown to the `gguf` package, or the number of
            heads does not fit.
    """
    import torch  # noqa: PLC0415 (heavy; opening a file needs none of it)

    tensor, rows = file.tensors[name], file.rows(name)
    if len(tensor.shape) == 1 and num_permuted_heads:  # a bias: one element a row
        rows = rows.reshape(tensor.shape[0], -1)
    if num_permuted_heads:
        if rows.shape[0] % (2 * num_permuted_heads):
            raise CheckpointError(
                f"{file.path}: {rows.shape[0]} rows of tensor {name} do not divide into "
                f"{num_permuted_heads} heads of even size"
            )
        rows = rows[hugging_face_row_order(rows.shape[0], num_permuted_heads)]
    if tensor.quant_type == GGMLQuantizationType.F16:
        return torch.from_numpy(rows.view(np.float16).copy()).view(tensor.shape)
    if tensor.quant_type == GGMLQuantizationType.BF16:
        raw = torch.from_numpy(rows.view(np.int16).copy())
        return raw.view(torch.bfloat16).view(tensor.shape)
    try:
        values = dequantize(rows, tensor.quant_type)
    except NotImplementedError as error:
        raise CheckpointError(
            f"{file.path}: tensor {name} is stored as {tensor.quant_type.name}, which the gguf "
            "package cannot dequantise"
        ) from error
    # F32 comes back as a view of the file, which must not leak out as a writable tensor.
    owned = values.copy() if tensor.quant_type == GGMLQuantizationType.F32 else values
    return torch.from_numpy(owned).view(tensor.shape)


def hugging_face_row_order(num_rows: int, num_heads: int) -> NDArray[np.intp]:
    """Return the index of the stored row for each row of a Q or K projection, `[num_rows]`.

    llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head; so its converter
    interleaves the halves of each head, which this undoes.
    """
    head_dim = num_rows // num_heads
    order = np.arange(num_rows).reshape(num_heads, head_dim // 2, 2)
    return order.swapaxes(1, 2).reshape(num_rows)
