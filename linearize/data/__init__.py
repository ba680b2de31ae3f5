"""From text to training rows. May import config.

sources.py        1. read records, from files and the Hub
documents.py      2. records to token ids (chat.py: chats and the tokens that are answers)
packing.py        3. ids to sequences on disk (texts.py: texts kept apart in a row)
sequences.py      4. training and validation sequences of a decoder: `prepare_data`
rows.py           4. rows of whole sentences, of an encoder
estimate.py       how many tokens a text has, before it is prepared
masking.py        which tokens an encoder does not see; vocabulary.py, whether ids fit a model
"""

from typing import TYPE_CHECKING

from linearize.lazy import on_first_use

if TYPE_CHECKING:
    from linearize.data.sequences import load_text_blocks, prepare_data

__getattr__ = on_first_use(
    __name__,
    {
        ".sequences": ("load_text_blocks", "prepare_data"),
    },
)

__all__ = [
    "load_text_blocks",
    "prepare_data",
]
