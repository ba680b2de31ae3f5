"""What went wrong while reading a checkpoint, in one sentence."""

import contextlib
import re
from collections.abc import Iterator

from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError

from linearize.errors import UserError

LOGIN = "log in with `hf auth login` or set HF_TOKEN to a token that may read it"


@contextlib.contextmanager
def explained(source: str, what: str = "model") -> Iterator[None]:
    """Turn the errors of loading `source` into a UserError; programming errors keep their trace."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        sentence = explain(source, what, error)
        if sentence is None:
            raise
        raise UserError(sentence) from error


def explain(source: str, what: str, error: BaseException) -> str | None:
    """The sentence for an error, or None when it is nobody's input that is wrong."""
    chain = list(_chain(error))
    text = " ".join(" ".join(str(e) for e in chain).split())

    def caused_by(*classes: type) -> bool:
        return any(isinstance(e, classes) for e in chain)

    if source.endswith(".gguf") and not caused_by(MemoryError):
        reason = _short(chain[-1])
        return f"the GGUF file {source} cannot be read ({reason}): download it again, or use another quantisation"
    gated = caused_by(hub_errors.GatedRepoError)
    missing = caused_by(hub_errors.RepositoryNotFoundError) and not gated  # the one class is below the other
    if gated or ("gated repo" in text and not missing):  # the Hub's answer about a missing one speaks of both
        return f"{source} is a gated repository: ask for access on its page, then {LOGIN}"
    unauthorised = bool(re.search(r"\b401\b", text)) and not missing
    if unauthorised or "Invalid credentials" in text or "token is invalid" in text.lower():
        return f"the Hub refused the token for {source}: {LOGIN}"
    if caused_by(hub_errors.RevisionNotFoundError) or "is not a valid git identifier" in text:
        return f"{source} has no such revision: check --revision"
    if missing or "is not a valid model identifier" in text:
        return f"there is no directory and no Hub repository {source}: check the name; if it is private, {LOGIN}"
    if caused_by(hub_errors.HFValidationError) or "Repo id must" in text:
        return f"{source} is neither a directory here nor a Hub id of the form name or owner/name: check the path"
    if caused_by(hub_errors.LocalEntryNotFoundError, hub_errors.OfflineModeIsEnabled, ConnectionError) or any(
        sign in text for sign in ("We couldn't connect", "offline mode", "Connection refused", "ConnectError")
    ):
        return (
            f"the Hub cannot be reached and {source} is not in the cache: check the network, or give a local directory"
        )
    if "no file named" in text or "does not appear to have a file named" in text:
        return f"{source} has no {what} weights (model.safetensors): give a complete checkpoint directory"
    if "backend tokenizer" in text and what == "tokenizer":
        return f"{source} has no tokenizer that can be read: give a complete checkpoint directory (tokenizer.json)"
    if "ignore_mismatched_sizes" in text:
        return (
            f"the weights of {source} have other shapes than its config.json says: give the config that goes with them"
        )
    if caused_by(hub_errors.StrictDataclassFieldValidationError):
        reason = next(str(e) for e in chain if isinstance(e, hub_errors.StrictDataclassFieldValidationError))
        return f"the config.json of {source} holds a value that it cannot have: {_short(ValueError(reason))}"
    if caused_by(SafetensorError):
        return f"a weight file of {source} is damaged ({_short(chain[-1])}): download it again"
    if caused_by(OSError):
        return f"the {what} of {source} cannot be read: {_short(chain[0])}"
    if what == "tokenizer" and not caused_by(MemoryError):  # a damaged tokenizer.json fails in many ways
        return f"the tokenizer of {source} cannot be read ({_short(chain[0])}): give a complete checkpoint directory"
    return None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
