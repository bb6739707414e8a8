"""NEO's logits for a whole token list, prefilled in chunks and then decoded token by token."""

from dataclasses import replace
from pathlib import Path

import torch

from engine.backends import make_backend
from engine.batch_builder import BatchBuilder
from engine.checkpoint import open_checkpoint
from engine.kv_blocks import BlockPool
from engine.model_config import ModelConfig
from engine.models import DecoderModel, load_weights
from engine.models.weights import allocate_weights
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.step_plan import ScheduledRequest, SubBatch


def neo_logits(
    folder: Path, tokens: list[int], num_prompt: int, chunk: int, dtype: torch.dtype, device: str
) -> torch.Tensor:
    """Return logits after each token, `[len(tokens), vocab_size]`, float32, on the CPU."""
    checkpoint = open_checkpoint(folder)
    config = ModelConfig.from_hf(checkpoint.config)
    total = len(tokens)
    backend = make_backend(torch.device(device), 2)
    weights = allocate_weights(config, dtype, backend.device)
    load_weights(weights, checkpoint.tensors(backend.device))
    model = DecoderModel(config, weights, backend, max_model_len=total)
    pool = BlockPool(-(-total // 16) + 3, 16)
    backend.allocate_kv_cache(model.attention_shape(16), pool.num_blocks)
    builder = BatchBuilder(backend.device, pool)
    request = Request(
        request_id="r", prompt_token_ids=tokens, params=SamplingParams(), max_total_tokens=total
    )
    pool.grow("r", total)
    rows = []
    steps = [(at, min(chunk, num_prompt - at)) for at in range(0, num_prompt, chunk)]
    for start, num_tokens in steps + [(at, 1) for at in range(num_prompt, total)]:
        share = ScheduledRequest(request, start, num_tokens)
        is_decode = start >= num_prompt
        sub_batch = SubBatch(gdec=[share]) if is_decode else SubBatch(gprf=[share])
        wanted = torch.arange(num_tokens, device=backend.device)
        batch = replace(builder.build(sub_batch), logits_rows=wanted)
        backend.begin_step([batch])
        rows.append(model.forward([batch]).float().cpu())
        backend.end_step()
    backend.close()
    return torch.cat(rows)
