"""OpenAI's summarization comparisons, through the `datasets` library.

`prompt` is the input; the length of the summary that people preferred, `chosen`, is the output's.
"""

from pathlib import Path
from typing import Any

from engine.errors import RequestError
from workloads.datasets.sample import Sample

SPLIT = "test"
_READERS = {".parquet": "parquet", ".jsonl": "json", ".json": "json"}
COLUMNS = ("prompt", "chosen")


def read_summarize(source: str) -> list[Sample]:
    """Read the comparisons.

    Args:
        source: A hub data set's id, a folder, or a `.parquet`, `.jsonl` or `.json` file.

    Raises:
        RequestError: The library is missing, or the source cannot be read or lacks a column.
    """
    try:
        # Here and not above: it takes a second, and only this data set needs it.
        import datasets  # noqa: PLC0415
    except ImportError as error:
        raise RequestError(
            "reading the summarize data set needs the Python package datasets: pip install "
            "datasets; without --dataset-path lengths are drawn from its distribution"
        ) from error
    path = Path(source).expanduser()
    reader = _READERS.get(path.suffix)
    try:
        if path.is_file() and reader:
            found: Any = datasets.load_dataset(reader, data_files=str(path), split="train")
        else:
            name = str(path) if path.exists() else source
            splits = datasets.load_dataset(name)
            found = splits[SPLIT if SPLIT in splits else next(iter(splits))]
    except Exception as error:  # the library's errors have no common base
        first_line = str(error).strip().partition("\n")[0]
        raise RequestError(
            f"the summarize data set {source!r} cannot be read ({first_line}); give a hub id, a "
            "folder, or a .parquet or .jsonl file"
        ) from error
    return _samples(found, source)


def _samples(found: Any, source: str) -> list[Sample]:
    missing = [name for name in COLUMNS if name not in found.column_names]
    if missing or len(found) == 0:
        raise RequestError(
            f"the summarize data set {source!r} must have rows with the columns "
            f"{' and '.join(COLUMNS)}; it has {len(found)} rows with "
            f"{', '.join(found.column_names) or 'no columns'}"
        )
    pairs = zip(found["prompt"], found["chosen"], strict=True)
    return [
        Sample(None, None, prompt_text=prompt, output_text=chosen)
        for prompt, chosen in pairs
        if prompt and chosen
    ]
