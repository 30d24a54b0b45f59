"""Models on disk: load one by name, save an edited one whole, and take an edit out of one it was merged into."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from circuits.atomic import atomic_folder
from circuits.errors import LocateEditError
from locate_edit.errors import EditError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from locate_edit.editing import Edit

SHIPPED = ("organism", "oracle", "oracle2")
"""Names of the models that come with the package."""


class LoadError(LocateEditError):
    """A model or tokenizer that cannot be loaded by the name given."""


def load(
    name: str | Path, *, dtype: str = "auto", device: str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal or masked language model and its tokenizer, in evaluation mode.

    Args:
        name: a folder written by `save_pretrained`, a name on the Hugging Face hub, or `organism`, `oracle`,
            `oracle2` for the models that come with the package.
        dtype: `auto` (as stored), `float32`, `bfloat16` or `float16`.
        device: `auto` (a CUDA device when there is one), `cpu`, `cuda`, `cuda:1`, ...

    Raises:
        LoadError: nothing by that name, no tokenizer beside it, or neither a causal nor a masked model.
    """
    import torch

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        place = torch.device(device)
        kind = "auto" if dtype == "auto" else getattr(torch, dtype)
    except (RuntimeError, AttributeError) as error:
        raise LoadError(
            f"Cannot use device {device!r} with dtype {dtype!r}: {error}. Expected a device such as cpu or "
            "cuda, and auto, float32, bfloat16 or float16."
        ) from error
    if str(name) in SHIPPED:
        with _without_progress_bars():
            model, tokenizer = _shipped(str(name), kind)
    elif Path(name).is_dir():
        with _without_progress_bars():
            model, tokenizer = _stored(name, kind)
    else:
        model, tokenizer = _stored(name, kind)
    try:
        model.to(place)
    except (RuntimeError, AssertionError) as error:
        raise LoadError(f"Cannot move {name} to {device!r}: {error}") from error
    return model.eval(), tokenizer


def load_tokenizer(name: str | Path) -> tuple[PreTrainedTokenizerBase, bool | None]:
    """Load the tokenizer of a model without its weights, and say whether the model is a masked one.

    Args:
        name: as of `load`, or a folder that holds a tokenizer alone, of which nothing more is known (None).

    Raises:
        LoadError: nothing by that name, no tokenizer there, or one of neither a causal nor a masked model.
    """
    import transformers

    if str(name) in SHIPPED:
        with _without_progress_bars():
            return _shipped(str(name), "auto")[1], False
    what = f"folder {name}" if Path(name).is_dir() else f"model {str(name)!r}"
    tokenizer = _tokenizer(name, what)
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError):
        return tokenizer, None
    return tokenizer, is_masked(config)


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    """Hide the bars of loading and saving, which take a moment; a download keeps its own."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path) -> None:
    """Write a model and its tokenizer as an ordinary checkpoint, all or nothing.

    Raises:
        StorageError: the folder holds something else, or the disk refuses the write.
    """
    with atomic_folder(folder, like="config.json") as place, _without_progress_bars():
        model.save_pretrained(place)
        tokenizer.save_pretrained(place)


def take_out(edit: Edit, model: PreTrainedModel) -> None:
    """Turn a model that an edit was merged into back into the base model, bit for bit.

    Raises:
        EditError: the model does not hold this edit, or holds other changes as well, or the edit holds additions, which
            no checkpoint does. It is as it was.
    """
    from locate_edit.fingerprint import difference, fingerprint

    edit.without_additions("a checkpoint that an edit was merged into")
    if (at := edit.delta.mismatch(model, "new")) is not None:
        if edit.delta.mismatch(model, "old") is None:
            raise EditError(
                "there is nothing to undo: the model does not hold this edit, its edited entries have the base "
                "model's values"
            )
        raise EditError(
            f"cannot undo: the model does not hold this edit, {at} has other values than it wrote. Expected the "
            "checkpoint the edit was merged into, unchanged since"
        )
    edit.delta.write(model, "old")
    if (reason := difference(edit.made_on, fingerprint(model))) is not None:
        edit.delta.write(model, "new")
        raise EditError(
            f"cannot undo: without this edit the model would still not be its base model: {reason}. If another edit "
            "was merged later, take that one out first"
        )


def _shipped(name: str, dtype: Any) -> tuple[Any, Any]:
    from locate_edit import organism

    model, tokenizer = organism.load(name)
    return (model if dtype == "auto" else model.to(dtype)), tokenizer


def _stored(name: str | Path, dtype: Any) -> tuple[Any, Any]:
    import transformers

    what = f"folder {name}" if Path(name).is_dir() else f"model {str(name)!r}"
    advice = (
        f"Expected a folder written by save_pretrained, a name on the Hugging Face hub, or one of "
        f"{', '.join(SHIPPED)}."
    )
    try:
        config = transformers.AutoConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise LoadError(f"Cannot load the {what}: {_first_line(error)} {advice}") from error
    loader = (
        transformers.AutoModelForMaskedLM
        if is_masked(config)
        else transformers.AutoModelForCausalLM
    )
    try:
        model = loader.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise LoadError(
            f"Cannot load the {what} as a {'masked' if is_masked(config) else 'causal'} language model: "
            f"{_first_line(error)}"
        ) from error
    return model, _tokenizer(name, what)


def _tokenizer(name: str | Path, what: str) -> Any:
    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise LoadError(
            f"The {what} has no usable tokenizer: {_first_line(error)} Save one beside the weights with "
            "tokenizer.save_pretrained."
        ) from error
    # Without its files, transformers may make a tokenizer of the right class with nothing in it.
    if not tokenizer("a")["input_ids"]:
        raise LoadError(
            f"The {what} has no usable tokenizer: it knows no tokens. Save one beside the weights with "
            "tokenizer.save_pretrained."
        )
    return tokenizer


def is_masked(config: PretrainedConfig) -> bool:
    """Say whether a configuration is of a masked language model (otherwise it is a causal one).

    The class that was saved decides; a bare encoder or decoder goes by what its family of models is trained for.

    Raises:
        LoadError: the configuration is of an encoder-decoder, or of no language model at all.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise LoadError(
            f"{config.model_type} is an encoder-decoder model; expected a causal or a masked language model."
        )
    for saved in config.architectures or ():
        if saved.endswith("MaskedLM"):
            return True
        if saved.endswith(("CausalLM", "LMHeadModel")):
            return False
    from transformers.models.auto import modeling_auto

    masked = config.model_type in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    causal = config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if not masked and not causal:
        raise LoadError(
            f"{config.model_type} (saved as {', '.join(config.architectures or ()) or 'no class'}) is no language "
            "model that transformers can load; expected a causal or a masked one."
        )
    # Encoders such as BERT are in both lists, because they can be run as decoders when asked to.
    return masked and not getattr(config, "is_decoder", False)


def _first_line(error: Exception) -> str:
    """Shorten the libraries' page-long messages to what went wrong."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return text if text.endswith((".", "!", "?")) else text + "."
