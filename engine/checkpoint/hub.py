"""Fetching a model folder from the Hugging Face hub, or from its local cache."""

from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from engine.errors import CheckpointError

CONFIG_AND_TOKENIZER = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.*",
    "vocab.json",
    "merges.txt",
]
WEIGHTS = ["*.safetensors", "*.safetensors.index.json"]
UNUSED_WEIGHTS = ["consolidated*", "*/*"]


def download_model(repo_id: str, revision: str | None, *, with_weights: bool) -> Path:
    """Return the local folder of a hub model, downloading what is missing.

    Args:
        repo_id: `organisation/name`.
        revision: Branch, tag or commit; None for the main branch.
        with_weights: False if only configuration and tokenizer are wanted.

    Raises:
        CheckpointError: There is no such model, it may not be read, or the hub is out of reach.
    """
    try:
        folder = snapshot_download(
            repo_id,
            revision=revision,
            allow_patterns=CONFIG_AND_TOKENIZER + (WEIGHTS if with_weights else []),
            ignore_patterns=UNUSED_WEIGHTS,
        )
    except GatedRepoError as error:
        raise CheckpointError(
            f"the hub model {repo_id!r} asks for permission: accept its terms on its page, then "
            "set HF_TOKEN or run `hf auth login`"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise CheckpointError(
            f"{repo_id!r}{at} is neither a local folder nor a model on the Hugging Face hub "
            "(if it is private, set HF_TOKEN)"
        ) from error
    except Exception as error:  # network errors have no common base over the hub's versions
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"{repo_id!r} is not a local folder, and downloading it from the Hugging Face hub "
            f"failed ({first_line}): check name and network, or give the path of a model folder"
        ) from error
    return Path(folder)
