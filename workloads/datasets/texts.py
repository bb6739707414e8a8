"""Data sets of texts, in the formats that `vllm bench serve` reads."""

import json
from pathlib import Path

from workloads.datasets.sample import Sample, broken, positive_int, read_json, read_text


def read_sharegpt(path: Path) -> list[Sample]:
    """Read ShareGPT conversations: the first turn is the prompt, the second the output.

    Raises:
        RequestError: The file is something else, or no conversation has two turns.
    """
    content = read_json(path)
    if not isinstance(content, list):
        raise broken(path, "expected a JSON list of conversations")
    samples = []
    for number, entry in enumerate(content):
        turns = entry.get("conversations") if isinstance(entry, dict) else None
        if not isinstance(turns, list):
            raise broken(path, f'entry {number}: expected {{"conversations": [...]}}')
        if len(turns) < 2:
            continue
        texts = [turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2]]
        if not all(isinstance(text, str) for text in texts):
            raise broken(path, f'entry {number}: a turn lacks its "value"')
        if all(texts):
            samples.append(Sample(None, None, prompt_text=texts[0], output_text=texts[1]))
    if not samples:
        raise broken(path, "holds no conversation of two turns")
    return samples


def read_custom(path: Path) -> list[Sample]:
    """Read `.jsonl` lines of `{"prompt": "...", "output_tokens": 100}`; the second is optional.

    Raises:
        RequestError: A line is something else, or there is none.
    """
    samples = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise broken(path, f"line {number} is not JSON: {error.msg}") from error
        prompt = entry.get("prompt") if isinstance(entry, dict) else None
        if not isinstance(prompt, str) or not prompt:
            raise broken(path, f'line {number}: expected {{"prompt": "..."}}')
        wanted = entry.get("output_tokens")
        output = None if wanted is None else positive_int(wanted, path, f"line {number}")
        samples.append(Sample(None, output, prompt_text=prompt))
    if not samples:
        raise broken(path, "holds no prompts")
    return samples
