"""The modules of a converted model that peft's adapters take where none are named: those of the stock model."""

import sys

PREFIX = "linearized_"


def tell_peft(model_type: str) -> None:
    """Enter a converted `model_type` in peft's tables of default targets, where peft is imported.

    A projection has the name it had before, and no part of a mechanism has such a name.
    """
    tables = sys.modules.get("peft.utils.constants")
    stock = model_type.removeprefix(PREFIX)
    for name, targets in vars(tables).items() if tables is not None else ():
        if name.startswith("TRANSFORMERS_MODELS_TO_") and isinstance(targets, dict) and stock in targets:
            targets.setdefault(model_type, targets[stock])
