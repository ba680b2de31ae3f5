"""A converted repository on disk and on the Hub. May import evaluation, conversion and below.

repository.py     save and push
card.py           README.md of a repository
push_files.py     which files of an earlier push go
sentence_files.py what makes an encoder a sentence-transformers model
diff/             weight differences
"""

from typing import TYPE_CHECKING

from linearize.lazy import on_first_use

if TYPE_CHECKING:
    from linearize.hub.repository import push

__getattr__ = on_first_use(
    __name__,
    {
        ".repository": ("push",),
    },
)

__all__ = [
    "push",
]
