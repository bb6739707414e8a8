"""The tokenizer files of a model folder."""

from pathlib import Path
from typing import TYPE_CHECKING

from engine.errors import CheckpointError

if TYPE_CHECKING:  # see `engine.checkpoint.checkpoint`
    from transformers import PreTrainedTokenizerBase

TOKENIZER_FILE = "tokenizer.json"
NO_LENGTH_LIMIT = 10**30  # what transformers takes for none
# Older formats that transformers converts, if the packages it wants for that are installed.
CONVERTIBLE_FILES = ("tokenizer.model", "vocab.json", "spiece.model", "tekken.json")


def load_folder_tokenizer(folder: Path) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a folder, without executing code of the model and without network.

    tokenizer.json is taken as it is: the classes that transformers has for single models may
    rebuild parts of it. The length limit in tokenizer_config.json is lifted: it would only make
    transformers print warnings, whoever encodes checks the length against the model's own.

    Raises:
        CheckpointError: No tokenizer file is there, or it cannot be read.
    """
    import transformers  # noqa: PLC0415 (heavy)

    is_convertible = any((folder / name).is_file() for name in CONVERTIBLE_FILES)
    try:
        if (folder / TOKENIZER_FILE).is_file():
            fast: PreTrainedTokenizerBase = transformers.PreTrainedTokenizerFast.from_pretrained(
                folder, local_files_only=True, model_max_length=NO_LENGTH_LIMIT
            )
            return fast
        if is_convertible:
            # Only here: to look AutoTokenizer up imports torch and much of transformers.
            converted: PreTrainedTokenizerBase = transformers.AutoTokenizer.from_pretrained(
                folder, local_files_only=True, model_max_length=NO_LENGTH_LIMIT
            )
            return converted
    except Exception as error:  # tokenizers raises bare Exception, transformers nearly anything
        first_line = str(error).strip().partition("\n")[0]
        raise CheckpointError(
            f"cannot load the tokenizer in {folder}: {first_line}; download it again"
        ) from error
    raise CheckpointError(
        f"{folder} holds no tokenizer: expected {TOKENIZER_FILE} (with tokenizer_config.json), "
        f"or one of {', '.join(CONVERTIBLE_FILES)}"
    )
