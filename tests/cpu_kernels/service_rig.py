"""A small model's worth of pools, and a CPU device that drives the attention service over them."""

import torch

from cpu_kernels.attention import CpuAttention
from cpu_kernels.checks import host_kv_shapes
from cpu_kernels.service import AttentionService
from cpu_kernels.step import Lane, StepReport

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 8, 2, 64, 16
ROW_SIZE = (NUM_Q_HEADS + 2 * NUM_KV_HEADS) * HEAD_DIM
NUM_BLOCKS = 128


class ServiceRig:
    """Lanes of requests in shuffled blocks; each lane's rows are drawn anew for each layer."""

    def __init__(
        self,
        attention: CpuAttention,
        *,
        seq_lens: list[list[int]] | None = None,
        num_layers: int = 4,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype = torch.bfloat16,
        first_bell: int = 0,
        timeout_s: float = 30.0,
        spin_us: int | None = None,
    ) -> None:
        seq_lens = [[5, 40], [17]] if seq_lens is None else seq_lens
        self.attention = attention
        self.num_layers = num_layers
        self.generator = torch.Generator().manual_seed(0)
        k_shape, v_shape = host_kv_shapes(NUM_BLOCKS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
        self.k_pool = self.random(num_layers, *k_shape).to(cache_dtype)
        self.v_pool = self.random(num_layers, *v_shape).to(cache_dtype)
        max_rows = max(len(lens) for lens in seq_lens) + 1
        self.rows = torch.full((len(seq_lens), max_rows, ROW_SIZE), torch.nan, dtype=dtype)
        self.out = torch.full((len(seq_lens), max_rows, NUM_Q_HEADS * HEAD_DIM), 7, dtype=dtype)
        self.bells = torch.full((len(seq_lens), 2, 16), first_bell, dtype=torch.int32)
        self.lanes = self.make_lanes(seq_lens)
        self.service = AttentionService(
            attention,
            num_layers=num_layers,
            num_q_heads=NUM_Q_HEADS,
            num_kv_heads=NUM_KV_HEADS,
            head_dim=HEAD_DIM,
            rows=self.rows,
            out=self.out,
            bells=self.bells,
            timeout_s=timeout_s,
            spin_us=spin_us,
        )

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator)

    def make_lanes(self, seq_lens: list[list[int]]) -> list[Lane]:
        """Every request has blocks of its own, one past its last token too."""
        blocks = torch.randperm(NUM_BLOCKS, generator=self.generator, dtype=torch.int32).tolist()
        lanes = []
        for lens in seq_lens:
            tables = torch.full((len(lens), max(lens) // BLOCK_SIZE + 2), -1, dtype=torch.int32)
            for table, seq_len in zip(tables, lens, strict=True):
                for i in range(seq_len // BLOCK_SIZE + 1):
                    table[i] = blocks.pop()
            lanes.append(Lane(block_tables=tables, seq_lens=torch.tensor(lens, dtype=torch.int32)))
        return lanes

    def begin(self, num_lanes: int | None = None) -> None:
        self.service.begin_step(self.k_pool, self.v_pool, self.lanes[:num_lanes], HEAD_DIM**-0.5)

    def write_rows(self) -> None:
        for lane, requests in enumerate(self.lanes):
            num_rows = len(requests.seq_lens)
            self.rows[lane, :num_rows] = self.random(num_rows, ROW_SIZE).to(self.rows.dtype)

    def expect(self, k_pool: torch.Tensor, v_pool: torch.Tensor, layer: int) -> list[torch.Tensor]:
        """What `paged_decode_attention` makes of each lane's rows, on pools of its own."""
        outs = []
        heads = [NUM_Q_HEADS, NUM_KV_HEADS, NUM_KV_HEADS]
        for lane, requests in enumerate(self.lanes):
            rows = self.rows[lane, : len(requests.seq_lens)]
            q, k, v = rows.view(len(rows), -1, HEAD_DIM).split(heads, dim=1)
            outs.append(torch.empty(q.shape, dtype=q.dtype))
            self.attention.paged_decode_attention(
                outs[-1],
                q,
                k_pool[layer],
                v_pool[layer],
                requests.block_tables,
                requests.seq_lens,
                HEAD_DIM**-0.5,
                k=k,
                v=v,
            )
        return outs

    def serve_and_compare(self) -> StepReport:
        """One step, every answer and the pools compared bit for bit; all lanes ring, then wait."""
        k_pool, v_pool = self.k_pool.clone(), self.v_pool.clone()
        self.begin()
        for layer in range(self.num_layers):
            self.write_rows()
            expected = self.expect(k_pool, v_pool, layer)
            tickets = [self.service.first_ticket(lane) + layer for lane in range(len(self.lanes))]
            for lane, ticket in enumerate(tickets):
                self.service.ring(lane, ticket)
            for lane, ticket in enumerate(tickets):
                self.service.wait(lane, ticket)
                num_rows = len(expected[lane])
                assert torch.equal(self.out[lane, :num_rows], expected[lane].flatten(1))
                assert (self.out[lane, num_rows:] == 7).all()
        report = self.service.end_step()
        assert torch.equal(self.k_pool, k_pool)
        assert torch.equal(self.v_pool, v_pool)
        return report

    def grow(self) -> None:
        """Let every request have one token more."""
        for lane in self.lanes:
            lane.seq_lens.add_(1)
