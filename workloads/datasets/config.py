"""Which data set, how many requests of it, and how long."""

from dataclasses import dataclass
from pathlib import Path

from engine.errors import ConfigError

DATASETS = (
    "synthetic",
    "summarize",
    "azure-code",
    "azure-conv",
    "sharegpt",
    "custom",
    "lengths",
)
ALIASES = {"random": "synthetic"}
FROM_FILES = ("azure-code", "azure-conv", "sharegpt", "custom", "lengths")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """Options of a workload; the names are `vllm bench serve`'s where it has one.

    Args:
        dataset_name: One of `DATASETS`; `random` is another name of `synthetic`.
        dataset_path: A local file, or for `summarize` also a folder or the id of a hub data set.
        num_prompts: Requests.
        seed: The same seed gives the same requests.
        input_len: Mean prompt length of `synthetic`, in tokens.
        output_len: Tokens to generate; None is the data set's own (100 on average for
            `synthetic`, 256 for `custom` files that do not say).
        range_ratio: Lengths of `synthetic` are uniform in [(1 - r) * mean, (1 + r) * mean].
        no_oversample: Take a data set that is too short as it is; otherwise it is repeated.
        disable_shuffle: Take a file's requests in their order.
        skip_chat_template: Send the prompts of `custom` without the model's chat template.

    Raises:
        ConfigError: A value is out of range, or the data set needs a file and none is named.
    """

    dataset_name: str = "synthetic"
    dataset_path: str | None = None
    num_prompts: int = 200
    seed: int = 0
    input_len: int = 1000
    output_len: int | None = None
    range_ratio: float = 0.1
    no_oversample: bool = False
    disable_shuffle: bool = False
    skip_chat_template: bool = False

    def __post_init__(self) -> None:
        if self.name not in DATASETS:
            raise ConfigError(
                f"dataset_name must be one of {', '.join(DATASETS)}, got {self.dataset_name}"
            )
        for name in ("num_prompts", "input_len", "output_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.range_ratio < 1:
            raise ConfigError(f"range_ratio must be at least 0 and below 1, got {self.range_ratio}")
        if self.name in FROM_FILES and self.dataset_path is None:
            raise ConfigError(f"the data set {self.name} is read from a file: give --dataset-path")

    @property
    def name(self) -> str:
        """The data set's own name."""
        return ALIASES.get(self.dataset_name, self.dataset_name)

    @property
    def path(self) -> Path:
        """The file, where one is needed."""
        assert self.dataset_path is not None
        return Path(self.dataset_path).expanduser()
